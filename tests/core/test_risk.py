"""Conformal risk control: the setting it chooses, and by simulation with known distributions the risk that it keeps."""

import functools
import random
from fractions import Fraction

import pytest

from refreekv.core.risk import corrected_risks, loosest, made_monotone, prompts_needed

SETTINGS = [index / 20 for index in range(21)]  # from strict to loose; nothing is lost at 0


@pytest.mark.parametrize(
    ("risk", "needed"), [("0.05", 19), ("0.1", 9), ("0.01", 99), ("0.02", 49), ("0.5", 1), ("0.3", 3), ("0.07", 14)]
)
def test_prompts_needed(risk, needed):
    assert prompts_needed(float(risk)) == needed
    assert Fraction(1, needed + 1) <= Fraction(risk)
    assert needed == 1 or Fraction(1, needed) > Fraction(risk)


def test_losses_made_monotone():
    assert made_monotone([0, 1, 0, 0, 1]) == [0, 1, 1, 1, 1]
    assert made_monotone([0, 0.2, 0.1, 0.4]) == [0, 0.2, 0.2, 0.4]
    assert made_monotone([]) == []


def test_the_bound_of_the_paper():
    """n / (n + 1) times the mean, and one over n + 1."""
    losses = [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert corrected_risks(losses) == pytest.approx([1 / 4, 3 / 4 * 1 / 3 + 1 / 4, 3 / 4 * 2 / 3 + 1 / 4])


def test_the_loosest_setting_that_fits():
    quiet = [[0, 0, 0]] * 19
    assert loosest(quiet, 0.05) == 2, "with 19 prompts and no loss the bound is met exactly"
    assert loosest(quiet[:18], 0.05) == 0
    hurt = [[0, 0, 0]] * 38 + [[0, 0, 1]]
    assert loosest(hurt, 0.05) == 2
    assert loosest([*hurt, [0, 1, 0]], 0.05) == 1, "what a stricter setting hurts, a looser one does"
    with pytest.raises(ValueError, match="has to lose nothing"):
        loosest([[1, 1]], 0.05)


def _from(threshold):
    """The losses of a prompt that is damaged from a constant of its own on."""
    return [float(setting > threshold) for setting in SETTINGS]


def _uniform(rng):
    return _from(rng.random())


def _clumped(rng):
    """Most prompts take anything, and some hardly anything."""
    return _from(2.0 if rng.random() < 0.93 else 0.1 * rng.random())


def _flickering(rng):
    """Losses that are not monotone: each setting hurts by itself, with a chance that grows."""
    return [float(rng.random() < setting / 4) for setting in SETTINGS]


def _graded(rng):
    """Losses between 0 and 1."""
    tender = rng.betavariate(1, 6)
    return [min(1.0, setting * tender) for setting in SETTINGS]


@functools.cache
def _expected(draw):
    """Expected loss at each setting."""
    rng = random.Random("expected")
    rows = [draw(rng) for _ in range(20_000)]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _mean_risk(draw, choose, *, count, risk, draws=3_000):
    """Mean expected loss of what is chosen from so many prompts, and its standard error."""
    expected, rng = _expected(draw), random.Random("draws")
    found = [expected[choose([draw(rng) for _ in range(count)], risk)] for _ in range(draws)]
    mean = sum(found) / draws
    error = (sum((one - mean) ** 2 for one in found) / draws**2) ** 0.5
    return mean, error


def _uncorrected(losses, risk):
    means = [sum(column) / len(losses) for column in zip(*map(made_monotone, losses), strict=True)]
    return max(index for index, mean in enumerate(means) if mean <= risk)


@pytest.mark.parametrize(("count", "risk"), [(19, 0.05), (40, 0.05), (25, 0.2)])
@pytest.mark.parametrize("draw", [_uniform, _clumped, _flickering, _graded])
def test_the_risk_is_kept(draw, count, risk):
    mean, error = _mean_risk(draw, loosest, count=count, risk=risk, draws=2_000)
    assert mean <= risk + 4 * error + 0.002  # of what is expected, which was drawn itself


def test_the_risk_is_used():
    """Of many prompts the bound is nearly reached: on a grid of 21 settings, within one of them."""
    mean, _ = _mean_risk(_uniform, loosest, count=300, risk=0.22, draws=300)
    assert 0.22 - 0.05 - 0.02 < mean <= 0.22


def test_without_the_correction_it_would_not_be_kept():
    kept, error = _mean_risk(_uniform, loosest, count=9, risk=0.12, draws=3_000)
    broken, _ = _mean_risk(_uniform, _uncorrected, count=9, risk=0.12, draws=3_000)
    assert kept <= 0.12 + 4 * error
    assert broken > 0.15


def test_without_monotone_losses_it_would_not_be_kept():
    """Choosing a looser setting that happens to look better, over a grid of many: what the method forbids."""

    def unmonotone(losses, risk):
        bounds = [(sum(column) + 1) / (len(losses) + 1) for column in zip(*losses, strict=True)]
        return max(index for index, bound in enumerate(bounds) if index == 0 or bound <= risk)

    kept, error = _mean_risk(_flickering, loosest, count=9, risk=0.12, draws=2_000)
    broken, _ = _mean_risk(_flickering, unmonotone, count=9, risk=0.12, draws=2_000)
    assert kept <= 0.12 + 4 * error
    assert broken > 0.15
