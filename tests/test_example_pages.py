"""Examples that are pages: their commands and their Python run as they stand there, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest

from helpers.command_line import runner
from helpers.models import save_with_characters
from refreekv.evaluation.checking import prompts

PAGE = Path(__file__).parents[1] / "examples" / "check_my_model.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the examples are not part of this installation")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    save_with_characters(tmp_path / "model")
    return tmp_path / "model"


def test_check_my_model(folder, tmp_path, monkeypatch, capsys):
    """From the first command to the last line; only the package's prompts are cut, to save time."""
    run = runner(capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "rounds", lambda: [[prompts.prompt("document", 60), prompts.prompt("prose", 60)]])
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [language for language, _ in blocks] == ["bash", "python", "bash", "bash", "bash", "python"]
    shown = ""
    for language, text in blocks:
        text = text.replace(NAME, str(folder))
        if language == "python":
            capsys.readouterr()
            exec(compile(text, str(PAGE), "exec"), {})
            shown = capsys.readouterr().out
            continue
        for command in text.strip().splitlines():
            name, *arguments = shlex.split(command)
            assert name == "refreekv"
            done = run(*arguments)
            assert done.code == 0, done.err
            if arguments[0] == "check":
                assert "refreekv.compress(model" in done.out
    assert (tmp_path / "calibration.json").is_file()
    assert "step 1 of" in shown, "a prompt of some characters is kept whole"
