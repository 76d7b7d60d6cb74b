"""The README's figure: which settings of which policies are its points, and what their numbers are."""

import pytest

import readme_figure as figure


def record(policy, family, kl, kept, full=100):
    return {"policy": policy, "family": family, "kl_mean": kl, "bytes_kept": kept, "bytes_full": full}


def test_a_point_has_all_bytes_and_the_worst_family():
    samples = [record("x", "a", 1.0, 10), record("x", "a", 2.0, 20), record("x", "b", 1.2, 150, full=300)]
    assert figure.point(samples, default=True) == (pytest.approx(100 * 180 / 500), 1.5, True)


def test_lines_are_of_settings_that_differ_in_the_budget_alone():
    names = [
        "full",
        "adaptive",
        "adaptive:constant=0.1",
        "adaptive:constant=0.1,copying=2",
        "snapkv:ratio=0.5",
        "top-p",
    ]
    found = figure.lines([record(name, "a", 1.0, 50 + at) for at, name in enumerate(names)])
    assert {name: [point.held for point in points] for name, points in found.items()} == {
        "full": [50.0],
        "adaptive": [51.0, 52.0],
        "snapkv": [54.0],
    }
    assert [point.default for point in found["adaptive"]] == [True, False]
