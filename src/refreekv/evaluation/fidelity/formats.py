"""Number formats in the bench: a policy together with how what it keeps is stored, as ``snapkv:ratio=0.5@int4``.

Many such policies read one prompt in one call as others do, through masks: the prompt's
entries stand there once as they are and once in each format, and a policy sees its first and newest
entries in the one form and those between in the other. Formats of others (`peer_formats`) have calls of their own.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreekv import policies
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import SINKS, KVDtype, Ladder, centre_of
from refreekv.core.selection import CutSelection, Selection
from refreekv.core.surrogates import Surrogates
from refreekv.evaluation.fidelity import peer_formats
from refreekv.evaluation.fidelity.kvzip import KVzip
from refreekv.evaluation.fidelity.masked import MaskedLayer
from refreekv.policies import LayerView, Policy, ProbePlan
from refreekv.storage.coding import maps_of

MARK = "@"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StoredPolicy(Policy):
    """A policy, and the number formats that what it keeps is stored in."""

    policy: Policy  # decides on what to keep, and where there are several formats on each entry's
    ladder: Ladder  # the formats
    optional: bool = False  # whether they are the policy's own, so that heads that cannot be coded stay as they are

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen_layers", self.policy.frozen_layers)
        object.__setattr__(self, "reads_copy_scores", self.policy.reads_copy_scores)
        name = self.policy.name if self.optional else f"{self.policy.name}{MARK}{self.ladder}"
        object.__setattr__(self, "name", name)

    def probe_plan(self, n: int) -> ProbePlan:
        """That of the policy."""
        return self.policy.probe_plan(n)

    def select(self, view: LayerView) -> Selection | CutSelection | None:
        """What the policy says, which is told of the formats."""
        sizes = view.keys.shape[-1], view.values.shape[-1]
        if not self.fits(sizes):
            return self.policy.select(view)
        forms = self.ladder.forms(sizes, sorted_keys=view.key_power is not None)
        return self.policy.select(replace(view, forms=forms, damage=None))

    def freezes(self, layer: int) -> bool:
        """What the policy says."""
        return self.policy.freezes(layer)

    @property
    def default_ladder(self) -> Ladder:
        """The formats."""
        return self.ladder

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether entries of such sizes are stored in the formats."""
        return not self.optional or all(size % 16 == 0 for size in sizes)

    def __str__(self) -> str:
        return f"{self.policy}{MARK}{self.ladder}"


def parse(spec: str) -> Policy:
    """A policy from its specification; without number formats behind it, it has those of its own, if any.

    Raises
    ------
    ValueError
        Unknown policy or format, a policy that a format of others is not measured with, or a parameter out of range.
    TypeError
        Unknown parameter.
    """
    base, mark, kind = spec.partition(MARK)
    if kind in peer_formats.FORMATS:
        if base != "full":
            raise ValueError(f"{kind} is measured on the whole prompt alone: write full{MARK}{kind}, not {spec}")
        return peer_formats.PeerStored(kind)
    policy = KVzip.parse(base) or policies.parse(base)
    ladder = Ladder.parse(kind) if mark else policy.default_ladder
    return policy if ladder is None else StoredPolicy(policy, ladder, optional=not mark)


def ladder_of(policy: Policy | None, sizes: Sequence[int] = ()) -> Ladder | None:
    """The number formats that a policy comes with, for keys and values of ``sizes`` elements."""
    return policy.ladder if isinstance(policy, StoredPolicy) and policy.fits(sizes) else None


def stored_as(policy: Policy | None) -> str:
    """What entries are stored in, the formats of others among it: what policies of one call share."""
    return policy.kind if isinstance(policy, peer_formats.PeerStored) else str(ladder_of(policy))


def kept_bytes(
    rungs: Sequence[Sequence[int]], sizes: tuple[int, int], itemsize: int, forms: Sequence[PackedFormat], mixed: bool
) -> int:
    """Bytes of one layer whose KV heads keep so many entries exact, and then so many in each format.

    ``sizes`` are the elements of a key and of a value, ``itemsize`` the bytes of each in the model. The means of
    each head are float32, as they are and in code space; where entries are ``mixed``, two bits say the rung of each.
    """
    sizes_of = [itemsize * sum(sizes), *(form.entry_bytes for form in forms)]
    means = 8 * sum(sizes) if forms else 0
    members = sum(-(-sum(head[1:]) // 4) for head in rungs) if mixed else 0
    entries = sum(sum(map(operator.mul, head, sizes_of)) for head in rungs)
    return entries + means * len(rungs) + members


def rung_counts(keep: Tensor, levels: Tensor | None, ladder: Ladder | None) -> Tensor:
    """Entries of KV heads that keep ``[H_kv, n]``: those that stay exact, and those in each rung, ``[H_kv, 1 + R]``."""
    older = coded(keep, ladder)
    counts = [(keep & ~older).sum(-1)]
    if ladder is not None:
        counts += [(older & _at(levels, rung, keep, ladder)).sum(-1) for rung in range(len(ladder.rungs))]
    return torch.stack(counts, -1)


def coded(keep: Tensor, ladder: Ladder | None) -> Tensor:
    """Of what heads keep, ``[H_kv, n]``, the entries that are coded: neither sinks nor among the newest."""
    if ladder is None:
        return torch.zeros_like(keep)
    counts = keep.sum(-1, keepdim=True)
    held = (counts - SINKS - ladder.rungs[0].recent).clamp_min(0)
    order = keep.cumsum(-1) - SINKS
    return keep & (order > 0) & (order <= held)


def _at(levels: Tensor | None, rung: int, keep: Tensor, ladder: Ladder) -> Tensor:
    if levels is None:
        return torch.full_like(keep, rung == ladder.generated)
    return levels.clamp_max(len(ladder.rungs) - 1) == rung


class StoredLayer(MaskedLayer):
    """One layer's prompt in several number formats, of which each row sees its own.

    Parameters
    ----------
    keys, values : Tensor
        ``[1, H_kv, n, D]``.
    keep : Tensor or None
        Boolean ``[P, H_kv, n]``: what each row keeps; None: everything.
    ladders : sequence of Ladder or None
        The formats of each row.
    levels : sequence of Tensor or None
        ``[1, H_kv, n]`` for each row: which of them each entry has; None: that of what is generated.
    surrogates : Surrogates or None
        As in `MaskedLayer`.
    codes : KeyCodes or None
        The model's own for keys; None: keys are rotated as values are.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        keep: Tensor | None,
        ladders: Sequence[Ladder | None],
        levels: Sequence[Tensor | None],
        surrogates: Surrogates | None = None,
        codes: KeyCodes | None = None,
    ):
        kinds = sorted({rung for ladder in ladders if ladder is not None for rung in ladder.rungs}, key=str)
        self._prompt = keys.shape[2]
        if keep is None:
            keep = torch.ones(len(ladders), keys.shape[1], self._prompt, dtype=torch.bool, device=keys.device)
        maps = maps_of((centre_of(keys), centre_of(values)), keys.dtype, codes)
        stored = [stored_entries((keys, values), kind, maps, codes is not None) for kind in kinds]
        super().__init__(
            torch.cat([keys, *(part for part, _ in stored)], dim=2),
            torch.cat([values, *(part for _, part in stored)], dim=2),
            torch.stack(
                [
                    _visible(row, None if own is None else own[0], ladder, kinds)
                    for row, own, ladder in zip(keep, levels, ladders, strict=True)
                ]
            ),
            None if surrogates is None else _stored_surrogates(surrogates, ladders, maps, codes is not None),
        )

    def get_seq_length(self) -> int:
        """Tokens of the prompt, however often they are here."""
        return self._prompt


def stored_layer(
    keys: Tensor,
    values: Tensor,
    keep: Tensor | None,
    names: Sequence[str],
    asked: Mapping[str, Policy | None],
    surrogates: Surrogates | None = None,
    levels: Mapping[str, Tensor] | None = None,
    codes: KeyCodes | None = None,
) -> MaskedLayer:
    """The layer that policies read: a plain one where none of them comes with a format.

    Raises
    ------
    ValueError
        A format of somebody else's beside other formats.
    """
    if any(peer_formats.form_of(asked[name]) for name in names):
        if len({stored_as(asked[name]) for name in names}) > 1:
            raise ValueError(f"formats of others are measured in calls of their own, not beside others: {list(names)}")
        form = peer_formats.form_of(asked[names[0]])
        assert form is not None
        return MaskedLayer(*form.round_trip(keys, values), None)
    sizes = keys.shape[-1], values.shape[-1]
    ladders = [ladder_of(asked[name], sizes) for name in names]
    if not any(ladders):
        return MaskedLayer(keys, values, keep, surrogates)
    own = [(levels or {}).get(name) for name in names]
    return StoredLayer(keys, values, keep, ladders, own, surrogates, codes)


def stored_entries(entries: Pair, number: KVDtype, maps: PackedMaps, sorted_keys: bool) -> Pair:
    """Keys and values ``[1, H_kv, n, D]`` as a format gives them back."""
    form = number.form((entries[0].shape[-1], entries[1].shape[-1]), sorted_keys=sorted_keys)
    found = []
    for part, side, mean, matrix, back, worth in (
        (entries[0], form.keys, maps.key_mean, maps.key_matrix, maps.key_dual, maps.key_worth[:, :, None]),
        (entries[1], form.values, maps.value_mean, maps.value_matrix, maps.value_back.mT, None),
    ):
        # [1, H_kv, n, D] of rows: matrices stand to their right, transposed
        codes, factors = side.encode((part.float() - mean[:, :, None]) @ matrix.mT, worth)
        levels = side.levels(codes, torch.float32) * factors[..., None].float()
        found.append((levels @ back + mean[:, :, None]).to(part.dtype))
    return found[0], found[1]


def _stored_surrogates(
    surrogates: Surrogates, ladders: Sequence[Ladder | None], maps: PackedMaps, sorted_keys: bool
) -> Surrogates:
    """Surrogates as the widest of each row's formats gives them back."""
    parts = zip(surrogates.keys.split(1), surrogates.values.split(1), strict=True)
    rows = [
        row if ladder is None else stored_entries(row, ladder.rungs[-1], maps, sorted_keys)
        for row, ladder in zip(parts, ladders, strict=True)
    ]
    return surrogates._replace(keys=torch.cat([key for key, _ in rows]), values=torch.cat([value for _, value in rows]))


def _visible(keep: Tensor, levels: Tensor | None, ladder: Ladder | None, kinds: Sequence[KVDtype]) -> Tensor:
    """Of one row ``[H_kv, n]``, which copies of each entry it sees: ``[H_kv, n + n * kinds]``."""
    nothing = torch.zeros_like(keep)
    older = coded(keep, ladder)
    copies = [keep & ~older]
    for kind in kinds:
        if ladder is None or kind not in ladder.rungs:
            copies.append(nothing)
        else:
            copies.append(older & _at(levels, ladder.rungs.index(kind), keep, ladder))
    return torch.cat(copies, dim=-1)
