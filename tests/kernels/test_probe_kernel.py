"""Probe reductions: the kernel, the CPU's blocks, the plain torch version, and whole rows in float64."""

import pytest
import torch

from refreekv.core import reductions
from refreekv.core.probes import attention_logits
from refreekv.core.reductions import Probes
from refreekv.kernels import both_reductions, ops, probe_blocks, probe_launch, probe_reductions
from refreekv.kernels.probe_launch import launch_both_reductions, launch_probe_reductions


def whole_rows(query, key, at, *, columns, valid=None, real=None, scaling, distance=0, softcap=None, sinks=None):
    """All rows at once, in float64 and with no code of refreekv."""
    batch, heads, probes, _ = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    logits = query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at = at.expand(batch, probes)
    hide = torch.ones(batch, kv_heads, length, dtype=torch.bool, device=key.device)
    if valid is not None:
        hide = hide & (valid[:, None] if valid.dim() == 2 else valid)
    shown = hide.repeat_interleave(group, 1)[:, :, None].expand(-1, -1, probes, -1)
    if real is not None:
        shown = shown & real.expand(batch, -1)[:, None, :, None]
    seen = shown & (columns <= at[:, None, :, None])
    weights = logits.exp() * seen
    whole = weights.sum(-1, keepdim=True)
    if sinks is not None:
        whole = whole + sinks.double().exp().view(1, heads, 1, 1)
    counted = shown & (columns + distance <= at[:, None, :, None])
    rows = torch.where(counted & (whole > 0), weights / whole, 0.0)
    rows, counted = (x.reshape(batch, kv_heads, -1, length) for x in (rows, counted))
    return rows.amax(2), rows.sum(2) / counted.sum(2).clamp_min(1), whole[..., 0].log().float()


def spread(probes, length, generator):
    return torch.sort(torch.randperm(length, generator=generator)[:probes]).values[None]


CASES = {
    "plain": {},
    "one head a group": {"heads": 2},
    "odd sizes": {"heads": 6, "probes": 7, "length": 33, "head_size": 80},
    "one key": {"length": 1, "probes": 1},
    "head 96": {"head_size": 96, "distance": 5},
    "padding": {"padding": 2, "distance": 3},
    "padding by head": {"padding": 3},
    "padded queries": {"padding": 2, "padded_queries": True},
    "columns": {"gaps": True, "distance": 10},
    "cap and sinks": {"softcap": 3.0, "sinks": True},
    "many rows": {"heads": 10, "probes": 40, "length": 300},
    "any order": {"shuffled": True, "distance": 20},
    "nothing seen": {"gaps": True, "before": 30, "distance": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("which", ["kernel", "blocks", "small blocks", "reference"])
def test_reductions_equal_whole_rows_in_float64(case, which, dtype, close, device, monkeypatch):
    if which == "small blocks":  # a few rows of one KV head each
        for name, value in (("BLOCK", 600), ("LEAST_ROWS", 4), ("WIDENED", 1000)):
            monkeypatch.setattr(probe_blocks, name, value)
    batch, kv_heads = 2, 2
    setting = {"heads": 4, "probes": 9, "length": 150, "head_size": 64, **case}
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    length, probes = setting["length"], min(setting["probes"], setting["length"])
    # Views of what a projection writes: heads and positions the other way round.
    query = random(batch, probes, setting["heads"], setting["head_size"]).transpose(1, 2) * 2
    key = random(batch, length, kv_heads, setting["head_size"]).transpose(1, 2)
    columns = torch.arange(length)
    if setting.get("gaps"):
        columns = torch.sort(torch.randperm(4 * length, generator=generator)[:length]).values
    at = spread(probes, int(columns[-1]) + 1, generator)
    if setting.get("shuffled"):
        at = at[:, torch.randperm(probes, generator=generator)]
    if setting.get("before"):
        # Some queries come before all keys.
        columns = columns + setting["before"]
        at[:, :4] = torch.tensor([0, 3, 9, 29])
    valid = real = None
    if "padding" in setting:
        shape = (batch, length) if setting["padding"] == 2 else (batch, kv_heads, length)
        valid = (torch.rand(shape, generator=generator) > 0.3).to(device)
    if setting.get("padded_queries"):
        at = at.repeat(batch, 1)
        real = (torch.rand(at.shape, generator=generator) > 0.3).to(device)
    sinks = torch.randn(setting["heads"], generator=generator).to(device) * 2 if setting.get("sinks") else None
    columns, at = columns.to(device), at.to(device)
    scaling, distance, softcap = 0.17, setting.get("distance", 0), setting.get("softcap")
    if which == "kernel":
        given = columns if setting.get("gaps") else None
        got = launch_probe_reductions(query, key, Probes(at, given, valid, real, scaling, distance, softcap, sinks))
    else:
        reduce = (reductions if which == "reference" else probe_blocks).probe_reductions
        if which != "reference" and device != "cpu":
            pytest.skip("blocks are for the CPU")
        got = reduce(query, key, Probes(at, columns, valid, real, scaling, distance, softcap, sinks))
    want = whole_rows(
        query, key, at, columns=columns, valid=valid, real=real,
        scaling=scaling, distance=distance, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    for mine, exact in zip(got, want[:2], strict=True):
        assert mine.dtype == torch.float32
        close(mine, exact)


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("group", [1, 3])
def test_denominators_that_are_known(which, group, dtype, close, device, monkeypatch):
    """Given as attention gives them, to some of its queries; they are not computed once more."""
    heads, length, distance = 2 * group, 150, 7
    query = torch.randn(2, length, heads, 64, device=device, dtype=dtype).transpose(1, 2) * 2
    key = torch.randn(2, length, 2, 64, device=device, dtype=dtype).transpose(1, 2)
    columns = torch.arange(length, device=device)
    *_, told = whole_rows(query, key, columns[None], columns=columns, scaling=0.17)
    some = slice(4, None, 5)
    at = columns[None, some]
    peak, mean, _ = whole_rows(query[:, :, some], key, at, columns=columns, scaling=0.17, distance=distance)
    probes = Probes(at, scaling=0.17, distance=distance, logsumexp=told[:, :, some])
    monkeypatch.setattr(probe_launch, "_denominator_kernel", None)
    monkeypatch.setattr(reductions, "attention_rows", None)
    reduce = launch_probe_reductions if which == "kernel" else reductions.probe_reductions
    got = reduce(query[:, :, some], key, probes)
    close(got[0], peak)
    close(got[1], mean)
    halved = reduce(query[:, :, some], key, probes._replace(logsumexp=told[:, :, some] + 0.6931472))
    close(halved[0], peak / 2)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_two_sets_of_queries_at_once(group, padded, told, device):
    """Bit by bit what each has alone; the sets differ in all that is their own."""
    heads, length = 2 * group, 200
    query = torch.randn(2, heads, length, 64, device=device).half()
    key = torch.randn(2, 2, length, 64, device=device).half()
    columns = torch.arange(length, device=device)
    valid = columns >= torch.tensor([[0], [9]], device=device) if padded else None
    seen = columns <= columns[:, None] if valid is None else (columns <= columns[:, None]) & valid[:, None, None]
    sums = attention_logits(query, key).masked_fill(~seen, float("-inf")).logsumexp(-1)
    sets = []
    for some, distance, wanted in ((slice(-7, None), 0, True), (slice(4, None, 5), 13, False)):
        known = sums[:, :, some] if told else None
        given = Probes(columns[None, some], valid=valid, distance=distance, sums=wanted, logsumexp=known)
        sets.append((query[:, :, some], given))
    (window, of_window), (spread, of_spread) = sets
    together = launch_both_reductions(window, spread, key, of_window, of_spread)
    swapped = launch_both_reductions(spread, window, key, of_spread, of_window)
    tile = probe_launch.tile_of_both(query, 64)
    alone = []
    for states, given in sets:
        first = probe_launch.tiles_for(query, 64, given.sums)[0]
        alone += launch_probe_reductions(states, key, given, (first, tile))
    for one, two in zip((*together, *swapped), (*alone, *alone[2:], *alone[:2]), strict=True):
        assert torch.equal(one, two)
    known: dict[int, torch.Tensor] = {}
    plain = both_reductions(
        window.cpu(), spread.cpu(), key.cpu(), *(_on_cpu(given, known) for given in (of_window, of_spread))
    )
    torch.testing.assert_close(together[0].cpu(), plain[0].peak, atol=1e-5, rtol=2e-3)
    torch.testing.assert_close(together[1].cpu(), plain[0].mean, atol=1e-5, rtol=2e-3)
    torch.testing.assert_close(together[2].cpu(), plain[1].peak, atol=1e-5, rtol=2e-3)
    assert plain[1].mean is None
    assert not together[3].numel()


def _on_cpu(probes, known):
    """What two of them share is the same tensor there, too."""
    parts = (known.setdefault(id(part), part.cpu()) if isinstance(part, torch.Tensor) else part for part in probes)
    return Probes(*parts)


@pytest.mark.parametrize("name", ["scaling", "valid"])
def test_two_sets_share_keys_and_attention(name):
    query, key, at = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 20, 16), torch.tensor([[5, 10, 19]])
    other = 0.5 if name == "scaling" else torch.ones(1, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"differ in their {name}"):
        both_reductions(query, query, key, Probes(at), Probes(at)._replace(**{name: other}))


def test_a_hidden_logit_of_any_size_does_no_harm(device):
    """What a query may not see can lie far above all it sees."""
    query = torch.randn(1, 2, 4, 64, device=device, dtype=torch.float16)
    key = torch.randn(1, 1, 64, 64, device=device, dtype=torch.float16)
    key[:, :, 40:] = 60 * query[:, :1, -1:].sign()
    at = torch.tensor([[10, 20, 30, 39]], device=device)
    got = launch_probe_reductions(query, key, Probes(at, scaling=1.0))
    assert all(torch.isfinite(part).all() for part in got)
    assert all((part[..., 40:] == 0).all() for part in got)


def test_the_operator_is_what_torch_expects_of_one():
    query, key, at = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 20, 16), torch.tensor([[5, 10, 19]])
    given = query, key, at, None, None, None, 0.25, 2, None, None, True, None
    torch.library.opcheck(ops.probe_reductions_op, given, test_utils="test_schema")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_function_goes_through_the_kernel_on_cuda():
    query, key = torch.randn(1, 4, 3, 64, device="cuda").half(), torch.randn(1, 2, 90, 64, device="cuda").half()
    at = torch.tensor([[5, 50, 89]], device="cuda")
    got = probe_reductions(query, key, Probes(at, distance=3))
    want = reductions.probe_reductions(query, key, Probes(at, distance=3))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: so many rows take minutes without")
def test_a_row_does_not_depend_on_those_beside_it():
    """vLLM decides about many layers as rows, or about one: what it keeps may not change with that."""
    query = torch.randn(96, 8, 64, 64, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(96, 2, 3000, 64, device="cuda", dtype=torch.bfloat16)
    probes = Probes(torch.arange(2936, 3000, device="cuda")[None])
    together = launch_probe_reductions(query, key, probes)
    for row in (0, 40, 95):
        alone = launch_probe_reductions(query[row : row + 1], key[row : row + 1], probes)
        assert all(torch.equal(one[0], all_of[row]) for one, all_of in zip(alone, together, strict=True))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads"):
        probe_reductions(torch.randn(1, 5, 1, 8), torch.randn(1, 2, 9, 8), Probes(torch.tensor([[8]])))


@pytest.mark.parametrize("which", [launch_probe_reductions, probe_blocks.probe_reductions, reductions.probe_reductions])
def test_peaks_alone(which, device):
    if which is probe_blocks.probe_reductions and device != "cpu":
        pytest.skip("blocks are for the CPU")
    query, key = torch.randn(2, 4, 9, 64, device=device).half(), torch.randn(2, 2, 200, 64, device=device).half()
    # Every other query of a longer prompt: views, as policies hand them over.
    at = torch.arange(18, device=device)[None, 1::2] * 11
    whole = reductions.probe_reductions(query, key, Probes(at, distance=5))
    if which is launch_probe_reductions:
        peak, *rest = which(query, key, Probes(at, distance=5, sums=False))
        assert [part.numel() for part in rest] == [0]
    else:
        peak, *rest = which(query, key, Probes(at, distance=5, sums=False))
        assert rest == [None]
    torch.testing.assert_close(peak, whole.peak, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("reduce", [probe_blocks.probe_reductions, reductions.probe_reductions])
def test_the_default_type_is_the_user_s(reduce):
    query, key, at = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 90, 16), torch.tensor([[5, 50, 89]])
    valid = torch.arange(90)[None] > 3
    want = reduce(query, key, Probes(at, distance=3, valid=valid))
    torch.set_default_dtype(torch.float64)
    try:
        got = reduce(query, key, Probes(at, distance=3, valid=valid))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(got, want, strict=True))
