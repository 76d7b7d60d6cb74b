"""The search for the longest prompt on one GPU, on a tiny shape whose memory is counted."""

import gc
import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import as_measured
import chat_speed
import one_gpu
import random_models
import refreekv
from helpers.command_line import save_chat_model
from helpers.live_bytes import LiveBytes
from one_gpu import STEP, Row, Variant, longest, main
from random_models import SHAPES, build, weight_bytes
from refreekv.core.weight_blocks import unpacked
from refreekv.engines.transformers import layer as layers_of_caches
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.packed_weights import is_packed
from refreekv.planner import plan
from refreekv.planner.plan import reserve_of
from refreekv.pruning import calls
from refreekv.storage import runs, unfinished


@pytest.mark.parametrize("true", [0, 64, 128, 1000, 5000, 40_000, 65_536, 10**6])
@pytest.mark.parametrize("guess", [1, 500, 5000, 70_000])
@pytest.mark.parametrize("resolution", [0.0, 0.02, 0.2])
def test_the_search_finds_the_longest(true, guess, resolution):
    tried = []
    most = 2**16
    found = longest(lambda n: tried.append(n) or n <= true, guess, most=most, resolution=resolution)
    assert found == 0 or found in tried
    assert found <= min(true, most)
    best = min(true, most) // STEP * STEP
    assert best - found <= max(STEP, resolution * found)
    assert all(n % STEP == 0 and 0 < n <= most for n in tried)
    assert len(set(tried)) == len(tried)
    assert len(tried) <= 24


def test_a_good_guess_takes_few_tries():
    tried = []
    assert longest(lambda n: tried.append(n) or n <= 10_100, 10_000, most=2**19, resolution=0.03) > 9_900
    assert len(tried) <= 3


@pytest.mark.parametrize("form", ["bf16", "int4-nf4", "int4-blocks"])
def test_random_models_are_made_in_their_form(form):
    if form == "int4-nf4":
        pytest.importorskip("bitsandbytes")
    config = SHAPES["tiny"]
    model = build(config, form, torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    others = 2 * 128 * 64 + 5 * 64
    bits = 16 if form == "bf16" else 4.5
    rows = 2 * (64 * 2 + 32 * 2 + 128 * 2 + 64)
    # NF4's levels, with each layer; of blocks a number a row.
    more = {"int4-nf4": 14 * 64, "int4-blocks": 4 * rows}.get(form, 0)
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert weight_bytes(model) - rotary == matrices * bits / 8 + others * 2 + more
    assert weight_bytes(model) - weight_bytes(model, read=True) == 128 * 64 * 2
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.float().std() < 10
    assert (form == "int4-blocks") == any(map(is_packed, model.modules()))
    if form == "int4-blocks":
        assert 0.8 < unpacked(model.model.layers[0].mlp.up_proj.blocks).std() / random_models.SPREAD < 1.2


def run(capsys, tmp_path, *arguments):
    out = tmp_path / "rows.jsonl"
    common = ["--device", "cpu", "--out", str(out), "--chunk", "64", "--new", "4", "--most", "4096"]
    main([*common, *arguments])
    return capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_row_on_a_cpu(capsys, tmp_path):
    model = build(SHAPES["tiny"], "int4-blocks", torch.device("cpu"))
    a_token = 2 * 2 * 2 * 16 * 2  # layers, key and value, KV heads, size, bytes
    limit = weight_bytes(model) + 1000 * a_token
    arguments = ["--rows", f"tiny:int4-blocks:{limit}B", "--policy", "streaming-llm:ratio=0.5"]
    said, (full, ours) = run(capsys, tmp_path, *arguments)
    # The full cache holds its prompt and the answer but for the last token.
    assert full["longest"] == (1000 - 3) // STEP * STEP
    assert full["at"]["cache_bytes"] == (full["longest"] + 3) * a_token
    assert full["at"]["peak"] == full["weight_bytes"] + full["at"]["cache_bytes"] <= limit
    assert (ours["kv"], ours["prompt"], full["prompt"]) == ("bf16", "auto", "bf16")
    assert ours["longest"] >= full["longest"]
    assert 0.45 < ours["at"]["kept_share"] < 0.55
    assert ours["at"]["cache_bytes"] < 0.6 * full["at"]["cache_bytes"] * ours["longest"] / full["longest"]
    assert all(one["at"]["token_seconds"] > 0 and one["forecast_peak"] > 0 for one in (full, ours))
    assert "tiny Q4_0" in said
    assert "CPU, counted and not measured" in full["about"]
    main(["--table", str(tmp_path / "rows.jsonl")])
    shown = capsys.readouterr().out
    assert f"{ours['longest'] / full['longest']:.2f}" in shown
    assert shown.count("| tiny |") == 2


def test_lengths_without_a_search(capsys, tmp_path):
    arguments = ["--rows", "tiny:bf16:1GB", "--at", "200,300", "--kinds", "ours", "--kv", "int8:recent=16"]
    said, rows = run(capsys, tmp_path, *arguments)
    assert [row["at"]["length"] for row in rows] == [200, 300]
    assert all(row["kv"] == "int8:recent=16" and row["at"]["fits"] for row in rows)
    assert "200 tokens" in said


def test_lengths_of_each_cache(capsys, tmp_path):
    given = ["--rows", "tiny:bf16:1GB", "--ours", "full@int4;streaming-llm:ratio=0.5@int8"]
    _, rows = run(capsys, tmp_path, *given, "--at", "100;200,300;400")
    assert [(row["kind"], row["kv"], row["at"]["length"]) for row in rows] == [
        ("full", "bf16", 100), ("ours", "int4", 200), ("ours", "int4", 300), ("ours", "int8", 400),
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*given, "--at", "100;200"])
    assert "--at has 2 lists of lengths for 3 caches" in capsys.readouterr().err


def test_several_caches_of_ours(capsys, tmp_path):
    given = "adaptive:min_length=16@auto;adaptive-as-measured:ratio=0.6@auto;full@int4@int4:recent=16"
    arguments = ["--rows", "tiny:bf16:1GB", "--at", "400", "--kinds", "ours", "--ours", given]
    said, rows = run(capsys, tmp_path, *arguments)
    assert [row["policy"] for row in rows] == [one.split("@")[0] for one in given.split(";")]
    assert [row["prompt"] for row in rows] == ["auto", "auto", "int4:recent=16"]
    assert all(row["constants_seconds"] > 0 for row in rows)
    assert rows[1]["at"]["kept_share"] == pytest.approx(0.6 + 0.4 * 68 / 400, abs=0.02)
    assert "constants of the model" in said
    for wrong in ("full@int9", "nothing", "full@int4@auto@8", "full@int4@auto@1GiB@more"):
        with pytest.raises(SystemExit):
            main(["--rows", "tiny:bf16:1GB", "--ours", wrong])
        capsys.readouterr()
    with pytest.raises(ValueError, match="this model is on cpu"):  # said, and not left out
        run(
            capsys,
            tmp_path,
            "--rows",
            "tiny:bf16:1GB",
            "--at",
            "400",
            "--kinds",
            "ours",
            "--host",
            "auto",
            "--kv",
            "int4",
        )


def forget_numbers():
    """Let go of the few lists of numbers that all layers of a prompt share."""
    for shared in (
        calls._asked_of_all, calls._ONCE, runs._first_numbers, unfinished._from_the_first, unfinished._starting_at
    ):  # fmt: skip
        shared.cache_clear()


@pytest.mark.parametrize("prompt", ["auto", "16"])
def test_nothing_outlives_a_try(monkeypatch, prompt):
    """After tries that are answered, and that run out of memory anywhere, tensors hold what they held before."""
    model = build(SHAPES["tiny"], "bf16", torch.device("cpu"))
    memory = one_gpu.Memory(torch.device("cpu"), 2**40)
    variant = Variant("adaptive-as-measured", "auto", prompt, None)
    bench = one_gpu.Bench(model, memory, variant=variant, chunk=256, new=4)
    monkeypatch.setattr(layers_of_caches, "is_late", lambda device: True)  # as on a GPU
    update, left, stop = ReFreeKVLayer.update, [], 0

    def failing(layer, *args, **kwargs):
        handed = update(layer, *args, **kwargs)
        left.append(layer.index)
        if len(left) == stop:
            raise torch.OutOfMemoryError("no memory")
        return handed

    monkeypatch.setattr(ReFreeKVLayer, "update", failing)
    gc.disable()  # what only a collection frees is held until one comes
    try:
        with LiveBytes() as live, attached(model):
            bench.measure_constants()
            assert bench.attempt("ours", 700).fits  # what is made once and kept: rotations
            forget_numbers()
            before = live.live
            for kind, length, stop in [
                ("full", 700, 0), ("ours", 700, 0), ("ours", 700, 2), ("ours", 700, 5), ("ours", 900, 8),
                ("full", 900, 0), ("ours", 900, 10), ("ours", 900, 0),
            ]:  # fmt: skip
                left.clear()
                tried = bench.attempt(kind, length)
                assert tried.fits == (stop == 0)
                forget_numbers()
                assert live.live == before, (kind, length, stop)
    finally:
        gc.enable()


def test_what_the_driver_takes_later_was_not_there_at_an_earlier_peak():
    """Tensors 70 with a driver of 10, then 60 with 15, then 30 with 30: 80 at a time, and not 100."""

    class Card(one_gpu.Memory):
        driver, _part = 10, (70, 72)

    memory = Card(torch.device("cpu"), 2**40)
    assert (memory.peak, memory.allocated, memory.reserved) == (80, 70, 72)
    memory.note()
    Card.driver, Card._part = 15, (60, 75)
    assert (memory.peak, memory.allocated, memory.reserved) == (80, 70, 75)
    memory.note()
    Card.driver, Card._part = 30, (30, 70)
    assert (memory.peak, memory.allocated, memory.reserved) == (80, 70, 75)
    Card._part = (55, 70)
    assert memory.peak == 85
    memory.begin()
    assert (memory.peak, memory.allocated, memory.reserved) == (85, 55, 70)


def test_parts_of_a_try_are_noted():
    model = build(SHAPES["tiny"], "bf16", torch.device("cpu"))
    memory = one_gpu.Memory(torch.device("cpu"), 2**40)
    bench = one_gpu.Bench(model, memory, variant=Variant("full", "bf16", "16", None), chunk=256, new=4)
    noted = []
    memory.note = lambda: noted.append(type(memory).note(memory))
    tried = bench.attempt("full", 700)
    assert len(noted) == 2
    assert weight_bytes(model) < tried.peak_read <= tried.peak_prompt <= tried.allocated == tried.peak


SEEN = {}
"""What was found of a shape, by what looked at it."""


@pytest.fixture
def shapes_looked_at_once(monkeypatch):
    """Each forecast runs a model without data to see what its shape is: here they are of a few shapes."""
    for name in ("measure", "count"):
        monkeypatch.setattr(plan, name, partial(_seen, getattr(plan, name)))


def _seen(look, model):
    shape = look.__name__, str(model.text)
    if shape not in SEEN:
        SEEN[shape] = look(model)
    return SEEN[shape]


@pytest.mark.usefixtures("shapes_looked_at_once")
@pytest.mark.parametrize("kind", ["full", "ours"])
def test_chunks_are_halved_where_memory_is_short(kind):
    row = Row.parse("qwen2.5-32b:int4:24GB")
    settings = one_gpu.Settings(Variant("full", "bf16", "16", None), 2048, 24, 0.02, 2**19, 1e9)
    lengths = (2048, 4096, 7000, 2**19)
    found = {length: one_gpu.reading_for(row, kind, length, settings) for length in lengths}
    assert found[2048] == (2048, False)
    assert [chunk for chunk, _ in found.values()] == sorted((chunk for chunk, _ in found.values()), reverse=True)
    assert found[2**19] == (one_gpu.LEAST_CHUNK, kind == "ours")
    for length, (chunk, sliced) in found.items():
        planned = one_gpu.forecast(row, kind, length, replace(settings, chunk=chunk))
        assert planned.fits == (length < 2**19)
        assert planned.sliced == sliced
        if chunk < 2048:
            assert not one_gpu.forecast(row, kind, length, replace(settings, chunk=2 * chunk)).fits


def test_a_try_is_read_in_slices_where_that_is_said():
    model = build(SHAPES["tiny"], "bf16", torch.device("cpu"))
    memory = one_gpu.Memory(torch.device("cpu"), 2**40)
    bench = one_gpu.Bench(model, memory, variant=Variant("full", "bf16", "16", None), chunk=256, new=4)
    caches, make = [], bench.cache
    bench.cache = lambda kind: caches.append(make(kind)) or caches[-1]
    for bench.sliced in (False, True):
        assert bench.attempt("ours", 300).sliced is bench.sliced
        assert caches[-1].state.sliced is bench.sliced
    bench.sliced = False
    assert bench.attempt("full", 300).fits


def test_a_full_cache_of_llama_70b_is_forecast():
    """32,768 tokens and a few of an answer, in chunks of 2,048: measured on an H200 on 2026-11-26."""
    settings = one_gpu.Settings(Variant("full", "bf16", "16", None), 2048, 24, 0.02, 2**19, 1e9)
    planned = one_gpu.forecast(Row.parse("llama-3-70b:int4:78GB"), "full", 32768, settings)
    assert planned.peak_bytes - reserve_of(78 * 10**9) == pytest.approx(54_925_012_992, rel=0.01)


def test_what_adaptive_kept_of_real_text_is_stored_alike():
    policy = as_measured.parse("adaptive-as-measured:ratio=0.5")
    assert sum(policy.shares) == pytest.approx(1)
    model = build(SHAPES["tiny"], "bf16", torch.device("cpu")).float()
    cache = refreekv.ReFreeKVCache(model, policy)
    with torch.no_grad():
        model(torch.randint(1, 128, (1, 3000)), past_key_values=cache)
    report = cache.report
    assert report.budget == pytest.approx(0.5, abs=0.02)
    coded = {name: share for name, share in report.formats.items() if name != "exact"}
    for share, wanted in zip(coded.values(), policy.shares, strict=True):
        assert share / sum(coded.values()) == pytest.approx(wanted, abs=0.01)


def test_a_chat_is_measured(capsys, tmp_path):
    folder, out = save_chat_model(tmp_path / "tiny"), tmp_path / "chat.jsonl"
    common = [str(folder), "--tokens", "150", "--new", "4", "--threads", "1"]
    chat_speed.main([*common, "--out", str(out), "--rounds", "2"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["policy"], row["n"], row["new"]) for row in rows] == [("full", 2, 4), ("adaptive", 2, 4)]
    assert all(row["tokens_per_second"] > 0 and row["first_token_seconds"] > 0 for row in rows)
    assert rows[0]["kv_bytes"] == rows[0]["full_bytes"] == rows[1]["full_bytes"]
    chat_speed.main(["--table", str(out)])
    assert "1 threads" in capsys.readouterr().out


def test_what_fits_nothing_is_said(capsys, tmp_path):
    said, rows = run(capsys, tmp_path, "--rows", "tiny:bf16:1KB", "--kinds", "full")
    assert rows[0]["longest"] == 0
    assert "nothing fits" in said
    main(["--table", str(tmp_path / "rows.jsonl")])


def test_memory_is_free_after_it_ran_out():
    """Nothing of a try is left, or the next one would not fit."""
    import gc
    import weakref

    model = build(SHAPES["tiny"], "bf16", torch.device("cpu"))
    memory = one_gpu.Memory(torch.device("cpu"), weight_bytes(model) + 10_000)
    bench = one_gpu.Bench(model, memory, variant=Variant("full", "bf16", "16", None), chunk=64, new=2)
    made, original = [], bench.cache
    bench.cache = lambda kind: made.append(weakref.ref(cache := original(kind))) or cache
    for kind in one_gpu.KINDS:
        assert not bench.attempt(kind, 2000).fits
    gc.collect()
    assert [one() for one in made] == [None, None]


@pytest.mark.parametrize("text", ["tiny", "tiny:int4", "huge:int4:8GB", "tiny:int3:8GB", "tiny:int4:8"])
def test_rows_that_are_none(text, capsys):
    with pytest.raises(ValueError, match=r"a row is SHAPE:WEIGHTS:MEMORY|has no unit"):
        Row.parse(text)
    with pytest.raises(SystemExit):
        main(["--rows", text])


@pytest.mark.usefixtures("shapes_looked_at_once")
def test_the_table_is_that_of_the_issue():
    rows = [Row.parse(text) for text in one_gpu.TABLE]
    assert [(row.shape, row.weights, row.limit) for row in rows] == [
        ("llama-3-70b", "int4", 48 * 10**9),
        ("qwen2.5-32b", "int4", 24 * 10**9),
        ("llama-3-8b", "int4", 8 * 10**9),
        ("llama-3-8b", "bf16", 24 * 10**9),
    ]
    for row in rows:
        variant = Variant("streaming-llm:ratio=0.4", "int4", "auto", None)
        settings = one_gpu.Settings(variant, 2048, 24, 0.02, 2**19, 1e9)
        full, ours = (one_gpu.forecast(row, kind, 8000, settings).longest_context for kind in one_gpu.KINDS)
        assert full > 4000
        assert ours > 1.3 * full
        hosted = replace(settings, variant=replace(variant, host="auto"))
        assert one_gpu.forecast(row, "ours", 8000, hosted).longest_context > 2 * ours


def test_the_page(tmp_path, capsys, monkeypatch):
    import one_gpu_page

    monkeypatch.setattr(one_gpu_page, "MODELS", (("llama-3-8b", "bf16"), ("llama-3-8b", "int4")))
    monkeypatch.setattr(one_gpu_page, "CARDS", ("8GiB", "24GiB"))
    out = tmp_path / "rows.jsonl"
    main(["--device", "cpu", "--rows", "tiny:bf16:1GB", "--at", "100", "--out", str(out)])
    capsys.readouterr()
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps(asdict(chat_speed.Chat("m", "full", "bf16", 9, 3, 1.0, 2.0, 8, 8, 1.0, 1, "here"))))
    one_gpu_page.main([str(out), str(chats)])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| m | 9 | full | 100% | 8 B | 1.0 s | 2.0 |" in rows
    assert "measured" in text
    # Weights in 16 bits take 15 GiB.
    plain, hosted = [row.split(" | ") for row in rows if row.startswith("| llama-3-8b, bf16")]
    assert plain[1] == hosted[1] == "–"
    assert plain[2].count("\\|") == 2
    lengths = [int(part.strip(" |\\").replace(",", "")) for part in plain[2].split("\\|")]
    made = one_gpu_page.planned("llama-3-8b", "bf16", 24 * 2**30, policy="adaptive", kv="auto")
    longest_of = [min(made.rows[place].longest_context, one_gpu_page.LONGEST) for place in (0, -1)]
    assert lengths[:2] == [length - one_gpu_page.OUTPUT for length in longest_of]
    assert int(hosted[2].split(" ")[0].replace(",", "")) >= lengths[2] >= lengths[1] > lengths[0]
    assert "GiB; " in hosted[2]
    measured = [row for row in rows if row.startswith("| tiny |")]
    assert len(measured) == 2
    assert all("| CPU |" in row and "≤" not in row for row in measured)
    # Of results of before, what tensors and the driver held is a sum.
    before = [json.loads(line) for line in out.read_text().splitlines()]
    del before[0]["at"]["peak_prompt"]
    assert "| ≤ " in one_gpu.table(before).splitlines()[2]
    assert "CPU, counted and not measured" in text


def test_a_forecast_leaves_the_model_as_it_is():
    """The configuration is the running model's, whose attention is read from it at each call."""
    model = build(SHAPES["tiny"], "bf16", torch.device("cpu"))
    assert model.config is SHAPES["tiny"]
    settings = one_gpu.Settings(Variant("full", "bf16", "16", None), 2048, 24, 0.02, 2**19, 1e9)
    one_gpu.forecast(Row.parse("tiny:bf16:1GB"), "full", 300, settings)
    assert model.config._attn_implementation == "sdpa"
