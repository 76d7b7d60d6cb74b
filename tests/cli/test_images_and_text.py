"""Models of images and text, which the command line has read text."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.command_line import PROMPT, runner, save_tokenizer
from helpers.tiny import tiny
from refreekv.cli.loading import load

KINDS = ["llava", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_loaded_and_generate_and_are_checked(kind, tmp_path, capsys):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model, run = tiny(kind), runner(capsys)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    answer = json.loads(
        run("generate", "--model", str(tmp_path), "--prompt", PROMPT, "--max-new-tokens", "3", "--json").out
    )
    assert answer["report"]["tokens"] > 0
    loaded = load(str(tmp_path))
    assert type(loaded.model) is type(model)
    torch.testing.assert_close(dict(loaded.model.named_parameters()), dict(model.named_parameters()))
    (tmp_path / "own.txt").write_text(PROMPT)
    checked = run("check", str(tmp_path), "--prompts", str(tmp_path / "own.txt"), "--json")
    assert checked.code == 0, checked.err
