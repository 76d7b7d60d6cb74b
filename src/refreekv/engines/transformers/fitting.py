"""Prompts that would not fit in one call, read in chunks: forecast from free memory, or found out the hard way."""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.configuration import head_size, largest
from refreekv.core.device_memory import free_memory
from refreekv.core.footprint import LayerKV, Reader, called_bytes, chunked_bytes
from refreekv.core.quantisation import PROMPT_DTYPE, PROMPT_DTYPES, KVDtype, Ladder
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME, cache_given
from refreekv.engines.transformers.packed_weights import PackedLinear
from refreekv.engines.transformers.slices import is_known
from refreekv.kernels import block_rows

if TYPE_CHECKING:
    from refreekv.engines.transformers.attachment import Attachment

logger = logging.getLogger("refreekv")

CHUNKS = (8192, 4096, 2048, 1024, 512)
"""Tokens of a chunk, the largest that fits; the last one if none does."""
LEAST = 128
"""Tokens of a chunk down to which it is halved when memory ran out all the same."""

USABLE = 0.95
"""Share of the free memory that a forecast counts on: allocators cannot use all of it."""

_TEXT = {"attention_mask", "position_ids", NAME, "past_key_values", "use_cache", "logits_to_keep", "is_first_iteration"}
"""What a prompt of text alone brings. Others (images, embeddings, kinds of tokens) are read as the model wants them."""


class Manner(NamedTuple):
    """How a prompt is read."""

    chunk: int | None = None  # tokens at a time; None: all in one call
    number: KVDtype = PROMPT_DTYPE  # how what was read is held, if nobody has asked for a format
    sliced: bool = False  # whether matrices of 4 bits are unpacked some rows at a time

    def smaller(self, *, free: bool, sliced: bool = False) -> "Manner | None":
        """What takes less memory: half the chunk, then a narrower format where the choice is ``free``.

        Matrices are unpacked some rows at a time from now on, if the model has such (``sliced``).
        """
        chunk = CHUNKS[-1] if self.chunk is None else self.chunk // 2
        if chunk >= min(LEAST, CHUNKS[-1]):
            return self._replace(chunk=chunk, sliced=sliced)
        narrower = PROMPT_DTYPES[PROMPT_DTYPES.index(self.number) + 1 :]
        return Manner(CHUNKS[-1], narrower[0], sliced) if free and narrower else None

    def __str__(self) -> str:
        said = "one call" if self.chunk is None else f"chunks of {self.chunk}"
        said += "" if self.number == PROMPT_DTYPE else f", held in {self.number}"
        return said + (", matrices unpacked in slices" if self.sliced else "")


def prefill(
    attachment: "Attachment",
    original: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Read the prompt of a `generate` call: in one call if that fits, else in chunks, smaller ones if these do not."""
    cache = cache_given(model_kwargs)
    if not isinstance(cache, PrunedCache) or not _can_be_split(cache, generation_config, input_ids, model_kwargs):
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
    model, length = attachment.model, cache.state.end
    assert length is not None

    def read(chunk: int | None) -> Any:
        rest = input_ids
        if chunk is not None:
            _feed(model, cache, input_ids, model_kwargs, chunk, length)
            missing = length - input_ids.shape[1]
            if missing:
                # Only new tokens were passed, and of those only the rest is to be.
                rest = input_ids[:, cache.get_seq_length() - missing :]
        return original(rest, generation_config, model_kwargs, *args, **kwargs)

    manner, fresh = forecast(model, cache, len(input_ids), length), cache.is_unused
    said = f"a prompt of {len(input_ids)} x {length:,} tokens"
    if manner != Manner():
        # Fewer bits lose something, which somebody may want to know.
        level = logging.INFO if manner.number == PROMPT_DTYPE else logging.WARNING
        logger.log(level, "%s is read in %s, as memory is short", said, manner)
    asked = cache.state.sliced
    while True:
        try:
            cache.state.held_as, cache.state.sliced = manner.number, asked or manner.sliced
            return read(manner.chunk)
        except torch.OutOfMemoryError:
            sliceable = any(is_known(module) for module in model.modules())
            smaller = manner.smaller(free=isinstance(cache.state.prompt_dtype, str), sliced=sliceable)
            # What an earlier prompt left may be pruned by now: only a new cache can begin anew.
            if not fresh or smaller is None or smaller.chunk is None or length <= smaller.chunk:
                raise
        finally:
            cache.state.held_as, cache.state.sliced = PROMPT_DTYPE, asked
        # Outside of the handler, as the error holds on to all that the call had made.
        cache.reset()
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning("%s did not fit in %s (out of memory) and is read again in %s", said, manner, smaller)
        manner = smaller


def _can_be_split(
    cache: PrunedCache, generation_config: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]
) -> bool:
    """Whether this is a whole prompt of text, of which nobody has said how it is to be read."""
    end, mask = cache.state.end, model_kwargs.get("attention_mask")
    if end is None or cache.get_seq_length() >= end or input_ids.dim() != 2 or input_ids.shape[1] > end:
        return False
    given = {name for name, value in model_kwargs.items() if value is not None and not isinstance(value, bool)}
    return (
        getattr(generation_config, "prefill_chunk_size", None) is None
        and (mask is None or (isinstance(mask, Tensor) and mask.shape == (len(input_ids), end)))
        and given <= _TEXT
    )


def _feed(
    model: Any, cache: PrunedCache, input_ids: Tensor, model_kwargs: Mapping[str, Any], chunk: int, length: int
) -> None:
    """Read all of a prompt but its last chunk, as `generate` does."""
    missing, at = length - input_ids.shape[1], cache.get_seq_length()
    while length - at > chunk:
        stop = at + chunk
        own = {**model_kwargs}
        if own.get("attention_mask") is not None:
            own["attention_mask"] = own["attention_mask"][:, :stop]
        if own.get("position_ids") is not None:
            own["position_ids"] = own["position_ids"][..., at:stop]
        inputs = model.prepare_inputs_for_generation(input_ids[:, at - missing : stop - missing], **own)
        model(**inputs, return_dict=True)
        at = stop


def forecast(model: Any, cache: PrunedCache, rows: int, length: int) -> Manner:
    """How a prompt is to be read: in one call if that fits or nobody can tell.

    Only where all of the model is on one CUDA device.
    """
    devices = {parameter.device for parameter in model.parameters()}
    new = length - cache.get_seq_length()
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or new <= CHUNKS[-1]:
        return Manner()
    device = next(iter(devices))
    return manner_for(model, cache, rows, length, int(USABLE * free_memory(device)))


def manner_for(model: Any, cache: PrunedCache, rows: int, length: int, free: int) -> Manner:
    """What `forecast` says where so many bytes are free. The policy may keep everything.

    A format that loses less comes before everything else. Of the rest what is faster comes first: one call, then
    chunks, the largest one that fits; each with whole matrices, then with slices of them: these cost less time than
    half the chunk, and take less memory.
    """
    text, itemsize = model.config.get_text_config(decoder=True), model.dtype.itemsize
    layers, reader = _layers(text, cache, itemsize), Reader.of(text, *unpacked(model))
    new, queries = length - cache.get_seq_length(), cache.policy.probe_plan(length).count
    free += 0 if cache.is_unused else cache.report.bytes_after
    kept = sum(layer.stored_bytes(length, _format(layer, cache.kv_dtype, None)) for layer in layers)
    full, widest = sum(layer.bytes(length) for layer in layers), max(layer.bytes(length) for layer in layers)
    for way in reader.ways:
        if rows * min(full, kept + 2 * widest) + way.behind(rows * new, itemsize) <= free:
            return Manner(sliced=way.is_sliced)
    least = Manner(CHUNKS[-1], sliced=bool(reader.matrices))
    ways = [(chunk, way) for chunk in CHUNKS for way in reader.ways]
    wanted = cache.state.prompt_dtype
    if wanted is None:
        for chunk, way in ways:
            if rows * (full + called_bytes(way, itemsize, chunk, length)) <= free:
                return Manner(chunk, sliced=way.is_sliced)
        return least
    free_choice = isinstance(wanted, str)
    for number in PROMPT_DTYPES if isinstance(wanted, str) else (wanted,):
        hosted = _hosted(layers, cache, model, rows, new, number)
        kept = sum(layer.stored_bytes(length, _format(layer, cache.kv_dtype, number)) for layer in layers)
        for chunk, way in ways:
            taken = chunked_bytes(layers, length, chunk, number, kept, way, hosted=hosted, queries=queries)
            if rows * taken <= free:
                return Manner(chunk, number if free_choice else PROMPT_DTYPE, way.is_sliced)
    return least._replace(number=PROMPT_DTYPES[-1]) if free_choice else least


def unpacked(model: Any) -> tuple[tuple[tuple[int, int], ...], int]:
    """What is unpacked to the model's precision where a prompt is multiplied with it, as a `Reader` is told.

    bitsandbytes' layers of 4 bits can be unpacked some rows at a time, our blocks always are; such layers that are
    not quite what we know are unpacked matrix by matrix. Others multiply with what they have.
    """
    matrices, fixed = set(), 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            fixed = max(fixed, block_rows(module.out_features, module.in_features) * module.in_features)
        elif is_known(module):
            matrices.add((module.out_features, module.in_features))
        elif getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            # Nothing is multiplied with an embedding, which has no such sizes.
            fixed = max(fixed, getattr(module, "out_features", 0) * getattr(module, "in_features", 0))
    return tuple(sorted(matrices)), fixed


def _hosted(layers: list[LayerKV], cache: PrunedCache, model: Any, rows: int, new: int, number: KVDtype) -> int:
    """How many layers' codes of a prompt of ``new`` tokens may be in host memory."""
    host, full = cache.state.host, [layer for layer in layers if layer.kind == "full"]
    if host is None:
        return 0
    return host.most(replace(full[0], heads=rows * full[0].heads), len(full), new, number, model.device)


def _format(layer: LayerKV, ladder: Ladder | None, read: KVDtype | None) -> KVDtype | None:
    """How a layer stores what is kept, at most; a prompt that was ``read`` in one of the formats in no wider one."""
    number = None if ladder is None else read if read in ladder.rungs else ladder.rungs[-1]
    return number if layer.kind == "full" and number is not None and layer.takes(number) else None


def _layers(text: Any, cache: PrunedCache, itemsize: int) -> list[LayerKV]:
    """What each layer of a cache stores, of a row."""
    configs = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text] * len(cache.layers)
    found = []
    for layer, config in zip(cache.layers, configs, strict=False):
        heads, size = largest(config, "num_key_value_heads") or int(config.num_attention_heads), head_size(config)
        window = getattr(layer, "sliding_window", None)
        if isinstance(layer, ReFreeKVLayer) and layer.get_seq_length():
            found.append(LayerKV("full", layer.kv_heads, *layer.sizes, itemsize=itemsize))
        elif isinstance(layer, ReFreeKVLayer):
            found.append(LayerKV("full", heads, size, size, itemsize=itemsize))
        elif window is not None:
            found.append(LayerKV("window", heads, size, size, window=int(window), itemsize=itemsize))
    return found
