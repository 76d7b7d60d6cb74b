"""Prompts that would not fit in one call, read in chunks: forecast from free memory, or found out the hard way."""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.device_memory import free_memory
from refreekv.core.footprint import LayerKV, Reader, called_bytes, chunked_bytes
from refreekv.core.quantisation import PROMPT_DTYPE, KVDtype, Ladder
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.naming import NAME, cache_given
from refreekv.engines.transformers.packed_weights import PackedLinear

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

    chunk, fresh = forecast(model, cache, len(input_ids), length), cache.is_unused
    if chunk is not None:
        logger.info("a prompt of %d x %s tokens is read in chunks of %d", len(input_ids), f"{length:,}", chunk)
    while True:
        try:
            return read(chunk)
        except torch.OutOfMemoryError:
            smaller = CHUNKS[-1] if chunk is None else chunk // 2
            # What an earlier prompt left may be pruned by now: only a new cache can begin anew.
            if not fresh or length <= smaller or smaller < min(LEAST, CHUNKS[-1]):
                raise
        # Outside of the handler, as the error holds on to all that the call had made.
        cache.reset()
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning(
            "a prompt of %d x %s tokens did not fit in %s (out of memory) and is read again in chunks of %d",
            len(input_ids), f"{length:,}", "one call" if chunk is None else f"chunks of {chunk}", smaller,
        )  # fmt: skip
        chunk = smaller


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


def forecast(model: Any, cache: PrunedCache, rows: int, length: int) -> int | None:
    """Tokens of the chunks that a prompt is to be read in; None: one call fits, or nobody can tell.

    Only where all of the model is on one CUDA device.
    """
    devices = {parameter.device for parameter in model.parameters()}
    new = length - cache.get_seq_length()
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or new <= CHUNKS[-1]:
        return None
    device = next(iter(devices))
    return chunk_for(model, cache, rows, length, int(USABLE * free_memory(device)))


def chunk_for(model: Any, cache: PrunedCache, rows: int, length: int, free: int) -> int | None:
    """What `forecast` says where so many bytes are free. The policy may keep everything."""
    text, itemsize = model.config.get_text_config(decoder=True), model.dtype.itemsize
    layers, reader = _layers(text, cache, itemsize), Reader.of(text, unpacked_bytes(model))
    new, queries = length - cache.get_seq_length(), cache.policy.probe_plan(length).count
    free += 0 if cache.is_unused else cache.report.bytes_after
    kept = sum(layer.stored_bytes(length, _format(layer, cache.kv_dtype)) for layer in layers)
    full, widest = sum(layer.bytes(length) for layer in layers), max(layer.bytes(length) for layer in layers)
    if rows * min(full, kept + 2 * widest) + reader.behind(rows * new, itemsize) <= free:
        return None
    wanted = cache.state.prompt_dtype
    number = PROMPT_DTYPE if isinstance(wanted, str) else wanted
    hosted = _hosted(layers, cache, model, rows, new, number)
    for chunk in CHUNKS:
        if number is None:
            taken = full + called_bytes(reader, itemsize, chunk, length)
        else:
            taken = chunked_bytes(layers, length, chunk, number, kept, reader, hosted=hosted, queries=queries)
        if rows * taken <= free:
            return chunk
    return CHUNKS[-1]


def unpacked_bytes(model: Any) -> int:
    """Bytes of the largest matrix that is unpacked to the model's precision where a prompt is multiplied with it.

    bitsandbytes unpacks its 4 bits matrix by matrix, and we our blocks in parts. Others multiply with what they have.
    """
    sizes = [0]
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            sizes.append(module.in_features * module.out_features)
        elif isinstance(module, PackedLinear):
            sizes.append(min(module.in_features * module.out_features, kernels.UNPACKED))
    return int(model.dtype.itemsize) * max(sizes)


def _hosted(layers: list[LayerKV], cache: PrunedCache, model: Any, rows: int, new: int, number: KVDtype | None) -> int:
    """How many layers' codes of a prompt of ``new`` tokens may be in host memory."""
    host, full = cache.state.host, [layer for layer in layers if layer.kind == "full"]
    if host is None or number is None:
        return 0
    return host.most(replace(full[0], heads=rows * full[0].heads), len(full), new, number, model.device)


def _format(layer: LayerKV, ladder: Ladder | None) -> KVDtype | None:
    """How a layer stores what is kept, at most."""
    number = None if ladder is None else ladder.rungs[-1]
    return number if layer.kind == "full" and number is not None and layer.takes(number) else None


def _layers(text: Any, cache: PrunedCache, itemsize: int) -> list[LayerKV]:
    """What each layer of a cache stores, of a row."""
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    found = []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if isinstance(layer, ReFreeKVLayer) and layer.get_seq_length():
            found.append(LayerKV("full", layer.kv_heads, *layer.sizes, itemsize=itemsize))
        elif isinstance(layer, ReFreeKVLayer):
            found.append(LayerKV("full", heads, size, size, itemsize=itemsize))
        elif window is not None:
            found.append(LayerKV("window", heads, size, size, window=int(window), itemsize=itemsize))
    return found
