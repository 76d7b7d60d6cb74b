"""``refreekv inspect``: the page against the cache it speaks of, in a real browser too."""

import base64
import html
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

import refreekv
from helpers.command_line import PROMPT, assert_refused, runner, save_llama
from helpers.driving import POLICIES
from helpers.models import prompts
from refreekv import ReFreeKVCache
from refreekv.evaluation.inspect.inspection import Inspection, encode_positions
from refreekv.serving.detokenizing import Detokenizer, token_texts

pytest.importorskip("jinja2")

EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>&amp;'\"\u2028{{7*7}}"
WORDS = [
    "The ",
    "keeper ",
    "wrote ",
    "a ",
    "line",
    ".\n",
    "שלום ",
    "עולם ",
    "مرحبا ",
    "日本",
    "語",
    "🦊",
    " naïve",
    EVIL,
]


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


def inspection_of(model, policy, length, /, **changes):
    """A made-up text over what a policy really keeps of a random prompt."""
    ids, _ = prompts((length,), seed=3)
    cache = ReFreeKVCache(model, policy)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    given = {
        "model": "made-up", "policy": str(policy), "tokens": [WORDS[at % len(WORDS)] for at in range(length)],
        "kept": cache.kept_ranges(), "report": cache.report, "full": "The keeper wrote a line.",
        "compressed": "The keeper wrote eleven pages.", "first_difference": 3, "new_tokens": 6,
    }  # fmt: skip
    return Inspection(**{**given, **changes})


UNEVEN = refreekv.policies.create("ada-kv", ratio=0.4)
CUT = refreekv.policies.create("refreekv", threshold=0.05, frozen_layers=1)


def kept_sets(inspection):
    """By layer and head, the kept positions."""
    layers = [inspection.by_head(layer) for layer in range(len(inspection.kept))]
    return [[{at for start, stop in head for at in range(start, stop)} for head in heads] for heads in layers]


# -- the numbers behind the page --------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_kept_ranges_are_what_the_layers_hold(llama, name):
    policy, parameters = POLICIES[name]
    cache = ReFreeKVCache(llama, policy, **parameters)
    ids, mask = prompts((50, 37), seed=4)
    llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)
    evicted = 0
    for row in range(2):
        for layer, heads in zip(cache.pruned_layers, cache.kept_ranges(row), strict=True):
            kept = layer.reports[row].kept_heads if layer.reports else (layer.get_seq_length(),)
            length = layer.get_seq_length()
            assert len(heads) in (1, layer.kv_heads)
            for head in heads:
                assert all(start < stop for start, stop in head)
                assert all(before[1] < after[0] for before, after in itertools.pairwise(head))
                assert head[-1][1] == length  # generated tokens are all there
            if layer.ragged is not None:  # without padding, which a dense layer keeps
                counts = [sum(stop - start for start, stop in head) - (length - 50) for head in heads]
                assert counts == list(kept)[: len(heads)]
                evicted += 50 - max(counts)
    assert evicted > 0 or name == "full"


def test_a_token_s_text_keeps_spaces_and_whole_characters():
    class Pieces:
        """Decodes as SentencePiece does: a space between words, none at the start; bytes above 300."""

        def decode(self, tokens, **options):
            raw = b"".join(bytes([t - 300]) if t >= 300 else f" w{t}".encode() for t in tokens)
            return raw.decode("utf-8", errors="replace").removeprefix(" ")

    fox = [300 + byte for byte in "🦊".encode()]
    assert token_texts(Pieces(), [1, 2, *fox, 3]) == ["w1", " w2", "", "", "", "🦊", " w3"]
    assert token_texts(Pieces(), [1, *fox[:2]])[0] == "w1"
    assert "".join(token_texts(Pieces(), [1, *fox[:2]])).startswith("w1\ufffd")
    added = Detokenizer(Pieces())
    assert [added.add(300 + byte) for byte in b"\xff" * 8][-1] == "\ufffd" * 8  # never comes together


def test_layers_and_report_must_belong_together(llama):
    made = inspection_of(llama, CUT, 40)
    with pytest.raises(ValueError, match=r"kept positions of 3 layers and a report of 4"):
        inspection_of(llama, CUT, 40, kept=made.kept[:3])
    with pytest.raises(ValueError, match="no tokens"):
        inspection_of(llama, CUT, 40, tokens=[])


@pytest.mark.parametrize("seed", range(5))
def test_encoded_positions_decode_to_the_ranges(seed):
    rng = random.Random(seed)
    for length in (1, 7, 8, 9, 300):
        kept = {at for at in range(length) if rng.random() < rng.choice([0.02, 0.5, 0.98])}
        beyond = [[length - 1, length + 5]] * (length - 1 in kept)
        encoded = encode_positions([[at, at + 1] for at in sorted(kept)] + beyond, length)
        if isinstance(encoded, str):
            bits = base64.b64decode(encoded)
            decoded = {at for at in range(length) if bits[at // 8] >> (at % 8) & 1}
        else:
            ends = [sum(encoded[: i + 1]) for i in range(len(encoded))]
            decoded = {at for i in range(1, len(ends), 2) for at in range(ends[i - 1], ends[i])}
        assert decoded == kept
    assert isinstance(encode_positions([[0, 9_000]], 10_000), list)
    assert isinstance(encode_positions([[at, at + 1] for at in range(0, 10_000, 2)], 10_000), str)


# -- the command ------------------------------------------------------------------------


def test_inspect_writes_what_the_library_keeps(run, folder, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    outcome = run(
        *("inspect", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--out", str(page)),
        *("--png", str(picture), "--policy", "streaming-llm:size=16", "--json"),
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["files"] == [str(page), str(picture)]
    assert result["kept"] == [[[[0, 4], [48, 60]]]] * 4
    text = page.read_text(encoding="utf-8")
    assert not re.search(
        r"<(iframe|object|embed|base|link(?! rel=.icon. href=.data:,.))|<[^>]+\ssrc=|@import|url\(", text
    )
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert "".join(data["tokens"]) == PROMPT
    assert (data["full"], data["compressed"]) == (result["full"]["text"], result["compressed"]["text"])
    assert result["first_difference"] is not None
    assert f"differ from token {result['first_difference'] + 1} of 12 on" in text
    assert picture.read_bytes().startswith(b"\x89PNG")

    words = run("inspect", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "3", "--out", str(page)).out
    assert f"Written: {page}" in words


def test_the_default_policy_is_the_library_s(run, folder, tmp_path):
    arguments = ("inspect", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "2", "--json")
    result = json.loads(run(*arguments, "--out", str(tmp_path / "page.html")).out)
    from refreekv.engines import DEFAULT_POLICY

    assert result["policy"] == DEFAULT_POLICY


def test_bad_input_is_refused_in_a_line(run, folder, tmp_path):
    def refused(*arguments, fragment):
        assert_refused(run("inspect", "--model", str(folder), *arguments), fragment)

    refused(fragment="exactly one of --prompt and --prompt-file")
    refused("--prompt", PROMPT, "--out", str(tmp_path), fragment="is a folder")
    refused("--prompt", PROMPT, "--out", str(tmp_path / "no" / "page.html"), fragment="does not exist")
    refused("--prompt", PROMPT, "--png", str(tmp_path / "no" / "page.png"), fragment="does not exist")
    refused("--prompt", PROMPT * 3, "--out", str(tmp_path / "p.html"), fragment="the context of tiny is 128 tokens")
    refused("--prompt", PROMPT, "--policy", "refrekv", fragment="did you mean 'refreekv'?")
    assert_refused(run("inspect", "--model", "./nowhere", "--prompt", PROMPT), "no such file or folder")


def test_the_picture_shows_the_shares(llama, tmp_path):
    pytest.importorskip("matplotlib")
    from refreekv.evaluation.inspect.png import kept_shares, write_png

    made = inspection_of(llama, UNEVEN, 1_500, full="$x^$ " * 400, compressed="شيء آخر\n\n" * 40)
    heads = kept_sets(made)
    shares = kept_shares(made)
    assert shares.shape == (4, 1_200)
    for layer, row in zip(heads, shares, strict=True):
        columns = [[] for _ in range(1_200)]
        for at in range(1_500):
            columns[at * 1_200 // 1_500].append(sum(at in head for head in layer) / len(layer))
        assert row.tolist() == pytest.approx([sum(column) / len(column) for column in columns])
    write_png(made, tmp_path / "p.png")
    from PIL import Image

    with Image.open(tmp_path / "p.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        assert image.width == 1690
    assert {(0x0B, 0x3D, 0x85), (0xEE, 0xF2, 0xF8)} <= colours  # kept by all, kept by none


# -- the page in a browser --------------------------------------------------------------


@pytest.fixture
def shown(browser, tmp_path):
    """Writes a page, opens it, and returns the browser; complaints are checked at the end."""

    def show(inspection, **options):
        inspection.write_html(tmp_path / "page.html")
        browser.complaints()
        browser.open(tmp_path / "page.html", **options)
        return browser

    yield show
    assert browser.js("return window.pwned ?? null") is None
    assert browser.complaints() == []


def shades(counts, most):
    return [f"k{max(1, math.floor(8 * count / most + 0.5))}" if count else "off" for count in counts]


@pytest.mark.parametrize("policy", [CUT, UNEVEN], ids=["cut", "uneven"])
def test_tokens_are_shaded_by_the_layers_and_heads_that_keep_them(shown, llama, policy):
    length = 300
    made = inspection_of(llama, policy, length)
    page, heads = shown(made), kept_sets(made)
    assert page.all("#text-tokens span", "n.textContent") == list(made.tokens)
    counts = [sum(at in head for layer in heads for head in layer) for at in range(length)]
    most = sum(len(layer) for layer in heads)
    assert page.all("#text-tokens span", "n.className") == shades(counts, most)
    assert page.all("[data-fact=nowhere]", "n.innerText") == [str(counts.count(0))]
    assert page.all("[data-fact=budget]", "n.innerText") == [f"{made.report.budget:.1%}"]

    page.choose("#layer", 3)  # 0 is all layers
    counts = [sum(at in head for head in heads[2]) for at in range(length)]
    assert page.all("#text-tokens span", "n.className") == shades(counts, len(heads[2]))
    assert page.all("#layer-name", "n.textContent") == ["2"]
    assert page.all("tr.chosen", "n.dataset.layer") == ["3"]
    total = sum(counts) / (length * len(heads[2]))
    assert f"Layer 2 keeps {100 * total:.1f}% of the 300 tokens" in page.all("#text-note", "n.innerText")[0]
    if made.heads > 1:
        page.choose("#head", "1")
        assert page.all("#text-tokens span", "n.className") == [
            "k8" if at in heads[2][1] else "off" for at in range(length)
        ]
        page.choose("#layer", 0)
        counts = [sum(at in layer[1] for layer in heads) for at in range(length)]
        assert page.all("#text-tokens span", "n.className") == shades(counts, len(heads))
        expected = [made.share(layer, head) for layer in range(4) for head in range(2)]
        assert page.all("#heads-chart rect.heat", "+n.dataset.v") == pytest.approx(expected, rel=1e-4)
    page.click("table.layers button", 3)
    assert page.all("#layer", "n.value") == ["4"]

    heads = page.all("table.layers thead th", "n.innerText")
    assert heads == ["Layer", "Kept", "Entries", *(["Cut", "Metric"] if policy is CUT else []), "Full", "Held"]
    rows = page.all("table.layers tbody tr", "[...n.cells].map(c => c.innerText)")
    for cells, layer in zip(rows, made.report.prunable, strict=True):
        [row] = layer.rows
        assert cells[0] == str(layer.index)
        assert cells[1].strip() == f"{layer.budget:.1%}"
        if policy is CUT:
            assert cells[3] == ("–" if row.cut is None else f"{row.cut:,}")
            assert cells[4] == ("–" if row.metric is None else f"{row.metric:.4g}")


def test_the_map_has_the_colours_of_what_is_kept(shown, llama):
    made = inspection_of(llama, CUT, 500)
    page, heads = shown(made), kept_sets(made)
    # Opaque where all is shown: the two ends of the scale, and nothing else where a column is a position.
    pixels = page.js(
        "const c = document.querySelector('#text-map canvas');"
        "return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    assert pixels[:2] == [500, 4]
    reds = [pixels[2][4 * at] for at in range(4 * 500)]
    kept = [at in layer[0] for layer in heads for at in range(500)]
    assert {red for red, keeps in zip(reds, kept, strict=True) if keeps} == {0x0B}
    assert {red for red, keeps in zip(reds, kept, strict=True) if not keeps} == {0xEE}


def test_both_answers_with_the_first_difference_marked(shown, llama):
    page = shown(inspection_of(llama, CUT, 60))
    answers = page.all(".answer", "[n.textContent, n.querySelector('mark').textContent]")
    assert answers == [["The keeper wrote a line.", "a"], ["The keeper wrote eleven pages.", "eleven"]]
    assert "differ from token 4 of 6 on" in page.all(".agreement", "n.innerText")[0]
    same = inspection_of(llama, CUT, 60, compressed="The keeper wrote a line.", first_difference=None)
    page = shown(same)
    assert page.all("mark", "n") == []
    assert page.all(".agreement", "n.innerText") == ["All 6 new tokens are the same."]


def test_reasons_to_keep_are_those_of_the_report(shown, llama):
    made = inspection_of(llama, refreekv.policies.create("adaptive", min_length=8, window=8), 400)
    assert made.report.reasons
    page = shown(made)

    def listed(reasons):
        return [f"{name} {share:.1%}" for name, share in reasons.items()]

    assert page.all("#reasons span + span", "n.innerText.trim()") == listed(made.report.reasons)
    page.choose("#layer", 2)
    assert page.all("#reasons span + span", "n.innerText.trim()") == listed(made.report.prunable[1].rows[0].reasons)
    page = shown(inspection_of(llama, CUT, 60))
    assert page.all("#reasons", "n.hidden") == [True]


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("length", [1, 300, 4_200])
def test_it_fits_every_width_and_length(shown, llama, width, length):
    texts = {"full": EVIL, "compressed": "שלום " * 30, "policy": EVIL, "facts": {"a": EVIL}}
    page = shown(inspection_of(llama, UNEVEN if length > 1 else CUT, length, **texts), width=width, dark=width == 768)
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert len(page.all("#text-tokens span", "n.className")) == length
    assert page.all("main", "/NaN|undefined|Infinity/.test(n.innerHTML)") == [False]
    overlaps = page.js(
        "const m = [...document.querySelectorAll('#map-positions span')].map(n => n.getBoundingClientRect());"
        "return m.some((box, at) => at && box.left < m[at - 1].right)"
    )
    assert not overlaps
    if length == 300:  # a Hebrew paragraph runs from the right, a Latin one from the left
        assert page.js(
            "const box = document.querySelector('#answer-compressed .answer'), first = document.createRange();"
            "first.selectNode(box.querySelector('mark') || box.firstChild);"
            "return first.getBoundingClientRect().right > box.getBoundingClientRect().right - 40"
        )


def test_the_prompt_is_not_markup(shown, llama, tmp_path):
    made = inspection_of(llama, CUT, 40, model=EVIL, full=EVIL, compressed=EVIL)
    page = shown(made)
    assert page.all(".model-name", "n.textContent") == [EVIL]
    assert html.escape(EVIL, quote=False)[:20] in (tmp_path / "page.html").read_text(encoding="utf-8")
