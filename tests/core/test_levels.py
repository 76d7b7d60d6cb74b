"""How many bits an entry is worth: what rungs of a ladder do, and the narrowest that is narrow enough."""

import itertools

import pytest
import torch

from refreekv.core import damage
from refreekv.core.damage import KEYS_WORTH, coded_errors, plain_damage, rung_damage
from refreekv.core.needs import Rules, levels
from refreekv.core.packed_lines import PackedFormat, Side, grid_error, step
from refreekv.core.quantisation import Ladder
from refreekv.core.reductions import ProbeReductions
from refreekv.policies import create
from refreekv.policies.adaptive import LADDER as DEFAULT

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
            worth = max(worth * weight, scores[0, head] * (rule.copying_peak / rule.unit))
            rung = 0
            while rung < damage.shape[-1] - 1 and worth * damage[0, head, rung] > rule.code_unit:
                rung += 1
            found[0, head, at] = rung
    return found


@pytest.mark.parametrize("copying_peak", [0.0, 0.03])
@pytest.mark.parametrize("unit", [1e-4, 1e-3, 1e-2])
def test_the_narrowest_rung_that_is_narrow_enough(unit, copying_peak):
    window, spread = peaks(0)
    scores = torch.tensor([[0.0, 0.5, 0.05]])
    damage = rung_damage(torch.tensor([[0.2, 0.1, 0.1, 0.05], [3.0, 2.0, 1.0, 1.0], [40.0, 9.0, 5.0, 1.0]]), FORMS)[
        None
    ]
    rule = rules(unit, copying_peak=copying_peak)
    found = levels(window, spread, scores, rule, damage)
    assert torch.equal(found, plainly(window, spread, scores, rule, damage))
    assert len(found.unique()) > 1


def test_entries_that_nobody_looked_at_count_by_how_much_their_head_copies():
    nothing = ProbeReductions(torch.zeros(1, 4, 20), None)
    damage = plain_damage(FORMS, 4, torch.device("cpu"))[None]
    # Scores at which an entry just fits the narrowest rung, and the next one, by what these do.
    fits = [2e-3 / float(does) / 0.1 for does in damage[0, 0, :2]]
    scores = torch.tensor([[0.0, 0.99 * fits[0], 1.01 * fits[0], 1.01 * fits[1]]])
    found = levels(nothing, nothing, scores, rules(1e-3, copying_peak=0.1), damage)
    assert found[0].tolist() == [[rung] * 20 for rung in (0, 0, 1, 2)]


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
    own = [(sum(coded_errors(form.values)) / 4) ** 0.5 for form in FORMS]
    assert rung_damage(torch.zeros(1, 4), FORMS)[0].tolist() == pytest.approx(own)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("bits", "low", "high"), [(2, 0.9, 1.0), (4, 0.78, 0.96), (6, 0.6, 0.82), (8, 0.35, 0.52)])
def test_sizes_of_their_own_save_more_the_more_bits_there_are(size, bits, low, high):
    """Against the error of the best uniform grid for a Gaussian, which one size for all entries would have."""
    for error in coded_errors(Side(size, (bits,) * 4)):
        assert low < error / grid_error(bits, step(bits)) < high


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8, 6, 6, 4), (6, 4, 4, 2), (4, 4, 4, 4)])
def test_errors_are_those_of_packed_lines(widths):
    """Fresh entries, all the way to lines and back, quarter by quarter."""
    entries = torch.randn(3000, 64, generator=torch.Generator().manual_seed(7))
    form = PackedFormat(64, 64, widths, widths)
    counted = torch.tensor(KEYS_WORTH).repeat_interleave(16)
    keys, values = form.unpack(*form.pack(entries, entries, counted), torch.float32)
    for back, found in ((keys, coded_errors(form.keys, KEYS_WORTH)), (values, coded_errors(form.values))):
        quarters = (back - entries).square().mean(0).unflatten(0, (4, -1)).mean(-1)
        assert quarters.tolist() == pytest.approx(list(found), rel=0.1)


def test_errors_do_not_depend_on_the_defaults_of_torch():
    power = torch.tensor([[2.0, 0.3, 0.1, 0.1]])
    expected = rung_damage(power, FORMS)
    coded_errors.cache_clear()
    damage._errors.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = rung_damage(power, FORMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kinds", [("k4v2", "k6v4"), ("k5v4", "k7v6"), ("int6", "int8")])
def test_predicted_damage_is_what_coding_does_to_the_output(kinds):
    """A head whose keys and values are Gaussian in code space, all of them coded: a share of what evicting does."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(3000, 64, generator=generator) for _ in range(2))
    forms = Ladder.of(*kinds).forms((64, 64), sorted_keys=True)
    # Queries look at the quarters in a ratio like that of the models; logits stay small, so that none has it all.
    power = torch.tensor([1.6, 0.14, 0.04, 0.02])
    queries = torch.randn(200, 64, generator=generator) * (power / 16).sqrt().repeat_interleave(16)
    weights = (queries @ keys.T).softmax(-1)
    output = weights @ values
    evicting = weights.square() @ values.square().sum(-1)
    for form, predicted in zip(forms, rung_damage(power[None], forms)[0].tolist(), strict=True):
        lines, factors = form.pack(keys, values, torch.tensor(KEYS_WORTH).repeat_interleave(16))
        coded_keys, coded_values = form.unpack(lines, factors, torch.float32)
        changed = (queries @ coded_keys.T).softmax(-1) @ coded_values
        found = ((changed - output).square().sum() / evicting.sum()).sqrt()
        assert float(found) == pytest.approx(predicted, rel=0.08)


def test_what_the_policy_says_of_formats():
    assert create("adaptive").default_ladder == DEFAULT
    for changes in ({"bits": 16}, {"shared": True}, {"constant": 0.0}):
        assert create("adaptive", **changes).default_ladder is None
    with pytest.raises(ValueError, match="bits must be 'auto' or 16, got 8"):
        create("adaptive", bits=8)
