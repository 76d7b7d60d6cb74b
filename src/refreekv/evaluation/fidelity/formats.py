"""Number formats in the bench: a policy together with how what it keeps is stored, as ``snapkv:ratio=0.5@int4``.

Many such policies read one prompt in one call as others do, through masks: the prompt's
entries stand there once as they are and once in each format, and a policy sees its first and newest
entries in the one form and those between in the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreekv import policies
from refreekv.core.quantisation import SINKS, KVDtype, centre_of, round_trip
from refreekv.core.selection import CutSelection, Selection
from refreekv.core.surrogates import Surrogates
from refreekv.evaluation.fidelity.masked import MaskedLayer
from refreekv.policies import LayerView, Policy, ProbePlan

MARK = "@"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StoredPolicy(Policy):
    """A policy, and the number format that what it keeps is stored in."""

    policy: Policy  # decides on what to keep
    kv_dtype: KVDtype  # the format

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen_layers", self.policy.frozen_layers)
        object.__setattr__(self, "reads_copy_scores", self.policy.reads_copy_scores)
        object.__setattr__(self, "name", f"{self.policy.name}{MARK}{self.kv_dtype}")

    def probe_plan(self, n: int) -> ProbePlan:
        """That of the policy."""
        return self.policy.probe_plan(n)

    def select(self, view: LayerView) -> Selection | CutSelection | None:
        """What the policy says."""
        return self.policy.select(view)

    def freezes(self, layer: int) -> bool:
        """What the policy says."""
        return self.policy.freezes(layer)

    def __str__(self) -> str:
        return f"{self.policy}{MARK}{self.kv_dtype}"


def parse(spec: str) -> Policy:
    """A policy from its specification, with or without a number format behind it.

    Raises
    ------
    ValueError
        Unknown policy or format, or a parameter out of range.
    TypeError
        Unknown parameter.
    """
    base, mark, kind = spec.partition(MARK)
    policy = policies.parse(base)
    number = KVDtype.parse(kind) if mark else None
    return policy if number is None else StoredPolicy(policy, number)


def format_of(policy: Policy | None) -> KVDtype | None:
    """The number format that a policy comes with."""
    return policy.kv_dtype if isinstance(policy, StoredPolicy) else None


def kept_bytes(counts: Sequence[int], heads: int, sizes: tuple[int, int], itemsize: int, number: KVDtype | None) -> int:
    """Bytes of one layer that keeps ``counts`` entries in its KV heads (one number where heads are alike).

    ``sizes`` are the elements of a key and of a value, ``itemsize`` the bytes of each in the model.
    """
    everywhere = list(counts) * heads if len(counts) == 1 else list(counts)
    entry = sum(sizes) * itemsize
    if number is None:
        return sum(everywhere) * entry
    return sum(number.segment_bytes(n, sizes, itemsize) for n in everywhere)


class StoredLayer(MaskedLayer):
    """One layer's prompt in several number formats, of which each row sees its own.

    Parameters
    ----------
    keys, values : Tensor
        ``[1, H_kv, n, D]``.
    keep : Tensor or None
        Boolean ``[P, H_kv, n]``: what each row keeps; None: everything.
    numbers : sequence of KVDtype or None
        The format of each row.
    surrogates : Surrogates or None
        As in `MaskedLayer`.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        keep: Tensor | None,
        numbers: Sequence[KVDtype | None],
        surrogates: Surrogates | None = None,
    ):
        kinds = sorted({number for number in numbers if number is not None}, key=str)
        self._prompt = keys.shape[2]
        if keep is None:
            keep = torch.ones(len(numbers), keys.shape[1], self._prompt, dtype=torch.bool, device=keys.device)
        centres = centre_of(keys), centre_of(values)
        stored = [_stored((keys, values), kind, centres) for kind in kinds]
        super().__init__(
            torch.cat([keys, *(part for part, _ in stored)], dim=2),
            torch.cat([values, *(part for _, part in stored)], dim=2),
            torch.stack([_visible(row, number, kinds) for row, number in zip(keep, numbers, strict=True)]),
            None if surrogates is None else _stored_surrogates(surrogates, numbers, centres),
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
) -> MaskedLayer:
    """The layer that policies read: a plain one where none of them comes with a format."""
    numbers = [format_of(asked[name]) for name in names]
    if not any(numbers):
        return MaskedLayer(keys, values, keep, surrogates)
    return StoredLayer(keys, values, keep, numbers, surrogates)


def _stored(entries: Pair, number: KVDtype, centres: Pair) -> Pair:
    """Keys and values ``[1, H_kv, n, D]`` as a format gives them back."""
    keys, values = map(round_trip, entries, number.widths, centres)
    return keys, values


def _stored_surrogates(surrogates: Surrogates, numbers: Sequence[KVDtype | None], centres: Pair) -> Surrogates:
    """Surrogates as each row's format gives them back."""
    parts = zip(surrogates.keys.split(1), surrogates.values.split(1), strict=True)
    rows = [
        row if number is None else _stored(row, number, centres) for row, number in zip(parts, numbers, strict=True)
    ]
    return surrogates._replace(keys=torch.cat([key for key, _ in rows]), values=torch.cat([value for _, value in rows]))


def _visible(keep: Tensor, number: KVDtype | None, kinds: Sequence[KVDtype]) -> Tensor:
    """Of one row ``[H_kv, n]``, which copies of each entry it sees: ``[H_kv, n + n * kinds]``."""
    nothing = torch.zeros_like(keep)
    if number is None:
        return torch.cat([keep, *([nothing] * len(kinds))], dim=-1)
    counts = keep.sum(-1, keepdim=True)
    coded = torch.tensor([[number.coded(count)] for count in counts.flatten().tolist()], device=keep.device)
    order = keep.cumsum(-1) - SINKS
    older = keep & (order > 0) & (order <= coded)
    return torch.cat([keep & ~older, *(older if kind == number else nothing for kind in kinds)], dim=-1)
