"""The one reader of `name:key=value`, and the nearest word."""

import pytest

from refreekv.core.spelling import listed, parts, spell, suggestion


def test_parts_and_back():
    assert parts(" niah : tokens = 500 ,, after,x=") == ("niah", [("tokens", "500"), ("after", None), ("x", "")])
    assert parts("int8") == ("int8", [])
    for spec in ("full", "p:a=1,b=x", "qasper:after,tokens=5"):
        name, items = parts(spec)
        words = [key for key, value in items if value is None]
        assert spell(name, {key: value for key, value in items if value is not None}, words) == spec


def test_lists_keep_parameters_together():
    texts = ["gsm8k,niah:tokens=500,depths=3,qasper:after", "gsm8k", "pg19,chars=9"]
    assert listed(texts, ["after"]) == ["gsm8k", "niah:tokens=500,depths=3", "qasper:after", "pg19:chars=9"]
    assert listed(["after"], ["after"]) == ["after"]


@pytest.mark.parametrize(("word", "end"), [("snapvk", "; did you mean 'snapkv'?"), ("zzz", "")])
def test_suggestion(word, end):
    assert suggestion(word, ["snapkv", "h2o"]) == end
