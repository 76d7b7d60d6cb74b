"""The cache a user holds: transformers' `DynamicCache` with layers that prune themselves."""

import copy
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, Self

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

from refreekv.core.configuration import largest
from refreekv.core.footprint import Reader
from refreekv.core.quantisation import KVDtype, Ladder
from refreekv.engines.transformers.accounting import index_bytes, layer_report, padded_bytes, remembered
from refreekv.engines.transformers.host_tier import HostTier, parse_host_memory
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.prompt import PromptState
from refreekv.engines.transformers.read_again import Recheck
from refreekv.engines.transformers.reading import parse_prompt_dtype
from refreekv.engines.transformers.saving import save
from refreekv.engines.transformers.verifying import Verification
from refreekv.policies import Policy
from refreekv.policies.base import AUTO, check_count, ladder_for
from refreekv.policies.full import Full
from refreekv.report import CompressionReport
from refreekv.storage.host_store import HostStore
from refreekv.storage.past import Past

CROSS = "cross_attention"
"""The kind of a layer that holds the states of an image or a sound, and no tokens."""


class Owner(Protocol):
    """Who made a cache and reports on it."""

    def observe(self, cache: "PrunedCache") -> None:
        """Look at a cache that was just pruned, or whose call ended."""


class PrunedCache(DynamicCache):
    """A dynamic cache whose full-attention layers are pruned when the prompt ends.

    Sliding-window, chunked, linear-attention and cross-attention layers stay what `DynamicCache`
    makes them: they are bounded already.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's configuration.
    policy : Policy
        Decides what each layer keeps.
    kv_dtype, decode, decode_interval, prompt_dtype, verify, keep_evicted, host_memory
        As for `compress`.

    Raises
    ------
    ValueError
        ``decode_interval`` under 1 or beside ``keep_evicted``, unknown ``kv_dtype`` or ``prompt_dtype``, the model is
        an encoder-decoder or has no full-attention layer, or what ``verify`` does not go with.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: Policy,
        kv_dtype: str | KVDtype | Ladder | None = AUTO,
        decode: str = "graph",
        decode_interval: int | None = None,
        prompt_dtype: str | KVDtype | None = AUTO,
        verify: bool | float | str | Recheck = False,
        keep_evicted: str | HostStore | None = None,
        host_memory: str | int | None = None,
    ):
        text = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{config.model_type} is an encoder-decoder model; refreekv supports decoder-only models")
        if getattr(text, "num_kv_shared_layers", 0):
            raise ValueError(
                f"{text.model_type} shares keys and values between layers; pruning one layer would change the others"
            )
        self.kv_dtype = ladder_for(policy, kv_dtype)
        super().__init__(config=text)
        # By position in the model: layers that look at images, whose states are no tokens of the prompt.
        crossing = set(getattr(text, "cross_attention_layers", None) or ())
        kinds = getattr(text, "layer_types", None) or [_kind(layer) for layer in self.layers]
        self.kinds: list[str] = [CROSS if index in crossing else kind for index, kind in enumerate(kinds)]
        if decode_interval is not None:
            check_count("decode_interval", decode_interval, minimum=1)
        self.state = PromptState(
            policy,
            decode_interval=decode_interval,
            codes_wanted=self.kv_dtype is not None,
            codes_optional=isinstance(kv_dtype, str) and kv_dtype == AUTO,
            prompt_dtype=parse_prompt_dtype(prompt_dtype),
        )
        wanted = parse_host_memory(host_memory)
        if wanted is not None:
            if self.kv_dtype is None:
                raise ValueError(
                    f"host_memory holds codes, and policy {policy.name!r} stores what it keeps as the model computes "
                    "it: pass kv_dtype, such as 'int4', or leave host_memory out"
                )
            self.state.host = HostTier(None if isinstance(wanted, str) else wanted, Reader.of(text))
        for index, layer in enumerate(self.layers):
            # Exactly this class: its subclasses hold more than keys and values of all tokens.
            if type(layer) is DynamicLayer and self.kinds[index] != CROSS:
                self.layers[index] = ReFreeKVLayer(index, self.state.layers, self.state, self.kv_dtype)
                self.state.layers += 1
        if not self.state.layers:
            kinds = ", ".join(sorted(set(self.kinds))) if self.layers else "none"
            raise ValueError(
                f"{text.model_type} has no full-attention layer to prune (its layers: {kinds}"
                + (f", sliding window {window})" if (window := largest(text, "sliding_window")) else ")")
                + "; run it without refreekv"
            )

        # What was asked for: a verification may find that nothing is to be coded.
        self._asked_kv_dtype = self.kv_dtype
        reading = Recheck.parse(verify)
        if reading is not None:
            self._check_verifiable()
            # Nothing is coded before the end, so that everything can be kept as it is.
            self.state.prompt_dtype = None
            self.state.verification = Verification(policy, reading)
        store = HostStore.parse(keep_evicted)
        if store is not None:
            if decode_interval is not None:
                raise ValueError(
                    "keep_evicted keeps what a prompt's end evicts, and decode_interval evicts tokens of the answer, "
                    "too, which would be missing among them: leave one of them out"
                )
            if self.state.host is not None:
                raise ValueError(
                    "keep_evicted brings all of a conversation back to the GPU when a turn begins, and host_memory is "
                    "for what does not fit there: leave one of them out"
                )
            # All layers hold what they have read anyway under a policy that evicts and codes nothing.
            evicts = policy.frozen_layers != "all" and not isinstance(policy, Full)
            if evicts or self.kv_dtype is not None:
                self.state.past = Past(store, self.state.layers, parse_prompt_dtype(prompt_dtype))
        self._model: weakref.ref[torch.nn.Module] | None = None
        self.owner: weakref.ref[Owner] | None = None
        self.first = self.pruned_layers[0]
        """The first layer that may be pruned, whose length is that of the cache."""
        self.decode = decode

    def _check_verifiable(self) -> None:
        if self.state.prompt_dtype not in (AUTO, None):
            raise ValueError(
                "verify compares with the prompt as the model computed it, and prompt_dtype codes it on the way: leave "
                "one of them out"
            )
        if self.state.decode_interval is not None:
            raise ValueError(
                "verify and decode_interval exclude each other: what is generated is pruned while there is no prompt "
                "to read again; leave one of them out"
            )
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, ReFreeKVLayer) and type(layer) is not DynamicSlidingWindowLayer:
                raise ValueError(
                    f"verify reads the end of a prompt again, and layer {index} of this model ({self.kinds[index]}) "
                    "keeps a state that has gone past it: leave verify out"
                )

    def store_exactly(self) -> None:
        """Code nothing, of this prompt and from now on: the last step of a verification."""
        for layer in self.pruned_layers:
            layer.code_nothing()
        self.kv_dtype = None

    def bind(self, model: torch.nn.Module) -> None:
        """Say which model the cache is for, so that another one is refused.

        Raises
        ------
        ValueError
            Codes are to be in host memory, and the model is not on one GPU.
        """
        if self.state.host is not None:
            devices = {parameter.device for parameter in model.parameters()}
            if len(devices) != 1 or next(iter(devices)).type != "cuda":
                raise ValueError(
                    "host_memory holds what does not fit on a GPU, and this model is on "
                    f"{' and '.join(sorted(map(str, devices)))}: put it on one CUDA device, or leave host_memory out"
                )
        self._model = self.state.model = weakref.ref(model)

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise ValueError if the cache is bound to another model, of which this one is no part."""
        bound = None if self.state.model is None else self.state.model()
        if not self.made_for(model) and (bound is None or all(part is not model for part in bound.modules())):
            raise ValueError(
                f"this cache was made for another model than the {type(model).__name__} it is used with; "
                "make one cache for each model"
            )

    def made_for(self, model: torch.nn.Module) -> bool:
        """Whether the cache is for this very model, and not for one around it."""
        return self.state.model is None or self.state.model() is model

    def begin_forward(self, *, mask_given: bool = False) -> None:
        """Note that its model begins to run with it; see `PromptState.begin_forward`."""
        if self.state.decode_interval is not None:
            for layer in self.pruned_layers:
                layer.prune_verified()
        self.state.begin_forward(lambda: {layer.get_seq_length() for layer in self.pruned_layers})
        self.state.mask_given = mask_given

    def tell_owner(self) -> None:
        """Let the block that made it take down its report."""
        owner = None if self.owner is None else self.owner()
        if owner is not None:
            owner.observe(self)

    @property
    def draft_limit(self) -> int | None:
        """Draft tokens that may be fed behind the next token without a decision over them; None: any number."""
        if self.state.end is not None and self.first.get_seq_length() < self.state.end:
            return 0  # they would attend to what is evicted by the time they are asked for
        if self.state.decode_interval is None:
            return None
        return max(self.state.decode_interval - self.first.generated_since - 2, 0)

    @property
    def is_unused(self) -> bool:
        """Whether no token was stored yet."""
        return all(layer.get_seq_length() == 0 for layer in self.pruned_layers)

    @property
    def remembers(self) -> bool:
        """Whether a next turn can be read over everything, from any place on: nothing was lost by eviction."""
        past = self.state.past
        # Layers with a window do not remember what fell out of it.
        return past is not None and past.length is not None and len(self.pruned_layers) == len(self.layers)

    @property
    def policy(self) -> Policy:
        """What decides on what to keep."""
        return self.state.policy

    @property
    def pruned_layers(self) -> list[ReFreeKVLayer]:
        """The layers that may be pruned."""
        return [layer for layer in self.layers if isinstance(layer, ReFreeKVLayer)]

    def prompt_until(self, end: int) -> AbstractContextManager[None]:
        """Within, the prompt ends at logical length ``end``: pruned there, whatever chunks it comes in.

        Tokens after it are decoding, also where several come in one call (speculative
        decoding). `generate` does this by itself; loops of one's own may want it.
        """
        return self.state.until(end)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within, no call is a prompt and nothing is pruned, however many tokens it has."""
        with self.state.until(0):
            yield

    def free_rows(self, rows: Sequence[int]) -> None:
        """Give back the memory of finished rows while the others go on decoding.

        The rows stay in the batch; what the model makes of them from now on means nothing.

        Raises
        ------
        ValueError
            The cache's entries are not in storage that can grow, as they are on CUDA once the
            prompt was pruned.
        """
        self.state.finish()
        for layer in self.pruned_layers:
            layer.free_rows(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, for another process to go on with: ``ReFreeKVCache.load(path, model)``.

        The file (safetensors) holds what the cache holds, coded as it is stored, and says what model, policy
        and settings it belongs to. It replaces what is at ``path`` once it is complete.

        Raises
        ------
        ValueError
            A cache that holds nothing, is in the middle of a prompt, has freed rows, or layers of other
            kinds than full and sliding-window attention.
        RuntimeError
            The model is gone.
        """
        model = self._model() if self._model is not None else None
        if model is None:
            raise RuntimeError("the model that this cache was made for is gone, and a file has to say which it was")
        save(self, model, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with keys and values of its own."""
        self.state.finish()
        copied = self.__copy__()
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled, as it belongs to a model that is in use here; write it to a "
            "file with cache.save(path) and read it with refreekv.ReFreeKVCache.load(path, model)"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number; see `ReFreeKVLayer.crop`.

        With ``keep_evicted`` all of what is left comes back when a next turn begins.
        """
        # Where drafts are verified some versions of transformers count by tensors.
        super().crop(int(tokens_to_remove))
        if self.state.past is not None:
            self.state.past.crop(self.first.get_seq_length())

    def reset(self) -> None:
        """Forget everything; the cache can take a new prompt."""
        self.state.clear()
        super().reset()
        self.kv_dtype = self._asked_kv_dtype
        for layer in self.pruned_layers:
            layer.ladder = self.kv_dtype

    def kept_ranges(self, row: int = 0) -> list[tuple[tuple[tuple[int, int], ...], ...]]:
        """Which tokens each full-attention layer still holds for one row of the batch.

        Returns
        -------
        list of tuple of tuple of (int, int)
            By layer, then by KV head (one entry where all heads hold the same): ascending
            half-open ranges of logical columns, generated tokens and padding before pruning
            included.
        """
        self.state.finish()
        return [
            (((0, layer.get_seq_length()),),) if layer.ragged is None else layer.columns(row).as_ranges()
            for layer in self.pruned_layers
        ]

    def _kind_of(self, index: int) -> str:
        """What a model calls a layer; some run layers several times, and add one to the cache for each time."""
        return self.kinds[index] if index < len(self.kinds) else _kind(self.layers[index])

    @property
    def report(self) -> CompressionReport:
        """What is kept and what it saves, now."""
        self.state.finish()
        stored = next((layer.ladder for layer in self.pruned_layers if layer.ladder is not None), None)
        return CompressionReport(
            policy=self.policy.spec,
            tokens=self.get_seq_length(self.pruned_layers[0].index),
            layers=tuple(
                layer_report(index, self._kind_of(index), layer)
                for index, layer in enumerate(self.layers)
                if isinstance(layer, CacheLayerMixin)
            ),
            index_bytes=sum(index_bytes(layer) for layer in self.pruned_layers),
            kv_dtype=None if stored is None else str(stored),
            padded_bytes=max(padded_bytes(layer) for layer in self.pruned_layers),
            verified=None if self.state.verification is None else self.state.verification.outcome,
            remembered=remembered(self.state.past),
        )


def _kind(layer: object) -> str:
    """What a model without named layer types would call a layer."""
    return "full_attention" if type(layer) is DynamicLayer else "sliding_attention"
