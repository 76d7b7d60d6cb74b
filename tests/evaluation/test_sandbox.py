"""The sandbox for code that a model wrote: what goes through, and that nothing else does."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from refreekv.evaluation.tasks import sandbox
from refreekv.evaluation.tasks.sandbox import NoIsolation, run_python

needs_isolation = pytest.mark.skipif(sandbox.isolates() is None, reason="this system lets users open no namespaces")


@pytest.fixture(params=[sandbox._bubblewrap, sandbox._unshare], ids=["bubblewrap", "unshare"], autouse=True)
def way(request, monkeypatch):
    """Each way in turn, where it is there and works."""
    if request.param is not sandbox.isolates():
        tool = "bwrap" if request.param is sandbox._bubblewrap else "unshare"
        if shutil.which(tool) is None or not sandbox._run(request.param, "pass", 20.0, 1 << 30).passed:
            pytest.skip(f"{tool} is not there or may open no namespaces")
    monkeypatch.setattr(sandbox, "isolates", lambda: request.param)


def succeeds(program, **options):
    outcome = run_python(program, **options)
    assert outcome.passed, outcome.error


@needs_isolation
def test_a_program_runs_with_the_standard_library():
    succeeds("import math, json, re, collections, itertools, random, hashlib\nassert math.sqrt(4) == 2")
    failed = run_python("assert 1 == 2, 'not so'")
    assert not failed.passed
    assert "not so" in failed.error


@needs_isolation
@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "print('done'); raise SystemExit", "return", "x = ("],
)
def test_leaving_early_is_no_success(program):
    assert not run_python(program).passed


@needs_isolation
def test_time_is_bounded():
    start = time.monotonic()
    outcome = run_python("while True: pass", seconds=1)
    assert (outcome.passed, outcome.timed_out) == (False, True)
    assert run_python("import time; time.sleep(60)", seconds=1).timed_out
    assert time.monotonic() - start < 30


@needs_isolation
def test_memory_and_output_are_bounded():
    assert "MemoryError" in run_python("x = bytearray(1 << 34)").error
    assert not run_python("x = bytearray(1 << 29)", memory=1 << 28).passed
    succeeds("x = bytearray(1 << 27)")
    assert not run_python("while True: print('x' * 1000)", seconds=5).passed
    assert not run_python("open('f', 'wb').write(bytes(1 << 22))").passed


@needs_isolation
def test_nothing_is_written_outside(tmp_path):
    target = tmp_path / "note"
    target.write_text("mine")
    for path in (target, tmp_path / "new", Path.home() / "refreekv-sandbox-test", Path("/usr/refreekv-sandbox-test")):
        assert not run_python(f"open({str(path)!r}, 'w').write('theirs')").passed
    # Not even seen.
    assert not run_python(f"open({str(target)!r}).read()").passed
    assert not run_python(f"import os; os.remove({os.__file__!r})").passed
    assert Path(os.__file__).exists()
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]
    # In its own folder it may, and that is gone afterwards.
    succeeds("open('f', 'w').write('x')\nimport os\nassert sorted(os.listdir('.')) == ['f', 'program.py']")
    succeeds("import os; assert os.listdir('.') == ['program.py']")


@needs_isolation
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert not run_python(connect).passed
    succeeds("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")


@needs_isolation
def test_no_process_is_seen_nor_outlives_the_program(monkeypatch):
    monkeypatch.setenv("SECRET", "value")
    succeeds("import os; assert 'SECRET' not in os.environ")
    assert not run_python(f"import os; os.kill({os.getpid()}, 0)").passed
    start = time.monotonic()
    # A daemon in a session of its own ends with the namespace.
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n    os._exit(0)"
    succeeds(daemon, seconds=30)
    assert time.monotonic() - start < 25
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"program.py" in _read(path)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_without_isolation_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "isolates", lambda: None)
    with pytest.raises(NoIsolation, match="user namespaces"):
        run_python("pass")
