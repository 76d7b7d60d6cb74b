"""On CUDA, where layers are compacted a layer late and probes skip the float32 copy: the CPU is the judge."""

import copy

import pytest
import torch

import refreekv
from helpers.models import build, prompts
from refreekv.core.probes import attention_rows
from refreekv.evaluation import sweeps
from refreekv.evaluation.data.encoding import Encoded
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICIES = [
    ("refreekv", {"threshold": 0.2, "frozen_layers": 1}),
    ("refreekv", {"threshold": 0.2, "frozen_layers": 1, "probe_rows": 4, "norm_includes_sinks": True}),
    ("refreekv-heavy-hitter", {"threshold": 0.1, "frozen_layers": 0}),
    ("streaming-llm", {"size": 20}),
    ("cake", {"ratio": 0.4, "window": 4}),
]


@pytest.mark.parametrize(("name", "parameters"), POLICIES, ids=lambda p: p if isinstance(p, str) else "")
@pytest.mark.parametrize("lengths", [(60,), (52, 40, 29, 47)], ids=["alone", "batch"])
@pytest.mark.parametrize("chunk", [None, 16], ids=["whole", "chunked"])
def test_cuda_gives_what_the_cpu_gives(name, parameters, lengths, chunk):
    model = build("llama")
    ids, mask = prompts(lengths, seed=3)
    outcome = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        with refreekv.compress(own, name, **parameters) as kv:
            out = own.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=12,
                do_sample=False,
                prefill_chunk_size=chunk,
                return_dict_in_generate=True,
            )
            kept = [[row.kept_heads for row in layer.rows] for layer in kv.report.layers]
            outcome.append((out.sequences.cpu(), kept, kv.report.bytes_after))
    assert torch.equal(outcome[0][0], outcome[1][0])
    assert outcome[0][1] == outcome[1][1]
    # On CUDA segments have room to grow: 16 entries at these lengths, less what was generated.
    segments = len(lengths) * sum(len(layer.rows) > 0 for layer in kv.report.layers) * own.config.num_key_value_heads
    entry = kv.report.bytes_before // (kv.report.tokens * segments)
    assert outcome[0][2] < outcome[1][2] <= outcome[0][2] + 16 * segments * entry


@pytest.mark.parametrize("kv_dtype", ["k6v4:recent=8", "int8:recent=8", "int4:recent=8"])
@pytest.mark.parametrize(("name", "parameters"), POLICIES[:3], ids=lambda p: p if isinstance(p, str) else "")
def test_quantised_storage_is_that_of_the_cpu(name, parameters, kv_dtype):
    model = build("llama", head_dim=16)
    ids, mask = prompts((52, 40, 29, 47), seed=3)
    outcome = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        with refreekv.compress(own, name, kv_dtype=kv_dtype, **parameters) as kv:
            out = own.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=12, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            outcome.append((out.logits[1].cpu(), kv.report.bytes_after))
    assert outcome[0][1] == outcome[1][1]
    # An element half-way between two codes may be rounded to the other side.
    torch.testing.assert_close(outcome[0][0], outcome[1][0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probe_rows_equal_float64(dtype):
    query = torch.randn(2, 8, 3, 64, dtype=dtype, device="cuda")
    key = torch.randn(2, 2, 500, 64, dtype=dtype, device="cuda")
    got = attention_rows(query, key)
    logits = torch.einsum("bhkd,bhnd->bhkn", query.double(), key.double().repeat_interleave(4, 1)) / 8
    torch.testing.assert_close(got.double(), logits.softmax(-1), atol=2e-5, rtol=1e-3)


def test_no_layer_waits_for_more_than_the_next_one():
    """After a prefill everything is compacted: no full tensor of any pruned layer is left."""
    model = build("llama").cuda()
    ids, _ = prompts((200,), seed=4)
    cache = refreekv.ReFreeKVCache(model, "refreekv", threshold=0.2, frozen_layers=0)
    with torch.inference_mode():
        model(ids.cuda(), past_key_values=cache)
    for layer in cache.pruned_layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * layer.keys.element_size()
    assert cache.report.bytes_after < cache.report.bytes_before


def test_fidelity_is_that_of_the_cpu():
    """The bench's masked attention on a GPU, in one batch with many policies, against the CPU's."""
    chosen = sweeps.choose(["refreekv:threshold=0.2"], ["peers"])
    ids = prompts((157,), seed=5)[0][0].tolist()
    encoded = Encoded(ids, [5, 6, 7], [9, 11, 4], "")
    one = Job(Sample("1", "numbers", ""), encoded, {"full": None, **chosen})
    records = {}
    for device in ("cpu", "cuda"):
        model = build("gemma3", attention="sdpa").to(device)
        (found,) = Bench(model, None, "tiny", continuation=12).measure([one])
        records[device] = {record.policy: record for record in found}
    assert records["cuda"]["full"].kl_max < 1e-4
    alike = []
    for name, wanted in records["cpu"].items():
        got = records["cuda"][name]
        assert got.budget == pytest.approx(wanted.budget, abs=0.02)
        alike.append(
            got.kl_mean == pytest.approx(wanted.kl_mean, rel=0.05, abs=1e-3)
            and got.answer_nll_change == pytest.approx(wanted.answer_nll_change, rel=0.05, abs=1e-2)
        )
        # Chosen by position alone: the very same entries.
        assert alike[-1] or not name.startswith("streaming-llm")
    # Random weights have near-equal scores, of which the devices may keep different ones.
    assert sum(alike) > 0.8 * len(alike)
