"""Running Python that a model wrote, shut off from the machine.

A process in namespaces of its own: of the file system it sees Python's own files, read only,
and an empty folder in memory; it has no network, sees no other process, and has no
environment. Memory, time, file size and output are bounded. The namespaces are bubblewrap's
(``bwrap``) where it is installed and works; in containers it often may not, and then they are
those that Linux lets any user open with ``unshare``. Where neither works, nothing is run.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

OUTPUT_BYTES = 1 << 20
"""Output and files of a program at most."""

_CELL = 16 << 20
"""Bytes of the folder in memory."""

_PROGRAM = """
import os, sys
os.chdir("/cell")
source = open("program.py", encoding="utf-8").read()
sys.argv = ["program.py"]
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
"""

_ENTER = """
set -e
root=$1; shift; size=$1; shift
mount --make-rprivate /
mount -t tmpfs -o "size=$size,mode=755" none "$root"
mkdir "$root/cell" "$root/dev"
mount -t tmpfs -o "size=$size,mode=755" none "$root/cell"
cat > "$root/cell/program.py"
while [ "$1" != -- ]; do
    if [ -L "$1" ]; then ln -s "$(readlink "$1")" "$root$1"; shift; continue; fi
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
    shift
done
shift
touch "$root/dev/null"; mount --bind /dev/null "$root/dev/null"
mount -o remount,ro "$root"
exec chroot "$root" "$@" < /dev/null
"""
"""Run by a shell that is root in namespaces of its own; the program comes through standard input."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool  # whether it came to its end with exit code 0
    timed_out: bool  # whether it was stopped for time
    error: str  # the end of what it wrote to stderr


class NoIsolation(RuntimeError):  # noqa: N818 - named for what is the case
    """The system does not let a user shut a program off."""


def run_python(program: str, *, seconds: float = 10.0, memory: int = 1 << 30) -> Outcome:
    """Run a program to its end.

    Parameters
    ----------
    program : str
        Source text.
    seconds : float
        Wall time after which it is stopped, with all it started.
    memory : int
        Address space of a process in bytes.

    Raises
    ------
    NoIsolation
        See there.
    """
    return _run(check(), program, seconds, memory)


def check() -> "Way":
    """The way by which programs are shut off here; `NoIsolation` where there is none."""
    way = isolates()
    if way is None:
        raise NoIsolation(
            "running generated code needs Linux with user namespaces, and bubblewrap or unshare(1): this system has or "
            "allows none; use a machine or container that does"
        )
    return way


@functools.cache
def isolates() -> "Way | None":
    """How programs can be shut off here, if at all."""
    if resource is None:
        return None
    ways: dict[Way, tuple[str, ...]] = {_bubblewrap: ("bwrap",), _unshare: ("unshare", "mount", "chroot", "sh")}
    there = (way for way, needed in ways.items() if all(map(shutil.which, needed)))
    return next((way for way in there if _run(way, "pass", 20.0, 1 << 30).passed), None)


Way = Callable[[str, Sequence[str], Sequence[str]], list[str]]
"""From an empty folder, places to be seen and a command to one that runs it shut off, its program on stdin."""


def _bubblewrap(root: str, places: Sequence[str], command: Sequence[str]) -> list[str]:
    del root  # bubblewrap makes its own
    shown: list[str] = []
    for place in map(Path, places):
        shown += ["--symlink", str(place.readlink())] if place.is_symlink() else ["--ro-bind", str(place)]
        shown.append(str(place))
    options = "--unshare-all --die-with-parent --new-session --dev-bind /dev/null /dev/null"
    cell = f"--size {_CELL} --tmpfs /cell --file 0 /cell/program.py --remount-ro / --chdir /cell"
    return ["bwrap", *options.split(), *shown, *cell.split(), "--", *command]


def _unshare(root: str, places: Sequence[str], command: Sequence[str]) -> list[str]:
    namespaces = ("--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts")
    return ["unshare", *namespaces, "sh", "-c", _ENTER, "sandbox", root, str(_CELL), *places, "--", *command]


def _run(way: Way, program: str, seconds: float, memory: int) -> Outcome:
    # The last line proves that the program was not left early by exit(0).
    token = os.urandom(8).hex()
    source = f"{program}\nprint({token!r})\n"
    command = [_interpreter(), "-I", "-S", "-B", "-c", _PROGRAM]
    with tempfile.TemporaryDirectory(prefix="refreekv-sandbox-") as folder:
        output, error = (open(Path(folder) / name, "w+b") for name in ("output", "error"))  # noqa: SIM115, PTH123
        with output, error:
            root = Path(folder) / "root"
            root.mkdir()
            process = subprocess.Popen(
                way(str(root), _places(), command),
                cwd=folder,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=error,
                start_new_session=True,
                preexec_fn=functools.partial(_limit, int(seconds) + 1, memory),
            )
            timed_out = False
            try:
                process.communicate(source.encode("utf-8", "backslashreplace"), timeout=seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            except BrokenPipeError:  # it was gone before it was read
                process.wait()
            finally:
                _kill_group(process)
                process.wait()
            said, complained = _end_of(output), _end_of(error)
    passed = not timed_out and process.returncode == 0 and said.rstrip().endswith(token)
    # A process that used up its CPU time shows as 128 + SIGXCPU through what started it.
    timed_out |= process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    return Outcome(passed, timed_out, complained)


def _interpreter() -> str:
    """Python itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _places() -> list[str]:
    """What Python needs of the file system, outer folders first."""
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    wanted = {"/usr", "/lib", "/lib64", "/bin", str(Path(_interpreter()).parent)}
    wanted |= {paths["stdlib"], paths["platstdlib"], str(Path(sys.base_prefix) / "lib")}
    found: list[str] = []
    for place in sorted(wanted):
        inside = any(place.startswith(f"{other}/") for other in found)
        if Path(place).is_dir() and not inside:
            found.append(place)
    return found


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2000))
    return file.read().decode("utf-8", "replace")


def _limit(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: OUTPUT_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
