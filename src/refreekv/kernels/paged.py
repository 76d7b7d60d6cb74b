"""Attention over entries in the pages of a paged cache: what was kept of a prompt, and the tokens after it.

A paged cache is one pool of blocks; block ``b`` is one page in each layer's cache. Ordinary blocks hold the
tokens of a sequence by position, all KV heads of a token together. Private blocks hold *lines*, an entry of
one layer and head each, key and value together, packed over all layers and heads: the pages of a sequence's
private blocks, block by block and layer by layer within a block, are one long list of lines, of which each
layer and head has a part, its segment. Some pages may hold coded lines (`core.packed_lines`) instead, as many as
fit, and behind them their factors: those of each rung of a ladder of number formats have pages of their own, so that
a layer and head has a segment a rung.

Tokens that came after the prompt are coded later, a private block at a time: of such a block each layer's page holds
the coded lines of this layer, as many consecutive tokens as fit of each head, head by head. So a block more is an
entry more in a list of blocks, and no line that is there moves.

An entry that stays is in a segment, or still listed: a list of positions of ordinary blocks. So a sequence can be
pruned before there are private blocks for it. A negative number in a list, ``-1 - i``, is line ``i`` of a
tensor of the segment's own: an entry that no block holds (a surrogate).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.rotation import rotation_like

FIRST, HELD, LIST, LISTED, REPLACED = range(5)
"""Columns of a line of `PagedTable.segments`."""

COLUMNS = 6
"""Columns that a line has: one more, for every layer's part to be aligned."""

UNIT = 16
"""Elements that offsets are counted in: kernels know of what is a multiple of 16 that it is aligned."""


@dataclass(frozen=True)
class Pool:
    """Where the pages are.

    Attributes
    ----------
    cache : Tensor
        ``[blocks, H_kv, N, 2 * D]``, of the first layer: a token's key and, behind it, its value.
    offsets : Tensor
        int64 ``[layers]``: where each layer's cache begins, from that of the first, in `UNIT` elements.
    """

    cache: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, caches: list[Tensor]) -> "Pool":
        """The pool of all layers' caches.

        Raises
        ------
        ValueError
            Caches that differ in shape, type or order, or whose pages are not contiguous.
        """
        first = caches[0]
        blocks, heads, tokens, width = first.shape
        for cache in caches:
            if (cache.shape, cache.dtype, cache.stride()) != (first.shape, first.dtype, first.stride()):
                raise ValueError("the layers' KV caches differ in shape, type or order: blocks cannot be shared by all")
        if first.stride(3) != 1 or sorted(first.stride()[1:3]) != sorted(_dense(first)):
            raise ValueError(
                f"a layer's block of the KV cache is not contiguous: shape {list(first.shape)}, strides "
                f"{list(first.stride())}; private entries need whole pages"
            )
        each = first.element_size()
        found = [cache.data_ptr() - first.data_ptr() for cache in caches]
        if any(number % (UNIT * each) for number in [*found, first.stride(0) * each]) or width % UNIT:
            raise ValueError(f"pages of {heads} heads of {tokens} tokens are not aligned to {UNIT} elements")
        offsets = torch.tensor([number // (UNIT * each) for number in found], device=first.device)
        del blocks
        return cls(first, offsets)

    @property
    def layers(self) -> int:
        """Pages of a block."""
        return len(self.offsets)

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.cache.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.cache.shape[2]

    @property
    def size(self) -> int:
        """Elements of a key, and of a value."""
        return self.cache.shape[3] // 2

    @property
    def lines(self) -> int:
        """Lines of a page."""
        return self.heads * self.tokens

    def coded_lines(self, form: PackedFormat) -> int:
        """Coded lines of a page."""
        return self.lines * 2 * self.size * self.cache.element_size() // form.entry_bytes

    def coded_tokens(self, form: PackedFormat) -> int:
        """Tokens of which a block holds the coded lines of all layers and heads."""
        return self.coded_lines(form) // self.heads

    @functools.cached_property
    def begins(self) -> Tensor:
        """Where each layer's and head's first token is: int64 ``[layers, H_kv, 4]``, as `kernels.table` has segments.

        Lines are of as many elements as a key has: those of keys from the key on, those of values from the value on.
        """
        item, size = self.cache.element_size(), self.size
        block, token, head = self.shared_strides()
        begins = self.offsets[:, None] * (UNIT * item) + self.cache.data_ptr()
        begins = begins + torch.arange(self.heads, device=begins.device) * (head * item)
        lines = ((len(self.cache) - 1) * block + (self.tokens - 1) * token) // size + 1
        held = torch.full_like(begins, lines)
        return torch.stack([begins, begins + size * item, held, held], -1)

    @property
    def has_lines(self) -> bool:
        """Whether tokens are lines of that many elements: else blocks begin between two."""
        return all(stride % self.size == 0 for stride in self.shared_strides())

    def pages_for(self, lines: int) -> int:
        """Pages that hold so many lines."""
        return -(-lines // self.lines)

    def shared_strides(self) -> tuple[int, int, int]:
        """Elements from block to block, token to token and head to head."""
        return self.cache.stride(0), self.cache.stride(2), self.cache.stride(1)


def _dense(cache: Tensor) -> tuple[int, int]:
    """Strides of heads and tokens where a page is contiguous, in the order that they have."""
    _, heads, tokens, width = cache.shape
    # A dimension of one element may have any stride.
    by_head = cache.stride(1) >= cache.stride(2)
    if heads == 1 or tokens == 1:
        return cache.stride(1), cache.stride(2)
    return (tokens * width, width) if by_head else (width, heads * width)


@dataclass(frozen=True)
class Coded:
    """Coded entries of each sequence, by its slot; on the device.

    Attributes
    ----------
    forms : tuple of PackedFormat
        Of the lines of each rung.
    segments : Tensor
        int64 ``[layers, slots, H_kv, R, 2]``: of each rung first line and lines, counted in lines of the rung from the
        first private page.
    generated : Tensor
        int32 ``[slots, 2]``: where blocks of tokens that were coded later begin among the private ones, and how many
        they are.
    rung : int
        The rung that these are in.
    key_means, value_means : Tensor
        float32 ``[layers, slots, H_kv, D]``: what was taken out of entries before they were coded.
    maps : PackedMaps
        Each layer's into code space, or of one row that is all layers', around nothing.
    key_duals : tuple of Tensor
        Of each layer float32 ``[H_kv, D, D]``: takes queries to code space, from their left.
    key_bounds : tuple of Tensor
        Of each layer float32 ``[H_kv]``: as in `core.packed_maps.PackedMaps`.
    rotation : Tensor
        ``[D, D]``, of the type of the queries: values times it are in code space.
    """

    forms: tuple[PackedFormat, ...]
    segments: Tensor
    generated: Tensor
    rung: int
    key_means: Tensor
    value_means: Tensor
    maps: PackedMaps
    key_duals: tuple[Tensor, ...]
    key_bounds: tuple[Tensor, ...]
    rotation: Tensor

    @classmethod
    def empty(
        cls,
        pool: Pool,
        slots: int,
        forms: Sequence[PackedFormat],
        codes: Sequence[KeyCodes] | None = None,
        rung: int = -1,
    ) -> "Coded":
        """Of sequences without coded entries.

        Parameters
        ----------
        pool, slots : Pool, int
            The cache, and sequences that there is room for.
        forms : sequence of PackedFormat
            The rungs.
        codes : sequence of KeyCodes, optional
            Each layer's codes of keys; None: keys are rotated as values are.
        rung : int
            That of tokens that are coded later; -1: the last.

        Raises
        ------
        ValueError
            Widths that the kernel does not read.
        """
        if any(len(set(form.value_widths)) > 1 for form in forms):
            raise ValueError(
                f"coded pages hold values of one width a rung; got "
                f"{' and '.join(str(form.value_widths) for form in forms)}"
            )
        device, dtype = pool.cache.device, pool.cache.dtype
        shape = pool.layers, slots, pool.heads
        means = [torch.zeros(*shape, pool.size, device=device) for _ in range(2)]
        segments = torch.zeros(*shape, len(forms), 2, dtype=torch.int64, device=device)
        none = torch.zeros(1, pool.heads, pool.size, device=device)
        if codes is None:
            maps = PackedMaps.rotated(none, none, dtype)
        else:
            maps = PackedMaps.joined([own.maps(none, none, dtype) for own in codes])
        return cls(
            tuple(forms),
            segments,
            torch.zeros(slots, 2, dtype=torch.int32, device=device),
            rung % len(forms),
            means[0],
            means[1],
            maps,
            tuple(maps.key_dual.expand(pool.layers, -1, -1, -1).unbind(0)),
            # Each in memory of its own, which is aligned: else kernels would be compiled once more.
            tuple(own.clone() for own in maps.key_bound.expand(pool.layers, -1).unbind(0)),
            rotation_like(pool.size, device, dtype),
        )


@dataclass(frozen=True)
class PagedTable:
    """What is kept of each sequence's prompt, by the sequence's slot; on the device, so that CUDA graphs read it.

    Attributes
    ----------
    segments : Tensor
        int64 ``[layers, slots, H_kv, 6]``: first line, lines, address of the list, entries listed, first element of
        the tensor that negative entries of the list name, from the pool's beginning in `UNIT` elements; unused.
    starts : Tensor
        int32 ``[slots]``: the first position that is read from ordinary blocks as it is; 0 of sequences that are whole.
    pages : Tensor
        int32 ``[slots, most]``: private blocks.
    coded : Coded or None
        Coded entries, if there may be any.
    """

    segments: Tensor
    starts: Tensor
    pages: Tensor
    coded: Coded | None = None

    @classmethod
    def empty(cls, pool: Pool, slots: int, most: int) -> "PagedTable":
        """Of sequences that are whole."""
        device = pool.cache.device
        return cls(
            torch.zeros(pool.layers, slots, pool.heads, COLUMNS, dtype=torch.int64, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.zeros(slots, most, dtype=torch.int32, device=device),
        )

    def copy_slot(self, source: int, target: int) -> None:
        """Have another slot hold what one holds."""
        by_slot, by_layer = [self.starts, self.pages], [self.segments]
        if self.coded is not None:
            by_slot.append(self.coded.generated)
            by_layer += [self.coded.segments, self.coded.key_means, self.coded.value_means]
        for part in (*by_slot, *(part.transpose(0, 1) for part in by_layer)):
            part[target : target + 1] = part[source : source + 1]


class Rows(NamedTuple):
    """Queries of a step, some consecutive ones of one sequence each.

    Attributes
    ----------
    begins, ends : Tensor
        int32 ``[R]``: the first query among the step's, and where they end; of a row without queries they are equal.
    lengths : Tensor
        int32 ``[R]``: entries that the last of them sees, itself among them.
    tables : Tensor
        int32 ``[R]``: row of the block table.
    slots : Tensor
        int32 ``[R]``: the sequence's slot.
    longest : int
        Most queries of a row.
    whole : bool
        Whether all queries of the step are in rows, or nobody's.
    span : tuple of (int, int) or None
        Where the first row begins and the last one ends, as the host knows; None: anywhere.
    """

    begins: Tensor
    ends: Tensor
    lengths: Tensor
    tables: Tensor
    slots: Tensor
    longest: int
    whole: bool = False
    span: tuple[int, int] | None = None


def paged_attention(
    query: Tensor,
    pool: Pool,
    layer: int,
    block_table: Tensor,
    rows: Rows,
    table: PagedTable,
    output: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attend to what is kept of each row's prompt and to all that came after it; causal.

    Parameters
    ----------
    query, output : Tensor
        ``[T, H, D]``; of ``output`` the rows' queries are written.
    pool : Pool
        The cache.
    layer : int
        Which layer of it.
    block_table : Tensor
        int32 ``[., W]``: ordinary blocks.
    rows : Rows
        Whose queries these are.
    table : PagedTable
        What is kept.
    scaling, softcap, sinks
        As in `kernels.ragged_decode`.

    Raises
    ------
    ValueError
        Heads that do not go together, or more queries a row than the kernel has room for.
    """
    heads = query.shape[1]
    if query.shape[2] != pool.size or heads % pool.heads:
        raise ValueError(
            f"queries of {heads} heads of {query.shape[2]} elements for a cache of {pool.heads} heads of {pool.size}"
        )
    if heads // pool.heads * rows.longest > MOST_QUERIES:
        raise ValueError(
            f"{rows.longest} queries a row by {heads // pool.heads} heads a group; the kernel takes {MOST_QUERIES} in "
            f"all"
        )
    arguments = query, pool, layer, block_table, rows, table, output, scaling, softcap, sinks
    if query.is_cuda:
        from refreekv.kernels.paged_levels import launch_paged_levels

        launch_paged_levels(*arguments)
    else:
        from refreekv.kernels import paged_reference

        paged_reference.paged_attention(*arguments)


MOST_QUERIES = 128
"""Queries of a row times query heads of a KV head."""


def move_to_pages(
    pool: Pool,
    table: PagedTable,
    slot: int,
    blocks: Tensor,
    places: Tensor,
    pages: Tensor,
    longest: int,
    opening: int = 0,
) -> None:
    """Copy what a sequence has listed to private blocks, all layers and heads. The table stays as it is.

    Parameters
    ----------
    pool, table : Pool, PagedTable
        The cache and what is kept; all of this sequence's entries are listed.
    slot : int
        The sequence.
    blocks : Tensor
        int32 ``[.]``: its ordinary blocks.
    places : Tensor
        int64 ``[2, layers, H_kv]``: the first line of each segment, and how many listed entries are left out after
        the first ``opening`` ones.
    pages : Tensor
        int32 ``[.]``: the private blocks.
    longest : int
        Entries of the longest list.
    opening : int
        See ``places``.
    """
    if pool.cache.is_cuda:
        from refreekv.kernels.paged_storage import launch_move

        launch_move(pages, pool, table, slot, blocks, places, longest, opening)
    else:
        from refreekv.kernels import paged_reference

        paged_reference.move_to_pages(pool, table, slot, blocks, places, pages, opening)


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.clone()
