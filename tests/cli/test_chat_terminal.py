"""``refreekv chat`` in a real terminal: what a person sees and presses."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from helpers.command_line import save_chat_model, words

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux (Debian: tmux)")

PATIENCE = 120  # seconds; machines that run tests are busy


class Terminal:
    """A program in a tmux window of its own server."""

    def __init__(self, socket, command, *, width=80, height=24, folder="."):
        self._socket = str(socket)
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        settings = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
        quoted = " ".join(f"'{word}'" for word in command)
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-s", "chat", "-x", str(width), "-y", str(height),
            "-c", str(folder), *settings,
            # The size of the window, not one that is left over in the environment.
            f"unset COLUMNS LINES; {quoted}; echo left with $?; sleep {PATIENCE}",
        )  # fmt: skip

    def tmux(self, *arguments):
        return subprocess.run(
            ["tmux", "-S", self._socket, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout

    def type(self, text):
        self.tmux("send-keys", "-t", "chat", "-l", text)
        self.press("Enter")

    def press(self, key):
        self.tmux("send-keys", "-t", "chat", key)

    def screen(self, history=True):
        return self.tmux("capture-pane", "-p", "-J", "-t", "chat", *(("-S", "-500") if history else ()))

    def wait(self, pattern, times=1):
        """The screen once ``pattern`` is on it that often."""
        end = time.monotonic() + PATIENCE
        while True:
            seen = self.screen()
            if len(re.findall(pattern, seen)) >= times:
                return seen
            if time.monotonic() > end:
                pytest.fail(f"{pattern!r} did not appear:\n{seen}")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("models") / "chatty", context=32_768)


@pytest.fixture
def start(folder, tmp_path):
    opened = []

    def chat(*options, **window):
        socket = f"/tmp/refreekv-{uuid.uuid4().hex[:8]}"  # short: the path of a socket may not be long
        command = [sys.executable, "-m", "refreekv", "chat", "--model", str(folder), *options]
        opened.append(Terminal(socket, command, folder=tmp_path, **window))
        opened[-1].wait("/help lists the commands")
        return opened[-1]

    yield chat
    for terminal in opened:
        subprocess.run(["tmux", "-S", terminal._socket, "kill-server"], check=False, timeout=30)


def test_a_conversation_as_a_person_has_it(start, tmp_path):
    terminal = start("--max-new-tokens", "20000", "--policy", "streaming-llm:ratio=0.5", width=100)
    terminal.type(words(60, 1))
    # The answer streams, and below it the live line counts.
    live = r"63 prompt tokens · K/V [\d.]+ [KM]iB of [\d.]+ [KM]iB · budget \d+\.\d% · [\d.]+ tokens/s"
    terminal.wait(live)
    first, deadline = terminal.screen(history=False), time.monotonic() + PATIENCE
    while terminal.screen(history=False) == first:
        assert time.monotonic() < deadline, "nothing moves"
        time.sleep(0.1)
    terminal.press("C-c")
    stopped = terminal.wait(r"63 prompt tokens · .* tokens/s · stopped")
    assert "left with" not in stopped
    assert len(re.findall("63 prompt tokens", stopped)) == 1, "the live line is gone"

    # The program goes on, and so does the conversation.
    terminal.type(f"/save {tmp_path / 'one.json'}")
    terminal.wait("Saved: ")
    terminal.type(words(5, 2))
    terminal.wait(r"(?m)^\d[\d,]+ prompt tokens · K/V", times=2)
    terminal.press("C-c")
    terminal.wait("· stopped", times=2)
    terminal.type("/report")
    terminal.wait("Kept per layer")
    terminal.type(f"/save {tmp_path / 'two.json'}")
    terminal.wait("Saved: ", times=2)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["turns"][0] == one["turns"][0]
    assert two["turns"][1]["ended"] == "stopped"
    # Only the second message's own tokens were read: <end>, the answer's last token, and its five with three around.
    assert two["turns"][1]["read_tokens"] == 10
    assert two["turns"][1]["prompt_tokens"] == 63 + one["turns"][0]["answer_tokens"] + 9
    answer = one["turns"][0]["answer"].split()
    shown = terminal.screen().split()
    assert " ".join(answer[-5:]) in " ".join(shown), "what was stopped is still to be read"

    terminal.press("C-c")  # at the prompt: nothing is lost
    terminal.wait(r"Ctrl-D or /quit leaves")
    terminal.press("C-d")
    terminal.wait("left with 0")
    assert "Traceback" not in terminal.screen()


def test_long_answers_are_shown_once_and_whole(start):
    terminal = start("--max-new-tokens", "400", width=50, height=16)
    terminal.type(words(20, 3))
    seen = terminal.wait(r"cut\s+at\s+400\s+tokens")
    spoken = re.findall(r"\bw\d+\b", seen)
    terminal.type("/save answer.json")
    terminal.wait("Saved: answer.json")
    terminal.type("/quit")
    terminal.wait("left with 0")
    folder = terminal.tmux("display-message", "-p", "-t", "chat", "#{pane_start_path}").strip()
    answer = json.loads((Path(folder) / "answer.json").read_text())["turns"][0]["answer"].split()
    text = " ".join(spoken)
    assert text.count(" ".join(answer[:12])) == 1
    assert " ".join(answer) in text


def test_ctrl_c_while_a_long_message_is_read(start, tmp_path):
    (tmp_path / "long.txt").write_text(words(20_000, 4))
    terminal = start("--max-new-tokens", "5")
    terminal.type("/file long.txt")
    terminal.wait("goes in front of your next message")
    terminal.type("w1")
    terminal.wait(r"reading [\d,]+ of 20,004")
    terminal.press("C-c")
    terminal.wait("stopped while reading; the message is not part of the conversation")
    terminal.type("/report")
    terminal.wait("There is nothing in the cache yet")
    terminal.type("/reset")
    terminal.wait("A new conversation.")
    terminal.type("w1 w2")
    terminal.wait("5 prompt tokens · K/V .* tokens/s")
