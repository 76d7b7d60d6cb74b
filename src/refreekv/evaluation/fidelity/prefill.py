"""One prefill for all policies: the full cache, and what each policy would keep of it.

The policies decide on what the library shows them at the end of a layer's prompt, after the
last layer and for many layers at once (`refreekv.evaluation.fidelity.choosing`).
`SharedPrefill.masked` then reads the shared tensors through masks, one policy a row: exact,
fast, and good for one call.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from refreekv import policies
from refreekv.engines.transformers.accounting import entry_bytes
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.copy_scores import copy_scores
from refreekv.engines.transformers.key_codes import key_codes
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import cache_argument, logits_argument
from refreekv.engines.transformers.prompt import PromptState
from refreekv.evaluation.fidelity import kvzip, peer_formats
from refreekv.evaluation.fidelity.choosing import capture, choose, plans_of
from refreekv.evaluation.fidelity.formats import StoredPolicy, kept_bytes, ladder_of, rung_counts, stored_layer
from refreekv.policies import Policy, ProbePlan
from refreekv.pruning.calls import AttentionCall


class _CapturingLayer(ReFreeKVLayer):
    """Keeps everything, and what many policies need to see of it."""

    def __init__(self, index: int, ordinal: int, state: PromptState, plans: Sequence[ProbePlan]):
        super().__init__(index, ordinal, state)
        self._plans = plans

    def _prune(self, call: AttentionCall, after: int) -> None:
        (entries,) = self._entries(call, after)
        self.captured = capture(
            self._plans, call, entries, self.state.scores_of(self.ordinal), self.state.codes_of(self.ordinal)
        )


class _PreallocatedLayer(DynamicLayer):
    """A dense layer with spare columns for the tokens to come: growing it copies nothing.

    Holds a copy of the entries ``[B, H_kv, n, D]`` given.
    """

    def __init__(self, keys: Tensor, values: Tensor, spare: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = [torch.nn.functional.pad(entries, (0, 0, 0, spare)) for entries in (keys, values)]
        self._show(keys.shape[2])

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        keys, values = (entries[:, :, :length] for entries in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, stop = self._length, self._length + key_states.shape[2]
        for buffer, entries in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = entries
        return self._show(stop)


class SharedPrefill:
    """One prompt in a full cache, with what each policy would keep of it.

    To be made while refreekv is attached to the model and gradients are off.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    context : list of int
        The prompt.
    asked : dict
        Names to policies; None stands for the full cache.
    tokenizer : PreTrainedTokenizerBase, optional
        Of the model; `KVzip` alone needs it.

    Attributes
    ----------
    length : int
        Tokens of the prompt.
    logits : Tensor
        ``[V]``: prediction of the token after the prompt. Pruning comes after it.
    """

    def __init__(self, model: Any, context: Sequence[int], asked: Mapping[str, Policy | None], tokenizer: Any = None):
        self.length = len(context)
        self._config = model.config
        self._asked = asked
        plans = plans_of(asked.values(), self.length)
        self._cache = self._new_cache()
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, ReFreeKVLayer):
                self._cache.layers[index] = _CapturingLayer(index, layer.ordinal, self._cache.state, plans)
        if any(policy is not None and policy.reads_copy_scores for policy in asked.values()):
            self._cache.state.copy_scores = copy_scores(model)
        if any(ladder_of(policy) is not None for policy in asked.values()):
            self._cache.state.key_codes = key_codes(model)
        self.logits = forward(model, [list(context)], self._cache, start=0, keep=1)[0, -1].clone()
        for layer in self._cache.layers:
            if type(layer) is DynamicSlidingWindowLayer and layer.keys is not None and layer.values is not None:
                # A view of the last tokens would hold on to the whole prompt.
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        self._choice = choose(asked, [layer.captured for layer in self._layers])
        zipped = {name: one for name, policy in asked.items() if (one := _kvzip(policy)) is not None}
        if zipped:
            scores = self._said_again(model, tokenizer, context)
            for name, policy in zipped.items():
                self._choice.put(name, kvzip.kept(scores, policy.ratio))

    def _said_again(self, model: Any, tokenizer: Any, context: Sequence[int]) -> list[Tensor]:
        """The scores ``[H_kv, n]`` of KVzip by layer: a second prefill."""
        found = [torch.full(layer.dense[0].shape[1:3], torch.inf, device=self.device) for layer in self._layers]
        for piece, tokens in kvzip.requests(tokenizer, context):
            cache = self.full()
            for index, layer in enumerate(self._cache.layers):
                if isinstance(layer, _CapturingLayer):
                    cache.layers[index] = kvzip.ScoringLayer(*layer.dense, piece)
            forward(model, [tokens], cache, start=self.length, keep=1)
            scoring = [layer for layer in cache.layers if isinstance(layer, kvzip.ScoringLayer)]
            for scores, layer in zip(found, scoring, strict=True):
                assert layer.found is not None
                scores[:, piece] = layer.found
        return found

    @property
    def _layers(self) -> list[_CapturingLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, _CapturingLayer)]

    def _new_cache(self) -> PrunedCache:
        # Nothing is ever pruned through this policy: decisions are made and applied here.
        return PrunedCache(self._config, policies.create("refreekv", frozen_layers="all"))

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys are."""
        return self._cache.pruned_layers[0].dense[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(_held(layer) for layer in self._cache.layers)

    @property
    def joinable(self) -> bool:
        """Whether `join` can put this prompt beside others: only attention layers have a length to fill up."""
        return all(type(layer) in (_CapturingLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers)

    def full(self) -> DynamicCache:
        """Transformers' own cache with all entries; it shares their storage until it grows."""
        cache = DynamicCache(config=self._config.get_text_config(decoder=True))
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, _CapturingLayer):
                cache.layers[index] = _dense_layer(*layer.dense)
            else:
                cache.layers[index] = _copied(layer)
        return cache

    def masked(self, names: Sequence[str]) -> DynamicCache:
        """One policy a row over the shared entries, for a single call: what that brings is not stored."""
        cache = DynamicCache(config=self._config.get_text_config(decoder=True))
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, _CapturingLayer):
                cache.layers[index] = stored_layer(
                    *layer.dense,
                    self._choice.keep(layer.ordinal, names),
                    names,
                    self._asked,
                    self._choice.surrogates_of(layer.ordinal, names),
                    self._choice.layers[layer.ordinal].levels,
                    self._cache.state.codes_of(layer.ordinal),
                )
            else:
                cache.layers[index] = _copied(layer, rows=len(names))
        return cache

    def kept(self, names: Sequence[str]) -> list[list[list[int]]]:
        """Entries that policies keep, by policy, layer and KV head (one number where heads are alike)."""
        return self._choice.counts(names)

    def bytes(self, name: str) -> tuple[int, int]:
        """K/V bytes of the prompt in a full cache, and in a policy's."""
        full = held = 0
        for layer in self._cache.layers:
            if isinstance(layer, _CapturingLayer):
                keys, values = layer.dense
                sizes = keys.shape[-1], values.shape[-1]
                ladder = ladder_of(self._asked[name], sizes)
                full += self.length * entry_bytes(layer)
                if (form := peer_formats.form_of(self._asked[name])) is not None:
                    held += keys.shape[1] * form.head_bytes(self.length, sizes, keys.element_size())
                    continue
                keep = self._choice.keep(layer.ordinal, [name])
                keep = keys.new_ones(keys.shape[1:3], dtype=torch.bool) if keep is None else keep[0]
                levels = self._choice.layers[layer.ordinal].levels.get(name)
                counts = rung_counts(keep, None if levels is None else levels[0], ladder)
                surrogates = self._choice.layers[layer.ordinal].surrogates.get(name)
                if surrogates is not None:
                    counts[:, -1] += surrogates.real.sum(-1)[0]
                sorted_keys = self._cache.state.codes_of(layer.ordinal) is not None
                forms = [] if ladder is None else ladder.forms(sizes, sorted_keys=sorted_keys)
                mixed = levels is not None and len(forms) > 1
                held += kept_bytes(counts.tolist(), sizes, keys.element_size(), forms, mixed)
            else:
                full += (other := _held(layer))
                held += other
        return full, held


def _kvzip(policy: Policy | None) -> kvzip.KVzip | None:
    inner = policy.policy if isinstance(policy, StoredPolicy) else policy
    return inner if isinstance(inner, kvzip.KVzip) else None


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from the same entries; neither of the two changes the other."""
    forked = copy.copy(cache)
    forked.layers = [_copied(layer) for layer in cache.layers]
    return forked


def join(caches: Sequence[DynamicCache], device: torch.device, *, spare: int) -> tuple[DynamicCache, Tensor]:
    """Full caches of single prompts as one left-padded batch, and its attention mask ``[B, longest]``.

    It has columns for ``spare`` more tokens.
    """
    lengths = [cache.get_seq_length() for cache in caches]
    joined = copy.copy(caches[0])
    joined.layers = []
    layers: tuple[Any, ...]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        longest = max(layer.keys.shape[2] for layer in layers)
        keys, values = (
            torch.cat([_padded(entries, longest) for entries in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        if isinstance(layers[0], DynamicSlidingWindowLayer):
            sliding = copy.copy(layers[0])
            sliding.keys, sliding.values, sliding.cumulative_length = keys, values, max(lengths)
            joined.layers.append(sliding)
        else:
            joined.layers.append(_PreallocatedLayer(keys, values, spare))
    starts = torch.tensor([max(lengths) - length for length in lengths], device=device)
    return joined, (torch.arange(max(lengths), device=device) >= starts[:, None]).long()


def forward(
    model: Any, tokens: Sequence[Sequence[int]] | Tensor, cache: Any, *, start: int, keep: int, rows: int | None = None
) -> Tensor:
    """Feed tokens at positions from ``start`` on; logits ``[B, keep, V]`` of the last ``keep``.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    tokens : nested sequence or Tensor
        ``[B, q]``, or ``[1, q]`` for the same tokens in all ``rows``.
    cache : Cache
        What was before; without padding.
    start : int
        Logical length of the cache.
    keep : int
        Lines of logits.
    rows : int, optional
        Rows of the cache, where they get the same tokens.
    """
    ids = torch.as_tensor(tokens, device=model.device)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    if rows is not None:
        ids = ids.expand(rows, -1)
    return call(model, ids, cache, positions=positions.expand(ids.shape[0], -1), mask=None, keep=keep)


def call(model: Any, ids: Tensor, cache: Any, *, positions: Tensor, mask: Tensor | None, keep: int) -> Tensor:
    """One forward pass; logits of the last ``keep`` tokens only, where the model can leave the others out."""
    more = cache_argument(model.forward, cache) | logits_argument(model.forward, keep)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **more)
    logits: Tensor = output.logits[:, -keep:]
    return logits


def _dense_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _copied(layer: Any, rows: int = 1) -> Any:
    """A layer of its own with the same state, in ``rows`` equal rows."""
    replaces_tensors = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    copied = copy.copy(layer) if replaces_tensors else copy.deepcopy(layer)
    if rows > 1:
        copied.batch_repeat_interleave(rows)
    return copied


def _padded(entries: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(entries, (0, 0, length - entries.shape[2], 0))


def _held(layer: Any) -> int:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
