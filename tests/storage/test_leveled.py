"""Coded storage against plain storage: what it gives back, whatever happens to it. In models: test_quantised*.py."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.driving import storage_bytes
from refreekv import KVDtype
from refreekv.core.quantisation import FLUSH, SINKS, round_trip
from refreekv.kernels.reference import decode_segment
from refreekv.storage.columns import Columns
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.ragged import RaggedKV

SIZES = (32, 16)


def entries(*shape, seed=0):
    """Keys and values ``[*shape, D]`` with outlying elements and offsets, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in SIZES:
        scale = torch.randn(size, generator=generator).exp()
        offset = 3 * torch.randn(size, generator=torch.Generator().manual_seed(7))
        found.append(torch.randn(*shape, size, generator=generator) * scale + offset)
    return found


def centres_of(dense):
    return tuple(part.mean(2) for part in dense)


class Twins:
    """A coded storage, and the entries that it was given, in plain storage."""

    def __init__(self, coded, plain, number, centres):
        self.coded, self.plain, self.number, self.centres = coded, plain, number, centres

    @classmethod
    def of(cls, dense, columns, after, number):
        centres = centres_of(dense)
        coded = LeveledKV.gathered(*dense, columns, after, number, centres)
        end = dense[0].shape[2] - after
        rows = []
        for row, own in enumerate(columns):
            index = own.tensors(torch.device("cpu"))
            tail = torch.arange(end, dense[0].shape[2])
            chosen = [torch.cat([index[h % len(index)].long(), tail]) for h in range(dense[0].shape[1])]
            rows.append([[part[row, h][i] for h, i in enumerate(chosen)] for part in dense])
        return cls(coded, RaggedKV.from_pieces([[k] for k, _ in rows], [[v] for _, v in rows]), number, centres)

    def alike(self, coded, plain, rows=None):
        centres = self.centres if rows is None else tuple(part[rows] for part in self.centres)
        return Twins(coded, plain, self.number, centres)

    def check(self):
        coded, plain = self.coded, self.plain
        assert coded.lengths == plain.lengths
        full = coded.full()
        assert full.lengths == plain.lengths
        for row, lengths in enumerate(plain.lengths):
            for head, length in enumerate(lengths):
                first, count = coded.sinks[row][head], coded.coded.lengths[row][head]
                assert (first > 0) <= (count > 0)
                assert first <= SINKS
                for side in (0, 1):
                    mine, given = full.segments(row)[side][head], plain.segments(row)[side][head]
                    want = given.clone()
                    middle = slice(first, first + count)
                    if count:
                        centre = self.centres[side][row, head]
                        want[middle] = round_trip(given[middle], self.number.widths[side], centre)
                    exact = torch.cat([torch.arange(first), torch.arange(first + count, length)])
                    assert torch.equal(mine[exact], want[exact])
                    # An element half-way between two levels may fall on either side.
                    far = (mine - want).abs() > 1e-3 * (1 + want.abs())
                    assert far.float().mean() < 0.05 if count else not far.any()
            for mine, other in zip(coded.segments(row), full.segments(row), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        self.check_bytes()

    def check_bytes(self):
        coded, maps = self.coded, self.coded.coding.maps
        tensors = [tensor for arena in coded.tables for tensor in (arena.keys, arena.values)]
        tensors += [maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset]
        assert coded.nbytes == storage_bytes(tensors)
        assert coded.nbytes == sum(coded.row_nbytes(row) for row in range(len(coded.lengths)))
        for arena in coded.tables:
            assert arena.table.tolist() == arena._lines()
            for lengths, capacities in zip(arena.lengths, arena.capacities, strict=True):
                assert all(length <= capacity for length, capacity in zip(lengths, capacities, strict=True))

    def check_attention(self, group=2, **settings):
        """What the kernels read in place is what the entries that come back give."""
        full, batch, heads = self.coded.full(), len(self.coded.lengths), self.coded.kv_heads
        query = torch.randn(batch, heads * group, 1, SIZES[0])
        got = self.coded.attend(query, 0.2, settings.get("softcap"), settings.get("sinks"))
        for row in range(batch):
            for head in range(heads):
                mine = slice(head * group, (head + 1) * group)
                keys, values = (side[head] for side in full.segments(row))
                sinks = None if settings.get("sinks") is None else settings["sinks"][mine]
                want = decode_segment(query[row, mine, 0], keys, values, 0.2, settings.get("softcap"), sinks)
                torch.testing.assert_close(got[row, 0, mine], want, atol=2e-4, rtol=1e-3)

    def step(self, what, how, number):
        lengths = self.plain.lengths
        match what:
            case "append":
                new = entries(len(lengths), self.plain.kv_heads, how, seed=11 + number)
                return self.alike(self.coded.append(*new), self.plain.append(*new))
            case "select":
                rows = [row % len(lengths) for row in how]
                return self.alike(self.coded.select_rows(rows), self.plain.select_rows(rows), rows)
            case "truncate":
                wanted = [tuple(min(n, how + 5 * head) for head, n in enumerate(row)) for row in lengths]
                return self.alike(self.coded.truncate(wanted), self.plain.truncate(wanted))
            case "drop":
                how = min(how, *(n for row in lengths for n in row))
                if not self.coded.drop(how):
                    return self
                return self.alike(self.coded, self.plain.truncate([[n - how for n in row] for row in lengths]))
            case "keep":
                after = min(how, *(n for row in lengths for n in row))
                kept = [
                    Columns(
                        heads=tuple(
                            torch.tensor(
                                [i for i in range(max(row) - n, max(row) - after) if (i * 7 + h) % 3],
                                dtype=torch.int32,
                            )
                            for h, n in enumerate(row)
                        )
                    )
                    for row in lengths
                ]
                twins = self.alike(self.coded.keep(kept, after), kept_of(self.plain, kept, after))
                twins.coded.code_older(after, all_due=True)
                return twins
            case "copy":
                copied = copy.deepcopy(self.coded) if how == "deepcopy" else pickle.loads(pickle.dumps(self.coded))
                self.coded.exact.keys.fill_(float("nan"))
                self.coded.coded.keys.fill_(0x7F)
                return self.alike(copied, self.plain)
            case "code":
                self.coded.code_older(how, all_due=True)
                return self


def kept_of(plain, kept, after):
    """What plain storage keeps of columns that count entries of rows padded on the left."""
    sides = [], []
    for row, lengths in enumerate(plain.lengths):
        for own, into in zip(plain.segments(row), sides, strict=True):
            parts = zip(own, kept[row].heads, lengths, strict=True)
            into.append([[torch.cat([p[i.long() - (max(lengths) - n)], p[n - after :]]) for p, i, n in parts]])
    return RaggedKV.from_pieces(*sides)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        st.tuples(st.just("truncate"), st.integers(0, 80)),
        st.tuples(st.just("drop"), st.integers(1, 20)),
        st.tuples(st.just("keep"), st.integers(0, 3)),
        st.tuples(st.just("code"), st.integers(0, 3)),
        st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
    ),
    max_size=5,
)


def some_columns(length, heads, seed):
    """What a policy might keep: a range, one index for all heads, or one each."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 3 == 0:
        return Columns.of_ranges((0, min(4, length)), (max(4, length // 3), length))
    chosen = [torch.rand(length, generator=generator) < 0.3 + 0.2 * h for h in range(heads if seed % 3 == 1 else 1)]
    return Columns(heads=tuple(some.nonzero().flatten().int() for some in chosen))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["int8", "int4", "k6v4", "int2"]),
    recent=st.integers(0, 20),
    length=st.integers(1, 90),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    after=st.integers(0, 3),
    seed=st.integers(0, 20),
    steps=moves,
)
def test_any_sequence_of_changes_is_that_of_plain_storage(kind, recent, length, heads, rows, after, seed, steps):
    number = KVDtype(kind, recent=recent)
    dense = entries(rows, heads, length + after, seed=seed)
    columns = [some_columns(length, heads, seed + row) for row in range(rows)]
    twins = Twins.of(dense, columns, after, number)
    counts = [row.for_heads(heads) for row in columns]
    assert twins.coded.coded.lengths == [tuple(max(0, n - SINKS - recent) for n in row) for row in counts]
    twins.check()
    for at, (what, how) in enumerate(steps):
        twins = twins.step(what, how, at)
        twins.check()
    twins.check_attention()


def storage(kind="int4", lengths=(150, 120), recent=10):
    dense = entries(2, 2, max(lengths))
    columns = [Columns.of_ranges((0, 4), (max(lengths) - n + 4, max(lengths))) for n in lengths]
    return Twins.of(dense, columns, 0, KVDtype(kind, recent=recent))


@pytest.mark.parametrize("kind", ["int8", "int4", "k6v4"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_place(kind, softcap, sinks):
    twins = storage(kind)
    twins.check_attention(softcap=softcap, sinks=torch.randn(4) if sinks else None)


def test_moving_entries_never_codes_them_again():
    twins = storage()
    lines = [side[0].clone() for side in twins.coded.coded.segments(0)]
    moved = twins.coded.select_rows([1, 0, 0]).truncate([(90, 90), (140, 140), (70, 70)])
    moved = moved.keep([Columns.of_ranges((0, 50)), Columns.of_ranges((2, 130)), Columns.of_ranges((0, 60))], 0)
    for mine, first in zip(moved.coded.segments(2), lines, strict=True):
        assert torch.equal(mine[0], first[:56])
    for mine, first in zip(moved.coded.segments(1), lines, strict=True):
        assert torch.equal(mine[0], first[: len(mine[0])])


@pytest.mark.parametrize("calls", [[1] * 100, [100], [3, 60, 37]])
def test_when_entries_are_coded_depends_on_their_number_alone(calls):
    """And not on the calls that brought them, nor on other rows."""
    twins, count = storage(lengths=(150, 9)), sum(calls)
    new = entries(2, 2, count, seed=5)
    alone = twins.coded.select_rows([1])
    at = 0
    for call in calls:
        twins.coded.append(*(part[:, :, at : at + call] for part in new))
        alone.append(*(part[1:, :, at : at + call] for part in new))
        at += call
    for each in (twins.coded, alone):
        each.code_older()
    blocks = count // FLUSH * FLUSH
    assert twins.coded.coded.lengths == [(136 + blocks,) * 2, ((9 + count - SINKS - 10) // FLUSH * FLUSH,) * 2]
    assert alone.lengths == twins.coded.lengths[1:]
    assert alone.coded.lengths == twins.coded.coded.lengths[1:]
    assert torch.equal(alone.coded.full().keys, twins.coded.coded.select_rows([1]).full().keys)
    twins.alike(twins.coded, twins.plain.append(*new)).check()


def test_tables_stay_what_they_are_while_entries_come():
    """A captured step reads them: neither coding nor moving may put others in their place."""
    twins = storage()
    tables = [arena.table for arena in twins.coded.tables]
    moved = 0
    for at in range(150):
        before = twins.coded.exact.keys.data_ptr()
        twins = twins.step("append", 1, at)
        moved += before != twins.coded.exact.keys.data_ptr()
        assert all(arena.table is table for arena, table in zip(twins.coded.tables, tables, strict=True))
    twins.check()
    assert moved == 150 // FLUSH  # once for each block that is coded, and never for want of growth


def test_freed_rows_give_their_memory_back_and_take_nothing():
    twins = storage()
    before = twins.coded.nbytes
    twins.coded.free_rows([0])
    assert twins.coded.nbytes < 0.6 * before
    for at in range(100):
        new = entries(2, 2, 1, seed=at)
        twins.coded.append(*new)
        twins.plain = twins.plain.append(*new)
    assert twins.coded.lengths == [(0, 0), (220, 220)]
    twins.alike(twins.coded.select_rows([1]), twins.plain.select_rows([1]), [1]).check()
    out = twins.coded.attend(torch.randn(2, 4, 1, SIZES[0]), None, None, None)
    assert (out[0] == 0).all()
    twins.check_bytes()


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_different_types(asked):
    dense = entries(1, 2, 90)
    dense[1] = dense[1].bfloat16()
    made = LeveledKV.gathered(*dense, [Columns.of_ranges((0, 90))], 0, KVDtype("int4", recent=8), centres_of(dense))
    made.append(dense[0][:, :, :3].bfloat16(), dense[1][:, :, :3].double())
    out = made.attend(torch.randn(1, 4, 1, SIZES[0]).to(asked), None, None, None)
    assert out.dtype == asked
    assert torch.isfinite(out).all()
    assert torch.equal(made.segments(0)[1][0][-3:], dense[1][0, 0, :3].double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", ["int8", "int4", "k6v4"])
def test_a_gpu_does_what_the_cpu_does(kind, size, dtype):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 300, size, generator=generator).to(dtype) + 2 for _ in range(2))
    columns = [some_columns(300, 2, 1), Columns.of_ranges((0, 300))]
    new = [torch.randn(2, 2, 120, size, generator=generator).to(dtype) for _ in range(2)]
    query = torch.randn(2, 8, 1, size, generator=generator).to(dtype)
    outs = []
    for device in ("cpu", "cuda"):
        dense = [part.to(device) for part in (keys, values)]
        own = [Columns(c.ranges, tuple(head.to(device) for head in c.heads)) for c in columns]
        made = LeveledKV.gathered(*dense, own, 0, KVDtype(kind, recent=16), tuple(part.mean(2) for part in dense))
        for at in range(0, 120, 40):
            made.append(*(part[:, :, at : at + 40].to(device) for part in new))
        # Counted within the row, whose shorter heads are padded on the left.
        starts = [[max(row) - n for n in row] for row in made.lengths]
        kept = [
            [torch.cat([torch.arange(at, at + 5), torch.arange(at + 20, max(row))]) for at in heads]
            for heads, row in zip(starts, made.lengths, strict=True)
        ]
        made = made.keep([Columns(heads=tuple(head.int().to(device) for head in row)) for row in kept], 0)
        outs.append((made.lengths, made.coded.lengths, made.attend(query.to(device), None, None, None).cpu()))
    assert outs[0][:2] == outs[1][:2]
    off = (outs[0][2].float() - outs[1][2].float()).norm() / outs[0][2].float().norm()
    assert off < (0.02 if dtype == torch.bfloat16 else 0.005)
