"""What stays of one prompt in all layers and heads, from the policy's selections to lists on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.quantisation import SINKS, Ladder
from refreekv.core.selection import CutSelection, Selection
from refreekv.kernels import kept_first
from refreekv.kernels.paged import COLUMNS, LIST, LISTED, REPLACED, UNIT, Pool

AT_ONCE = 1 << 22
"""Entries of layers and heads that are counted or listed together: of long prompts some layers at a time."""


class LayersKept(NamedTuple):
    """What some layers keep of a prompt of ``n`` tokens, in all heads of all tensor-parallel ranks.

    Attributes
    ----------
    keep : Tensor
        Boolean ``[L, H_kv, n]``, the places of surrogates among them.
    columns, real : Tensor or None
        ``[L, H_kv, m]``: the places of the surrogates, and whether they replace anything; None if there are none.
    lines : Tensor or None
        ``[L, H_kv, m, 2 * D]``: the surrogates' keys and values, of the cache's type.
    metric : Tensor or None
        ``[L]``: the policy's criterion.
    levels : Tensor or None
        uint8 ``[L, H_kv, n]``: the rung of each entry that stays; None: all are in that of what is generated.
    """

    keep: Tensor
    columns: Tensor | None = None
    real: Tensor | None = None
    lines: Tensor | None = None
    metric: Tensor | None = None
    levels: Tensor | None = None

    @classmethod
    def everything(cls, layers: int, heads: int, prompt: int, device: torch.device) -> "LayersKept":
        """Nothing goes."""
        return cls(torch.ones(1, 1, 1, dtype=torch.bool, device=device).expand(layers, heads, prompt))

    def metrics(self) -> Tensor:
        """``metric`` in float64, not a number where there is none."""
        if self.metric is not None:
            return self.metric.double()
        return torch.full((len(self.keep),), float("nan"), dtype=torch.float64, device=self.keep.device)

    def levels_or(self, rung: int) -> Tensor:
        """``levels``, or this rung where nobody said any."""
        if self.levels is not None:
            return self.levels
        device = self.keep.device
        return torch.full((1, 1, 1), rung, dtype=torch.uint8, device=device).expand(self.keep.shape)


def layers_kept(
    selection: Selection | CutSelection, heads: int, prompt: int, dtype: torch.dtype, ladder: Ladder | None = None
) -> LayersKept:
    """Read a selection, each row of which is a layer of so many KV heads."""
    if isinstance(selection, CutSelection):
        cut = selection.cut
        keep = selection.mask(torch.ones(len(cut), prompt, dtype=torch.bool, device=cut.device))
        return LayersKept(keep.expand(-1, heads, -1), metric=selection.metric)
    keep, levels = selection.keep.expand(-1, heads, -1), None
    if selection.levels is not None and ladder is not None and len(ladder.rungs) > 1:
        levels = selection.levels.expand(-1, heads, -1).clamp_max(len(ladder.rungs) - 1)
    chosen = selection.surrogates
    if chosen is None:
        return LayersKept(keep, metric=selection.metric, levels=levels)
    columns, real = chosen.columns.long(), chosen.real
    keep = keep.scatter(-1, columns, keep.gather(-1, columns) | real)
    if levels is not None and ladder is not None:
        # Each stands for many.
        widest = torch.where(real, len(ladder.rungs) - 1, levels.gather(-1, columns)).to(levels.dtype)
        levels = levels.scatter(-1, columns, widest)
    lines = torch.cat([chosen.keys, chosen.values], -1).to(dtype)
    return LayersKept(keep, columns, real, lines, selection.metric, levels)


@dataclass
class KeptPrompt:
    """What all layers keep of a prompt of ``n`` tokens; stays until the request ends, for it may be preempted.

    Attributes
    ----------
    prompt : int
        ``n``.
    ladder : Ladder or None
        Number formats of what is kept, once it is in private blocks.
    bits : Tensor
        uint8 ``[L, H_kv, ceil(n / 8)]``: what is kept, eight positions a byte.
    levels : Tensor or None
        uint8 ``[L, H_kv, ceil(n / 4)]``: rungs, four positions a byte; None where there is one for all.
    columns, real, lines : Tensor or None
        Of all layers, as in `LayersKept`.
    lists : Tensor or None
        int32 ``[L, H_kv, n]``, see `kernels.paged`; None while the entries are in private blocks.
    counts : Tensor
        int32 ``[L, H_kv]``.
    numbers : Tensor
        float64: of all ranks' heads how many entries stay ``[L * H]``, the layers' metrics ``[L]``, not a number where
        there is none, and how many of the entries that are coded are in each rung ``[L * H * R]``.
    """

    prompt: int
    ladder: Ladder | None
    bits: Tensor
    levels: Tensor | None
    columns: Tensor | None
    real: Tensor | None
    lines: Tensor | None
    lists: Tensor | None
    counts: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, layers: Sequence[LayersKept], ladder: Ladder | None = None, own: slice = slice(None)) -> "KeptPrompt":
        """Put the layers together.

        Parameters
        ----------
        layers : sequence of LayersKept
            In the model's order.
        ladder : Ladder, optional
            As above.
        own : slice
            The heads of this rank.
        """
        keep = _joined([some.keep for some in layers])
        prompt = keep.shape[-1]
        numbers, levels = [keep.sum(-1).double().flatten(), *[some.metrics() for some in layers]], None
        if ladder is not None:
            if len(ladder.rungs) > 1:
                levels = _joined([some.levels_or(ladder.generated) for some in layers])
            each = max(1, AT_ONCE // keep[0].numel())
            parts = [
                rungs_of(keep[at : at + each], None if levels is None else levels[at : at + each], ladder).sum(-1)
                for at in range(0, len(keep), each)
            ]
            # [layers, R, H_kv] to [layers * H_kv * R]
            numbers.append(torch.cat(parts).transpose(1, 2).double().flatten())
        columns, real, lines = _surrogates(layers)
        keep = keep[:, own]
        columns, real, lines = (None if part is None else part[:, own].contiguous() for part in (columns, real, lines))
        lists, counts = _lists_of(keep, columns, real)
        packed = None if levels is None else _packed(levels[:, own], 2)
        return cls(prompt, ladder, _packed(keep, 1), packed, columns, real, lines, lists, counts, torch.cat(numbers))

    def list_again(self) -> None:
        """Make the lists, if they are gone."""
        if self.lists is None:
            keep = unpacked(self.bits, 1, self.prompt).bool()
            self.lists, _ = _lists_of(keep, self.columns, self.real)

    def coded_lists(self, layers: slice) -> Tensor:
        """Positions of the entries of some layers that are coded: int32 ``[L, R, H_kv, n]``, in front, of each rung."""
        assert self.ladder is not None
        keep = unpacked(self.bits[layers], 1, self.prompt).bool()
        levels = None if self.levels is None else unpacked(self.levels[layers], 2, self.prompt)
        coded = rungs_of(keep, levels, self.ladder)
        order, *_ = kept_first(coded.flatten(0, 1))
        return order.view(coded.shape).contiguous()

    def with_surrogates(self, entries: Tensor, layer: int) -> Tensor:
        """A layer's entries ``[H_kv, n, 2 * D]`` with surrogates in their places."""
        if self.columns is None or self.real is None or self.lines is None:
            return entries
        index = self.columns[layer][..., None].expand(-1, -1, entries.shape[-1])
        new = torch.where(self.real[layer][..., None], self.lines[layer], entries.gather(1, index))
        return entries.scatter(1, index, new)

    def segments(self, pool: Pool) -> Tensor:
        """Segments of listed entries, ``[L, H_kv, 6]`` as in `PagedTable`; the lists must live as long as these."""
        assert self.lists is not None
        device, (layers, heads, prompt) = self.lists.device, self.lists.shape
        each = torch.arange(layers * heads, device=device).view(layers, heads)
        found = torch.zeros(layers, heads, COLUMNS, dtype=torch.int64, device=device)
        found[..., LIST] = self.lists.data_ptr() + each * (prompt * self.lists.element_size())
        found[..., LISTED] = self.counts
        if self.lines is not None:
            size = pool.cache.element_size() * UNIT
            beside, odd = divmod(self.lines.data_ptr() - pool.cache.data_ptr(), size)
            assert not odd, "tensors are allocated at multiples of 64 bytes or more"
            found[..., REPLACED] = beside + each * (self.lines[0, 0].numel() // UNIT)
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _surrogates(layers: Sequence[LayersKept]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Surrogates of all layers, with some that replace nothing where layers have none."""
    first = next((some for some in layers if some.columns is not None), None)
    if first is None:
        return None, None, None
    assert first.columns is not None
    assert first.real is not None
    assert first.lines is not None
    prompt = first.keep.shape[-1]
    nowhere = torch.full_like(first.columns[:1], prompt - 1)
    none = nowhere, torch.zeros_like(first.real[:1]), torch.zeros_like(first.lines[:1])
    found = []
    for some in layers:
        if some.columns is None or some.real is None or some.lines is None:
            count = len(some.keep)
            found.append(tuple(part.expand(count, *part.shape[1:]) for part in none))
        else:
            found.append((some.columns, some.real, some.lines))
    columns, real, lines = (_joined(part) for part in zip(*found, strict=True))
    return columns, real, lines


def _lists_of(keep: Tensor, columns: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lists and counts of what is kept, ``[L, H_kv, n]``."""
    order, counts, _ = kept_first(keep)
    order = order.contiguous()  # kernels are told where it begins, and how long a list is
    if columns is None or real is None:
        return order, counts
    prompt = keep.shape[-1]
    numbers = torch.arange(prompt, dtype=torch.int32, device=keep.device).expand(keep.shape).contiguous()
    line = -1 - torch.arange(columns.shape[-1], dtype=torch.int32, device=keep.device)
    numbers.scatter_(-1, columns, torch.where(real, line, columns.int()))
    # What is behind the counts may be anything.
    return numbers.gather(-1, order.long().clamp_(0, prompt - 1)), counts


def rungs_of(keep: Tensor, levels: Tensor | None, ladder: Ladder) -> Tensor:
    """Which entries are coded in each rung, given what is kept ``[L, H_kv, n]``: boolean ``[L, R, H_kv, n]``.

    First and newest ones of each head stay as they are.
    """
    number = keep.cumsum(-1, dtype=torch.int32)
    coded = keep & (number > SINKS) & (number <= number[..., -1:] - ladder.recent)
    if levels is None:
        return coded[:, None]
    each = torch.arange(len(ladder.rungs), dtype=torch.uint8, device=keep.device)[:, None, None]
    return coded[:, None] & (levels[:, None] == each)


def _packed(fields: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits ``[..., n]`` in bytes, the first in the lowest bits."""
    each = 8 // bits
    padded = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % each)).unflatten(-1, (-1, each))
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    found: Tensor = (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)
    return found


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of so many bits ``[..., count]`` out of bytes."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    found: Tensor = ((packed[..., None] >> places) & (2**bits - 1)).flatten(-2)[..., :count]
    return found
