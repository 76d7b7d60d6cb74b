"""Coded storage against plain lists of entries: what it gives back, whatever happens to it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.driving import storage_bytes
from refreekv.core.quantisation import FLUSH, SINKS, Ladder, round_trip
from refreekv.kernels.reference import decode_segment
from refreekv.storage.columns import Columns, Levels
from refreekv.storage.leveled import LeveledKV

SIZES = (32, 16)
LADDERS = [
    Ladder.of("int8"),
    Ladder.of("int4"),
    Ladder.of("k6v4"),
    Ladder.of("int2"),
    Ladder.of("k4v2", "k8v8"),
    Ladder.of("k4v2", "k6v4", "k8v8", generated=1),
    Ladder.of("k2v2", "k4v2", "k4v4", "k6v6", generated=0),
]


def with_recent(ladder, recent):
    return Ladder.of(*(rung.kind for rung in ladder.rungs), recent=recent, generated=ladder.generated)


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


class Segment:
    """One KV head's entries in plain lists: what each is worth by now, and its rung; -1 where it is exact.

    ``given`` is what each was before it was last coded.
    """

    def __init__(self, sides, rungs, ladder, centre, given=None):
        self.sides, self.rungs, self.ladder, self.centre = list(sides), rungs, ladder, centre
        self.given = [side.clone() for side in (sides if given is None else given)]

    def __len__(self):
        return len(self.rungs)

    def some(self, index):
        sides, given = ([side[index] for side in both] for both in (self.sides, self.given))
        return Segment(sides, self.rungs[index], self.ladder, self.centre, given)

    def with_more(self, sides):
        both, given = ([torch.cat(pair) for pair in zip(own, sides, strict=True)] for own in (self.sides, self.given))
        rungs = torch.cat([self.rungs, torch.full((len(sides[0]),), -1)])
        return Segment(both, rungs, self.ladder, self.centre, given)

    def put(self, at, rung):
        """Code an entry, from what it is worth now."""
        for number, (side, centre) in enumerate(zip(self.sides, self.centre, strict=True)):
            self.given[number][at] = side[at]
            side[at] = round_trip(side[at][None], self.ladder.rungs[rung].widths[number], centre)[0]
        self.rungs[at] = rung

    def code(self, after, block=1, asked=None):
        """Code what is due: in whole blocks, the oldest first, behind the first entries and what is coded."""
        self.sides = [side.clone() for side in self.sides]
        self.rungs = self.rungs.clone()
        coded = (self.rungs >= 0).nonzero().flatten()
        first = int(coded[-1]) + 1 if len(coded) else SINKS
        due = max(0, len(self) - after - self.ladder.recent - first)
        for at in range(first, first + due // block * block):
            self.put(at, self.ladder.generated if asked is None else int(asked[at]))

    def keep(self, index, after, asked=None):
        kept = self.some(index)
        kept.sides = [side.clone() for side in kept.sides]
        if asked is not None:
            for at, rung in enumerate(kept.rungs.tolist()):
                if rung > int(asked[at]):
                    kept.put(at, int(asked[at]))
        kept.code(after, asked=asked)
        return kept


class Twins:
    """A coded storage, and the entries that it was given in plain lists, by row and KV head."""

    def __init__(self, coded, plain):
        self.coded, self.plain = coded, plain

    @classmethod
    def of(cls, dense, columns, after, ladder, levels=None):
        centres = centres_of(dense)
        coded = LeveledKV.gathered(*dense, columns, after, ladder, centres, levels)
        end = dense[0].shape[2] - after
        plain = []
        for row, own in enumerate(columns):
            index, heads = own.tensors(torch.device("cpu")), []
            for head in range(dense[0].shape[1]):
                chosen = torch.cat([index[head % len(index)].long(), torch.arange(end, end + after)])
                sides = [part[row, head][chosen] for part in dense]
                segment = Segment(sides, torch.full((len(chosen),), -1), ladder, [part[row, head] for part in centres])
                segment.code(after, asked=None if levels is None else levels[row].heads[head % len(levels[row].heads)])
                heads.append(segment)
            plain.append(heads)
        return cls(coded, plain)

    def check(self):
        coded = self.coded
        assert coded.lengths == [tuple(map(len, heads)) for heads in self.plain]
        full, at = coded.full(), 0
        rungs = coded.lines.rung_of_each().tolist()
        for row, heads in enumerate(self.plain):
            for head, segment in enumerate(heads):
                expected = segment.rungs[segment.rungs >= 0].tolist()
                assert rungs[at : at + len(expected)] == expected
                at += len(expected)
                for rung, arena in enumerate(coded.lines.rungs):
                    assert arena.lengths[row][head] == expected.count(rung)
                for side in (0, 1):
                    mine, want = full.segments(row)[side][head], segment.sides[side]
                    exact = segment.rungs < 0
                    assert torch.equal(mine[exact], want[exact])
                    # An element half-way between two levels may fall on either side, and one entry to either of two
                    # sizes that are as good.
                    far = (mine - want).abs() > 1e-3 * (1 + want.abs())
                    assert far.float().mean() < 0.05 or far.any(-1).sum() == 1 if expected else not far.any()
                    missed, meant = ((part - segment.given[side]).norm(dim=-1) for part in (mine, want))
                    assert (missed <= 1.5 * meant + 1e-3)[far.any(-1)].all()  # more than 1 where it was coded twice
            for mine, other in zip(coded.segments(row), full.segments(row), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert at == len(rungs)
        self.check_bytes()

    def check_bytes(self):
        coded = self.coded
        tensors = [tensor for arena in coded.tables for tensor in (arena.keys, arena.values)]
        assert coded.nbytes == storage_bytes([*tensors, *coded.coding.means, coded.lines.members.packed])
        assert coded.nbytes == sum(coded.row_nbytes(row) for row in range(len(coded.lengths)))
        told = sum(n for row in coded.lines.members.counts for n in row)
        assert coded.lines.members.nbytes <= told / 4 + len(coded.lengths) * coded.kv_heads
        assert not told or len(coded.lines.rungs) > 1
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
        coded, plain = self.coded, self.plain
        lengths = [tuple(map(len, heads)) for heads in plain]
        match what:
            case "append":
                new = entries(len(lengths), coded.kv_heads, how, seed=11 + number)
                grown = []
                for row, heads in enumerate(plain):
                    for segment in heads:
                        segment.code(0, FLUSH)
                    grown.append([s.with_more([part[row, head] for part in new]) for head, s in enumerate(heads)])
                return Twins(coded.append(*new), grown)
            case "select":
                rows = [row % len(lengths) for row in how]
                return Twins(coded.select_rows(rows), [[s.some(slice(None)) for s in plain[row]] for row in rows])
            case "truncate":
                wanted = [tuple(min(n, how + 5 * head) for head, n in enumerate(row)) for row in lengths]
                rows = zip(plain, wanted, strict=True)
                left = [[s.some(slice(n)) for s, n in zip(*row, strict=True)] for row in rows]
                return Twins(coded.truncate(wanted), left)
            case "drop":
                how = min(how, *(n for row in lengths for n in row))
                if coded.drop(how):
                    self.plain = [[s.some(slice(len(s) - how)) for s in heads] for heads in plain]
                return self
            case "keep":
                return self.keep(min(how[0], *(n for row in lengths for n in row)), how[1])
            case "copy":
                copied = copy.deepcopy(coded) if how == "deepcopy" else pickle.loads(pickle.dumps(coded))
                coded.exact.keys.fill_(float("nan"))
                for arena in coded.lines.rungs:
                    arena.keys.fill_(0x7F)
                return Twins(copied, plain)
            case "code":
                coded.code_older(how, all_due=True)
                for heads in plain:
                    for segment in heads:
                        segment.code(how)
                return self

    def keep(self, after, seed):
        """Two thirds of the entries, in rungs drawn by the seed; None: of no rung of their own."""
        kept, levels, left = [], [], []
        rungs = len(self.coded.lines.rungs)
        for row, heads in enumerate(self.plain):
            longest = max(map(len, heads))
            index, given, own = [], [], []
            for head, segment in enumerate(heads):
                gap = longest - len(segment)
                stay = torch.tensor([i for i in range(gap, longest - after) if (i * 7 + head) % 3], dtype=torch.int32)
                asked = drawn(len(stay) + after, rungs, 0 if seed is None else seed + 10 * row + head)
                asked[len(stay) :] = rungs - 1  # what follows a prompt stays where it is
                index.append(stay)
                given.append(asked[: len(stay)])
                chosen = torch.cat([stay.long(), torch.arange(longest - after, longest)]) - gap
                own.append(segment.keep(chosen, after, None if seed is None else asked))
            kept.append(Columns(heads=tuple(index)))
            levels.append(Levels(tuple(given), ((0,) * rungs,) * len(heads)))
            left.append(own)
        return Twins(self.coded.keep(kept, after, None if seed is None else levels), left)


def drawn(count, rungs, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rungs, (count,), generator=generator, dtype=torch.uint8)


moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
        st.tuples(st.just("truncate"), st.integers(0, 80)),
        st.tuples(st.just("drop"), st.integers(1, 20)),
        st.tuples(st.just("keep"), st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 9)))),
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


def some_levels(columns, heads, ladder, seed):
    """Rungs drawn for columns, a number for each, or one for each of the KV heads."""
    counts = columns.for_heads(heads if len(columns.counts) > 1 or seed % 2 else 1)
    given = [drawn(n, len(ladder.rungs), seed + head) for head, n in enumerate(counts)]
    coded = [own[SINKS : SINKS + ladder.coded(len(own))].tolist() for own in given]
    return Levels(tuple(given), tuple(tuple(own.count(r) for r in range(len(ladder.rungs))) for own in coded))


@settings(deadline=None, max_examples=120)
@given(
    ladder=st.sampled_from(LADDERS),
    recent=st.integers(0, 20),
    length=st.integers(1, 90),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    after=st.integers(0, 3),
    seed=st.integers(0, 20),
    leveled=st.booleans(),
    steps=moves,
)
def test_any_sequence_of_changes_is_that_of_plain_lists(
    ladder, recent, length, heads, rows, after, seed, leveled, steps
):
    ladder = with_recent(ladder, recent)
    dense = entries(rows, heads, length + after, seed=seed)
    columns = [some_columns(length, heads, seed + row) for row in range(rows)]
    levels = [some_levels(own, heads, ladder, seed + row) for row, own in enumerate(columns)] if leveled else None
    twins = Twins.of(dense, columns, after, ladder, levels)
    counts = [row.for_heads(heads) for row in columns]
    assert twins.coded.lines.lengths == [tuple(max(0, n - SINKS - recent) for n in row) for row in counts]
    twins.check()
    for at, (what, how) in enumerate(steps):
        twins = twins.step(what, how, at)
        twins.check()
    twins.check_attention()


FOUR_BITS = Ladder.of("int4")


def storage(ladder=FOUR_BITS, lengths=(150, 120), recent=10, leveled=True):
    ladder = with_recent(ladder, recent)
    dense = entries(2, 2, max(lengths))
    columns = [Columns.of_ranges((0, 4), (max(lengths) - n + 4, max(lengths))) for n in lengths]
    levels = [some_levels(own, 2, ladder, 5 + row) for row, own in enumerate(columns)] if leveled else None
    return Twins.of(dense, columns, 0, ladder, levels)


TWO, THREE = LADDERS[4:6]


@pytest.mark.parametrize("ladder", [*LADDERS[:3], TWO, THREE], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_place(ladder, softcap, sinks):
    twins = storage(ladder)
    twins.check_attention(softcap=softcap, sinks=torch.randn(4) if sinks else None)


@pytest.mark.parametrize("ladder", [LADDERS[1], TWO, THREE], ids=str)
def test_moving_entries_never_codes_them_again(ladder):
    twins = storage(ladder)
    before = [lines_of(twins.coded, 0, 0), lines_of(twins.coded, 1, 0)]
    moved = twins.coded.select_rows([1, 0, 0]).truncate([(90, 90), (140, 140), (70, 70)])
    kept = [Columns.of_ranges((0, 50)), Columns.of_ranges((2, 130)), Columns.of_ranges((0, 60))]
    # Wider rungs than their own are asked for, and not given.
    top = [Levels((torch.full((sum(row.counts),), 3, dtype=torch.uint8),), ()) for row in kept]
    for levels in (None, top):
        left = moved.keep(kept, 0, levels)
        assert [sum(map(len, lines_of(left, row, 0))) for row in range(3)] == [46, 126, 56]
        for row, old, first in ((0, 1, 0), (1, 0, 0), (2, 0, 0)):
            for mine, theirs in zip(lines_of(left, row, 0), before[old], strict=True):
                assert mine == theirs[first : first + len(mine)]


def lines_of(coded, row, head):
    """Lines and factors of each rung of a segment, as plain lists."""
    found = []
    for arena in coded.lines.rungs:
        lines, factors = (side[head] for side in arena.segments(row))
        found.append([*zip(lines.tolist(), factors.tolist(), strict=True)])
    return found


def test_an_entry_s_code_depends_on_its_rung_and_itself_alone():
    """And not on what else is kept, nor on the rungs of others."""
    ladder, dense = with_recent(THREE, 10), entries(1, 1, 120)
    centres, everything = centres_of(dense), [Columns.of_ranges((0, 120))]
    alike = [
        LeveledKV.gathered(*dense, everything, 0, ladder, centres, [Levels((torch.full((120,), rung).byte(),), (
            tuple(106 * (r == rung) for r in range(3)),
        ))])
        for rung in range(3)
    ]  # fmt: skip
    chosen = torch.tensor([i for i in range(120) if i % 3])
    columns, rungs = [Columns(heads=(chosen.int(),))], drawn(80, 3, 1)
    counts = tuple(rungs[4:70].tolist().count(r) for r in range(3))
    mixed = LeveledKV.gathered(*dense, columns, 0, ladder, centres, [Levels((rungs,), (counts,))])
    for rung in range(3):
        where = [int(chosen[at]) - 4 for at in range(4, 70) if rungs[at] == rung]
        whole = lines_of(alike[rung], 0, 0)[rung]
        assert lines_of(mixed, 0, 0)[rung] == [whole[at] for at in where]


def test_a_narrower_rung_is_coded_from_what_the_code_stands_for():
    twins = storage(THREE)
    for asked in (2, 1, 0):
        levels = [Levels((torch.full((max(row),), asked).byte(),), ()) for row in twins.coded.lengths]
        columns = [Columns.of_ranges((0, max(row))) for row in twins.coded.lengths]
        made = twins.coded.keep(columns, 0, levels)
        plain = [
            [s.keep(torch.arange(len(s)), 0, torch.full((len(s),), asked)) for s in heads] for heads in twins.plain
        ]
        twins = Twins(made, plain)
        twins.check()
        assert [sum(map(sum, arena.lengths)) for arena in made.lines.rungs[asked + 1 :]] == [0] * (2 - asked)


def test_rungs_without_entries_cost_their_tables_and_no_more():
    ladders = Ladder.of("int4", recent=10), Ladder.of("int2", "int4", "int6", "int8", recent=10, generated=1)
    one, four = (storage(ladder, leveled=False).coded for ladder in ladders)
    assert four.nbytes == one.nbytes
    assert sum(arena.table.nbytes for arena in four.tables) == sum(arena.table.nbytes for arena in one.tables) * 5 // 2
    query = torch.randn(2, 4, 1, SIZES[0])
    assert torch.equal(four.attend(query, None, None, None), one.attend(query, None, None, None))


@pytest.mark.parametrize("ladder", [LADDERS[1], TWO, THREE], ids=str)
@pytest.mark.parametrize("calls", [[1] * 100, [100], [3, 60, 37]])
def test_when_entries_are_coded_depends_on_their_number_alone(calls, ladder):
    """And not on the calls that brought them, nor on other rows."""
    twins, count = storage(ladder, lengths=(150, 9)), sum(calls)
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
    assert twins.coded.lines.lengths == [(136 + blocks,) * 2, ((9 + count - SINKS - 10) // FLUSH * FLUSH,) * 2]
    assert alone.lengths == twins.coded.lengths[1:]
    assert [lines_of(alone, 0, head) for head in (0, 1)] == [lines_of(twins.coded, 1, head) for head in (0, 1)]
    assert {sum(map(sum, arena.lengths)) for arena in alone.lines.rungs} == {0, 2 * alone.lines.lengths[0][0]} - (
        {0} if len(ladder.rungs) == 1 else set()
    )
    plain = [
        [s.with_more([part[row, head] for part in new]) for head, s in enumerate(heads)]
        for row, heads in enumerate(twins.plain)
    ]
    for segment in (segment for heads in plain for segment in heads):
        segment.code(0, FLUSH)
    Twins(twins.coded, plain).check()


@pytest.mark.parametrize("ladder", [LADDERS[1], THREE], ids=str)
def test_tables_stay_what_they_are_while_entries_come(ladder):
    """A captured step reads them: neither coding nor moving may put others in their place."""
    twins = storage(ladder)
    tables = [arena.table for arena in twins.coded.tables]
    moved = 0
    for at in range(150):
        before = twins.coded.exact.keys.data_ptr()
        twins = twins.step("append", 1, at)
        moved += before != twins.coded.exact.keys.data_ptr()
        assert all(arena.table is table for arena, table in zip(twins.coded.tables, tables, strict=True))
    twins.check()
    assert moved == 0


@pytest.mark.parametrize("ladder", [LADDERS[1], THREE], ids=str)
def test_freed_rows_give_their_memory_back_and_take_nothing(ladder):
    twins = storage(ladder)
    before = twins.coded.nbytes
    twins.coded.free_rows([0])
    assert twins.coded.nbytes < 0.6 * before
    for at in range(100):
        twins = twins.step("append", 1, at)
    assert twins.coded.lengths == [(0, 0), (220, 220)]
    Twins(twins.coded.select_rows([1]), twins.plain[1:]).check()
    out = twins.coded.attend(torch.randn(2, 4, 1, SIZES[0]), None, None, None)
    assert (out[0] == 0).all()
    twins.check_bytes()


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_different_types(asked):
    dense = entries(1, 2, 90)
    dense[1] = dense[1].bfloat16()
    made = LeveledKV.gathered(*dense, [Columns.of_ranges((0, 90))], 0, Ladder.of("int4", recent=8), centres_of(dense))
    made.append(dense[0][:, :, :3].bfloat16(), dense[1][:, :, :3].double())
    out = made.attend(torch.randn(1, 4, 1, SIZES[0]).to(asked), None, None, None)
    assert out.dtype == asked
    assert torch.isfinite(out).all()
    assert torch.equal(made.segments(0)[1][0][-3:], dense[1][0, 0, :3].double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("ladder", [*LADDERS[:3], THREE], ids=str)
def test_a_gpu_does_what_the_cpu_does(ladder, size, dtype):
    ladder = with_recent(ladder, 16)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 300, size, generator=generator).to(dtype) + 2 for _ in range(2))
    columns = [some_columns(300, 2, 1), Columns.of_ranges((0, 300))]
    levels = [some_levels(own, 2, ladder, row) for row, own in enumerate(columns)]
    new = [torch.randn(2, 2, 120, size, generator=generator).to(dtype) for _ in range(2)]
    query = torch.randn(2, 8, 1, size, generator=generator).to(dtype)
    outs = []
    for device in ("cpu", "cuda"):
        dense = [part.to(device) for part in (keys, values)]
        own = [Columns(c.ranges, tuple(head.to(device) for head in c.heads)) for c in columns]
        given = [Levels(tuple(head.to(device) for head in row.heads), row.counts) for row in levels]
        made = LeveledKV.gathered(*dense, own, 0, ladder, tuple(part.mean(2) for part in dense), given)
        for at in range(0, 120, 40):
            made.append(*(part[:, :, at : at + 40].to(device) for part in new))
        # Counted within the row, whose shorter heads are padded on the left.
        starts = [[max(row) - n for n in row] for row in made.lengths]
        kept = [
            [torch.cat([torch.arange(at, at + 5), torch.arange(at + 20, max(row))]) for at in heads]
            for heads, row in zip(starts, made.lengths, strict=True)
        ]
        again = [Levels(tuple(drawn(len(head), 3, 9).to(device) for head in row), ()) for row in kept]
        made = made.keep([Columns(heads=tuple(head.int().to(device) for head in row)) for row in kept], 0, again)
        lengths = [arena.lengths for arena in made.tables]
        outs.append((lengths, made.attend(query.to(device), None, None, None).cpu()))
    assert outs[0][0] == outs[1][0]
    off = (outs[0][1].float() - outs[1][1].float()).norm() / outs[0][1].float().norm()
    assert off < (0.02 if dtype == torch.bfloat16 else 0.005)
