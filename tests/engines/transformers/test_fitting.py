"""Prompts that do not fit in one call: chunks by forecast, and after an out-of-memory error; on a CPU neither."""

import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import random_models
import refreekv
from helpers.driving import greedy
from helpers.models import build, prompts
from helpers.planning import LLAMA
from refreekv import KVDtype, ReFreeKVCache, policies
from refreekv.core.footprint import Reader, chunked_bytes
from refreekv.core.quantisation import PROMPT_DTYPES
from refreekv.engines.transformers import fitting
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.fitting import Manner
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.packed_weights import PackedEmbedding, PackedLinear
from refreekv.kernels import weight_blocks

CHUNK = 40
NUMBER = KVDtype("int8", recent=4)
LONG = (150, 40, 121, 99)
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build("llama", attention="sdpa", head_dim=16)


@pytest.fixture
def calls(monkeypatch):
    """Lengths of what the first layer is given, call by call."""
    seen, update = [], ReFreeKVLayer.update

    def watched(self, keys, values, *args, **kwargs):
        if self.index == 0:
            seen.append(keys.shape[2])
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(ReFreeKVLayer, "update", watched)
    return seen


def split(length, chunk=CHUNK):
    return [chunk] * ((length - 1) // chunk) + [(length - 1) % chunk + 1]


@pytest.fixture
def forecast(monkeypatch):
    monkeypatch.setattr(fitting, "forecast", lambda *_: fitting.Manner(CHUNK))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": False, "use_cache": True}], ids=str)
def test_chunks_by_forecast_are_those_of_a_caller(model, calls, forecast, settings):
    ids, mask = prompts(LONG, seed=6)
    with refreekv.compress(model, "refreekv", threshold=0.2, prompt_dtype=NUMBER) as kv:
        got = model.generate(ids, attention_mask=mask, max_new_tokens=6, **settings)
        assert calls[: len(split(150))] == split(150)
        said = kv.report
        own = {"prefill_chunk_size": CHUNK, **settings}
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, **own)
        assert kv.report == said
    assert torch.equal(got, wanted)


def test_embeddings_and_a_mask_that_is_left_out(model, calls, forecast):
    ids, _ = prompts((150,), seed=6)
    with refreekv.compress(model, "full", prompt_dtype=None):
        plain = model.generate(ids, max_new_tokens=6, prefill_chunk_size=CHUNK)
        calls.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=6), plain)
        assert calls[:4] == split(150)
        # Embeddings come in one call, as they do without a forecast.
        calls.clear()
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)
        assert calls[0] == 150


@pytest.mark.parametrize("only_new", [False, True])
def test_a_later_turn(model, calls, forecast, only_new):
    ids, _ = prompts((150,), seed=6)
    cache, other = (ReFreeKVCache(model, "streaming-llm", size=60, prompt_dtype=None) for _ in range(2))
    for one in (cache, other):
        sequence = greedy(model, ids[:, :50], None, one, steps=3)
        text = torch.cat([sequence, ids[:, 50:]], 1)
        if one is other:
            # All in one call.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fitting, "forecast", lambda *_: fitting.Manner())
                wanted = greedy(model, text, torch.ones_like(text), one)
            break
        calls.clear()
        new = text[:, one.get_seq_length() :] if only_new else text
        got = greedy(model, new, torch.ones_like(text), one)
        assert calls[:3] == split(text.shape[1] - 52)
    assert torch.equal(got[:, -6:], wanted[:, -6:])
    assert cache.report == other.report


class Failing:
    """A layer's `update` that has no memory for more than so many new tokens, from the second layer on."""

    def __init__(self, most):
        self.most, self.update, self.failed = most, ReFreeKVLayer.update, 0

    def patch(self, monkeypatch):
        def update(layer, keys, values, *args, **kwargs):
            if layer.index == 2 and keys.shape[2] > self.most:
                self.failed += 1
                raise torch.OutOfMemoryError("no memory")
            return self.update(layer, keys, values, *args, **kwargs)

        monkeypatch.setattr(ReFreeKVLayer, "update", update)
        monkeypatch.setattr(fitting, "CHUNKS", (CHUNK,))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_out_of_memory_is_answered_by_chunks_once(model, monkeypatch, caplog, settings):
    ids, mask = prompts((150,), seed=6)
    with refreekv.compress(model, "refreekv", threshold=0.2, prompt_dtype=NUMBER) as kv:
        wanted = greedy(model, ids, mask, None, prefill_chunk_size=CHUNK, **settings)
        said = kv.report
        failing = Failing(CHUNK)
        failing.patch(monkeypatch)
        with caplog.at_level(logging.WARNING, logger="refreekv"):
            got = greedy(model, ids, mask, None, **settings)
        assert failing.failed == 1
        assert torch.equal(got, wanted)
        assert kv.report == said
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("x 150 tokens did not fit in one call (out of memory) and is read again in chunks of 40")


def test_chunks_that_are_too_large_are_halved(model, monkeypatch, caplog, calls):
    ids, mask = prompts((150,), seed=6)
    with refreekv.compress(model, "full", prompt_dtype=None):
        wanted = greedy(model, ids, mask, None)
        failing = Failing(CHUNK // 4)
        failing.patch(monkeypatch)
        monkeypatch.setattr(fitting, "LEAST", 5)
        calls.clear()
        with caplog.at_level(logging.WARNING, logger="refreekv"):
            got = greedy(model, ids, mask, None)
    assert calls[:3] == [150, CHUNK, CHUNK // 2]  # each failed; only a new cache begins anew
    assert calls[3:18] == split(150, CHUNK // 4)
    assert torch.equal(got, wanted)
    said = [record.getMessage().partition("did not fit in ")[2] for record in caplog.records]
    more = " (out of memory) and is read again in chunks of "
    assert said == [f"one call{more}40", f"chunks of 40{more}20", f"chunks of 20{more}10"]
    # Not to nothing.
    failing.most = 4
    with pytest.raises(torch.OutOfMemoryError):
        greedy(model, ids, mask, ReFreeKVCache(model, "full"))


def test_out_of_memory_that_chunks_do_not_cure(model, monkeypatch):
    ids, mask = prompts((150,), seed=6)
    failing = Failing(8)
    failing.patch(monkeypatch)
    cache = ReFreeKVCache(model, "full", prompt_dtype="int8")
    with pytest.raises(torch.OutOfMemoryError):
        greedy(model, ids, mask, cache)
    assert failing.failed == 2
    # Neither is one of a later turn, whose earlier prompt cannot be read again.
    cache = ReFreeKVCache(model, "full")
    sequence = greedy(model, ids[:, :8], mask[:, :8], cache, steps=2)
    with pytest.raises(torch.OutOfMemoryError):
        greedy(model, torch.cat([sequence, ids], 1), None, cache)
    assert failing.failed == 3
    # Nor what is shorter than a chunk.
    with pytest.raises(torch.OutOfMemoryError):
        greedy(model, ids[:, :CHUNK], mask[:, :CHUNK], ReFreeKVCache(model, "full"))
    assert failing.failed == 4


def test_what_does_not_fit_in_eight_bits_is_held_in_fewer(model, monkeypatch, caplog):
    ids, mask = prompts((150,), seed=6)
    narrow = str(PROMPT_DTYPES[1])
    wanted, own = (ReFreeKVCache(model, "adaptive:min_length=64", prompt_dtype=dtype) for dtype in (narrow, "auto"))
    expected = greedy(model, ids, mask, wanted, prefill_chunk_size=64)
    monkeypatch.setattr(fitting, "CHUNKS", (64,))
    monkeypatch.setattr(fitting, "forecast", lambda *_: fitting.Manner(64, PROMPT_DTYPES[1]))
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        got = greedy(model, ids, mask, own)
    assert [r.getMessage() for r in caplog.records] == [
        f"a prompt of 1 x 150 tokens is read in chunks of 64, held in {narrow}, as memory is short"
    ]
    assert torch.equal(got, expected)
    assert own.report == wanted.report
    # What was read in few bits is not stored in more.
    rungs = [own.kv_dtype.rungs.index(PROMPT_DTYPES[1]) + 1 for _ in own.pruned_layers]
    assert all(
        not any(map(any, arena.lengths))
        for layer, first in zip(own.pruned_layers, rungs, strict=True)
        for arena in layer.ragged.tables[1 + first :]
    )
    # The next prompt is held as usual.
    assert own.state.held_as == PROMPT_DTYPES[0]


def test_formats_follow_chunks_where_memory_runs_out():
    manner, tried = fitting.Manner(), []
    while manner is not None:
        tried.append(str(manner))
        manner = manner.smaller(free=True)
    narrow = f", held in {PROMPT_DTYPES[1]}"
    assert tried == [
        "one call", *(f"chunks of {n}" for n in (512, 256, 128)), *(f"chunks of {n}{narrow}" for n in (512, 256, 128))
    ]  # fmt: skip
    assert fitting.Manner(128).smaller(free=False) is None


def test_a_format_that_was_asked_for_stays_where_memory_runs_out(model, monkeypatch, caplog):
    """And nobody is told that memory is the reason for it."""
    ids, mask = prompts((150,), seed=6)
    failing = Failing(8)
    failing.patch(monkeypatch)
    cache = ReFreeKVCache(model, "full", kv_dtype="int4", prompt_dtype="int4")
    monkeypatch.setattr(fitting, "LEAST", CHUNK)
    monkeypatch.setattr(fitting, "forecast", lambda *_: fitting.manner_for(model, cache, 1, 150, 0))
    with caplog.at_level(logging.WARNING, "refreekv"), pytest.raises(torch.OutOfMemoryError):
        greedy(model, ids, mask, cache)
    assert caplog.records == []
    assert failing.failed == 1


def test_a_cpu_reads_a_prompt_in_one_call(model, calls):
    ids, mask = prompts((600,), seed=6)
    with refreekv.compress(model, "full"):
        greedy(model, ids, mask, None, steps=2)
    assert calls[0] == 600
    assert fitting.forecast(model, ReFreeKVCache(model, "full"), 1, 10**6) == fitting.Manner()


def test_chunks_that_fit():
    """Of Llama-3-8B's shape in bfloat16: 128 KiB of K/V and 116 KiB of activations a token."""
    config = LlamaConfig(**{name: LLAMA[name] for name in SHAPE})
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"), modules=list)
    length = 131_072
    layer, token = length * 4096, 2 * (4 * 4096 + 3 * 14336)

    def chunk(free, rows=1, **settings):
        cache = PrunedCache(config, policies.create("full"), **settings)
        manner = fitting.manner_for(model, cache, rows, length, int(free))
        return manner.chunk if manner.number == PROMPT_DTYPES[0] else (manner.chunk, str(manner.number))

    # In one call: all layers, and what the tokens take. A policy may keep everything.
    whole = 32 * layer + length * token
    assert chunk(whole) is None
    assert chunk(2 * whole, rows=2) is None
    assert chunk(whole - 1) == 8192

    def taken(tokens, kept, held=32 * layer):
        # Within attention, a layer in full and masks; or in the feed-forward part behind it.
        return max(held, kept) + layer + tokens * max(2 * 4 * 4096 + 3 * length, token + length)

    assert chunk(taken(4096, 32 * layer)) == 4096
    assert chunk(taken(4096, 32 * layer) - 1) == 2048
    assert chunk(0) == (512, str(PROMPT_DTYPES[1]))
    # Held in 8 bits until the end, and in fewer from then on; or in fewer all the time.
    coded = taken(2048, 0, held=0.51 * 32 * layer)
    assert chunk(coded, kv_dtype="int4") == chunk(coded, kv_dtype="int8") == 2048
    assert chunk(coded, kv_dtype="int4", prompt_dtype="int4") == 8192
    assert chunk(coded, kv_dtype="int4", prompt_dtype=None) == 512
    # In fewer than 8 if that does not do, which makes no difference where all is kept in 16 bits.
    narrow = str(PROMPT_DTYPES[1])
    fewer = taken(2048, 0, held=0.34 * 32 * layer)
    assert chunk(fewer, kv_dtype="int4") == (2048, narrow)
    assert chunk(fewer, kv_dtype=f"k4v2+{narrow}+k7v6") == (2048, narrow)
    assert chunk(fewer, kv_dtype="k7v6") == chunk(coded) == (512, narrow)
    # With codes of all layers in host memory: two and one more pass through.
    there = taken(2048, 0, held=0.52 * 3 * layer)
    assert chunk(there, kv_dtype="int4") == (512, narrow)
    assert chunk(there, kv_dtype="int4", host_memory=2**50) == 2048


PACKED = ((32, 64), (64, 64), (64, 128), (128, 64))


@pytest.mark.parametrize(
    ("form", "found"), [("bf16", ((), 0)), ("int4-blocks", ((), 64 * 128)), ("int4-nf4", (PACKED, 0))]
)
def test_matrices_that_are_unpacked_count(form, found, monkeypatch):
    if form == "int4-nf4":
        pytest.importorskip("bitsandbytes")
    model = random_models.build(random_models.SHAPES["tiny"], form, torch.device("cpu"))
    assert fitting.unpacked(model) == found
    monkeypatch.setattr(weight_blocks, "UNPACKED", 1000)
    assert fitting.unpacked(model) == (found[0], 15 * 64 if form == "int4-blocks" else 0)
    if form == "int4-nf4":  # somebody else's function: who knows what it takes
        layer = model.model.layers[0].mlp.down_proj
        layer.forward = layer.forward
        assert fitting.unpacked(model) == (PACKED, 64 * 128)


def test_matrices_in_slices_where_whole_ones_do_not_fit(monkeypatch):
    """Of Llama-3-8B's shape in 4 bits: before the chunk is halved, and before anything is lost."""
    config = LlamaConfig(**{name: LLAMA[name] for name in SHAPE})
    matrices = ((1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096))
    monkeypatch.setattr(fitting, "unpacked", lambda model: (matrices, 0))
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"), modules=list)
    reader = Reader.of(config, matrices)

    def manner(free, length, **settings):
        cache = PrunedCache(config, policies.create("full"), **settings)
        return fitting.manner_for(model, cache, 1, length, int(free))

    # In one call.
    results, three = 2 * (2 * 4096 + 2 * 14336), 2 * (4 * 4096 + 3 * 14336)
    cache = 32 * 1000 * 4096
    assert manner(cache + 1000 * results + 2 * 4096 * 14336, 1000) == Manner()
    assert manner(cache + 1000 * results + 2 * 4096 * 14336 - 1, 1000) == Manner(sliced=True)
    assert manner(cache + 1000 * three, 1000) == Manner(sliced=True)
    # In chunks: the first that fits of whole matrices, slices, and half the chunk.
    length, order = 16_384, []
    layers = fitting._layers(config, PrunedCache(config, policies.create("full")), 2)
    for number, chunk in itertools.product(PROMPT_DTYPES, (2048, 1024, 512)):
        kept = sum(one.stored_bytes(length, number) for one in layers)
        for way in reader.ways:
            taken = chunked_bytes(layers, length, chunk, number, kept, way)
            order.append((taken, Manner(chunk, number, way.is_sliced)))
    found = {manner(taken, length, kv_dtype="k4v2+k6v4+int8") for taken, _ in order}
    assert found == {next(one for need, one in order if need <= taken) for taken, _ in order}
    assert {Manner(2048), Manner(2048, sliced=True), Manner(1024, sliced=True)} < found
    assert Manner(512) not in found  # takes more than slices of twice the chunk
    assert manner(0, length) == Manner(512, PROMPT_DTYPES[-1], sliced=True)
    assert manner(0, length, prompt_dtype=None) == Manner(512, sliced=True)


def test_of_an_embedding_in_blocks_only_rows_are_unpacked():
    model = random_models.build(random_models.SHAPES["tiny"], "int4-blocks", torch.device("cpu"))
    before, packed = fitting.unpacked(model), next(m for m in model.modules() if isinstance(m, PackedLinear))
    model.model.embed_tokens = PackedEmbedding(packed.blocks, torch.bfloat16)
    assert fitting.unpacked(model) == before


def test_an_embedding_of_4_bits_is_no_matrix_that_a_prompt_is_multiplied_with():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, embedding = build("llama", attention="sdpa"), bitsandbytes.nn.EmbeddingNF4(96, 64)
    embedding.load_state_dict({"weight": torch.randn(96, 64)})
    model.model.embed_tokens = embedding.to("cpu")
    assert embedding.weight.quant_state is not None
    assert fitting.unpacked(model) == ((), 0)


@torch.no_grad()
def test_what_is_held_by_now_need_not_be_found_again():
    model = build("llama", attention="sdpa", head_dim=64)
    cache, length = ReFreeKVCache(model, "full"), 20_000
    model(torch.randint(2, 90, (1, 2000)), past_key_values=cache)
    entry, token = 4 * 2 * 128 * 4, 4 * (4 * 64 + 3 * 96)
    free = 18_000 * (entry + token)
    assert fitting.manner_for(model, cache, 1, length, free).chunk is None
    assert fitting.manner_for(model, cache, 1, length, free - 1).chunk is not None
