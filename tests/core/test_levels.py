"""How many bits an entry is worth: what rungs of a ladder do, and the narrowest that is narrow enough."""

import itertools

import pytest
import torch

from refreekv.core.damage import distortion, plain_damage, rung_damage
from refreekv.core.needs import Rules, levels
from refreekv.core.quantisation import Ladder
from refreekv.core.reductions import ProbeReductions
from refreekv.policies import create

LADDER = Ladder.of("k4v2", "k6v4", "int8")
FORMS = LADDER.forms((64, 64), sorted_keys=True)


def rules(unit, **changes):
    given = {"copying_weight": 8.0, "code_unit": 2.0} | changes
    return Rules(4, 64, unit, 25 * unit, 0.05, 40, 0.9, 0.1, **given)


def peaks(seed, heads=3, length=300):
    generator = torch.Generator().manual_seed(seed)
    window, spread = (torch.rand(1, heads, length, generator=generator).pow(12) for _ in range(2))
    return ProbeReductions(window, None), ProbeReductions(spread, None)


def plainly(window, spread, scores, rule, damage):
    """Entry by entry, as the docstring says."""
    _, heads, length = window.peak.shape
    found = torch.zeros(1, heads, length, dtype=torch.uint8)
    for head in range(heads):
        weight = rule.copying_weight if scores[0, head] >= rule.copying else 1.0
        for at in range(length):
            near = range(max(at - 1, 0), min(at + 2, length))
            worth = max(
                max(window.peak[0, head, i] / rule.unit, spread.peak[0, head, i] / rule.spread_unit) for i in near
            )
            rung = 0
            while rung < damage.shape[-1] - 1 and worth * weight * damage[0, head, rung] > rule.code_unit:
                rung += 1
            found[0, head, at] = rung
    return found


@pytest.mark.parametrize("unit", [1e-4, 1e-3, 1e-2])
def test_the_narrowest_rung_that_is_narrow_enough(unit):
    window, spread = peaks(0)
    scores = torch.tensor([[0.0, 0.5, 0.05]])
    damage = rung_damage(torch.tensor([[0.2, 0.1, 0.1, 0.05], [3.0, 2.0, 1.0, 1.0], [40.0, 9.0, 5.0, 1.0]]), FORMS)[
        None
    ]
    found = levels(window, spread, scores, rules(unit), damage)
    assert torch.equal(found, plainly(window, spread, scores, rules(unit), damage))
    assert len(found.unique()) > 1


def test_a_stricter_constant_never_gives_fewer_bits():
    window, spread = peaks(1)
    scores, damage = torch.tensor([[0.0, 0.5, 0.05]]), plain_damage(FORMS, 3, torch.device("cpu"))[None]
    units = [1e-5, 1e-4, 3e-4, 1e-3, 1e-2]
    found = [levels(window, spread, scores, rules(unit), damage) for unit in units]
    assert all(bool((strict >= loose).all()) for strict, loose in itertools.pairwise(found))
    assert bool((found[0] > found[-1]).any())


def test_padding_changes_no_level():
    window, spread = peaks(2, length=50)
    damage = plain_damage(FORMS, 3, torch.device("cpu"))[None]
    scores = torch.zeros(1, 3)
    alone = levels(window, spread, scores, rules(1e-3), damage)
    # Padding in front and between two turns, with peaks that would count.
    real = torch.ones(1, 3, 60, dtype=torch.bool)
    real[..., :4] = real[..., 20:26] = False
    padded = [ProbeReductions(torch.ones(1, 3, 60).masked_scatter(real, part.peak), None) for part in (window, spread)]
    assert torch.equal(levels(*padded, scores, rules(1e-3), damage, real=real)[real], alone.flatten())


def test_damage_falls_with_bits_and_rises_with_queries():
    power = torch.tensor([[0.1, 0.1, 0.1, 0.1], [2.0, 2.0, 2.0, 2.0]])
    found = rung_damage(power, FORMS)
    assert bool((found[:, 1:] < found[:, :-1]).all())
    assert bool((found[1] > found[0]).all())
    # Nothing looks at the keys: what is left is the values' own error.
    assert rung_damage(torch.zeros(1, 4), FORMS)[0].tolist() == pytest.approx([distortion(b) ** 0.5 for b in (2, 4, 8)])


def test_distortion_is_the_error_of_codes():
    from refreekv.core.packed_lines import Side

    numbers = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 6, 8):
        side = Side(64, (bits,) * 4)
        codes, factors = side.encode(numbers)
        coded = side.levels(codes, torch.float32) * factors[:, None].float()
        assert float((coded - numbers).square().mean()) == pytest.approx(0.8 * distortion(bits), rel=0.3)


def test_what_the_policy_says_of_formats():
    assert create("adaptive").default_ladder == LADDER
    for changes in ({"bits": 16}, {"shared": True}, {"constant": 0.0}):
        assert create("adaptive", **changes).default_ladder is None
    with pytest.raises(ValueError, match="bits must be 'auto' or 16, got 8"):
        create("adaptive", bits=8)
