"""The HTML report: its numbers, its escaping, and what a real browser makes of it."""

import base64
import itertools
import math
import random
import re
from collections import defaultdict
from dataclasses import replace
from statistics import mean

import pytest

from refreekv.evaluation.html import short_labels, summarise, write_report
from refreekv.evaluation.page import encode_positions
from refreekv.evaluation.records import FidelityRecord

pytest.importorskip("jinja2")

LAYERS, HEADS = 6, 3
EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1><b>&amp;'\"\u2028{{7*7}}"
POLICIES = {  # how much each keeps, and how far that takes it from the full cache
    "refreekv:threshold=0.01": (0.62, 0.02),
    "refreekv:threshold=0.05": (0.45, 0.08),
    "snapkv:ratio=0.5": (0.5, 0.14),
    "snapkv:ratio=0.7": (0.7, 0.06),
    "streaming-llm:ratio=0.5": (0.5, 0.6),
    "full": (1.0, 1e-5),
}
ONE = {"refreekv": (0.6, 0.02)}
WORDS = [
    "The ",
    "cache ",
    "keeps ",
    "what ",
    "matters",
    ".\n",
    " Then",
    " it",
    " answers",
    " 42",
    ";",
    " naïve",
    " 日本",
]


def make_records(seed=0, policies=POLICIES, families=("qa", "code", "summary"), per_family=4, display=1, model="tiny"):
    """Made-up records; the first ``display`` samples of each family have texts and positions."""
    rng = random.Random(seed)
    records = []
    for family, index in itertools.product(families, range(per_family)):
        length, shown = rng.randint(90, 900), index < display
        tokens = [EVIL, *(rng.choice(WORDS) for _ in range(length - 1))]
        answer = "".join(rng.choice(WORDS) for _ in range(30))
        for policy, (budget, kl) in policies.items():
            heads = [[1.0]] * 2 + [
                [min(1.0, budget * rng.uniform(0.4, 1.4)) for _ in range(HEADS)] for _ in range(LAYERS - 2)
            ]
            ranges = [make_ranges(rng, length, layer < 2, budget) for layer in range(LAYERS)]
            loss = kl * rng.lognormvariate(0, 0.8)
            parts = policy != "full" and rng.random() < 0.7
            measured = FidelityRecord(
                sample=f"{family}-{index}", family=family, policy=policy, model=model,
                prompt_tokens=length, continuation_tokens=32, budget=mean(mean(layer) for layer in heads),
                bytes_full=length * 4608, bytes_kept=int(length * 4608 * budget),
                kl_mean=loss, kl_p99=loss * 6, kl_max=loss * 9, top1=1 - rng.random() * 0.2 * parts,
                same_path=not parts, first_divergence=rng.randrange(32) if parts else None, kept_heads=heads,
            )  # fmt: skip
            text = answer[: rng.randrange(20, 60)] + " parts" + EVIL if parts else answer
            texts = {"text": text, "text_full": answer, "prompt": "".join(tokens), "tokens": tokens}
            records.append(replace(measured, positions=ranges, **texts) if shown else measured)
    return records


def make_ranges(rng, length, everything, budget):
    kept = [at for at in range(length) if at < 4 or at >= length - 8 or rng.random() < budget]
    return [[0, length]] if everything else [[at, at + 1] for at in kept]


# Numbers


def test_summary_is_a_mean_over_families_with_the_worst_named():
    base = make_records(per_family=1, display=0)[0]
    records = [
        replace(base, family=family, sample=str(i), kl_mean=kl, same_path=same, first_divergence=first)
        for i, (family, kl, same, first) in enumerate(
            [("a", 0.1, True, None), ("a", 0.3, True, None), ("a", 0.2, False, 3), ("b", 1.0, False, 7)]
        )
    ]
    group = summarise("p", records)
    assert group.n == 4
    changed = [replace(record, answer_nll_change=record.kl_mean) for record in records]
    assert summarise("p", changed).answer_nll_change == pytest.approx((0.2 + 1.0) / 2)
    assert group.metrics["kl_mean"].value == pytest.approx((0.2 + 1.0) / 2)
    assert group.metrics["same_path"].value == pytest.approx((2 / 3 + 0) / 2)
    assert group.worst["kl_mean"][0] == "b"
    assert group.worst["same_path"][0] == "b"
    assert group.first_divergence == 7  # 3, 7, never, never: the lower middle
    assert [(family.name, family.n) for family in group.families] == [("a", 3), ("b", 1)]
    assert group.families[0].first_divergence is None
    assert summarise("p", records[::-1]) == group, "the order of the lines must not matter"


def test_worst_is_the_lowest_where_more_is_better_and_nan_is_worse_than_all():
    base = make_records(per_family=1, display=0)[0]
    good, bad = replace(base, family="good", top1=0.9, kl_mean=5.0), replace(base, family="bad", top1=0.1, kl_mean=0.1)
    assert summarise("p", [good, bad]).worst["top1"][0] == "bad"
    assert summarise("p", [good, bad]).worst["kl_mean"][0] == "good"
    broken = replace(bad, kl_mean=math.nan, top1=math.nan)
    for order in ([good, broken], [broken, good]):
        assert summarise("p", order).worst["kl_mean"][0] == "bad"
        assert summarise("p", order).worst["top1"][0] == "bad"
        assert math.isnan(summarise("p", order).metrics["kl_mean"].value)


def test_bootstrap_interval_covers_the_mean_at_about_its_rate():
    rng = random.Random(3)
    base = make_records(per_family=1, display=0)[0]
    hits = 0
    for _ in range(60):
        records = [replace(base, sample=str(i), kl_mean=rng.gauss(1.0, 0.2)) for i in range(40)]
        estimate = summarise("p", records).metrics["kl_mean"]
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 1.0 <= estimate.high
    assert 50 <= hits < 60  # 95% of 60 is 57
    expected = 2 * 1.96 * 0.2 / math.sqrt(40)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.35)


def test_short_labels():
    labels = short_labels(["full", "snapkv:ratio=0.5", "snapkv:ratio=0.7", "r:threshold=0.1,sinks=4", "r:sinks=4"])
    assert labels["full"] == "full"
    assert labels["snapkv:ratio=0.5"] == "snapkv 0.5"
    assert (labels["r:threshold=0.1,sinks=4"], labels["r:sinks=4"]) == ("r 0.1", "r")
    both = short_labels(["x:a=1,b=2", "x:a=2,b=1"])
    assert both == {"x:a=1,b=2": "x a=1, b=2", "x:a=2,b=1": "x a=2, b=1"}
    assert short_labels(["x:a", "x:a="]) == {"x:a": "x:a", "x:a=": "x:a="}


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


# The file


def test_page_is_self_contained_and_escaped(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(make_records(), path, title=EVIL, setup={"command": EVIL, "nested": {"a": [1, EVIL]}, "date": "today"})
    page = path.read_text(encoding="utf-8")
    assert "<img" not in page
    assert "window.pwned=1</script>" not in page
    assert page.count("<script") == 2
    # Nothing that loads; the only addresses are the names of the SVG and HTML namespaces.
    loading = r"<(iframe|object|embed|base|link(?! rel=.icon. href=.data:,.))|<[^>]+\ssrc=|@import|url\("
    assert not re.search(loading, page)
    namespaces = {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\s\"']+", page)) == namespaces


def test_size_is_bounded_with_many_long_texts(tmp_path):
    rng = random.Random(1)
    base = make_records(per_family=1, display=0)[0]
    length = 6_500
    tokens = [rng.choice(WORDS) for _ in range(length)]
    scattered = [[at, at + 1] for at in range(0, length, 2)]
    long = replace(base, prompt_tokens=length, positions=[scattered] * 24, tokens=tokens)
    records = [replace(long, sample=str(i), policy=f"p{p}") for i in range(6) for p in range(20)]
    write_report(records, tmp_path / "report.html", title="Many", setup={})
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert re.search(r"\d+ recorded selections are left out", (tmp_path / "report.html").read_text())


def test_no_record_is_an_error_and_the_later_of_two_counts(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="no records"):
        write_report([], path, title="Empty", setup={})
    first = make_records(per_family=1, families=("qa",), policies=ONE)[0]
    write_report([first, replace(first, kl_mean=0.25)], path, title="Twice", setup={})
    assert '<dd data-fact="n">1</dd>' in path.read_text(encoding="utf-8")
    assert 'data-v="0.25"' in path.read_text(encoding="utf-8")


# In a browser


@pytest.fixture
def shown(browser, tmp_path):
    """Writes a report, opens it, and returns the browser; complaints are checked at the end."""

    def show(records, **options):
        path = tmp_path / "report.html"
        write_report(records, path, title="A made-up run", setup={"machine": "none", "command": EVIL})
        browser.complaints()
        browser.open(path, **options)
        return browser

    yield show
    assert browser.js("return window.pwned ?? null") is None
    assert browser.complaints() == []


def test_the_browser_reports_errors_and_requests(browser, tmp_path):
    """The checks of every other test would see a script error and a request."""
    (tmp_path / "bad.html").write_text("<script src='http://127.0.0.1:9/x.js'></script><script>undefined.x</script>")
    browser.open(tmp_path / "bad.html")
    seen = browser.complaints()
    assert any("TypeError" in line for line in seen)
    assert "http://127.0.0.1:9/x.js" in seen


def family_means(records, policy, name):
    by_family = defaultdict(list)
    for record in records:
        if record.policy == policy:
            by_family[record.family].append(float(getattr(record, name)))
    return {family: mean(values) for family, values in by_family.items()}


def test_numbers_in_the_page(shown):
    records = make_records()
    page = shown(records)
    rows = dict(page.all("table.sortable > tbody", "[n.dataset.policy, [...n.rows[0].cells].map(c => c.dataset.v)]"))
    worst_families = dict(page.all("table.sortable > tbody", "[n.dataset.policy, n.rows[0].cells[5].innerText]"))
    assert set(rows) == set(POLICIES)
    macro = {}
    for policy, cells in rows.items():
        names = ("budget", "bytes_kept", "kl_mean", "same_path", "top1")
        budget, size, kl, same, top1 = (family_means(records, policy, name) for name in names)
        macro[policy] = [mean(budget.values()), mean(kl.values())]
        expected = [12, macro[policy][0], mean(size.values()), macro[policy][1], max(kl.values())]
        expected += [mean(same.values()), min(same.values()), mean(top1.values()), min(top1.values())]
        assert [float(cell) for cell in cells[1:10]] == pytest.approx(expected)
        assert max(kl, key=kl.get) in worst_families[policy]
    [floor] = page.all("[data-fact=floor]", "parseFloat(n.innerText)")
    assert floor == pytest.approx(macro["full"][1], rel=0.01)
    points = {spec: xy for spec, *xy in page.all(".point", "[n.dataset.spec, +n.dataset.x, +n.dataset.y]")}
    assert set(points) == set(POLICIES) - {"full"}
    assert all(points[policy] == pytest.approx(macro[policy], rel=1e-4) for policy in points)
    by_family = family_means(records, "full", "kl_mean")
    details = page.all("tbody[data-policy=full] [data-family]", "[n.dataset.family, +n.cells[4].dataset.v]")
    assert dict(details) == pytest.approx(by_family)
    lengths = page.all("table.lengths tr[data-policy='snapkv:ratio=0.7'] td", "[+n.dataset.v, n.innerText]")
    bins = defaultdict(list)
    for record in records:
        if record.policy == "snapkv:ratio=0.7":
            bins[max(7, math.floor(math.log2(record.prompt_tokens)) + 1)].append(record.budget)
    assert [value for value, _ in lengths] == pytest.approx([mean(bins[key]) for key in sorted(bins)])
    assert [int(text.split()[-1]) for _, text in lengths] == [len(bins[key]) for key in sorted(bins)]


def test_controls(shown):
    records = make_records()
    page = shown(records)
    budgets = {policy: mean(family_means(records, policy, "budget").values()) for policy in POLICIES}
    for falling in (False, True):
        page.click("table.sortable > thead button", 2)
        order = page.all("table.sortable > tbody", "n.dataset.policy")
        assert order == sorted(POLICIES, key=budgets.get, reverse=falling)
    page.click(".expand")
    [opened] = page.all("tr.detail:not([hidden])", "n.innerText")
    assert all(family in opened for family in ("qa", "code", "summary"))
    for metric, field, summary in [("worst", "kl_mean", max), ("kl_p99", "kl_p99", mean), ("same_path",) * 2 + (mean,)]:
        page.click(f"[data-metric={metric}]")
        expected = {p: summary(family_means(records, p, field).values()) for p in POLICIES if p != "full"}
        assert dict(page.all(".point", "[n.dataset.spec, +n.dataset.y]")) == pytest.approx(expected, rel=1e-4)
    page.click(".legend button", page.all(".legend button", "n.innerText").index("snapkv"))
    left = {policy for policy in POLICIES if policy != "full" and "snapkv" not in policy}
    assert set(page.all(".point", "n.dataset.spec")) == left


@pytest.mark.parametrize("policy", ["snapkv:ratio=0.5", "refreekv:threshold=0.01"])
def test_heads_text_and_worst_samples_show_the_records(shown, policy):
    records = make_records(seed=5)
    ours = [record for record in records if record.policy == policy]
    page = shown(records)
    page.choose("#text select.policy", policy)
    full = [[layer * HEADS if len(layer) == 1 else layer for layer in record.kept_heads] for record in ours]
    means = [mean(kept[layer][head] for kept in full) for layer in range(LAYERS) for head in range(HEADS)]
    assert page.all("#heads-chart rect.heat", "+n.dataset.v") == pytest.approx(means, rel=1e-4)

    record = next(record for record in ours if record.positions)
    length = record.prompt_tokens
    assert page.all("#text-tokens span", "n.textContent") == record.tokens
    kept = [{at for start, stop in layer for at in range(start, stop)} for layer in record.positions]
    counts = [sum(at in layer for layer in kept) for at in range(length)]
    shades = [f"k{max(1, math.floor(8 * count / LAYERS + 0.5))}" if count else "off" for count in counts]
    assert page.all("#text-tokens span", "n.className") == shades
    page.choose("#text-layer", 5)  # 0 is all layers
    assert page.all("#text-tokens span", "n.className") == ["k8" if at in kept[4] else "off" for at in range(length)]
    assert f"Layer 4 keeps {len(kept[4])} of {length} tokens" in page.all("#text-note", "n.innerText")[0]

    ranked = [record.sample for record in sorted(ours, key=lambda record: -record.kl_mean)]
    by_name = {record.sample: record for record in ours}
    listed = page.all(".sample", "n.dataset.sample")
    assert listed[:6] == ranked[:6]
    assert set(listed) == {*ranked[:6], *(record.sample for record in ours if record.text)}  # one a family has texts
    answers = page.all(
        ".sample", "[...n.querySelectorAll('.answer')].map(a => a.textContent.replace('∎ ends here', ''))"
    )
    texts = [[by_name[name].text_full, by_name[name].text] if by_name[name].text else [] for name in listed]
    assert answers == texts
    marked = page.all(".sample", "[...n.querySelectorAll('mark')].map(m => m.previousSibling.textContent)")
    for before, both in zip(marked, texts, strict=True):
        assert len(before) == (2 if both and both[0] != both[1] else 0)
        assert all(text.startswith(start) for text, start in zip(both, before, strict=False))
        assert len(set(before)) <= 1, "both marks come after the same beginning"


OPTIONAL = dict.fromkeys(
    ("first_divergence", "answer_nll_change", "kept_heads", "positions", "text", "text_full", "prompt", "tokens")
)


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([replace(r, **OPTIONAL) for r in make_records()], id="no-optional-fields"),
        pytest.param(make_records(policies=ONE, families=("qa",), per_family=1), id="one-record"),
        pytest.param(make_records(policies=ONE, families=("qa",), display=0), id="one-policy-nothing-to-display"),
        pytest.param(make_records(policies={"full": (1.0, 0.0)}), id="only-the-noise-floor"),
        pytest.param([replace(r, kl_mean=0.0, kl_p99=0.0, kl_max=0.0) for r in make_records()], id="all-zero"),
        pytest.param([replace(r, kl_mean=math.nan, kl_max=math.inf) for r in make_records()], id="not-numbers"),
        pytest.param([replace(r, tokens=None, prompt=None) for r in make_records()], id="positions-without-tokens"),
        pytest.param([replace(r, answer_nll_change=0.5) for r in make_records()], id="answers"),
        pytest.param(make_records() + make_records(model="other", policies=ONE), id="two-models"),
        pytest.param(make_records()[:-3], id="incomplete"),
        pytest.param(
            [replace(r, tokens=["\ud800"] * 5, family="\udfff") for r in make_records()], id="lone-surrogates"
        ),
        pytest.param(
            [replace(r, positions=[[] for _ in r.positions or ()]) for r in make_records()], id="nothing-kept"
        ),
    ],
)
@pytest.mark.parametrize("width", [390, 1280])
def test_every_kind_of_file_opens(shown, records, width):
    page = shown(records, width=width, dark=width == 390)
    # The page itself never scrolls sideways; wide tables scroll on their own.
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.all("#text select.policy option", "n.value")
    for index in page.all("#model option", "n.value"):
        page.choose("#model", index)
        assert set(page.all(".model:not([hidden])", "n.dataset.model")) == {index}
        for metric in ("worst", "kl_p99", "same_path", "kl_mean"):
            page.click(f"[data-metric={metric}]")
            assert page.all("#frontier", "/NaN|undefined/.test(n.innerHTML)") == [False]
        assert page.all(".sample", "n.dataset.sample")
