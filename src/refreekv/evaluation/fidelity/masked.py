"""Many policies over one prompt's keys and values, told apart by masks: exact, and nothing is copied.

Attention over what a policy keeps of the prompt and over the tokens after it is one softmax
in two parts: products with the prompt's keys, which all policies share and which are one
matrix product for all of them, and products with each policy's own new keys. The parts
share their maximum and their sum, so that the result is the softmax over both.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from refreekv.core.probes import wide_product
from refreekv.core.surrogates import Surrogates
from refreekv.engines.transformers.handout import hand_out
from refreekv.pruning.calls import AttentionCall

LOGITS = {"cuda": 2**28, "cpu": 2**24}
"""Attention logits (float32) over the prompt that exist at once, by kind of device."""


class MaskedLayer(DynamicLayer):
    """One layer's prompt, shared by the rows of a batch, each of which sees what its policy keeps.

    Good for one call: what it brings is attended to and not stored.

    Parameters
    ----------
    keys, values : Tensor
        ``[1, H_kv, n, D]``.
    keep : Tensor or None
        Boolean ``[P, H_kv, n]``, a row each; None: all see everything.
    surrogates : Surrogates or None
        ``[P, H_kv, m]``: entries of each row's own, seen beside what it keeps.
    """

    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor | None, surrogates: Surrogates | None = None):
        super().__init__()
        self._surrogates = surrogates
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._hidden = None if keep is None else ~keep

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new entries back, marked so that attention comes here."""
        hand_out(self, key_states, value_states)
        return key_states, value_states

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a call's queries over the shared prompt and, causally, over the call's own tokens.

        ``key`` and ``value`` are the call's own, ``[P, H_kv, q, D]``; the result is ``[P, q, H, Dv]``.
        """
        rows, heads, queries, _ = call.query.shape
        assert self.keys is not None
        size = heads * queries * (self.keys.shape[2] + queries)
        step = max(1, LOGITS.get(key.device.type, LOGITS["cpu"]) // size)
        parts = [self._part(slice(at, at + step), call, key, value) for at in range(0, rows, step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _part(self, rows: slice, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        assert self.keys is not None
        assert self.values is not None
        query, key, value = call.query[rows], key[rows], value[rows]
        count, heads, queries, dim = query.shape
        scaling, softcap, sink = dim**-0.5 if call.scaling is None else call.scaling, call.softcap, call.sink_logits
        future = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
        hidden = future.repeat(heads // key.shape[1], 1)[None, None]
        if self._surrogates is not None:
            _, more_keys, more_values, real = (part[rows] for part in self._surrogates)
            key, value = torch.cat([more_keys, key], dim=2), torch.cat([more_values, value], dim=2)
            absent = ~real[:, :, None].expand(-1, -1, hidden.shape[2], -1)
            hidden = torch.cat([absent, hidden.expand(*absent.shape[:2], -1, -1)], dim=-1)
        kv_heads, length = key.shape[1], self.keys.shape[2]
        group = heads // kv_heads
        grouped = query.reshape(count, kv_heads, group * queries, dim)

        # [1, H_kv, P * group * q, n]: the policies are as many more queries of one batch row.
        shared = grouped.transpose(0, 1).reshape(1, kv_heads, count * group * queries, dim)
        before = wide_product(shared, self.keys).view(kv_heads, count, group * queries, length).mul_(scaling)
        own = wide_product(grouped, key).transpose(0, 1).mul_(scaling)
        if softcap is not None:
            before = before.div_(softcap).tanh_().mul_(softcap)
            own = own.div_(softcap).tanh_().mul_(softcap)
        if self._hidden is not None:
            before.masked_fill_(self._hidden[rows].transpose(0, 1)[:, :, None], float("-inf"))
        own = own.masked_fill_(hidden.transpose(0, 1), float("-inf"))

        largest = torch.maximum(before.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
        if sink is not None:  # [H] -> [H_kv, 1, H / H_kv * q, 1]
            logits = sink.float().view(kv_heads, group, 1).expand(-1, -1, queries).reshape(kv_heads, 1, -1, 1)
            largest = torch.maximum(largest, logits)
        before, own = before.sub_(largest).exp_(), own.sub_(largest).exp_()
        total = before.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (logits - largest).exp()
        weights = before.view(1, kv_heads, count * group * queries, length).to(value.dtype)
        output = wide_product(weights, self.values.transpose(2, 3)).view(kv_heads, count, group * queries, -1)
        output = output + wide_product(own.to(value.dtype).transpose(0, 1), value.transpose(2, 3)).transpose(0, 1)
        output = (output / total).view(kv_heads, count, group, queries, -1)
        return output.permute(1, 3, 0, 2, 4).reshape(count, queries, heads, -1).to(query.dtype)
