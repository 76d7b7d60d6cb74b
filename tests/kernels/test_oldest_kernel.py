"""Coding the oldest exact entries of several layers: kernel and reference, against packing and copying them."""

import pytest
import torch

from kernels.test_packed_kernels import POISON, Exact, Packed, check_lines, form_of, maps_of, on
from kernels.test_segment_kernels import run
from refreekv import kernels
from refreekv.kernels import packed_oldest, packed_reference
from refreekv.kernels.packed_calls import Oldest

FIRSTS, COUNTS = [4, 0, 2, 4], [32, 0, 70, 1]
LENGTHS, THERE = [100, 3, 72, 69], [7, 0, 0, 30]


class Layer:
    """One layer, and what was there before."""

    def __init__(self, form, dtype, device, rows=1, seed=0):
        torch.manual_seed(seed)
        self.sizes = form.key_size, form.value_size
        self.kept = Exact(LENGTHS, self.sizes, dtype, device)
        self.packed = Packed(THERE, form, device, capacities=[a + b + 2 for a, b in zip(THERE, COUNTS, strict=True)])
        self.before = [[part.clone() for part in side] for side in (self.kept.keys, self.kept.values)]
        self.lines = [[part.clone() for part in side] for side in (self.packed.lines, self.packed.factors)]
        self.maps = maps_of(self.sizes, dtype, rows)
        storages = (torch.empty(0, size, dtype=dtype, device=device) for size in self.sizes)
        told = torch.tensor([FIRSTS, COUNTS, THERE])
        self.given = Oldest(*storages, self.kept.table, self.packed.table, form, on(self.maps, device), told)

    def check(self):
        assert self.kept.table[:, 2].tolist() == [n - count for n, count in zip(LENGTHS, COUNTS, strict=True)]
        assert self.packed.table[:, 2].tolist() == [n + count for n, count in zip(THERE, COUNTS, strict=True)]
        for segment, (first, count, length, there) in enumerate(zip(FIRSTS, COUNTS, LENGTHS, THERE, strict=True)):
            chosen = [side[segment][first : first + count] for side in self.before]
            if count:
                check_lines(self.packed, segment, there, *chosen, self.maps, self.sizes)
            for side, old in zip((self.packed.lines, self.packed.factors), self.lines, strict=True):
                assert torch.equal(side[segment][:there], old[segment][:there])
                assert (side[segment][there + count :] == POISON).all()
            for side, old in zip((self.kept.keys, self.kept.values), self.before, strict=True):
                stay = torch.cat([old[segment][:first], old[segment][first + count : length]])
                assert torch.equal(side[segment][: len(stay)], stay)


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("rows", [1, 2], ids=["shared maps", "rows' own"])
def test_layers_that_are_alike_and_one_that_is_not(which, rows, dtype, device, monkeypatch):
    form, other = form_of("6442", "4444"), form_of("4444", "4444", (64, 32))
    layers = [Layer(some, dtype, device, rows, seed) for seed, some in enumerate((form, other, form, form))]
    launched, launch = [], packed_oldest.launch_code_oldest
    monkeypatch.setattr(
        packed_oldest, "launch_code_oldest", lambda exact, some: launched.append(len(some)) or launch(exact, some)
    )
    given = [layer.given for layer in layers]
    if which == "kernel":
        packed_oldest.code_alike(given)
        assert launched == [3, 1]
    else:
        for each in given:
            run(which, device, None, packed_reference.code_oldest, each)
    for layer in layers:
        layer.check()


def test_what_does_not_go_together_is_refused():
    layer = Layer(form_of("4444", "4444"), torch.float32, "cpu")
    given, before = layer.given, layer.kept.table.clone()
    for wrong, error, words in (
        ({"told": given.told[:2]}, ValueError, "expected int64 \\[3, segments\\]"),
        ({"table": given.table[:2]}, ValueError, "4 segments of exact entries, 2 of lines"),
        ({"keys": given.keys.half()}, TypeError, "maps are for entries in torch.float32, keys are in torch.float16"),
        ({"form": form_of("4444", "4444", (32, 64))}, ValueError, "maps of heads of 64"),
    ):
        with pytest.raises(error, match=words):
            kernels.code_oldest([given, given._replace(**wrong)][1:])
    assert torch.equal(layer.kept.table, before)
