"""Prompts in chunks on CUDA: coded by the kernels as on the CPU, in the memory that plans say, chosen by forecast."""

import copy

import pytest
import torch

import refreekv
from helpers.models import build, prompts
from refreekv import KVDtype
from refreekv.core.footprint import LayerKV, Reader, chunked_bytes
from refreekv.core.quantisation import centre_of
from refreekv.engines.transformers import fitting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICIES = {
    "full": ("full", {}),
    "heavy-hitter": ("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}),
    "joint": ("cake", {"ratio": 0.4, "window": 4}),
}


@pytest.mark.parametrize("lengths", [(150,), (150, 40, 121, 99)], ids=["alone", "batch"])
@pytest.mark.parametrize("kv_dtype", [None, "int8:recent=8", "k4v4+int8:recent=8"])
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_gives_what_the_cpu_gives(policy, kv_dtype, lengths):
    name, parameters = POLICIES[policy]
    model = build("llama", attention="sdpa", head_dim=64)
    ids, mask = prompts(lengths, seed=3)
    outcome = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        with refreekv.compress(own, name, kv_dtype=kv_dtype, prompt_dtype="int8:recent=8", **parameters) as kv:
            out = own.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=8, do_sample=False,
                prefill_chunk_size=40, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            outcome.append((out.logits, [[row.kept_heads for row in layer.rows] for layer in kv.report.layers]))
    # An element half-way between two codes may be rounded to the other side.
    for one, other in zip(outcome[0][0][:2], outcome[1][0][:2], strict=True):
        assert (one - other.cpu()).norm() < 0.03 * one.norm()
    if policy != "heavy-hitter":  # whose peaks may be near-ties
        assert outcome[0][1] == outcome[1][1]


def big():
    """Of Llama's proportions, bfloat16: large enough that K/V are most of a long prompt's memory."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = build("llama", attention="sdpa", num_hidden_layers=12, head_dim=128, **shape, initializer_range=0.02)
    return model.to("cuda", torch.bfloat16)


@pytest.mark.parametrize(("kv_dtype", "ratio"), [(None, 0.25), ("int4", 1.0)])
def test_the_peak_is_the_forecast(kv_dtype, ratio):
    model, prompt, chunk = big(), 32768, 512
    ids = torch.randint(2, 90, (1, prompt), device="cuda")
    layers = (LayerKV("full", 4, 128, 128),) * 12
    number = None if kv_dtype is None else KVDtype(kv_dtype)
    kept = sum(layer.stored_bytes(ratio * prompt, number) for layer in layers)
    peaks = []
    for _ in range(2):  # the first one has kernels to compile
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with refreekv.compress(model, "streaming-llm", ratio=ratio, kv_dtype=kv_dtype, decode="eager"):
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    forecast = chunked_bytes(layers, prompt, chunk, KVDtype("int8"), kept, Reader.of(model.config))
    assert peaks[1] == pytest.approx(forecast, rel=0.05)


def test_what_does_not_fit_is_read_in_chunks(monkeypatch):
    """In a process that may take little: the forecast says chunks, and they fit; without it, one call fails first."""
    model, prompt = big(), 65536
    ids = torch.randint(2, 90, (1, prompt), device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    layers, reader = (LayerKV("full", 4, 128, 128),) * 12, Reader.of(model.config)
    kept = sum(layer.stored_bytes(prompt, KVDtype("int4")) for layer in layers)
    needed = 1.15 * chunked_bytes(layers, prompt, 512, KVDtype("int8"), kept, reader)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated() + needed
    free = torch.cuda.mem_get_info
    calls = []

    def read():
        with refreekv.compress(model, "full", kv_dtype="int4", decode="eager") as kv:
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            return kv.report.tokens

    forecast = fitting.forecast
    monkeypatch.setattr(fitting, "forecast", lambda *given: calls.append(forecast(*given)) or calls[-1])
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(needed), free(device)[1]))
        assert read() == prompt + 1
        assert calls.pop() in [fitting.Manner(chunk) for chunk in fitting.CHUNKS]
        monkeypatch.setattr(fitting, "forecast", lambda *_: fitting.Manner())
        assert read() == prompt + 1  # after an out-of-memory error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_means_take_little_memory():
    """PyTorch's own sum over so many tokens takes 128 MiB, and a copy without padding 32."""
    entries = torch.randn(1, 4, 32768, 128, device="cuda", dtype=torch.bfloat16)
    real = torch.ones(1, 1, 32768, dtype=torch.bool, device="cuda")
    for counted in (None, real):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = centre_of(entries, counted)
        assert torch.cuda.max_memory_allocated() - before < 2**24
        assert torch.allclose(found.double(), entries[:, :, 4:].double().mean(2), atol=1e-4)
