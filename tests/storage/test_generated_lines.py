"""Generated entries as they are coded: in all layers together, in place, without a wait and in few launches."""

import copy

import pytest
import torch

from helpers.counting import counting
from refreekv import kernels
from refreekv.core.quantisation import FLUSH, SINKS, Ladder, centre_of
from refreekv.kernels import Transfer
from refreekv.kernels.packed_reference import pack
from refreekv.storage.arena import KVArena
from refreekv.storage.coded_lines import ROOM
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.hosted import HostArena
from refreekv.storage.leveled import LeveledKV, code_older

LADDER = Ladder.of("k4v2", "k4v4", "k6v4", "k7v6", recent=8)
FOUR_BITS = Ladder.of("int4", recent=8)
ROWS, HEADS, SIZES = 2, 3, (32, 16)


def entries(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, HEADS, tokens, size, generator=generator) for size in SIZES]


def layer(seed, ladder=LADDER, length=200, drop=0, dtype=torch.float32):
    """A layer after a prompt, of whose first row ``drop`` entries are gone in the last KV head."""
    dense = [part.to(dtype) for part in entries(length, seed)]
    everything = torch.arange(length, dtype=torch.int32)
    columns = [
        Columns(heads=tuple(everything[drop if (row, head) == (0, HEADS - 1) else 0 :] for head in range(HEADS)))
        for row in range(ROWS)
    ]
    rungs, levels = len(ladder.rungs), []
    for row, own in enumerate(columns):
        given = tuple((torch.arange(n) * (row + 3) % rungs).to(torch.uint8) for n in own.counts)
        coded = [some[SINKS : SINKS + ladder.coded(len(some))].tolist() for some in given]
        levels.append(Levels(given, tuple(tuple(some.count(rung) for rung in range(rungs)) for some in coded)))
    return LeveledKV.gathered(*dense, columns, 0, ladder, tuple(map(centre_of, dense)), levels)


def held(storage):
    """All that tables say is there, as plain lists: entries of each arena, by row and KV head."""
    found = []
    for arena in storage.tables:
        assert arena.table.tolist() == arena._lines()
        for row in range(ROWS):
            found += [part.tolist() for side in arena.segments(row) for part in side]
    return found


@pytest.mark.parametrize("ladder", [LADDER, FOUR_BITS, Ladder.of("k4v2", "int8", recent=8, generated=0)], ids=str)
def test_layers_together_hold_what_each_holds_alone(ladder):
    together = [layer(seed, ladder, drop=drop) for seed, drop in ((1, 0), (2, 195), (3, 150))]
    together[2].free_rows([1])
    alone = copy.deepcopy(together)
    for at in range(3 * FLUSH + 5):
        both = [entries(1, 100 + 10 * at + number) for number in range(len(alone))]
        code_older(together)
        for storages in (together, alone):
            for storage, new in zip(storages, both, strict=True):
                storage.append(*new)
        assert [held(storage) for storage in together] == [held(storage) for storage in alone]
    assert [storage.lines.lengths[0][0] for storage in together] == [188 + 3 * FLUSH] * 3
    assert together[1].lines.lengths[0] == (188 + 3 * FLUSH,) * 2 + (2 * FLUSH,)  # 5 entries were left of its prompt


@pytest.mark.parametrize("ladder", [LADDER, FOUR_BITS], ids=str)
def test_lines_are_what_each_entry_s_own_code_is(ladder):
    """Bit by bit: those that the plain version makes of one entry at a time."""
    storage = layer(1, ladder)
    before, new = copy.deepcopy(storage), entries(2 * FLUSH, 2)
    waiting = [torch.cat(pair, 2) for pair in zip(before.exact.full().stacked(), new, strict=True)]
    for at in range(2 * FLUSH):
        storage.append(*(part[:, :, at : at + 1] for part in new))
    storage.code_older()
    form, rung = storage.coding.forms[ladder.generated], ladder.generated
    assert storage.lines.lengths[0][0] == before.lines.lengths[0][0] + 2 * FLUSH
    like = torch.empty(0, form.line_bytes, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.float16)
    for number in range(2 * FLUSH):
        one = KVArena.like(*like, [(1,) * HEADS] * ROWS, growth=0)
        at = SINKS + number
        entry = [part[:, :, at : at + 1].contiguous() for part in waiting]
        spans = torch.tensor([(0, 0, 0)] * (ROWS * HEADS))
        pack(Transfer(*entry, None, one.table, form, storage.coding.maps, spans, 1, 1, None))
        for row in range(ROWS):
            old = before.lines.rungs[rung].lengths[row]
            for mine, wanted in zip(storage.lines.rungs[rung].segments(row), one.segments(row), strict=True):
                for head in range(HEADS):
                    assert torch.equal(mine[head][old[head] + number], wanted[head][0])
    for own, other in zip(storage.exact.full().stacked(), waiting, strict=True):
        assert torch.equal(own, torch.cat([other[:, :, :SINKS], other[:, :, SINKS + 2 * FLUSH :]], 2))


def addresses_of(layers):
    return [part.data_ptr() for own in layers for arena in own.tables for part in (arena.keys, arena.values)]


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_what_it_asks_of_a_gpu(even):
    """One launch for all layers and nothing that waits for the device, nor memory of a layer's own."""
    for count in (1, 6):
        layers = [layer(seed, length=1700, drop=0 if even else 1680) for seed in range(count)]
        for storage in layers:
            for at in range(FLUSH):
                storage.append(*entries(1, at))
        addresses = addresses_of(layers)
        with counting() as counts:
            assert code_older(layers)
        assert not counts.waits
        assert counts.launches == {"kernels.code_oldest": 1}
        assert not counts.sent  # but what the launch is told
        assert not counts.made
        assert addresses_of(layers) == addresses
        assert not code_older(layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `test_leveled` runs the kernel")
def test_the_kernel_does_to_storages_what_plain_torch_does(monkeypatch):
    """In Triton's interpreter; one of three layers has a row that was freed, and one heads of different lengths."""
    packed_oldest = pytest.importorskip("refreekv.kernels.packed_oldest", reason="needs triton")
    plain = [layer(seed, drop=drop, dtype=torch.float16) for seed, drop in ((1, 0), (2, 195), (3, 150))]
    plain[2].free_rows([1])
    others = copy.deepcopy(plain)
    for at in range(2):
        for pair in zip(plain, others, strict=True):
            new = [part.half() for part in entries(FLUSH, at)]
            for storage in pair:
                storage.exact.append(*new)
                storage._wait -= FLUSH
        code_older(plain)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "code_oldest", packed_oldest.code_alike)
            code_older(others)
    for one, other in zip(plain, others, strict=True):
        assert one.lines.lengths == other.lines.lengths
        mine, wanted = held(one), held(other)
        exact = len(mine) // len(one.tables)
        assert mine[:exact] == wanted[:exact]
        query = torch.randn(ROWS, HEADS, 1, SIZES[0]).half()
        got = [storage.attend(query, None, None, None) for storage in (other, one)]
        torch.testing.assert_close(*got, atol=1e-2, rtol=1e-2)


def test_lines_move_rarely_and_have_little_room():
    """A prompt leaves room for whole blocks of 2.5% of what is coded; what moves gets some blocks more."""
    storage = layer(1, length=2700)
    generated, others = storage.lines.rungs[-1], storage.lines.rungs[:-1]
    assert all(arena.capacities == arena.lengths for arena in others)
    assert [most - n for n, most in zip(generated.lengths[0], generated.capacities[0], strict=True)] == [2 * FLUSH] * 3
    short = layer(1, length=1200)
    assert all(arena.capacities == arena.lengths for arena in short.lines.rungs)
    exact = storage.exact.nbytes
    moved, address = 0, generated.keys.data_ptr()
    for at in range(2 * FLUSH + 3 * ROOM + 8):
        storage.append(*entries(1, at))
        moved += generated.keys.data_ptr() != address
        address = generated.keys.data_ptr()
        assert storage.exact.nbytes == exact
    assert moved == 3
    room = [most - n for n, most in zip(generated.lengths[0], generated.capacities[0], strict=True)]
    assert max(room) < ROOM


def test_memory_is_given_back_where_much_is_coded_at_once():
    storage = layer(1)
    storage.append(*entries(400, 5))
    storage.code_older()
    assert storage.exact.lengths[0] == (SINKS + LADDER.recent + 400 % FLUSH,) * HEADS
    assert max(map(max, storage.exact.capacities)) <= SINKS + LADDER.recent + 400 % FLUSH + FLUSH


def test_lines_in_host_memory_too():
    storage, other = layer(1), layer(1)
    storage.move_to_host()
    for at in range(2 * FLUSH):
        for each in (storage, other):
            each.append(*entries(1, at))
    assert code_older([storage, other])
    assert isinstance(storage.lines.rungs[-1], HostArena)
    assert held(storage) == held(other)
