"""Number formats of others: against loops over groups, hand-made groups, and bytes counted one by one."""

import pytest
import torch

from helpers.fidelity import bench, job, tokens
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.core.rotation import rotation
from refreekv.evaluation import sweeps
from refreekv.evaluation.fidelity.formats import parse
from refreekv.evaluation.fidelity.peer_formats import FORMATS, Kivi, RotatedInt4, between_extremes
from refreekv.evaluation.fidelity.prefill import SharedPrefill


def entries(n=300, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, n, size, generator=generator) * 3 + 1 for _ in range(2))


def half(number):
    return float(torch.tensor(number).half())


def slowly(group, bits):
    """One group, element by element."""
    low = half(min(group))
    scale = half((max(group) - low) / (2**bits - 1))
    return [low + scale * min(max(round((x - low) / scale), 0), 2**bits - 1) for x in group]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_goes_by_channel_in_keys_and_by_token_in_values(bits):
    keys, values = entries()
    found_keys, found_values = Kivi(bits).round_trip(keys, values)
    # 300 tokens: two blocks of 128 keys, and all values but the newest 128
    assert Kivi(bits).coded(300) == (256, 172)
    for head, channel, start in ((0, 0, 0), (1, 63, 224), (0, 17, 96)):
        expected = slowly(keys[0, head, start : start + 32, channel].tolist(), bits)
        assert found_keys[0, head, start : start + 32, channel].tolist() == pytest.approx(expected, abs=1e-5)
    for head, token, start in ((0, 0, 0), (1, 171, 32)):
        expected = slowly(values[0, head, token, start : start + 32].tolist(), bits)
        assert found_values[0, head, token, start : start + 32].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found_keys[:, :, 256:], keys[:, :, 256:])
    assert torch.equal(found_values[:, :, 172:], values[:, :, 172:])
    assert bool((found_keys[:, :, :256] != keys[:, :, :256]).any())


def test_kivi_leaves_short_prompts_as_they_are():
    keys, values = entries(n=127)
    assert all(map(torch.equal, Kivi(2).round_trip(keys, values), (keys, values)))
    assert Kivi(2).head_bytes(127, (64, 64), 2) == 127 * 128 * 2


def test_kivi_is_blind_to_a_constant_in_a_channel():
    keys, values = entries()
    shifted = keys + 200 * torch.arange(64).remainder(7)
    errors = [(Kivi(4).round_trip(part, values)[0] - part).square().mean() for part in (keys, shifted)]
    # What a zero point of 16 bits rounds away is all that it costs.
    assert float(errors[1]) == pytest.approx(float(errors[0]), rel=0.1)


def test_kivi_counts_scales_and_zero_points():
    # 256 of 300 keys and 172 values are coded, of 64 and 96 elements; 4 bytes a group of 32 elements
    keys = 256 * 64 // 2 + 256 * 64 // 32 * 4 + 44 * 64 * 2
    values = 172 * 96 // 2 + 172 * 3 * 4 + 128 * 96 * 2
    assert Kivi(4).head_bytes(300, (64, 96), 2) == keys + values
    assert Kivi(2).head_bytes(10**6, (128, 128), 2) / (10**6 * 256 * 2) == pytest.approx(3 / 16, abs=1e-3)


def test_kivi_refuses_values_that_do_not_split():
    with pytest.raises(ValueError, match="groups of 32 channels, and this model's have 80"):
        Kivi(4).head_bytes(300, (80, 80), 2)


def test_hand_made_groups():
    group = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-1.5, -1.5, -1.5, -1.5], [0.0, 0.4, 0.6, 3.0]])
    found = between_extremes(group, 2)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 2.0, 3.0], [-1.5] * 4, [0.0, 0.0, 1.0, 3.0]]))


def test_rotated_int4_is_a_grid_of_sixteen_in_rotated_coordinates():
    keys, values = entries(n=40)
    found = RotatedInt4().round_trip(keys, values)
    matrix = rotation(64).float()
    for part, back in zip((keys, values), found, strict=True):
        for head, token in ((0, 0), (1, 39)):
            turned, coded = (x[0, head, token] @ matrix for x in (part, back))
            scale = float(turned.max() - turned.min()) / 15
            zero = min(max(round(-float(turned.min()) / scale), 0), 15)
            steps = (coded / scale + zero).tolist()
            assert steps == pytest.approx([min(max(round(float(x) / scale + zero), 0), 15) for x in turned], abs=1e-3)
    assert RotatedInt4().head_bytes(10, (64, 128), 2) == 10 * (32 + 4 + 64 + 4)


def test_rotated_int4_breaks_where_keys_have_a_constant():
    """Nothing is taken out before the rotation, which spreads a constant over all channels."""
    keys, values = entries()
    shifted = keys.clone()
    shifted[..., 5] += 300.0
    errors = [(RotatedInt4().round_trip(part, values)[0] - part).square().mean() for part in (keys, shifted)]
    assert float(errors[1]) > 20 * float(errors[0])


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=32)


def test_in_the_bench(llama):
    names = [f"full@{kind}" for kind in FORMATS]
    chosen = sweeps.choose([*names, "full@int4"])
    assert list(chosen) == [*names, "full@int4"]
    (records,) = bench(llama).measure([job(length=400, asked={"full": None, **chosen})])
    by_name = {record.policy: record for record in records}
    for name in names:
        record = by_name[name]
        assert record.budget == 1.0
        heads = len(record.kept_heads) * llama.config.num_key_value_heads
        assert record.bytes_kept == heads * FORMATS[name.partition("@")[2]].head_bytes(400, (32, 32), 4)
        assert record.kl_mean > 0
    assert by_name["full@kivi2"].kl_mean > by_name["full@kivi4"].kl_mean


@torch.no_grad()
def test_what_is_refused(llama):
    with pytest.raises(ValueError, match=r"write full@kivi4, not snapkv:ratio=0\.5@kivi4"):
        parse("snapkv:ratio=0.5@kivi4")
    attached = ReFreeKVCache(llama, "full")
    shared = SharedPrefill(llama, tokens(57, 0), {name: parse(name) for name in ("full@kivi4", "full@rht4")})
    with pytest.raises(ValueError, match="calls of their own"):
        shared.masked(["full@kivi4", "full@rht4"])
    del attached
