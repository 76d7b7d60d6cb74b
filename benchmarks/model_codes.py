"""Codes of keys that belong to the model: bits go to the channels that its queries look at.

What matters of a key is its product with queries. A channel that queries hardly use may be
wrong, one that they use much may not, and which these are is the model's own, the same for every
text. So each KV head's channels are weighted with the size of its queries and sorted by what an
error in them would cost, into four groups; each group gets a width by water-filling, a
rotation of its own, and each rotated channel the spread it has. All of this is measured once
a model. An entry keeps one scale of 16 bits, as any (`codebooks`).

Unequal bits by channel are reverse water-filling (Cover and Thomas, "Elements of Information
Theory", section 10.3.3); queries are weighted as KVQuant (arXiv 2401.18079) weights errors by sensitivity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import codebooks as codes
from refreekv.core.quantisation import SINKS
from refreekv.core.rotation import rotation_like
from refreekv.core.selection import Selection
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.copy_scores import few_logits
from refreekv.engines.transformers.naming import cache_argument
from refreekv.policies import LayerView, ProbePlan
from refreekv.pruning.copy_scores import CopyProbe, tokens_said_twice

GROUPS = 4
"""Groups of channels with a width each."""
RIDGE = 0.01
"""Of the mean square of a head's queries, added to each channel's: none counts for nothing."""
SCALES = (0.8, 1.0, 1.25, 1.6)
"""Of an entry's own size, at which it is coded; the one that loses least is stored. Few channels may be far out."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class KeyCodes:
    """How the keys of a layer's KV heads are coded.

    Attributes
    ----------
    centre : Tensor
        ``[H_kv, D]``: mean keys.
    order : Tensor
        Integer ``[H_kv, D]``: channels, those first in which an error costs most.
    weight : Tensor
        ``[H_kv, D]``: of the channels in that order, the root mean square of the queries.
    spread : Tensor
        ``[H_kv, D]``: standard deviations of the weighted, rotated channels.
    cost : Tensor
        ``[H_kv, GROUPS]``: mean square of each group's, which decides on its width.
    """

    centre: Tensor
    order: Tensor
    weight: Tensor
    spread: Tensor
    cost: Tensor

    @classmethod
    def measured(cls, keys: Tensor, queries: Tensor | None) -> "KeyCodes":
        """From keys ``[B, H_kv, n, D]`` and queries ``[B, H, r, D]`` of any text; None: queries of one size everywhere.

        Each row's first `SINKS` keys are left out: they are never coded.

        Raises
        ------
        ValueError
            A head size that does not split into `GROUPS`.
        """
        heads, size = keys.shape[1], keys.shape[3]
        if size % GROUPS:
            raise ValueError(f"keys of {size} elements do not split into {GROUPS} groups of channels")
        # [B, H_kv, n, D] -> [H_kv, B n, D]
        entries = keys[:, :, SINKS:].transpose(0, 1).flatten(1, 2).float()
        centre = entries.mean(1)
        power = torch.ones(heads, size, device=keys.device)
        if queries is not None:
            # [B, H, r, D] -> [H_kv, B group r, D]
            grouped = queries.float().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
            power = grouped.square().mean(1)
        power = power + RIDGE * power.mean(-1, keepdim=True)
        deviation = entries - centre[:, None]
        order = (power * deviation.square().mean(1)).argsort(dim=-1, descending=True, stable=True)
        found = cls(centre, order, power.sqrt().gather(-1, order), torch.ones_like(power), power[:, :GROUPS])
        turned = found.turned(entries)
        variance = turned.square().mean(1)
        # A channel that never moves has no spread to divide by, and no bits to spend.
        least = 1e-6 * variance.amax(-1, keepdim=True).clamp_min(_TINY)
        spread = variance.maximum(least).sqrt()
        return cls(centre, order, found.weight, spread, variance.unflatten(-1, (GROUPS, -1)).mean(-1))

    def of(self, head: int) -> "KeyCodes":
        """Those of one KV head."""
        parts = (self.centre, self.order, self.weight, self.spread, self.cost)
        return KeyCodes(*(part[head : head + 1] for part in parts))

    def turned(self, keys: Tensor, centre: Tensor | None = None) -> Tensor:
        """Keys ``[H_kv, n, D]`` less their mean, weighted, sorted, each group rotated: float32."""
        less = keys.float() - (self.centre if centre is None else centre.float())[:, None]
        sorted_keys = less.gather(-1, self.order[:, None].expand_as(less)) * self.weight[:, None]
        return _rotate_groups(sorted_keys, back=False)

    def turned_queries(self, queries: Tensor) -> Tensor:
        """Queries ``[H_kv, r, D]`` so that their products with `turned` keys are those with centred keys."""
        sorted_queries = queries.float().gather(-1, self.order[:, None].expand_as(queries)) / self.weight[:, None]
        return _rotate_groups(sorted_queries, back=False)

    def turned_back(self, turned: Tensor, centre: Tensor | None = None) -> Tensor:
        """Undo `turned`."""
        sorted_keys = _rotate_groups(turned, back=True) / self.weight[:, None]
        less = torch.empty_like(sorted_keys).scatter_(-1, self.order[:, None].expand_as(sorted_keys), sorted_keys)
        return less + (self.centre if centre is None else centre.float())[:, None]

    def widths(self, bits: int) -> list[tuple[int, ...]]:
        """Bits of each group's codes, for each KV head: ``bits`` on average."""
        return [filled(costs, bits) for costs in self.cost.tolist()]

    def round_trip(
        self, keys: Tensor, bits: int, centre: Tensor | None = None, widths: tuple[int, ...] | None = None
    ) -> Tensor:
        """What codes of ``bits`` bits an element, on average, give back of keys ``[H_kv, n, D]``.

        ``centre`` ``[H_kv, D]`` takes the place of the model's mean keys, ``widths`` that of each head's own widths.
        """
        each = self.widths(bits) if widths is None else [widths] * len(keys)
        turned = self.turned(keys, centre)
        even = turned / self.spread[:, None]
        size = even.square().mean(-1, keepdim=True).sqrt().clamp_min(_TINY)
        best, least = torch.zeros_like(turned), turned.square().sum(-1, keepdim=True)
        for factor in SCALES:
            levels = _levels(even / (factor * size), each) * self.spread[:, None]
            # The scale is fitted where errors count as they do for the queries.
            scale = (turned * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_min(_TINY)
            half = keys.dtype if keys.dtype.itemsize == 2 else torch.float16
            found = levels * scale.to(half).float()
            lost = (found - turned).square().sum(-1, keepdim=True)
            best, least = torch.where(lost < least, found, best), torch.minimum(lost, least)
        return self.turned_back(best, centre).to(keys.dtype)


def _levels(numbers: Tensor, widths: Sequence[tuple[int, ...]]) -> Tensor:
    """Nearest levels of numbers ``[H_kv, n, D]``, each group's in its width."""
    heads = [
        torch.cat([codes.nearest(part, width) for part, width in zip(own.chunk(GROUPS, -1), row, strict=True)], -1)
        for own, row in zip(numbers, widths, strict=True)
    ]
    return torch.stack(heads)


def shared_widths(measured: Sequence[KeyCodes], bits: int) -> tuple[int, ...]:
    """One layout of widths for all heads of a model: what the typical head's groups would get.

    Groups' costs are compared within each head, where bits are shared out, and averaged as logarithms.
    """
    costs = torch.cat([one.cost.cpu() for one in measured]).clamp_min(_TINY)
    typical = (costs / costs.sum(-1, keepdim=True)).log().mean(0).exp()
    return filled(typical.tolist(), bits)


def filled(costs: Sequence[float], bits: int, most: int = codes.WIDTHS.stop - 1) -> tuple[int, ...]:
    """Widths of groups of equal size, ``bits`` on average: each bit goes to where it saves most.

    The distortion of a codebook falls less with each further bit, so that taking the best bit each time is best
    in all.
    """
    widths = [0] * len(costs)
    for _ in range(min(bits, most) * len(costs)):
        saves = [
            cost * (codes.distortion(width) - codes.distortion(width + 1)) if width < most else -1.0
            for cost, width in zip(costs, widths, strict=True)
        ]
        widths[saves.index(max(saves))] += 1
    return tuple(widths)


def _rotate_groups(entries: Tensor, *, back: bool) -> Tensor:
    """Each of `GROUPS` parts of entries ``[..., D]`` rotated by itself."""
    matrix = rotation_like(entries.shape[-1] // GROUPS, entries.device, torch.float32)
    # [..., D] -> [..., GROUPS, D / GROUPS]
    parts: Tensor = entries.unflatten(-1, (GROUPS, -1))
    return (parts @ (matrix.T if back else matrix)).flatten(-2)


@dataclass(frozen=True)
class LayerCodes:
    """What codes of one layer's entries go by, all of it the model's.

    Attributes
    ----------
    keys : KeyCodes
        How keys are coded.
    value_centre : Tensor
        ``[H_kv, Dv]``: mean values, which are taken out before these are rotated and coded.
    """

    keys: KeyCodes
    value_centre: Tensor


@dataclass(frozen=True)
class CodeProbe(CopyProbe):
    """Prunes nothing; takes down copy scores and, from the same pass, what `LayerCodes` need.

    Parameters
    ----------
    codes : dict of int to LayerCodes
        Filled by the layer's number among those that may be pruned, as ``found`` is.
    """

    codes: dict[int, LayerCodes] = field(default_factory=dict)

    def probe_plan(self, n: int) -> ProbePlan:
        """The queries of the second saying, and what attention they pay."""
        del n
        return ProbePlan(rows=self.tokens, queries=True)

    def select(self, view: LayerView) -> Selection | None:
        """Take down the layer's statistics; keep everything."""
        super().select(view)
        values = view.values[:, :, SINKS:].transpose(0, 1).flatten(1, 2)
        centre = values.mean(1, dtype=torch.float32)
        self.codes[int(view.layer)] = LayerCodes(KeyCodes.measured(view.keys, view.queries), centre)
        return None


SHARES = (0.0, 1 / 64, 1 / 16, 1 / 4)
"""Of the longest context: where rows of the calibration stand."""


def model_codes(model: PreTrainedModel, offsets: Sequence[int] | None = None) -> list[LayerCodes]:
    """What to code the entries of each full-attention layer by; see `calibrated`."""
    return calibrated(model, offsets)[1]


@torch.no_grad()
def calibrated(model: PreTrainedModel, offsets: Sequence[int] | None = None) -> tuple[list[Tensor], list[LayerCodes]]:
    """Copy scores and codes of each full-attention layer, from one pass over random tokens said twice.

    To be called while refreekv is attached to the model.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    offsets : sequence of int, optional
        Positions at which rows of random tokens begin; left out: `SHARES` of the longest context.
    """
    config = model.config.get_text_config(decoder=True)
    prompt, count = tokens_said_twice(config)
    if offsets is None:
        longest = int(getattr(config, "max_position_embeddings", 0) or len(prompt))
        offsets = sorted({min(int(share * longest), max(0, longest - len(prompt))) for share in SHARES})
    ids = torch.tensor([prompt] * len(offsets), device=model.device)
    positions = torch.arange(len(prompt), device=model.device) + torch.tensor(offsets, device=model.device)[:, None]
    probe = CodeProbe(tokens=count)
    cache = PrunedCache(model.config, probe)
    with cache.prompt_until(ids.shape[1]):
        arguments = cache_argument(model.forward, cache) | few_logits(model)
        model(input_ids=ids, position_ids=positions, **arguments, use_cache=True)
    scores = probe.scores(cache.state.layers)
    return scores, [probe.codes[layer] for layer in range(len(scores))]
