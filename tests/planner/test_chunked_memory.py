"""What plans say about prompts that are read in chunks, against what caches hold."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from helpers.driving import storage_bytes, tensors_of
from helpers.live_bytes import LiveBytes
from helpers.models import build
from helpers.planning import LLAMA
from planner.test_plan import GIB, model_of
from refreekv import KVDtype, ReFreeKVCache
from refreekv.core.footprint import MASK_BYTES, LayerKV, Reader, called_bytes, chunked_bytes, reading_bytes
from refreekv.core.quantisation import FLUSH
from refreekv.engines.transformers import layer as layers_of_caches
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.planner import geometry, memory
from refreekv.planner import plan as plans
from refreekv.planner.memory import Load, Machine, Scenario
from refreekv.storage import unfinished as unfinished_prompts

LAYERS, PROMPT, CHUNK = 10, 2400, 240


@pytest.fixture(scope="module")
def model():
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    small = build("llama", attention="sdpa", num_hidden_layers=LAYERS, initializer_range=0.02, **shape)
    return small.to(torch.bfloat16)


def held(layers):
    """K/V bytes that can be reached, padding, queries, indices and shared matrices not among them."""
    tensors = []
    for layer in layers:
        others = [*tensors_of(layer._queries), *([layer._padding.seen] if layer._padding.seen is not None else [])]
        mapped = [layer.reading.prompt._maps] if layer.reading is not None else []
        coding = None if layer.ragged is None else layer.ragged.coding
        mapped += [coding.maps] if coding is not None else []
        others += [part for maps in mapped if maps is not None for part in maps.tensors]
        ignored = {part.data_ptr() for part in others}
        tensors += [part for part in tensors_of(layer) if part.data_ptr() not in ignored]
    return storage_bytes(tensors)


@pytest.mark.parametrize(
    ("number", "kv_dtype", "ratio"),
    [("int8", None, 0.2), ("int8", None, 1.0), ("int8", "int4", 1.0), ("int4", "int4", 0.9), ("k6v4", None, 0.4),
     (None, None, 0.5)],
)  # fmt: skip
@torch.no_grad()
def test_a_forecast_is_what_is_held(model, number, kv_dtype, ratio):
    cache = ReFreeKVCache(model, "streaming-llm", ratio=ratio, kv_dtype=kv_dtype, prompt_dtype=number)
    cache.state.arena = True
    layers = (LayerKV("full", 2, 64, 64),) * LAYERS
    number, kept_number = KVDtype.parse(number), KVDtype.parse(kv_dtype)
    kept = sum(layer.stored_bytes(ratio * PROMPT, kept_number) for layer in layers)
    most, after = 0, []
    attended, stored = ReFreeKVLayer.after_attention, ReFreeKVLayer._store

    def storing(self, storage):
        # What moves there is still where it was.
        nonlocal most
        most = max(most, held(cache.pruned_layers) + storage.nbytes)
        stored(self, storage)

    def watched(self, call):
        nonlocal most
        most = max(most, held(cache.pruned_layers))
        attended(self, call)
        most = max(most, held(cache.pruned_layers))

    with pytest.MonkeyPatch.context() as patch, cache.prompt_until(PROMPT):
        patch.setattr(ReFreeKVLayer, "after_attention", watched)
        patch.setattr(ReFreeKVLayer, "_store", storing)
        for piece in torch.randint(2, 90, (1, PROMPT)).split(CHUNK, 1):
            model(piece, past_key_values=cache)
            after.append(held(cache.pruned_layers))
    # Lines are allocated for all of the prompt; what is not coded grows with it.
    read = PROMPT if number is not None else PROMPT - CHUNK
    unfinished = sum(layer.unfinished_bytes(read, number) for layer in layers)
    assert max(after[:-1]) == pytest.approx(unfinished, rel=0.05)
    # What is coded has room for entries that are not yet, which plans leave out: of a real prompt it is little.
    room = 0 if kv_dtype is None else LAYERS * 2 * 256 * FLUSH
    assert after[-1] == pytest.approx(kept + room, rel=0.05)
    forecast = reading_bytes(layers, PROMPT, number, kept)
    if number is None:
        # Each layer's own part is there once more while it is moved, and layers behind it lack the last chunk.
        forecast += layers[0].stored_bytes(ratio * PROMPT, None) - (LAYERS - 1) * layers[0].bytes(CHUNK)
    assert most == pytest.approx(forecast, rel=0.05)


@pytest.mark.parametrize(("kv_dtype", "ratio"), [(None, 0.25), ("int4", 1.0), ("int8", 1.0), (None, 0.8)])
@torch.no_grad()
def test_the_peak_is_the_forecast(kv_dtype, ratio, monkeypatch):
    """All that is alive while a prompt is read as on a GPU: decisions are carried out late, masks are there, too."""
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    small = build("llama", attention="sdpa", num_hidden_layers=LAYERS, initializer_range=0.02, **shape).bfloat16()
    monkeypatch.setattr(layers_of_caches, "is_late", lambda device: True)
    monkeypatch.setattr(unfinished_prompts, "MOVED", 256)  # of a prompt as short as this
    layers, number = (LayerKV("full", 4, 64, 64),) * LAYERS, KVDtype("int8")
    kept = sum(layer.stored_bytes(ratio * PROMPT, KVDtype.parse(kv_dtype)) for layer in layers)
    pieces = torch.randint(2, 90, (1, PROMPT)).split(CHUNK, 1)
    for _ in range(2):  # the first one measures the model's own codes
        cache = ReFreeKVCache(small, "streaming-llm", ratio=ratio, kv_dtype=kv_dtype, prompt_dtype=number)
        cache.state.arena = True
        with LiveBytes() as bytes_of, cache.prompt_until(PROMPT):
            for piece in pieces:
                small(piece, past_key_values=cache, logits_to_keep=1)
    room = 0 if kv_dtype is None else LAYERS * 4 * 256 * FLUSH
    forecast = chunked_bytes(layers, PROMPT, CHUNK, number, kept + room, Reader.of(small.config))
    assert bytes_of.peak == pytest.approx(forecast, rel=0.05)


@pytest.mark.parametrize("kv_heads", [2, 8])
@torch.no_grad()
def test_the_peak_of_a_full_cache_is_the_forecast(kv_heads):
    """Behind a mask sdpa copies keys and values for all query heads, where these share some."""
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": 64}
    small = build("llama", attention="sdpa", num_hidden_layers=LAYERS, initializer_range=0.02, **shape).bfloat16()
    layer, reader = LayerKV("full", kv_heads, 64, 64), Reader.of(small.config)
    assert reader.repeated == (2 * 8 * 64 if kv_heads < 8 else 0)
    cache = DynamicCache(config=small.config)
    with LiveBytes() as bytes_of:
        for piece in torch.randint(2, 90, (1, PROMPT)).split(CHUNK, 1):
            small(piece, past_key_values=cache, logits_to_keep=1)
    forecast = LAYERS * layer.bytes(PROMPT) + called_bytes(reader, 2, CHUNK, PROMPT)
    assert bytes_of.peak == pytest.approx(forecast, rel=0.05)


def test_use_counts_one_layer_in_full():
    measured = geometry.measure(model_of(LLAMA))
    machine = Machine(24 * GIB, 0, 0, activation_bytes=0, logit_bytes=0, chunk=2048)
    load, layer = Load(32768, 0), 32768 * 4096
    coded = 32 * measured.layers[0].unfinished_bytes(32768, KVDtype("int8"))
    assert coded == pytest.approx(32 * layer * (0.5 + 4 / 512), rel=0.01)

    def peak(budget, number=None, prompt_number="int8", **more):
        scenario = Scenario("", lambda _: budget, number, prompt_number=KVDtype.parse(prompt_number), **more)
        return memory.use(measured, machine, scenario, load).peak

    masks = 2048 * 32768 * MASK_BYTES
    assert peak(0.2) == int(coded + layer) + masks
    assert peak(0.9) == int(0.9 * 32 * layer + layer) + masks
    assert peak(0.2, prompt_number=None) == 32 * layer
    assert peak(1.0, KVDtype("int4"), "int4") < 0.4 * 32 * layer
    # A prompt that comes in one call is not coded on the way.
    one_call = Machine(24 * GIB, 0, 0, activation_bytes=0, logit_bytes=0, chunk=None)
    coded_call, plain_call = (
        memory.use(measured, one_call, Scenario("", lambda _: 0.2, prompt_number=one), load)
        for one in (KVDtype("int8"), None)
    )
    assert coded_call == plain_call


def test_what_reads_a_chunk_counts():
    """Llama-3-8B at 32k in chunks of 2k: the masks of attention, or the feed-forward part behind it."""
    model = model_of(LLAMA)
    measured, reader = geometry.measure(model), Reader.of(model.text)
    assert reader == Reader(4 * 4096 + 3 * 14336, 4 * 4096, 2 * 4096 + 2 * 14336, 2 * 4096)
    layers, layer, number = measured.layers, 32768 * 4096, KVDtype("int8")
    coded = sum(one.unfinished_bytes(32768, number) for one in layers)
    behind = coded + layer + 2048 * (2 * reader.activation + 32768)
    assert chunked_bytes(layers, 32768, 2048, number, 0, reader) == behind
    machine = Machine(24 * GIB, 0, 0, activation_bytes=2 * reader.activation, logit_bytes=0, chunk=2048, reader=reader)
    taken = memory.use(measured, machine, Scenario("", lambda _: 0.1, prompt_number=number), Load(32768, 0))
    assert taken.peak == int(behind)
    coded = sum(one.unfinished_bytes(65536, number) for one in layers)
    within = coded + 2 * layer + 2048 * (8 * 4096 + 3 * 65536)
    assert chunked_bytes(layers, 65536, 2048, number, 0, reader) == within
    # What is kept in the prompt's own format is there beside its codes.
    kept = sum(one.stored_bytes(65536, number) for one in layers)
    moving = coded + 2 * layer + layers[0].unfinished_lines(65536, number) + 64 * (8 * 4096 + 65536)
    assert chunked_bytes(layers, 65536, 64, number, kept, reader) == pytest.approx(moving, rel=1e-4)


def test_packed_matrices_count_whole_and_in_slices():
    """Llama-3-8B in 4 bits: 14336 x 4096 weights are unpacked, or, where these do not fit, a quarter of them."""
    model = model_of(LLAMA)
    made = plans.make(model, memory=24 * GIB, load=Load(8192, 0), weights="int4", number=KVDtype("int4"))
    reader, sliced = made.machine.reader.ways
    assert reader.matrices == ((1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096))
    results, three = 2 * 4096 + 2 * 14336, 4 * 4096 + 3 * 14336
    assert reader.behind(256, 2) == 2 * (256 * results + 4096 * 14336)
    assert sliced.behind(256, 2) == 2 * (256 * results + 4096 * 4096)
    assert sliced.behind(1024, 2) == 2 * 1024 * three > 2 * (1024 * results + 4096 * 4096)
    assert reader.behind(4096, 2) == sliced.behind(4096, 2) == 2 * 4096 * three
    assert Reader(3).ways == (Reader(3),)
    machine = Machine(0, 0, 0, activation_bytes=0, logit_bytes=0, chunk=256, reader=reader)
    plain, ours = (Scenario("", lambda _: 1.0, compacts=False, may_slice=may) for may in (False, True))

    def use(memory_bytes, scenario):
        return memory.use(geometry.measure(model), replace(machine, memory=memory_bytes), scenario, Load(1024, 0))

    whole = use(0, plain).peak
    assert not use(0, plain).sliced
    assert (use(whole, ours).peak, use(whole, ours).sliced) == (whole, False)
    short = use(whole - 1, ours)
    assert short.sliced
    assert whole - short.peak == 2 * 4096 * (14336 - 4096)


def test_slices_come_before_a_narrower_format_and_a_plan_says_so():
    model = model_of({**LLAMA, "max_position_embeddings": 131072})

    def plan(prompt):
        load = Load(prompt + 24, 24)
        return plans.make(model, memory=8 * GIB, load=load, weights="int4", number=KVDtype("int4"), chunk=256)

    short, ways = plan(1024), []
    for prompt in range(1024, 40_000, 512):
        taken = memory.use(short.geometry, short.machine, short.scenarios[-1], Load(prompt + 24, 24))
        if taken.peak <= short.machine.available:
            ways.append((str(taken.read), taken.sliced))
    assert sorted(set(ways), key=ways.index) == [("int8", False), ("int8", True), ("k6v4", False), ("k6v4", True)]
    longest = plan(short.rows[-1].longest_context - 24)
    assert longest.rows[-1].sliced
    assert not longest.rows[0].sliced
    assert any("some rows at a time" in note for note in longest.notes)
    assert not any("some rows at a time" in note for note in short.notes)


def test_longer_prompts_fit():
    model = model_of({**LLAMA, "max_position_embeddings": 131072})
    contexts = {}
    for held_as in (None, KVDtype("int8"), KVDtype("int4")):
        made = plans.make(model, memory=24 * GIB, load=Load(8192, 512), number=KVDtype("int4"), prompt_number=held_as)
        contexts[held_as] = made.rows[-1].longest_context
        full = made.rows[0].longest_context
        assert any("--prompt-kv" in note for note in made.notes) == (held_as is None)
    assert contexts[None] <= full < 1.5 * full < contexts[KVDtype("int8")] < contexts[KVDtype("int4")]
    # By itself a prompt is held in int8 as long as that fits, and in k6v4 then.
    longest, in_eight = (
        plans.make(model, memory=24 * GIB, load=Load(8192, 512), number=KVDtype("int4")),
        contexts[KVDtype("int8")],
    )
    assert in_eight < longest.rows[-1].longest_context <= contexts[KVDtype("int4")]
    assert longest.rows[-1].read == "int8"
    assert longest.notes == made.notes
    beyond = plans.make(model, memory=24 * GIB, load=Load(in_eight + 1, 512), number=KVDtype("int4"))
    assert beyond.rows[-1].fits
    assert beyond.rows[-1].read == "k6v4"
    assert any("held in k6v4, as it does not fit in int8" in note for note in beyond.notes)
