"""What attention loads beside a sequence's tokens holds no codes: blocks that windows have left, and ends of blocks."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from refreekv.engines.vllm.gpu.ends import clear_behind
from refreekv.engines.vllm.gpu.windows import hide_left, reach_of

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}


def test_blocks_wholly_before_the_window_are_hidden():
    full, sliding = FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=40)
    reaches = [reach_of(full), reach_of(sliding), reach_of(SimpleNamespace(first_spec=sliding))]
    assert reaches == [0, 39, 39]
    tables = [torch.arange(1, 33, dtype=torch.int32).view(4, 8).clone() for _ in reaches]
    before = tables[0].clone()
    # A query at position 54 sees 15 to 54, so the first block, too; one at 55 does not.
    hide_left(tables, reaches, [16, 16, 16], torch.tensor([54, 55, 120], dtype=torch.int32))
    assert torch.equal(tables[0], before)
    expected = before.clone()
    expected[1, :1] = 0
    expected[2, :5] = 0
    assert torch.equal(tables[1], expected)
    assert torch.equal(tables[2], expected)


def test_the_model_runner_hides_them(monkeypatch):
    runner = pytest.importorskip("refreekv.engines.vllm.gpu.runner", exc_type=ImportError)
    made = runner.KeptModelRunner.__new__(runner.KeptModelRunner)
    table = torch.arange(1, 17, dtype=torch.int32).view(2, 8)
    monkeypatch.setattr(runner.GPUModelRunner, "prepare_attn", lambda *_: ((table,), None))
    made.block_tables = SimpleNamespace(block_sizes=[16])
    computed = torch.tensor([0, 0, 55, 0], dtype=torch.int32)
    made.req_states = SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=computed))
    batch = SimpleNamespace(idx_mapping=torch.tensor([2]))
    made.prepare_attn(batch)
    assert table.all()
    made.reaches = (39,)
    made.prepare_attn(batch)
    assert table[0].tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    assert table[1].all()


def test_blocks_are_cleared_behind_a_sequence():
    caches = [torch.full((6, 64, 2, 8), torch.nan).transpose(1, 2) for _ in range(3)]
    before = [cache.clone() for cache in caches]
    table = torch.tensor([[3, 0, 0], [2, 5, 0], [4, 0, 0], [1, 1, 1]], dtype=torch.int32)
    # A block that is full has nothing behind its sequence.
    clear_behind(caches, table, torch.tensor([1, 64 + 40, 64], dtype=torch.int32))
    for cache, wanted in zip(caches, before, strict=True):
        wanted[3, :, 1:] = 0
        wanted[5, :, 40:] = 0
        assert torch.equal(cache.isnan(), wanted.isnan())
        assert not cache.nan_to_num().any()


@pytest.mark.parametrize("planned", [True, False])
def test_the_model_runner_clears_them(monkeypatch, planned):
    """In steps that have many queries of a row; others load no tiles whole."""
    runner = pytest.importorskip("refreekv.engines.vllm.gpu.runner", exc_type=ImportError)
    made = runner.KeptModelRunner.__new__(runner.KeptModelRunner)
    table = torch.tensor([[1], [2]], dtype=torch.int32)
    monkeypatch.setattr(runner.GPUModelRunner, "prepare_attn", lambda *_: ((table,), None))
    cache = torch.full((3, 1, 64, 2), torch.nan)
    made.ends = ([cache],)
    made.kept = SimpleNamespace(plan=lambda batch: None, reads_tiles=planned)
    made.prepare_attn(SimpleNamespace(seq_lens=torch.tensor([5, 60, 9], dtype=torch.int32), num_reqs=2))
    # [blocks, N]
    numbers = ~cache[:, 0, :, 0].isnan()
    assert numbers.sum(1).tolist() == ([0, 59, 4] if planned else [0, 0, 0])
