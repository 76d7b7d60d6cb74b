"""Codes in pinned host memory on CUDA: the same tokens, whichever way the GPU gets at them, and less of its memory."""

import gc
import time

import pytest
import torch

import refreekv
from helpers.models import build
from refreekv.engines.transformers.attachment import attached
from refreekv.engines.transformers.host_tier import MARGIN
from refreekv.engines.transformers.prompt import ATTACHMENT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LADDER = "k4v2+k6v4+int8"
PROMPT, CHUNK, NEW = 32768, 2048, 72


@pytest.fixture(scope="module")
def model():
    """Of Llama's proportions, bfloat16: large enough that K/V are most of a long prompt's memory."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    made = build("llama", attention="sdpa", num_hidden_layers=13, head_dim=128, **shape, initializer_range=0.02)
    made = made.to("cuda", torch.bfloat16)
    with attached(made):
        yield made


def answer(model, ids, host, *, decode="graph", chunk=None, kv_dtype=LADDER, policy="adaptive"):
    """Logits, layers in host memory, bytes on the device and in host memory, the peak, and seconds a token."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache = refreekv.ReFreeKVCache(model, policy, kv_dtype=kv_dtype, host_memory=host, decode=decode)
    given = {"prefill_chunk_size": chunk} if chunk else {}
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, **given,
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(out.sequences, past_key_values=cache, max_new_tokens=24, min_new_tokens=24, pad_token_id=0)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / 24
    if decode == "graph":
        steps = vars(model)[ATTACHMENT]._decoder
        assert not steps._refused, steps._refused
        assert steps._last._graph is not None
    report = cache.report
    hosted = [layer.index for layer in report.layers if layer.host_bytes]
    return torch.stack(out.logits), hosted, report.bytes_after - report.host_bytes, report.host_bytes, peak, seconds


@pytest.mark.parametrize("chunk", [None, CHUNK], ids=["one call", "chunks"])
@pytest.mark.parametrize("policy", ["full", "adaptive"])
def test_the_gpu_reads_the_same_from_host_memory(model, policy, chunk):
    ids = torch.randint(2, 90, (1, PROMPT), device="cuda")
    ways = {
        "on the device": (None, "graph"),
        "brought": ("64GiB", "graph"),
        "read there": ("64GiB", "eager"),
        "some": ("0.07GiB", "graph"),
    }
    found = {}
    for name, (host, decode) in ways.items():
        found[name] = answer(model, ids, host, decode=decode, chunk=chunk, policy=policy)
        _, hosted, here, there, peak, seconds = found[name]
        print(
            f"\n{policy}, {name}: {len(hosted)} layers, {here >> 20} MiB here, {there >> 20} MiB in host memory, "
            f"peak {peak >> 20} MiB, {1e3 * seconds:.2f} ms a token, {there / seconds / 1e9:.1f} GB/s"
        )
    plain = found["on the device"]
    assert plain[1] == []
    assert len(found["brought"][1]) == 13
    assert 0 < len(found["some"][1]) < 13 or policy == "adaptive"
    assert torch.equal(plain[0], found["brought"][0])
    assert torch.equal(plain[0], found["some"][0])
    # Eager attention has another forward around it, whose last bits differ.
    assert (plain[0][:2].float() - found["read there"][0][:2].float()).norm() < 0.02 * plain[0][:2].float().norm()
    # What is generated stays here, and the room for it.
    assert found["brought"][2] < 0.1 * plain[2] + 13 * 4 * 512 * 256
    if chunk is not None and policy == "full":
        assert found["brought"][4] < plain[4] - 2**28


def test_several_caches_share_a_step(model):
    lengths = (3000, 700, 9000)
    outcome = []
    for host in (None, "64GiB"):
        found, caches = [], []
        for length in lengths:
            ids = torch.randint(
                2, 90, (1, length), generator=torch.Generator("cuda").manual_seed(length), device="cuda"
            )
            caches.append((refreekv.ReFreeKVCache(model, "full", kv_dtype="int4", host_memory=host), ids))
        for _ in range(2):
            for number, (cache, ids) in enumerate(caches):
                out = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0)
                caches[number] = cache, out
                found.append(out)
        outcome.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*outcome, strict=True))


def test_what_does_not_fit_goes_by_itself(model):
    """In a process that may take little: without host memory there is not enough, with "auto" there is."""
    ids = torch.randint(2, 90, (1, 2 * PROMPT), device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    wanted, hosted, *_, peak, _ = answer(model, ids, "auto", chunk=CHUNK, kv_dtype="int8", policy="full")
    assert hosted == []
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 0.8 * peak + MARGIN
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        found, hosted, *_, less, seconds = answer(model, ids, "auto", chunk=CHUNK, kv_dtype="int8", policy="full")
        print(f"\nauto: {len(hosted)} layers, peak {less >> 20} of {peak >> 20} MiB, {1e3 * seconds:.2f} ms a token")
        torch.cuda.set_per_process_memory_fraction((limit - MARGIN) / total)
        with pytest.raises(torch.OutOfMemoryError):
            answer(model, ids, None, chunk=CHUNK, kv_dtype="int8", policy="full")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(found, wanted)
    assert less < 0.9 * peak
