"""Attention over private pages, lists and tails: the kernels against dense attention, in float64."""

from dataclasses import replace

import pytest
import torch

from refreekv.core.key_codes import Moments
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import KVDtype, Ladder, centre_of
from refreekv.kernels import paged_reference
from refreekv.kernels.paged import COLUMNS, UNIT, Coded, PagedTable, Pool, Rows, paged_attention
from refreekv.kernels.paged_coding import Chosen, Later, Source, centres_in_blocks, code_to_pages, prompt_in_blocks

pytest.importorskip("triton", reason="needs triton: pip install 'refreekv[dev]'")

from refreekv.kernels import paged_join, paged_levels
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.packed_storage import launch_pack
from refreekv.kernels.paged_levels import launch_paged_levels
from refreekv.kernels.paged_storage import launch_move, launch_read, launch_spread, launch_sum

LAYERS, HEADS, GROUP, TOKENS, SIZE, BLOCKS = 3, 2, 3, 16, 16, 40


def begins(counts):
    """Where each of ``[L, H_kv]`` parts begins that lie one behind the other."""
    return (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)


def by_kernel(pool, table, slot, blocks, places, pages, longest, opening):
    launch_move(pages, pool, table, slot, blocks, places, longest, opening)


def plainly(pool, table, slot, blocks, places, pages, longest, opening):
    del longest
    paged_reference.move_to_pages(pool, table, slot, blocks, places, pages, opening)


class Case:
    """Three sequences in one pool: a whole one, one with a list and surrogates, one in private blocks."""

    def __init__(self, dtype, device, *, by_head=False, size=SIZE, seed=0, columns=8):
        self.generator = torch.Generator().manual_seed(seed)
        blocks = BLOCKS + 3 * (columns - 8)
        shape = (LAYERS, blocks, HEADS, TOKENS, 2 * size) if by_head else (LAYERS, blocks, TOKENS, HEADS, 2 * size)
        memory = torch.randn(shape, generator=self.generator).to(device, dtype)
        caches = [part if by_head else part.transpose(1, 2) for part in memory]
        self.pool, self.caches, self.size, self.device, self.dtype = Pool.of(caches), caches, size, device, dtype
        self.table = PagedTable.empty(self.pool, slots=4, most=12)
        # The last columns belong to nobody.
        order = torch.randperm(blocks - 1, generator=self.generator) + 1
        self.block_table = order[: 3 * columns].view(3, columns).int().to(device)
        self.private = order[3 * columns :][:12].int().to(device)
        self.prompts = [0, 70, 45]
        self.slots = [2, 0, 3]
        self.lists, self.surrogates = {}, None
        for row in (1, 2):
            self._list(row)

    def _list(self, row):
        """List some positions of each layer and head; of the last head two surrogates."""
        prompt, slot = self.prompts[row], self.slots[row]
        lists = torch.full((LAYERS, HEADS, prompt), 7, dtype=torch.int32)
        for layer in range(LAYERS):
            for head in range(HEADS):
                count = int(torch.randint(1, prompt, (), generator=self.generator))
                kept = torch.randperm(prompt, generator=self.generator)[:count].sort().values.int()
                if head == HEADS - 1:
                    kept = torch.cat([kept, torch.tensor([-1, -2], dtype=torch.int32)])[-prompt:]
                lists[layer, head, : len(kept)] = kept
                self.lists[row, layer, head] = kept.tolist()
        surrogates = torch.randn(LAYERS, HEADS, 2, 2 * self.size, generator=self.generator)
        lists, surrogates = lists.to(self.device), surrogates.to(self.device, self.dtype)
        each = surrogates.element_size()
        for layer in range(LAYERS):
            for head in range(HEADS):
                beside = (surrogates[layer, head].data_ptr() - self.pool.cache.data_ptr()) // each
                # The kernel counts in units: where an allocation is not aligned to it, nothing can be said.
                assert beside % UNIT == 0
                line = [0, 0, lists[layer, head].data_ptr(), len(self.lists[row, layer, head]), beside // UNIT, 0]
                assert len(line) == COLUMNS
                self.table.segments[layer, slot, head] = torch.tensor(line)
        self.table.starts[slot] = prompt
        self.alive = [*getattr(self, "alive", []), lists, surrogates]
        self.surrogates = {**(self.surrogates or {}), row: surrogates}

    def move(self, row, move):
        """Copy a row's listed entries to private blocks."""
        slot = self.slots[row]
        counts = self.table.segments[:, slot, :, 3].clone()
        firsts = begins(counts)
        blocks = -(-self.pool.pages_for(int(counts.sum())) // LAYERS)
        pages = self.private[:blocks]
        places = torch.stack([firsts, torch.zeros_like(firsts)])
        move(self.pool, self.table, slot, self.block_table[row], places, pages, int(counts.max()), 0)
        self.table.segments[:, slot] = 0
        self.table.segments[:, slot, :, 0] = firsts
        self.table.segments[:, slot, :, 1] = counts
        self.table.pages[slot, :blocks] = pages
        # What was moved is not read again.
        for position in range(self.prompts[row] // TOKENS):
            for cache in self.caches:
                cache[int(self.block_table[row, position])] = float("nan")

    def code(self, row, kind, move, opening=2, recent=3, codes=None):
        """Copy a row's first and last listed entries to private blocks as they are, and code those between.

        Each goes to a rung of its own, drawn at random.
        """
        slot = self.slots[row]
        forms = Ladder.parse(kind).forms((self.size, self.size), sorted_keys=codes is not None)
        rung = Ladder.parse(kind).generated
        self.table = replace(self.table, coded=Coded.empty(self.pool, 4, forms, codes, rung))
        coded = self.table.coded
        counts = self.table.segments[:, slot, :, 3].clone()
        left_out = (counts - opening - recent).clamp(min=0)
        exact = counts - left_out
        firsts = begins(exact)
        pages = self.private
        places = torch.stack([firsts, left_out])
        move(self.pool, self.table, slot, self.block_table[row], places, pages, int(counts.max()), opening)
        lists = {}
        for layer in range(LAYERS):
            for head in range(HEADS):
                listed = self.lists[row, layer, head][opening:][: int(left_out[layer, head])]
                # Surrogates lie in the last places, which are not coded here.
                assert min(listed, default=0) >= 0
                drawn = torch.randint(0, len(forms), (len(listed),), generator=self.generator).tolist()
                for rung in range(len(forms)):
                    lists[layer, head, rung] = [entry for entry, own in zip(listed, drawn, strict=True) if own == rung]
        page = self.pool.pages_for(int(exact.sum()))
        firsts_of, counts_of = [], []
        for rung, form in enumerate(forms):
            own = torch.tensor([[len(lists[layer, head, rung]) for head in range(HEADS)] for layer in range(LAYERS)])
            first = page * self.pool.coded_lines(form) + begins(own)
            coded.segments[:, slot, :, rung] = torch.stack([first, own], -1).to(self.device)
            firsts_of.append(first[:, 0])
            counts_of.append(own)
            page += -(-int(own.sum()) // self.pool.coded_lines(form))
        own = torch.stack(counts_of, -1)  # [layers, H_kv, R]
        listed = torch.zeros(LAYERS, len(forms), HEADS, max(1, int(own.max())), dtype=torch.int32)
        for (layer, head, rung), entries in lists.items():
            listed[layer, rung, head, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
        prompt = self.prompts[row]
        source = Source.in_blocks(self.pool, self.block_table[row], prompt)
        means = centres_in_blocks(self.pool, self.block_table[row], prompt)
        everything = torch.stack(
            [torch.stack([self.token(row, layer, p) for p in range(prompt)], 1) for layer in range(LAYERS)]
        )
        for found, part in zip(means, everything.split(self.size, -1), strict=True):
            close = 1e-5 if self.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found, centre_of(part).float(), atol=close, rtol=close)
        coded.key_means[:, slot], coded.value_means[:, slot] = means
        chosen = Chosen.of(source.lines[listed.to(self.device)], own, forms)
        maps = coded.maps.around(*means)
        code_to_pages(self.pool, forms, maps, source, chosen, [int(first[0]) for first in firsts_of], pages)
        assert page <= LAYERS * len(pages)
        self.table.segments[:, slot] = 0
        self.table.segments[:, slot, :, 0], self.table.segments[:, slot, :, 1] = firsts, exact
        self.table.pages[slot, : len(pages)] = pages
        return int(left_out.sum())

    def code_later(self, row, blocks):
        """Code what follows a row's coded prompt, so many private blocks of it; how many tokens."""
        coded, slot = self.table.coded, self.slots[row]
        column = 12 - blocks  # not used by what was coded before
        coder = Later(self.pool, coded)
        for block in range(blocks):
            start = int(self.table.starts[slot])
            coder.code(self.table, slot, self.block_table[row], start, column + block)
            coded.generated[slot] = torch.tensor([column, block + 1], dtype=torch.int32)
            self.table.starts[slot] = start + coder.tokens
        # What was coded is not read again.
        for position in range(int(self.table.starts[slot]) // TOKENS):
            for cache in self.caches:
                cache[int(self.block_table[row, position])] = float("nan")
        return blocks * coder.tokens

    def token(self, row, layer, position):
        """``[H_kv, 2 * D]``."""
        return self.caches[layer][int(self.block_table[row, position // TOKENS]), :, position % TOKENS]

    def entries(self, row, layer, head, length):
        """Entries ``[t, 2 * D]`` that a row sees, in float64; taken before anything moves."""

        def token(position):
            block = int(self.block_table[row, position // TOKENS])
            return self.caches[layer][block, head, position % TOKENS]

        kept = [
            token(p) if p >= 0 else self.surrogates[row][layer, head, -1 - p]
            for p in self.lists.get((row, layer, head), [])
        ]
        return torch.stack([*kept, *(token(p) for p in range(self.prompts[row], length))]).double().cpu(), len(kept)


def rows_of(case, counts, lengths, padded=0):
    ends = torch.tensor(counts).cumsum(0)
    columns = [ends - torch.tensor(counts), ends, torch.tensor(lengths), torch.arange(3), torch.tensor(case.slots)]
    if padded:
        more = torch.tensor([int(ends[-1])] * padded)
        zeros = torch.zeros(padded, dtype=torch.long)
        columns = [torch.cat([c, m]) for c, m in zip(columns, (more, more, zeros, zeros, zeros), strict=True)]
    return Rows(*(column.int().to(case.device) for column in columns), longest=max(counts))


def dense(case, query, layer, counts, lengths, scaling, softcap=None, sinks=None):
    out, at = torch.zeros(query.shape, dtype=torch.float64), 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for head in range(HEADS):
            entries, kept = case.entries(row, layer, head, length)
            for index in range(count):
                seen = kept + length - case.prompts[row] - (count - 1 - index)
                for one in range(head * GROUP, (head + 1) * GROUP):
                    logits = entries[:seen, : case.size] @ query[at + index, one].double().cpu() * scaling
                    if softcap:
                        logits = softcap * torch.tanh(logits / softcap)
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[one : one + 1].double().cpu()])
                    out[at + index, one] = logits.softmax(0)[:seen] @ entries[:seen, case.size :]
        at += count
    return out


def queries(case, counts):
    return torch.randn(sum(counts), HEADS * GROUP, case.size, generator=case.generator).to(case.device, case.dtype)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 4, 2)], ids=["single", "several"])
@pytest.mark.parametrize("more", [{}, {"softcap": 5.0}, {"sinks": True}], ids=["plain", "cap", "sinks"])
@pytest.mark.parametrize("moved", [False, True], ids=["listed", "moved"])
def test_attention(dtype, device, close, counts, more, moved):
    case = Case(dtype, device)
    lengths, query = [50, 80, 60], queries(case, counts)
    if more.get("sinks"):
        more = {"sinks": torch.randn(HEADS * GROUP, generator=case.generator).to(device)}
    want = dense(case, query, 1, counts, lengths, 0.3, **more)
    if moved:
        case.move(2, by_kernel)
    out = torch.full_like(query, float("nan"))
    more = {"softcap": None, "sinks": None, **more}
    launch_paged_levels(
        query, case.pool, 1, case.block_table, rows_of(case, counts, lengths, padded=2), case.table, out, 0.3, **more,
        programs=5,
    )  # fmt: skip
    close(out, want)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("size", [16, 48])
def test_layouts(dtype, device, close, by_head, size):
    case = Case(dtype, device, by_head=by_head, size=size)
    counts, lengths = (1, 1, 1), [33, 71, 46]
    query = queries(case, counts)
    want = dense(case, query, 2, counts, lengths, 0.2)
    case.move(1, by_kernel)
    out = torch.empty_like(query)
    launch_paged_levels(
        query, case.pool, 2, case.block_table, rows_of(case, counts, lengths), case.table, out, 0.2, None, None
    )
    close(out, want)


@pytest.mark.parametrize("moved", [False, True], ids=["listed", "moved"])
def test_plain_version(moved):
    case = Case(torch.float32, "cpu")
    counts, lengths = (2, 1, 3), [50, 80, 60]
    query = queries(case, counts)
    want = dense(case, query, 0, counts, lengths, 0.3)
    if moved:
        case.move(1, plainly)
    out = torch.zeros_like(query)
    paged_attention(query, case.pool, 0, case.block_table, rows_of(case, counts, lengths), case.table, out, scaling=0.3)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


def random_codes(case):
    """Codes of keys for each layer, of random keys and queries whose channels differ in size."""
    found = []
    for _ in range(LAYERS):
        size = torch.rand(case.size, generator=case.generator) * 2 + 0.1
        keys = torch.randn(1, HEADS, 200, case.size, generator=case.generator) * size
        asked = torch.randn(1, HEADS * GROUP, 100, case.size, generator=case.generator) * size.flip(0)
        found.append(Moments.of(keys, asked).codes())
    return found


ERRORS = {"int4": 0.1, "k6v4": 0.1, "k8v4": 0.1, "int8": 0.02, "k4v2+k4v4+k6v4+k7v6": 0.3, "k4v2+int8:generated=0": 0.4}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 3, 2)], ids=["single", "several"])
@pytest.mark.parametrize("own", [False, True], ids=["rotated", "model's"])
def test_coded_entries(dtype, device, close, kind, counts, own):
    case = Case(dtype, device, size=64)
    lengths, query = [50, 80, 60], queries(case, counts)
    full = dense(case, query, 1, counts, lengths, 0.2)
    assert case.code(1, kind, by_kernel, codes=random_codes(case) if own else None) > 50
    rows = rows_of(case, counts, lengths, padded=1)
    want = torch.zeros(query.shape, dtype=torch.float64)
    if device == "cpu":
        wide = query.double(), case.pool, 1, case.block_table, rows, case.table, want, 0.2, None, None
        paged_reference.paged_attention(*wide, wide=torch.float64)
    out = torch.full_like(query, float("nan"))
    launch_paged_levels(query, case.pool, 1, case.block_table, rows, case.table, out, 0.2, None, None)
    # Codes that were made for other queries lose more.
    most = ERRORS[kind] * (4 if own else 1)
    if device == "cpu":
        close(out, want)
        # Of random numbers, which no code likes; and not nothing: codes were read.
        assert 1e-4 < (want - full).norm() / full.norm() < most
    else:
        assert 1e-4 < (out.double().cpu() - full).norm() / full.norm() < most


@pytest.mark.parametrize("kind", ["k4v2+k4v4+k6v4+k7v6", "int4", "k4v2+int8:generated=0"])
@pytest.mark.parametrize("coded_block", [None, 16])
@pytest.mark.parametrize("layout", ["by token", "by head", "without lines"])
def test_tokens_that_are_coded_later(monkeypatch, dtype, device, close, kind, coded_block, layout):
    """They are read as what is coded of a prompt, by all queries; what they were is not read again."""
    if layout == "without lines":
        monkeypatch.setattr(Pool, "has_lines", False)
    case = Case(dtype, device, size=64, columns=32, by_head=layout == "by head")
    counts, prompt = (1, 3, 2), case.prompts[1]
    assert case.code(1, kind, by_kernel, codes=random_codes(case)) > 50
    ladder = Ladder.parse(kind)
    tokens = 2 * case.pool.coded_tokens(case.table.coded.forms[ladder.generated])
    lengths, query = [50, prompt + tokens + 30, 60], queries(case, counts)
    rows, told = rows_of(case, counts, lengths, padded=1), (case.pool, 1, case.block_table)
    before = torch.full_like(query, float("nan"))
    launch_paged_levels(query, *told, rows, case.table, before, 0.2, None, None)
    # As they are now, and what their codes stand for.
    exact = torch.stack([case.token(1, 1, position) for position in range(prompt, prompt + tokens)], 1)
    own, form = case.table.coded.maps.of_span(slice(1, 2)), case.table.coded.forms[ladder.generated]
    means = (part[1, case.slots[1]][None] for part in (case.table.coded.key_means, case.table.coded.value_means))
    own = own.around(*means)
    stand_for = torch.stack([stands_for(exact[head], form, own, head) for head in range(HEADS)])
    assert case.code_later(1, 2) == tokens
    assert int(case.table.starts[case.slots[1]]) == prompt + tokens
    out = torch.full_like(query, float("nan"))
    launch_paged_levels(
        query, *told, rows, case.table, out, 0.2, None, None, **({"coded_block": coded_block} if coded_block else {})
    )
    if device == "cpu":
        decoded = paged_reference._decoded(case.pool, case.table, case.table.coded, 1, case.slots[1], 1, torch.float32)
        place = sum(
            int(case.table.coded.segments[1, case.slots[1], 1, rung, 1]) for rung in range(case.table.coded.rung + 1)
        )
        close(decoded[place:][:tokens], stand_for[1].double())
        want = torch.zeros(query.shape, dtype=torch.float64)
        wide = query.double(), *told, rows, case.table, want, 0.2, None, None
        paged_reference.paged_attention(*wide, wide=torch.float64)
        close(out, want)
    # The other rows see what they saw.
    close(out[0], before[0].double().cpu())
    close(out[4:6], before[4:6].double().cpu())
    # Of random numbers, as above; not of nothing.
    assert 1e-4 < (out[1:4] - before[1:4]).float().norm() / before[1:4].float().norm() < 0.8


def stands_for(entries, form, maps, head):
    """What entries ``[t, 2 * D]`` of a head are after they were coded."""
    own, size = maps.of_segment(0, head), entries.shape[-1] // 2
    keys, values = entries.float().split(size, -1)
    keys = (keys - own.key_mean) @ own.key_matrix.T
    values = (values - own.value_mean) @ own.value_matrix.T
    lines, factors = form.pack(keys, values, own.key_worth)
    return torch.cat(maps.entries(*form.unpack(lines, factors, torch.float32), 0, head), -1)


@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("kind", ["int4", "k4v2+k6v4"])
def test_rows_beside_a_prompt(dtype, device, close, kind, spanned):
    """Other queries of the step are let alone, and those of the rows get what they get by themselves."""
    case, counts, lengths, before, behind = Case(dtype, device, size=64), (1, 3, 2), [50, 80, 60], 7, 9
    case.code(1, kind, by_kernel)
    query = queries(case, (before, *counts, behind))
    mine, rows = slice(before, before + sum(counts)), rows_of(case, counts, lengths)
    told = case.pool, 1, case.block_table
    alone = torch.empty_like(query[mine])
    launch_paged_levels(query[mine].contiguous(), *told, rows._replace(whole=True), case.table, alone, 0.2, None, None)
    shifted = rows._replace(
        begins=rows.begins + before, ends=rows.ends + before, span=(before, mine.stop) if spanned else None
    )
    out = torch.full_like(query, 3.0)
    launch_paged_levels(query, *told, shifted, case.table, out, 0.2, None, None)
    close(out[mine], alone.double().cpu())
    assert (out[:before] == 3).all()
    assert (out[mine.stop :] == 3).all()


def test_sums_of_blocks(dtype, device, close):
    """Of a prompt of more than a program's share, all layers and heads, and nothing of what is behind it."""
    case = Case(dtype, device, size=16)
    blocks, prompt = torch.randperm(BLOCKS, generator=case.generator).int().to(device), 31 * TOKENS + 5
    total = launch_sum(blocks, case.pool, 4, prompt)
    for layer, cache in enumerate(case.caches):
        entries = cache.transpose(1, 2)[blocks.long()].flatten(0, 1)[4:prompt]  # [n, H_kv, 2 * D]
        close(total[layer] / 100, entries.double().sum(0).cpu() / 100)
    if device == "cpu":
        torch.testing.assert_close(total, paged_reference.sum_of_blocks(case.pool, blocks, 4, prompt))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("layers", [slice(0, LAYERS), slice(1, 2)])
def test_prompts_read_out_of_blocks(dtype, device, by_head, layers):
    """Bit by bit, of some layers, in any order of blocks; nothing behind the prompt."""
    case = Case(dtype, device, by_head=by_head)
    blocks, prompt = torch.randperm(BLOCKS, generator=case.generator).int().to(device), 3 * TOKENS + 5
    want = [cache.transpose(1, 2)[blocks.long()].flatten(0, 1)[:prompt].transpose(0, 1) for cache in case.caches]
    want = torch.stack(want[layers])  # [layers, H_kv, n, 2 * D]
    assert torch.equal(launch_read(blocks, case.pool, layers, prompt), want)
    assert torch.equal(prompt_in_blocks(case.pool, blocks, layers, prompt), want)


@pytest.mark.parametrize("kind", ["int4", "k6v4"])
def test_coding_out_of_blocks(dtype, device, kind):
    """Entries are found in blocks in any order, in all layers and heads: the lines are those of a copy."""
    case = Case(dtype, device, size=64, by_head=kind == "int4")
    form, prompt = KVDtype(kind).form((64, 64)), 5 * TOKENS + 3
    blocks = torch.randperm(BLOCKS, generator=case.generator)[:6].int().to(device)
    source = Source.in_blocks(case.pool, blocks, prompt)
    maps = PackedMaps.rotated(*centres_in_blocks(case.pool, blocks, prompt), dtype)
    counts = torch.randint(0, prompt, (LAYERS, HEADS, 1), generator=case.generator)
    order = torch.stack([torch.randperm(prompt, generator=case.generator) for _ in range(LAYERS * HEADS)])
    listed = order.int().view(LAYERS, 1, HEADS, prompt).to(device)
    chosen = Chosen.of(source.lines[listed], counts, [form])
    keys, values = case.pool.cache.split(64, -1)
    table = source.table.flatten(0, 1)
    launch_pack(
        Transfer(keys, values, table, chosen.tables[0], form, maps, chosen.spans[0], 0, int(counts.max()), None)
    )
    at = 0
    for layer, cache in enumerate(case.caches):
        entries = cache.transpose(1, 2)[blocks.long()].flatten(0, 1).transpose(0, 1)[None]  # [1, H_kv, n, 2 * D]
        copy = Chosen.of(listed[layer : layer + 1], counts[layer : layer + 1], [form])
        dense = entries.split(64, -1)
        mine = maps.of_span(slice(layer, layer + 1))
        launch_pack(Transfer(*dense, None, copy.tables[0], form, mine, copy.spans[0], prompt, prompt, None))
        count = int(counts[layer].sum())
        assert torch.equal(chosen.lines[0][at : at + count], copy.lines[0])
        assert torch.equal(chosen.factors[0][at : at + count], copy.factors[0])
        at += count
    assert at == len(chosen.lines[0])


@pytest.mark.parametrize("more", [{"softcap": 5.0}, {"sinks": True}], ids=["cap", "sinks"])
def test_coded_entries_with_caps_and_sinks(dtype, device, close, more):
    case, counts, lengths = Case(dtype, device, size=64), (1, 2, 1), [50, 80, 60]
    query = queries(case, counts)
    if more.get("sinks"):
        more = {"sinks": torch.randn(HEADS * GROUP, generator=case.generator).to(device)}
    want = dense(case, query, 2, counts, lengths, 0.2, **more)
    case.code(1, "k8v4+int8", by_kernel, codes=random_codes(case))
    out = torch.full_like(query, float("nan"))
    more = {"softcap": None, "sinks": None, **more}
    launch_paged_levels(
        query, case.pool, 2, case.block_table, rows_of(case, counts, lengths), case.table, out, 0.2, **more
    )
    assert (out.double().cpu() - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize("block", [16, 64])
def test_shares_and_blocks_change_nothing(monkeypatch, dtype, device, close, programs, block):
    """Segments begin anywhere in a page, a program may have any part of them, and one kernel or two may join these."""
    case, counts, lengths = Case(dtype, device, size=64, seed=3), (1, 1, 1), [50, 80, 60]
    query = queries(case, counts)
    case.code(1, "k4v2+k4v4+k6v4+k7v6", by_kernel)
    rows, found = rows_of(case, counts, lengths), []
    other = {"programs": programs, "coded_block": block, "block": 16, "least": 1, "whole": False, "joined": 2}
    for settings in ({}, other):
        out = torch.full_like(query, float("nan"))
        launch_paged_levels(query, case.pool, 1, case.block_table, rows, case.table, out, 0.2, None, None, **settings)
        found.append(out)
        # The list's segments are looked through a few at a time where they are many.
        monkeypatch.setattr(paged_join, "AT_ONCE", 4)
        monkeypatch.setattr(paged_levels, "AT_ONCE", 4)
    close(found[1], found[0].double())


@pytest.mark.parametrize("kind", ["int4", "k6v4"])
def test_coded_lines_are_spread_over_pages(dtype, device, kind):
    case, other = Case(dtype, device, size=64), Case(dtype, device, size=64)
    form = KVDtype(kind).form((64, 64))
    each = case.pool.coded_lines(form)
    first, count = each - 5, 2 * each + 9
    lines = torch.randint(0, 256, (count, form.line_bytes), generator=case.generator).to(torch.uint8).to(device)
    factors = torch.randint(0, 256, (count, 4), generator=case.generator).to(torch.uint8).to(device)
    launch_spread(lines, factors, case.pool, form, first, case.private)
    if device == "cpu":
        paged_reference.spread(lines, factors, other.pool, form, first, other.private)
        for one, two in zip(case.caches, other.caches, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
    page, block = first // each, int(case.private[0])
    raw = case.caches[page].transpose(1, 2)[block].contiguous().view(torch.uint8).flatten()
    start = (first % each) * form.line_bytes
    assert torch.equal(raw[start : start + 5 * form.line_bytes].cpu(), lines[:5].flatten().cpu())
    start = each * form.line_bytes + (first % each) * 4
    assert torch.equal(raw[start : start + 20].cpu(), factors[:5].flatten().cpu())


def test_widths_that_pages_do_not_hold_are_refused():
    case = Case(torch.float32, "cpu")
    with pytest.raises(ValueError, match="one width a rung"):
        Coded.empty(case.pool, 4, [PackedFormat(SIZE, SIZE, (8,) * 4, (8, 8, 4, 4))])


def test_too_many_queries_are_refused():
    case = Case(torch.float32, "cpu")
    rows = rows_of(case, (1, 1, 50), [50, 80, 60])
    query = queries(case, (1, 1, 50))
    with pytest.raises(ValueError, match="the kernel takes 128"):
        paged_attention(query, case.pool, 0, case.block_table, rows, case.table, query, scaling=1.0)


def test_pages_must_be_contiguous():
    memory = torch.zeros(2, 8, 32, 2, 32)[:, :, :16]
    with pytest.raises(ValueError, match="not contiguous"):
        Pool.of([part.transpose(1, 2) for part in memory[:, :, ::2]])
    wide = torch.zeros(2, 8, 16, 2, 64)[..., :32]
    with pytest.raises(ValueError, match="not contiguous"):
        Pool.of([part.transpose(1, 2) for part in wide])
