"""One greedy generation, timed and measured."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import refreekv
from refreekv.cli.app import UserError, one_line, refusals
from refreekv.cli.loading import Loaded, quiet_transformers
from refreekv.engines import DEFAULT_POLICY
from refreekv.policies import Policy
from refreekv.policies.base import AUTO, ladder_for

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import Cache

    from refreekv.storage.host_store import HostStore


@dataclass(frozen=True)
class Run:
    """What one generation gave and took."""

    text: str  # the new text
    tokens: list[int]  # the new tokens, an end token included
    prefill_seconds: float  # from the call to the first new token
    decode_seconds: float  # from the first new token to the last
    token_seconds: float | None  # median time from one new token to the next; None if there was only one
    kv_bytes: int  # storage of all key and value tensors at the end, measured on the cache itself


def parse(policy: str, kv_dtype: str, max_new_tokens: int) -> tuple[Policy, str | None]:
    """What the options say; `UserError` for what they cannot, or unless at least one token is asked for."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    with refusals():
        chosen, stored = refreekv.policies.parse(policy), None if kv_dtype == "16" else kv_dtype
        ladder_for(chosen, stored)  # refuse before the long work
        return chosen, stored


def calibrated(
    loaded: Loaded, policy: Policy, stored: str | None, calibration: str | None, *, verify: str | None = None
) -> tuple[Policy, Any, Any]:
    """What a calibration says, where there is one, and what to verify by.

    Raises
    ------
    UserError
        No such file, or one for another model; a calibration beside what it says itself; a ``verify`` that is none.
    """
    from refreekv.engines.transformers.api import chosen
    from refreekv.engines.transformers.read_again import Recheck

    with refusals():
        reading = Recheck.parse(verify or False) or False
    if calibration is None:
        return policy, stored, reading
    if policy.spec != DEFAULT_POLICY or stored != AUTO:
        raise UserError("--calibration says itself what to prune by: leave --policy and --kv-dtype out")
    try:
        with refusals():
            chosen_policy, chosen_storage, read = chosen(loaded.model, DEFAULT_POLICY, AUTO, calibration, reading)
            return chosen_policy, chosen_storage, read or False
    except OSError as error:
        raise UserError(one_line(error)) from error


def store_of(keep_evicted: str, device: "torch.device", host_memory: str | None = None) -> "HostStore | None":
    """Where conversations on a device keep what is evicted; None: nowhere. `UserError` for a text that is no choice.

    With ``host_memory``, which is for what does not fit on the device, nothing is kept that nobody asked for.
    """
    from refreekv.storage.host_store import HostStore

    if keep_evicted == "auto":
        keep_evicted = "off" if device.type == "cpu" or host_memory is not None else "host"
    try:
        return None if keep_evicted == "off" else HostStore.parse(keep_evicted)
    except ValueError as error:
        said = one_line(error).replace("keep_evicted must be", "--keep-evicted must be auto, off,")
        raise UserError(said) from error


def generate(
    loaded: Loaded,
    inputs: dict[str, Any],
    *,
    max_new_tokens: int,
    on_token: Callable[[], None] | None = None,
    stream: Any = None,
    cache: "Cache | None" = None,
) -> Run:
    """Generate greedily from one prompt.

    Parameters
    ----------
    loaded : Loaded
        The model and its tokenizer.
    inputs : dict
        From `refreekv.cli.prompts.encode`.
    max_new_tokens : int
        Tokens to generate at most.
    on_token : callable, optional
        Called at each new token.
    stream : TextStreamer, optional
        Is handed the tokens as they come.
    cache : Cache, optional
        What to generate with; by default what `generate` makes itself.
    """
    import torch

    from refreekv.engines.transformers.naming import NAME
    from refreekv.evaluation.tasks.generation import greedy

    model: Any = loaded.model  # typed as a Module, whose attributes may all be tensors
    prompt_tokens = inputs["input_ids"].shape[1]
    settings = greedy(model, loaded.tokenizer, max_new_tokens)
    settings.return_dict_in_generate = True
    clock = _Clock(on_token, stream)
    with torch.inference_mode(), quiet_transformers():
        begin = time.perf_counter()
        output: Any = model.generate(**inputs, generation_config=settings, streamer=clock, **{NAME: cache})
    tokens = output.sequences[0, prompt_tokens:].tolist()
    first, steps = clock.times[0], [after - before for before, after in itertools.pairwise(clock.times)]
    return Run(
        text=decode(loaded, tokens),
        tokens=tokens,
        prefill_seconds=first - begin,
        decode_seconds=clock.times[-1] - first,
        token_seconds=statistics.median(steps) if steps else None,
        kv_bytes=cache_bytes(getattr(output, NAME)),
    )


def decode(loaded: Loaded, tokens: list[int]) -> str:
    """Text of generated tokens, without special tokens."""
    text: Any = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    return str(text)


def cache_bytes(cache: "Cache") -> int:
    """Bytes of storage that the keys and values of a cache hold on to."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


class _Clock:
    """The streamer of a generation: takes the time of each new token, and passes it on.

    Tokens arrive on the CPU, so a GPU has finished with them when the time is taken.
    """

    def __init__(self, on_token: Callable[[], None] | None, stream: Any):
        self.times: list[float] = []
        self._on_token = on_token
        self._stream = stream
        self._prompt_seen = False

    def put(self, tokens: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            if self._on_token is not None:
                self._on_token()
        self._prompt_seen = True
        if self._stream is not None:
            self._stream.put(tokens)

    def end(self) -> None:
        if self._stream is not None:
            self._stream.end()
