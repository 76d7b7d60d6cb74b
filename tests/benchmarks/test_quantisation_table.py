"""The table of fidelity against bytes: bytes in 16 bits, whatever the run's type, and stretches of lengths."""

import math

import quantisation as bench
from refreekv.evaluation.records import FidelityRecord


def record(policy, tokens, kept):
    return FidelityRecord(
        sample=f"{tokens}", family="f", policy=policy, model="m", prompt_tokens=tokens, continuation_tokens=1,
        budget=kept, bytes_full=1, bytes_kept=1, kl_mean=0.0, kl_p99=0.0, kl_max=0.0, top1=1.0, same_path=True,
        first_divergence=None, answer_nll_change=None, kept_heads=[[kept]],
    )  # fmt: skip


def test_bytes_of_formats_of_others():
    # KIVI: all 1,280 keys, a multiple of 128, and all values but 128, have 4 bits and 1 for scales and zero points.
    share = (1280 * 5 / 16 + 1152 * 5 / 16 + 128) / 2560
    assert math.isclose(bench.share(record("full@kivi4", 1280, 1.0), (64, 64), 4), share)
    assert math.isclose(bench.share(record("full@rht4", 100, 1.0), (64, 64), 2), (32 + 4) / 128)


def test_bytes_of_what_is_kept():
    assert math.isclose(bench.share(record("kvzip:ratio=0.5", 1000, 0.5), (64, 64), 4), 0.5)
    # 68 of 500 entries stay as they are, the others have 8 + 4 + 32 * 2 bytes, and the head its means.
    expected = (68 * 256 + 432 * 68 + 8 * 128) / (1000 * 256)
    assert math.isclose(bench.share(record("kvzip:ratio=0.5@int4", 1000, 0.5), (64, 64), 4), expected)


def test_stretches_of_lengths():
    assert bench.bounds("16000,4000") == [0, 4000, 16000, math.inf]
    text = bench.table([record("full", 10, 1.0), record("full@int8", 10, 1.0)], (64, 64), 2)
    assert "full (noise floor)" in text
    assert "full@int8" in text
