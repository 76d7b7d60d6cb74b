"""Coding a prompt's entries on their way to private pages: of several layers at once, a launch a rung."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import SINKS
from refreekv.kernels.packed_calls import Transfer
from refreekv.kernels.paged import Coded, PagedTable, Pool, upload


class Source(NamedTuple):
    """Where a prompt's entries are, of some layers: counted in lines of as many elements as a key has.

    Attributes
    ----------
    table : Tensor
        int64 ``[layers, H_kv, 4]``: segments of exact entries, as `kernels.table` has them.
    lines : Tensor
        int32 ``[n]``: each token's line in all of them.
    """

    table: Tensor
    lines: Tensor

    @classmethod
    def in_blocks(cls, pool: Pool, blocks: Tensor, prompt: int) -> "Source":
        """In ordinary blocks, int32 ``[.]``, of a pool that has lines: all layers."""
        block, token, _ = (stride // pool.size for stride in pool.shared_strides())
        position = torch.arange(prompt, dtype=torch.int32, device=blocks.device)
        return cls(pool.begins, blocks[position // pool.tokens] * block + position % pool.tokens * token)

    @classmethod
    def copied(cls, entries: Tensor) -> "Source":
        """One layer's in a tensor ``[H_kv, n, 2 * D]``, contiguous, that has to live as long as this is used."""
        assert entries.is_contiguous()
        heads, prompt, width = entries.shape
        item, device = entries.element_size(), entries.device
        begins = torch.arange(heads, device=device) * (prompt * width * item) + entries.data_ptr()
        held = torch.full_like(begins, 2 * prompt - 1)
        table = torch.stack([begins, begins + width // 2 * item, held, held], -1)[None]
        return cls(table, 2 * torch.arange(prompt, dtype=torch.int32, device=device))

    def of_layers(self, layers: slice) -> "Source":
        """Those of some layers."""
        return self._replace(table=self.table[layers])


def centres_in_blocks(pool: Pool, blocks: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """`core.quantisation.centre_of` of a prompt's keys and values in all layers, in few launches.

    Parameters
    ----------
    pool : Pool
        The cache.
    blocks : Tensor
        int32 ``[.]``: ordinary blocks.
    prompt : int
        Tokens.

    Returns
    -------
    keys, values : Tensor
        ``[layers, H_kv, D]`` in float32, with the entries' precision.
    """
    first = SINKS if prompt > SINKS else 0
    if pool.cache.is_cuda:
        from refreekv.kernels.paged_storage import launch_sum

        total = launch_sum(blocks, pool, first, prompt)
    else:
        from refreekv.kernels import paged_reference

        total = paged_reference.sum_of_blocks(pool, blocks, first, prompt)
    keys, values = (total / (prompt - first)).to(pool.cache.dtype).float().split(pool.size, -1)
    return keys, values


def prompt_in_blocks(pool: Pool, blocks: Tensor, layers: slice, prompt: int) -> Tensor:
    """A copy of what some layers' ordinary blocks, int32 ``[.]``, hold of a prompt: ``[layers, H_kv, n, 2 * D]``."""
    if pool.cache.is_cuda:
        from refreekv.kernels.paged_storage import launch_read

        return launch_read(blocks, pool, layers, prompt)
    from refreekv.kernels import paged_reference

    return paged_reference.read_blocks(pool, blocks, layers, prompt)


class Chosen(NamedTuple):
    """Which entries of some layers are coded in which rung, and where their codes are before they go to pages.

    Attributes
    ----------
    counts : Tensor
        int64 ``[layers, H_kv, R]``, in host memory.
    tables, spans : Tensor
        int64 ``[R, layers * H_kv, 4]`` and ``[R, layers * H_kv, 3]``: as `kernels.pack_lines` is told.
    lines, factors : tuple of Tensor
        Of each rung, one layer's and head's behind the other's.
    listed : Tensor
        int32 ``[layers, R, H_kv, n]``: lines of a `Source`, which the spans name.
    """

    counts: Tensor
    tables: Tensor
    spans: Tensor
    lines: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    listed: Tensor

    @classmethod
    def of(cls, listed: Tensor, counts: Tensor, forms: Sequence[PackedFormat]) -> "Chosen":
        """The first ``counts`` entries of each list, in these formats; everything is told the device at once."""
        assert listed.is_contiguous()
        layers, rungs, heads, length = listed.shape
        device, totals = listed.device, counts.sum((0, 1)).tolist()
        lines = tuple(
            torch.empty(count, form.line_bytes, dtype=torch.uint8, device=device)
            for count, form in zip(totals, forms, strict=True)
        )
        factors = tuple(torch.empty(count, FACTOR_BYTES, dtype=torch.uint8, device=device) for count in totals)
        by_rung = counts.permute(2, 0, 1).flatten(1)  # [R, layers * H_kv]
        begins = by_rung.cumsum(-1) - by_rung
        at = [torch.tensor([part.data_ptr() for part in parts])[:, None] for parts in (lines, factors)]
        each = torch.tensor([form.line_bytes for form in forms])[:, None]
        numbered = torch.arange(layers * rungs * heads).view(layers, rungs, heads).transpose(0, 1).flatten(1)
        address = listed.data_ptr() + numbered * length * listed.element_size()
        told = torch.stack(
            [at[0] + begins * each, at[1] + begins * FACTOR_BYTES, by_rung, by_rung, address, by_rung, 0 * by_rung], -1
        )
        there = upload(told, device)
        tables, spans = there[..., :4].contiguous(), there[..., 4:].contiguous()
        return cls(counts, tables, spans, lines, factors, listed)


def code_to_pages(
    pool: Pool,
    forms: Sequence[PackedFormat],
    maps: PackedMaps,
    source: Source,
    chosen: Chosen,
    firsts: Sequence[int],
    pages: Tensor,
    each: int | None = None,
) -> None:
    """Code entries of some layers and write them to coded lines, one layer's and head's behind the other's.

    Parameters
    ----------
    pool : Pool
        The cache.
    forms, maps : sequence of PackedFormat, PackedMaps
        Of the lines of each rung, and of each layer into code space.
    source, chosen : Source, Chosen
        Where the layers' entries are, and lines of which.
    firsts : sequence of int
        The first line in each rung, counted in lines of the rung.
    pages : Tensor
        int32 ``[.]``: the private blocks.
    each : int, optional
        Lines of a page; None: as many as there is room for.
    """
    keys, values = pool.cache.split(pool.size, -1)  # for their type
    exact, most = source.table.flatten(0, 1), chosen.counts.amax((0, 1)).tolist()
    if not any(most):
        return
    rungs = zip(chosen.tables, forms, chosen.spans, most, strict=True)
    kernels.pack_rungs(
        [Transfer(keys, values, exact, table, form, maps, spans, 0, n, None) for table, form, spans, n in rungs]
    )
    for rung, (form, first) in enumerate(zip(forms, firsts, strict=True)):
        lines, factors = chosen.lines[rung], chosen.factors[rung]
        if not len(lines):
            continue
        if pool.cache.is_cuda:
            from refreekv.kernels.paged_storage import launch_spread

            launch_spread(lines, factors, pool, form, first, pages, each)
        else:
            from refreekv.kernels import paged_reference

            paged_reference.spread(lines, factors, pool, form, first, pages, each)


class Later:
    """Codes tokens that came after prompts, as many as a private block holds at a time, of all layers and heads.

    What the device is told is the same each time: it is told once, and lists and codes have one place.

    Parameters
    ----------
    pool, coded : Pool, Coded
        The cache, and what is known of coded entries: means of a slot are those of its prompt.
    layers : int, optional
        How many of the layers, the first ones; None: all.
    """

    def __init__(self, pool: Pool, coded: Coded, layers: int | None = None):
        self._pool, self._coded, self._form = pool, coded, coded.forms[coded.rung]
        self._layers = slice(0, pool.layers if layers is None else layers)
        self.tokens = pool.coded_tokens(self._form)
        """Of a block."""
        counts = torch.full((self._layers.stop, pool.heads, 1), self.tokens)
        listed = torch.zeros(len(counts), 1, pool.heads, self.tokens, dtype=torch.int32, device=pool.cache.device)
        self._chosen = Chosen.of(listed, counts, [self._form])

    def code(self, table: PagedTable, slot: int, blocks: Tensor, start: int, column: int) -> None:
        """Code a sequence's next tokens. The table stays as it is; the host does not wait.

        The private block may be one of those that the tokens are in.

        Parameters
        ----------
        table, slot : PagedTable, int
            What is kept, and the sequence.
        blocks : Tensor
            int32 ``[.]``: its ordinary blocks.
        start : int
            Position of the first of the tokens.
        column : int
            Which of its private blocks they go to.
        """
        pool, coded, layers = self._pool, self._coded, self._layers
        at = start % pool.tokens
        own = blocks[start // pool.tokens :][: -(-(at + self.tokens) // pool.tokens)]
        if pool.has_lines:
            source = Source.in_blocks(pool, own, at + self.tokens).of_layers(layers)
        else:
            # Lives until its codes are made.
            copy = prompt_in_blocks(pool, own, layers, at + self.tokens)
            source = Source.copied(copy.flatten(0, 1))
            source = source._replace(table=source.table.view(layers.stop, pool.heads, -1))
        self._chosen.listed.copy_(source.lines[at:])
        maps = coded.maps.of_span(layers).around(coded.key_means[layers, slot], coded.value_means[layers, slot])
        pages, each = table.pages[slot, column:], pool.heads * self.tokens
        code_to_pages(pool, [self._form], maps, source, self._chosen, [0], pages, each)
