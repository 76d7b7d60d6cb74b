"""Arenas in host memory against exact storage, and the buffers that entries come to the device through."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from helpers.arenas import check_changes, exact, lengths_of, moves, same
from helpers.copies import COPIES, Early, Late
from refreekv.kernels.table import LENGTH, entries
from refreekv.storage.arena import KVArena
from refreekv.storage.host import NoRoomError
from refreekv.storage.hosted import HostArena, HostedPrompts
from refreekv.storage.staging import Lines, Staging

CPU = torch.device("cpu")


@given(lengths_of, moves)
@settings(max_examples=60, deadline=None)
def test_changes_are_those_of_exact_storage(lengths, steps):
    judge = exact(lengths)
    arena = HostArena.moved(KVArena.of(judge))
    arena, judge = check_changes(arena, judge, steps, same=same)
    assert type(arena) is HostArena
    back = arena.back()
    assert type(back) is KVArena
    assert back.capacities == back.lengths == judge.lengths
    assert all(torch.equal(*pair) for pair in zip((back.keys, back.values), (judge.keys, judge.values), strict=True))


def test_freed_rows_stay_freed():
    arena = KVArena.of(exact([(5, 7), (30, 2)]))
    arena.free_rows([1])
    there = HostArena.moved(arena)
    assert there.freed == there.back().freed == [False, True]
    assert there.lengths == [(5, 7), (0, 0)]
    there.make_room(np.array([(40, 40), (0, 0)]))
    there.note_changed(np.array([(40, 40), (0, 0)]))
    assert there.lengths == [(45, 47), (0, 0)]


def test_no_more_memory_is_said(monkeypatch):
    arena, empty = KVArena.of(exact([(5, 7)])), torch.empty

    def refusing(*sizes, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    monkeypatch.setattr(KVArena, "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(NoRoomError, match=r"the system gives no [\d,]+ bytes of pinned host memory; ask for less"):
        HostArena.moved(arena)


class Layer:
    """Segments of one layer in host memory, of two kinds of lines."""

    def __init__(self, number, lengths=((3, 40), (0, 9))):
        self.arenas = [HostArena.moved(KVArena.of(exact([own], seed=10 * number + i))) for i, own in enumerate(lengths)]

    @property
    def lines(self):
        return [Lines.of(arena) for arena in self.arenas]

    def check(self, tables):
        """The tables tell of what the arenas hold, somewhere else."""
        for arena, table in zip(self.arenas, tables, strict=True):
            assert table[:, LENGTH].tolist() == list(arena.lengths[0])
            assert not set(table[:, 0].tolist()) & set(arena.table[:, 0].tolist())
            for segment, (keys, values) in enumerate(zip(*arena.segments(0), strict=True)):
                found = entries(table, segment, arena.sizes, arena.types)
                for part, wanted in zip(found, (keys, values), strict=True):
                    assert torch.equal(part[: len(wanted)], wanted)


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_layers_pass_through_two_buffers(count, copies):
    layers = [Layer(number, ((3 * number, 40), (0, 9 + number))) for number in range(count)]
    staging = Staging(CPU, [layer.lines for layer in layers], COPIES[copies]())
    staging.begin()
    assert [table[:, LENGTH].tolist() for table in staging.use(0)] == [[0, 0], [0, 0]]  # nothing has room yet
    staging.aim([layer.lines for layer in layers])
    largest = max(sum(lines.nbytes for lines in layer.lines) for layer in layers)
    assert staging.nbytes == min(count, 2) * largest
    for _ in range(2):
        staging.begin()
        for place, layer in enumerate(layers):
            layer.check(staging.use(place))
    # What is used again, or not in turn, is brought again.
    for place in (count - 1, 0, 0, count // 2, count - 1):
        layers[place].check(staging.use(place))


def test_what_grew_has_room_once_that_is_said():
    layers = [Layer(number) for number in range(3)]
    staging = Staging(CPU, [layer.lines for layer in layers], Early())
    staging.aim([layer.lines for layer in layers])
    aims = [list(map(id, tables)) for tables in staging.tables]
    layers[1].arenas[0].append(*(torch.randn(1, 2, 100, size) for size in layers[1].arenas[0].sizes))
    staging.begin()
    staging.use(0)
    found = staging.use(1)[0][:, LENGTH].tolist()
    assert found < list(layers[1].arenas[0].lengths[0])  # never more than there is room for
    staging.aim([layer.lines for layer in layers])
    staging.begin()
    for place, layer in enumerate(layers):
        layer.check(staging.use(place))
    assert aims == [list(map(id, tables)) for tables in staging.tables]


def test_a_buffer_is_not_written_while_its_layer_is_used():
    """What comes early has not taken the place of the layer before; what comes late is there when it is used."""
    layers = [Layer(number) for number in range(5)]
    for copies in (Early(), Late()):
        staging = Staging(CPU, [layer.lines for layer in layers], copies)
        staging.aim([layer.lines for layer in layers])
        staging.begin()
        for place, layer in enumerate(layers):
            tables = staging.use(place)
            layer.check(tables)
            layer.check(tables)


def test_prompts_come_again_for_each_chunk():
    layers, prompts = [Layer(number, ((0, 5),)) for number in range(3)], HostedPrompts(CPU, Late())
    for number, layer in enumerate(layers):
        prompts.hold(10 * number, layer.lines[0])
    for chunk in range(3):
        for number, layer in enumerate(layers):
            layer.check([prompts.table(10 * number)])
        for layer in layers:  # more is written where there is room
            (arena,) = layer.arenas
            assert arena.left >= 3 * (3 - chunk)
            arena.append(*(torch.randn(1, 2, 3, size) for size in arena.sizes))
    layers[1] = Layer(7, ((90, 1),))
    prompts.hold(10, layers[1].lines[0])
    for number, layer in enumerate(layers):
        layer.check([prompts.table(10 * number)])
    prompts.clear()
    with pytest.raises(ValueError, match="is not in list"):
        prompts.table(10)
