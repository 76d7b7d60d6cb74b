"""The terminal side of a chat: lines in, a streamed answer and a live line out."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

import refreekv
from refreekv.cli import prompts, views
from refreekv.cli.app import UserError, one_line
from refreekv.cli.conversation import Conversation, MessageError, Turn
from refreekv.report import CompressionReport, format_bytes
from refreekv.serving.answering import Listener

PROMPT = "> "
NEXT = "\n"  # space before the next message
REFRESH = 0.08  # seconds between two drawings of the live line

HELP = """\
/report                what each layer keeps now
/policy [NAME[:…]]     show the policy, or prune by another one from the next message on
/file FILE             put a text file in front of your next message
/save FILE             write the conversation to a file (.json, or Markdown)
/reset                 start a new conversation
/help                  this list
/quit                  leave (also Ctrl-D)

Ctrl-C stops an answer. A message may run over several lines: begin and end it with \"\"\".
A line that begins with a space is a message, whatever follows."""


@dataclass(frozen=True)
class Status:
    """What the live line says."""

    prompt_tokens: int
    report: CompressionReport | None = None
    tokens_per_second: float | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens:,} prompt tokens"]
        if self.report is not None and self.report.prunable:
            after, before = self.report.bytes_after, self.report.bytes_before
            parts.append(f"K/V {format_bytes(after)} of {format_bytes(before)}")
            parts.append(f"budget {self.report.budget:.1%}")
            if (verified := self.report.verified) is not None:
                parts.append("not verified" if verified.reason else f"step {verified.step + 1} of {verified.steps}")
            if (whole := self.report.remembered) is not None and (whole.tokens or whole.lost):
                kept = f"{format_bytes(whole.host_bytes + whole.disk_bytes)} on the host"
                parts.append("evicted is gone" if whole.lost else kept)
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return " · ".join([*parts, *filter(None, [self.note])])


class Chat:
    """Reads messages and commands, and shows the answers.

    Parameters
    ----------
    conversation : Conversation
        What is talked to.
    console : Console
        Where answers go.
    errors : Console
        Where everything goes that is not an answer, unless ``console`` is a terminal.
    """

    def __init__(self, conversation: Conversation, console: Console, errors: Console):
        self.conversation = conversation
        self.console = console
        self.live = console.is_terminal
        self.side = console if self.live else errors
        self._file = ""  # text to put in front of the next message
        if self.live:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` a history and keys to edit with
        self._commands: dict[str, Callable[[str], None]] = {
            "report": self._report,
            "policy": self._policy,
            "file": self._attach,
            "save": self._save,
            "reset": self._reset,
            "help": lambda _: self._say(HELP),
        }

    def greet(self) -> None:
        """Say what is talked to, and how."""
        from refreekv.cli.weights import weight_bytes

        loaded = self.conversation.loaded
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        context = f", context {loaded.context:,}" if loaded.context else ""
        size = format_bytes(weight_bytes(loaded.model))
        self._say(f"{loaded.name}, {dtype} on {loaded.device}, weights {size}{context}")
        stored = f", stored in {self.conversation.formats}" if self.conversation.formats else ""
        self._say(f"{self.conversation.policy.spec}{stored}", style="dim")
        if not self.conversation.has_template:
            self._say(
                f"{loaded.name} has no chat template: what you type is plain text that it continues.", style="yellow"
            )
        if self.live:
            self._say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.\n", style="dim")

    def run(self) -> None:
        """Talk until the input ends or `/quit`."""
        for line in self._lines():
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._answer(line)
            except UserError as error:
                self._say(one_line(error), style="yellow")

    # -- input ------------------------------------------------------------------------------

    def _lines(self) -> Iterator[str]:
        """Messages and commands, those over several lines joined."""
        while True:
            line = self._line(PROMPT)
            if line is None:
                return
            if line.startswith('"""'):
                parts = [line[3:]]
                while not parts[-1].rstrip().endswith('"""'):
                    more = self._line("… ")
                    if more is None:
                        return
                    parts.append(more)
                # In front a space, so that it is a message whatever it begins with.
                line = " " + "\n".join(parts).rstrip().removesuffix('"""').strip()
            yield line

    def _line(self, prompt: str) -> str | None:
        """One line; None at the end of the input."""
        while True:
            try:
                if sys.stdin.isatty() and self.live:
                    return prompts.whole(input(prompt), "the input")
                line = prompts.whole(sys.stdin.readline(), "the input")
                return line.rstrip("\n") if line else None
            except EOFError:
                self._say("")
                return None
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /quit leaves)", style="dim")
            except UnicodeDecodeError as error:
                raise UserError(f"the input is not UTF-8 text: {one_line(error)}") from error

    # -- an answer --------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        text = f"{self._file}\n\n{message.strip()}" if self._file else message.strip()
        with stop_on_interrupt() as stopped:
            shown: _Writing = _Drawing(self) if self.live else _Writing(self)
            with shown:
                listener = Listener(shown.on_read, shown.on_text, stopped)
                turn = self.conversation.say(text, listener)
        self._file = ""
        self._say(f"{status_of(turn)}{NEXT if self.live else ''}", style="dim")
        loaded = self.conversation.loaded
        if turn.ended == "context":
            full = f"The context of {loaded.name} is full ({loaded.context:,} tokens)"
            self._say(f"{full}; /reset starts a new conversation.", style="yellow")

    # -- commands ---------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise MessageError(
                f"there is no command /{name}; /help lists them (a message that begins with / needs a space before it)"
            )
        self._commands[name](rest.strip())

    def _report(self, _: str) -> None:
        report = self.conversation.report
        if report is None:
            self._say("There is nothing in the cache yet.")
            return
        self._say(str(Status(self.conversation.turns[-1].prompt_tokens, report)))
        self.side.print(views.layers(report, self.side.width))

    def _policy(self, spec: str) -> None:
        if spec:
            try:
                self.conversation.use(refreekv.policies.parse(spec))
            except (ValueError, TypeError) as error:
                raise MessageError(one_line(error)) from error
        again = f"; {len(self.conversation.tokens):,} tokens are read again with your next message"
        self._say(f"Policy: {self.conversation.policy.spec}{again if spec and self.conversation.tokens else ''}")

    def _attach(self, name: str) -> None:
        if not name:
            raise MessageError("/file needs the name of a text file")
        self._file = prompts.read_file(name)
        self._say(f"{name} ({len(self._file):,} characters) goes in front of your next message.")

    def _save(self, name: str) -> None:
        if not name:
            raise MessageError("/save needs the name of a file")
        path = Path(name).expanduser()
        if path.suffix.lower() == ".json":
            text = json.dumps(transcript(self.conversation), indent=2, ensure_ascii=False) + "\n"
        else:
            text = markdown(self.conversation)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise MessageError(f"cannot write {name}: {error.strerror or one_line(error)}") from error
        self._say(f"Saved: {path}")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._file = ""
        self._say("A new conversation.")

    def _say(self, text: str, style: str = "") -> None:
        self.side.print(Text(text, style=style), soft_wrap=not self.live)


class _Writing(contextlib.AbstractContextManager["_Writing"]):
    """Shows one answer while it comes: in files and pipes the text as it is, then a line break."""

    def __init__(self, chat: Chat):
        self.chat = chat

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.chat.console.file.write("\n")

    def on_read(self, read: int, total: int) -> None:
        """Take note of how much of the message was read."""

    def on_text(self, text: str, tokens: int, seconds: float) -> None:
        """Show new text."""
        self.chat.console.file.write(text)
        self.chat.console.file.flush()


class _Drawing(_Writing):
    """For terminals: whole lines scroll, the last one and the live line below it are drawn again and again."""

    def __init__(self, chat: Chat):
        super().__init__(chat)
        self._open = ""  # text of the line that is still growing
        self._status = Status(len(chat.conversation.tokens))
        self._drawn = 0.0
        self._live = Live(console=chat.console, auto_refresh=False, transient=True, redirect_stderr=False)

    def __enter__(self) -> "_Drawing":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        if self._open:
            self.chat.console.print(Text(self._open))

    def on_read(self, read: int, total: int) -> None:
        before = len(self.chat.conversation.tokens)
        self._status = Status(before + total, note=f"reading {read:,} of {total:,} …" if read < total else "reading …")
        self._draw()

    def on_text(self, text: str, tokens: int, seconds: float) -> None:
        self._open += printable(text)
        whole, line_break, rest = self._open.rpartition("\n")
        if line_break:
            self._scroll(whole, rest)
        elif len(self._open) > self.chat.console.width * max(1, self.chat.console.height // 2):
            # A paragraph that would fill the screen: the lines it makes are whole, too.
            *done, last = Text(self._open).wrap(self.chat.console, self.chat.console.width)
            self._scroll("\n".join(line.plain for line in done), last.plain)
        if time.perf_counter() - self._drawn < REFRESH:
            return  # a report at every token would make a GPU wait for it
        report = self.chat.conversation.live_report
        rate = (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None
        self._status = Status(self._status.prompt_tokens, report, rate, "Ctrl-C stops")
        self._draw()

    def _scroll(self, text: str, rest: str) -> None:
        """Print whole lines above; first what is left, as printing draws the live part below them again."""
        self._open = rest
        self._live.update(self._shown())
        self._live.console.print(Text(text))

    def _shown(self) -> RenderableType:
        said, width = str(self._status), self.chat.console.width
        if len(said) > width:  # numbers before advice
            said = str(replace(self._status, note=""))
        status = Text(said, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(Text(self._open), status) if self._open else status

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        self._live.update(self._shown(), refresh=True)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C raises nothing; the function that is yielded says whether it was pressed.

    An exception in the middle of a forward pass would leave some layers of the cache one
    token ahead of others.
    """
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Without the control characters by which a text could take over a terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def status_of(turn: Turn) -> Status:
    """The line below a finished answer."""
    note = {"stopped": "stopped", "length": f"cut at {turn.answer_tokens} tokens"}.get(turn.ended, "")
    return Status(turn.prompt_tokens, turn.report, turn.tokens_per_second, note)


def transcript(conversation: Conversation) -> dict[str, Any]:
    """The conversation as plain types, ready for JSON."""
    return {
        "refreekv": refreekv.__version__,
        "model": conversation.loaded.name,
        "policy": conversation.policy.spec,
        "kv_dtype": None if conversation.formats is None else str(conversation.formats),
        "messages": conversation.messages,
        "turns": [
            {**asdict(turn), "report": turn.report.to_dict(), "tokens_per_second": turn.tokens_per_second}
            for turn in conversation.turns
        ],
    }


def markdown(conversation: Conversation) -> str:
    """The conversation as Markdown."""
    lines = [f"# {conversation.loaded.name}, {conversation.policy.spec}", ""]
    if conversation.system:
        lines += ["**System**", "", conversation.system, ""]
    for turn in conversation.turns:
        lines += ["**User**", "", turn.message, "", "**Assistant**", "", turn.answer, ""]
        lines += [f"<sub>{status_of(turn)}</sub>", ""]
    return "\n".join(lines)
