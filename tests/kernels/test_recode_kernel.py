"""Lines made of lines of wider formats: the kernel against plain torch, and against coding what they stand for."""

import pytest
import torch

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import Ladder
from refreekv.kernels import packed_reference
from refreekv.kernels.packed_calls import Moved
from refreekv.kernels.packed_recode import launch_recode
from refreekv.storage.arena import KVArena
from refreekv.storage.coding import maps_of

LADDERS = ["k4v2+k4v4+k6v4+k7v6", "k6v4+int8", "int4+k6v4+k7v6"]


def maps(rows, heads, size, sorted_keys):
    means = [torch.randn(rows, heads, size) for _ in range(2)]
    codes = None
    if sorted_keys:
        order = torch.stack([torch.randperm(size) for _ in range(heads)])
        codes = KeyCodes.known(order, torch.rand(heads, size) + 0.5, torch.rand(heads, size) + 0.5)
    return maps_of(means, torch.float32, codes)


def case(ladder, size, sorted_keys, target, counts):
    """Lines of all rungs at made-up places, and what fills a table of segments by a function, on a device."""
    rows, heads = len(counts), len(counts[0])
    forms = Ladder.parse(ladder).forms((size, size), sorted_keys=sorted_keys)
    stored = [form.pack(torch.randn(60, size), torch.randn(60, size)) for form in forms]
    total = sum(map(sum, counts))
    rungs = (torch.randint(0, len(forms) - target, (total + 5,)) + target).to(torch.uint8)
    at = torch.randint(0, 60, (total + 5,))
    starts, first = [], 5  # what is before belongs to others
    for row in counts:
        for n in row:
            starts.append(first)
            first += n
    own = maps(rows, heads, size, sorted_keys)

    def fill(recode, device="cpu"):
        there = [[part.to(device) for part in parts] for parts in stored]
        sources = [
            [line.data_ptr(), factor.data_ptr(), 60, form.line_bytes]
            for (line, factor), form in zip(there, forms, strict=True)
        ]
        like = torch.zeros(0, forms[target].line_bytes, dtype=torch.uint8, device=device)
        arena = KVArena.like(like, torch.zeros(0, 2, dtype=torch.float16, device=device), counts, growth=3)
        arena.keys.zero_()
        arena.values.zero_()
        numbers = [part.to(device) for part in (torch.tensor(sources), rungs, at, torch.tensor(starts))]
        moved = PackedMaps(*(part.to(device) for part in own.tensors))
        recode(Moved(arena.table, *numbers, forms, target, moved, max(map(max, counts))))
        return arena

    return fill, stored, forms, rungs, at


@pytest.mark.parametrize(("ladder", "target"), [(one, target) for one in LADDERS for target in range(2)])
@pytest.mark.parametrize(("size", "sorted_keys"), [(64, False), (64, True), (128, True)])
def test_it_gives_what_plain_torch_gives(ladder, target, size, sorted_keys, device):
    torch.manual_seed(target)
    fill, stored, forms, rungs, at = case(ladder, size, sorted_keys, target, [(40, 3), (0, 35)])
    wanted, filled = fill(packed_reference.recode), fill(lambda moved: launch_recode(moved.table, moved), device)
    keys, values = filled.keys.cpu(), filled.values.cpu()
    used = forms[target].keys.bytes + forms[target].values.bytes
    # An element half-way between two codes may be rounded to the other side.
    assert (wanted.keys[:, :used] == keys[:, :used]).float().mean() > 0.999
    torch.testing.assert_close(values, wanted.values, rtol=2e-3, atol=1e-5)
    lines, factors = stored[target]
    row = 5
    for segment, n in enumerate((40, 3, 0, 35)):
        for number in range(n):
            if rungs[row] == target:  # of the format already: byte by byte
                place = sum(m + 3 for m in (40, 3, 0, 35)[:segment]) + number
                assert torch.equal(keys[place, :used], lines[at[row], :used])
                assert torch.equal(values[place], factors[at[row]])
            row += 1


def test_what_does_not_go_together_is_refused():
    fill, *_ = case(LADDERS[0], 64, False, 0, [(2, 2)])

    def wrong(moved):
        launch_recode(moved.table, moved._replace(rungs=moved.rungs.int()))

    with pytest.raises(ValueError, match=r"expected torch.uint8 \[9\], got torch.int32"):
        fill(wrong)
