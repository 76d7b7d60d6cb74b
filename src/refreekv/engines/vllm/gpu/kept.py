"""What stays of one prompt in all layers and heads, from the policy's selections to lists on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refreekv.core.selection import CutSelection, Selection
from refreekv.kernels import kept_first
from refreekv.kernels.paged import COLUMNS, LIST, LISTED, REPLACED, UNIT, Pool


class LayerKept(NamedTuple):
    """What one layer keeps of a prompt of ``n`` tokens.

    Attributes
    ----------
    keep : Tensor
        Boolean ``[H_kv, n]``, the places of surrogates among them.
    columns, real : Tensor or None
        ``[H_kv, m]``: the places of the surrogates, and whether they replace anything; None if there are none.
    lines : Tensor or None
        ``[H_kv, m, 2 * D]``: the surrogates' keys and values, of the cache's type.
    metric : Tensor or None
        ``[1]``: the policy's criterion.
    """

    keep: Tensor
    columns: Tensor | None
    real: Tensor | None
    lines: Tensor | None
    metric: Tensor | None


def layer_kept(selection: Selection | CutSelection, heads: int, prompt: int, dtype: torch.dtype) -> LayerKept:
    """Read a selection of batch size 1 for a layer of so many KV heads."""
    if isinstance(selection, CutSelection):
        keep = selection.mask(torch.ones(1, prompt, dtype=torch.bool, device=selection.cut.device))
    else:
        keep = selection.keep
    keep = keep[0].expand(heads, -1)
    chosen = selection.surrogates if isinstance(selection, Selection) else None
    if chosen is None:
        return LayerKept(keep, None, None, None, selection.metric)
    columns, real = chosen.columns[0].long(), chosen.real[0]
    keep = keep.scatter(-1, columns, keep.gather(-1, columns) | real)
    lines = torch.cat([chosen.keys[0], chosen.values[0]], -1).to(dtype)
    return LayerKept(keep, columns, real, lines, selection.metric)


@dataclass
class KeptPrompt:
    """What all layers keep of a prompt of ``n`` tokens; stays until the request ends, for it may be preempted.

    Attributes
    ----------
    prompt : int
        ``n``.
    bits : Tensor
        uint8 ``[L, H_kv, ceil(n / 8)]``: what is kept, eight positions a byte.
    columns, real, lines : Tensor or None
        Of all layers, as in `LayerKept`.
    lists : Tensor or None
        int32 ``[L, H_kv, n]``, see `kernels.paged`; None while the entries are in private blocks.
    counts : Tensor
        int32 ``[L, H_kv]``.
    metrics : Tensor
        float64 ``[L]``; not a number where there is none.
    """

    prompt: int
    bits: Tensor
    columns: Tensor | None
    real: Tensor | None
    lines: Tensor | None
    lists: Tensor | None
    counts: Tensor
    metrics: Tensor

    @classmethod
    def of(cls, layers: list[LayerKept | None], heads: int, prompt: int, device: torch.device) -> "KeptPrompt":
        """Put the layers together; None keeps everything."""
        everything = torch.ones(heads, prompt, dtype=torch.bool, device=device)
        keep = torch.stack([everything if one is None else one.keep for one in layers])
        columns, real, lines = _stacked(layers, heads, prompt)
        nothing = torch.full((1,), float("nan"), dtype=torch.float64, device=device)
        metrics = [nothing if one is None or one.metric is None else one.metric.double().view(1) for one in layers]
        lists, counts = _lists_of(keep, columns, real)
        return cls(prompt, _to_bits(keep), columns, real, lines, lists, counts, torch.cat(metrics))

    def list_again(self) -> None:
        """Make the lists, if they are gone."""
        if self.lists is None:
            self.lists, _ = _lists_of(_from_bits(self.bits, self.prompt), self.columns, self.real)

    def positions(self) -> Tensor:
        """The lists with surrogates by their places: int32 ``[L, H_kv, n]``, contiguous."""
        assert self.lists is not None
        if self.columns is None:
            return self.lists
        places = self.columns.int().gather(-1, (-1 - self.lists).clamp_(min=0, max=self.columns.shape[-1] - 1).long())
        return torch.where(self.lists < 0, places, self.lists)

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


def _stacked(
    layers: list[LayerKept | None], heads: int, prompt: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Surrogates of all layers, with some that replace nothing where a layer has none."""
    first = next((one for one in layers if one is not None and one.columns is not None), None)
    if first is None:
        return None, None, None
    assert first.columns is not None
    assert first.lines is not None
    assert first.real is not None
    nowhere = torch.full_like(first.columns, prompt - 1)
    none = (nowhere, torch.zeros_like(first.real), torch.zeros_like(first.lines))
    parts = [none if one is None or one.columns is None else (one.columns, one.real, one.lines) for one in layers]
    columns, real, lines = (torch.stack(part) for part in zip(*parts, strict=True))
    return columns, real, lines


def _lists_of(keep: Tensor, columns: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lists and counts of what is kept, ``[L, H_kv, n]``."""
    order, counts = kept_first(keep)
    order = order.contiguous()  # kernels are told where it begins, and how long a list is
    if columns is None or real is None:
        return order, counts
    prompt = keep.shape[-1]
    numbers = torch.arange(prompt, dtype=torch.int32, device=keep.device).expand(keep.shape).contiguous()
    line = -1 - torch.arange(columns.shape[-1], dtype=torch.int32, device=keep.device)
    numbers.scatter_(-1, columns, torch.where(real, line, columns.int()))
    # What is behind the counts may be anything.
    return numbers.gather(-1, order.long().clamp_(0, prompt - 1)), counts


def _to_bits(keep: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=keep.device)
    bits: Tensor = (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)
    return bits


def _from_bits(bits: Tensor, prompt: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    keep: Tensor = ((bits[..., None] >> places) & 1).flatten(-2)[..., :prompt].bool()
    return keep
