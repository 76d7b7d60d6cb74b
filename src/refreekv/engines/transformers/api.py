"""The method on transformers: `compress` and `ReFreeKVCache`."""

import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from refreekv.core.quantisation import KVDtype, Ladder
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.calibration import Calibration
from refreekv.engines.transformers import identity, sessions
from refreekv.engines.transformers.attachment import Attachment
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.decoder import DecodeMode, check_mode
from refreekv.engines.transformers.finding import decoder_of
from refreekv.engines.transformers.read_again import Recheck
from refreekv.engines.transformers.reading import parse_prompt_dtype
from refreekv.engines.transformers.saving import Saved
from refreekv.policies import Policy, resolve
from refreekv.policies.base import AUTO, ladder_for
from refreekv.report import CompressionReport
from refreekv.storage.host_store import HostStore


class ReFreeKVCache(PrunedCache):
    """A cache to pass as ``past_key_values`` (from transformers 5.24 on: ``cache``), pruned at the end of each prompt.

    As long as such a cache lives, its model's attention is routed through refreekv
    (results for other caches are unchanged); when the last one is gone the model is as
    it was. Inside `compress` there is no need for one.

    Parameters
    ----------
    model : Module
        The model that the cache is for: a transformers model, or what PEFT, accelerate,
        DistributedDataParallel or a module of one's own wraps around one.
    policy : str or Policy
        A policy, the name of one (see ``refreekv.policies.available()``), or a name with parameters as the
        command line takes it: ``"snapkv:ratio=0.5"``.
    kv_dtype, decode, decode_interval, prompt_dtype, calibration, verify, keep_evicted, host_memory
        As for `compress`.
    **parameters
        Parameters of a policy given by name.

    Raises
    ------
    ValueError
        Unknown policy, ``kv_dtype`` or ``prompt_dtype``, parameter out of range, or a model that cannot be pruned.
    TypeError
        Unknown parameter, or not a model.

    Examples
    --------
    >>> cache = refreekv.ReFreeKVCache(model, policy="streaming-llm", ratio=0.5)  # doctest: +SKIP
    >>> out = model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: torch.nn.Module,
        policy: str | Policy = DEFAULT_POLICY,
        *,
        kv_dtype: str | KVDtype | Ladder | None = AUTO,
        decode: DecodeMode = "graph",
        decode_interval: int | None = None,
        prompt_dtype: str | KVDtype | None = AUTO,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        verify: bool | float | str | Recheck = False,
        keep_evicted: str | HostStore | None = None,
        host_memory: str | int | None = None,
        **parameters: Any,
    ):
        model = decoder_of(model)
        check_mode(decode)
        resolved, stored, reading = chosen(model, policy, kv_dtype, calibration, verify, **parameters)
        super().__init__(
            model.config, resolved, stored, decode, decode_interval, prompt_dtype, reading or False, keep_evicted,
            host_memory,
        )  # fmt: skip
        self.bind(model)
        weakref.finalize(self, Attachment.attach(model).detach)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        policy: str | Policy | None = None,
        *,
        verify: bool | float | str | Recheck = False,
        keep_evicted: str | HostStore | None = AUTO,
        host_memory: str | int | None = None,
    ) -> Self:
        """Read a cache that `save` wrote, of this process or another, and go on with it.

        Parameters
        ----------
        path : str or path
            The file.
        model : PreTrainedModel
            The model that the cache was made for: its configuration, and a few of its weights, are compared.
        policy : str or Policy, optional
            Needed for policies that are not registered; has to be the one that the cache had.
        verify, host_memory
            As for `compress`: files do not say so.
        keep_evicted : str, HostStore or None
            As for `compress`; ``"auto"``: ``"host"`` if the file has what that keeps. None leaves it out.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            A file that is none of ours, was damaged or cut off, is of another version, or belongs to another
            model or policy.

        Examples
        --------
        >>> cache.save("manual.safetensors")  # doctest: +SKIP
        >>> cache = refreekv.ReFreeKVCache.load("manual.safetensors", model)  # doctest: +SKIP
        """
        check_model(model)
        saved = Saved(path)
        saved.check_model(model)
        chosen_policy, settings = saved.policy(None if policy is None else resolve(policy)), saved.settings
        settings["kv_dtype"] = saved.asked_kv_dtype(chosen_policy)
        if verify is not False:
            settings.pop("prompt_dtype")
        if keep_evicted == AUTO:
            keep_evicted = "host" if saved.remembers else None
        cache = cls(model, chosen_policy, **settings, verify=verify, keep_evicted=keep_evicted, host_memory=host_memory)
        saved.fill(cache, model)
        if cache.state.host is not None:
            cache.state.host.distribute(cache.pruned_layers)
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that keeps the model attached by itself, also when the original is gone."""
        copied = super().__deepcopy__(memo)
        model = self._model() if self._model is not None else None
        if isinstance(model, PreTrainedModel):
            weakref.finalize(copied, Attachment.attach(model).detach)
        return copied


class CompressionSession:
    """What `compress` hands out: the report, and the latest cache.

    Attributes
    ----------
    policy : Policy
        What decides on what to keep.
    kv_dtype : Ladder or None
        How what is kept is stored.
    decode_interval, prompt_dtype, verify, keep_evicted, host_memory
        What `compress` was given, as it was read: the store that serves all of the block among it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        kv_dtype: str | KVDtype | Ladder | None,
        keep_evicted: str | HostStore | None,
        **settings: Any,
    ):
        self.policy, self.kv_dtype = policy, ladder_for(policy, kv_dtype)
        # One store for all caches of the block.
        self.keep_evicted = HostStore.parse(keep_evicted)
        self.decode_interval, self.verify, self.host_memory = (
            settings[name] for name in ("decode_interval", "verify", "host_memory")
        )
        self.prompt_dtype = parse_prompt_dtype(settings["prompt_dtype"])
        self._settings = {**settings, "kv_dtype": kv_dtype, "keep_evicted": self.keep_evicted}
        self._model = model
        self._opened: sessions.Opened | None = None
        # Weak: the session must not keep a finished answer's keys and values alive.
        self._latest: weakref.ref[PrunedCache] | None = None
        stored = None if self.kv_dtype is None else str(self.kv_dtype)
        self._snapshot = CompressionReport(policy.spec, 0, (), kv_dtype=stored)

    @property
    def cache(self) -> PrunedCache | None:
        """The cache of the latest call, for a next turn; None once nobody else holds it."""
        return self._latest() if self._latest is not None else None

    @property
    def report(self) -> CompressionReport:
        """What the latest call kept and saved: live while its cache lives, then as it last was."""
        cache = self.cache
        if cache is not None and not cache.is_unused:
            return cache.report
        return self._snapshot

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function as if this block had been opened around it, in whatever thread.

        A block belongs to the thread or context that opened it, and a new thread starts without any.

        Raises
        ------
        RuntimeError
            The block was left.
        TypeError
            A coroutine or generator function, whose body runs later: open a block inside of it.

        Examples
        --------
        >>> with refreekv.compress(model) as kv:  # doctest: +SKIP
        ...     inputs["streamer"] = TextIteratorStreamer(tokenizer)
        ...     thread = threading.Thread(target=kv.run, args=(model.generate,), kwargs=inputs)
        ...     thread.start()
        ...     for text in inputs["streamer"]:
        ...         print(text, end="")
        ...     thread.join()
        """
        if self._opened is None or self._opened.session is None:
            raise RuntimeError("the compress block of this session was left; open another one")
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(
                f"run calls a function, and the body of {getattr(function, '__name__', function)} would run later: "
                "open a compress block inside of it"
            )
        with sessions.in_force(self._opened):
            return function(*args, **kwargs)

    def new_cache(self, *, nested: bool = False) -> PrunedCache:
        """A cache for a call that brings none; ``nested``: inside an answer, which the report stays about."""
        cache = PrunedCache(self._model.config, self.policy, **self._settings)
        cache.bind(self._model)
        if not nested:
            cache.owner = weakref.ref(self)
            self._latest = weakref.ref(cache)
        return cache

    def observe(self, cache: PrunedCache) -> None:
        """Take down the report of a cache made here, before it may go away."""
        if cache is self.cache:
            self._snapshot = cache.report


@contextmanager
def compress(
    model: torch.nn.Module,
    policy: str | Policy = DEFAULT_POLICY,
    *,
    kv_dtype: str | KVDtype | Ladder | None = AUTO,
    decode: DecodeMode = "graph",
    decode_interval: int | None = None,
    prompt_dtype: str | KVDtype | None = AUTO,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    verify: bool | float | str | Recheck = False,
    keep_evicted: str | HostStore | None = None,
    host_memory: str | int | None = None,
    **parameters: Any,
) -> Iterator[CompressionSession]:
    """Prune the KV cache of everything that ``model`` generates inside the ``with`` block.

    Calls of ``model.generate``, of a pipeline around the model and of the model itself get
    a `PrunedCache` if they bring no cache. There is no budget to choose. On exit, also after
    an exception, the model is exactly as before, but for what was changed about it by others.

    A block belongs to the thread or context (`contextvars`) that opened it: calls in other threads
    stay plain, so that threads may each open their own, on one model, and asyncio tasks likewise.
    A new thread has no block, also if it was started inside of one; hand calls over to it with
    `CompressionSession.run`, or pass a `ReFreeKVCache`. Of nested blocks the innermost is in force.
    A cache that outlives its block is of use in another block on the same model only.

    Parameters
    ----------
    model : Module
        A decoder-only model that goes through transformers' attention interface, or what PEFT, accelerate,
        DistributedDataParallel or a module of one's own wraps around one.
    policy : str or Policy
        A policy, the name of one (see ``refreekv.policies.available()``), or a name with parameters as the
        command line takes it: ``"snapkv:ratio=0.5"``.
    kv_dtype : str, KVDtype, Ladder or None
        What is kept is stored in, but for sinks and the newest entries: ``"int8"``, ``"int4"``, ``"k6v4"`` (keys in 6
        bits, values in 4) or other such widths; several of them, such as ``"k4v2+k6v4+int8"``, of which a policy
        chooses for each entry; None: in the model's precision. ``"auto"``: as the policy has it, several widths for
        `adaptive` and the model's precision for others; also where heads cannot be coded.
    decode : str
        How `generate` decodes on CUDA: ``"graph"`` through a CUDA graph, captured at the second token
        in about a second, or ``"eager"``. What cannot be captured is decoded eagerly, for one reason
        that is logged. On the CPU there is nothing to capture.
    decode_interval : int or None
        Generated tokens after which the policy looks again, so that long answers stop growing the
        cache; None: only prompts are pruned.
    prompt_dtype : str, KVDtype or None
        How a prompt that comes in chunks (``prefill_chunk_size``, or calls of one's own) is held until its end shows
        what matters: in one of the formats of ``kv_dtype``, but for sinks and the newest entries; or, None, in the
        model's precision. "auto": int8, or k6v4 where only that fits, if heads are a multiple of 16 elements and chunks
        have 64 tokens and more; else None.
    calibration : path or Calibration, optional
        What ``refreekv calibrate`` wrote for this model: it says what policy and number format keep a stated
        risk, in place of ``policy`` and ``kv_dtype``.
    verify : bool, float, str or Recheck
        True or ``"prompt"``: the last 32 tokens of each prompt are read again over what was kept, as the answer will
        be, and compared with the same over everything. Where the mean divergence of a row is above 0.02 nats (or above
        a number given in place of True, or the damage of the calibration), the policy is asked again at a quarter and
        at a sixteenth of its constant, and in the end everything is kept. ``"answer"``: the first 16 tokens of the
        answer are generated over everything, and read again in place of the prompt's; that sees what only the answer
        needs. ``"answer:damage=0.05,tokens=8"``: other numbers. The report says which step it was. Costs a short call
        for what everything predicts, and one a step; until then all layers hold the prompt in full, beside one
        compressed copy.
    keep_evicted : str, HostStore or None
        ``"host"``: at the end of each prompt, all it held goes to host memory (int8, or as ``prompt_dtype`` says), and
        comes back when the next turn begins: its question is read over everything, and the policy decides over
        everything again. What is on the device while an answer is generated stays what the policy keeps. At most a
        quarter of the host memory that is free; ``"host:limit=8GiB,folder=/tmp"``: another limit, and a folder for what
        finds no room. Conversations used least recently go first; one that finds no room goes on over what was kept,
        and the report says so. On a CPU it takes the memory that eviction frees, but with a folder. A `HostStore` is
        one limit for the caches of several blocks. None: what is evicted is gone.
    host_memory : str, int or None
        ``"auto"``: codes that do not fit on the GPU are in pinned host memory, those of as many layers as it takes,
        also while a prompt is read in chunks. They come to the GPU layer by layer ahead of their use, so that a token
        takes as long as the bus takes for them. ``"8GiB"``, or a number of bytes: the codes of as many layers as that
        holds. For models on one CUDA device, and with ``kv_dtype``.
    **parameters
        Parameters of a policy given by name.

    Yields
    ------
    CompressionSession
        Its ``report`` says what was kept, layer by layer.

    Raises
    ------
    ValueError
        Unknown policy, ``kv_dtype`` or ``prompt_dtype``, parameter out of range, a model that cannot be pruned, or a
        calibration that was made for another one.
    TypeError
        Unknown parameter, or not a model.

    Examples
    --------
    >>> with refreekv.compress(model) as kv:  # doctest: +SKIP
    ...     out = model.generate(**inputs, max_new_tokens=200)
    >>> print(kv.report)  # doctest: +SKIP
    """
    check_mode(decode)
    model = decoder_of(model)
    resolved, stored, reading = chosen(model, policy, kv_dtype, calibration, verify, **parameters)
    session = CompressionSession(
        model, resolved, kv_dtype=stored, decode=decode, decode_interval=decode_interval, prompt_dtype=prompt_dtype,
        verify=reading or False, keep_evicted=keep_evicted, host_memory=host_memory,
    )  # fmt: skip
    session.new_cache()  # refuse an unsupported model here, not at its first call
    attachment = Attachment.attach(model)
    session._opened = opened = attachment.open(session)
    try:
        yield session
    finally:
        attachment.close(opened)
        attachment.detach()


def chosen(
    model: PreTrainedModel,
    policy: str | Policy,
    kv_dtype: str | KVDtype | Ladder | None,
    calibration: str | os.PathLike[str] | Calibration | None,
    verify: bool | float | str | Recheck = False,
    **parameters: Any,
) -> tuple[Policy, str | KVDtype | Ladder | None, Recheck | None]:
    """What arguments ask for, by name or by a calibration: the policy, the number format, and what to verify by."""
    reading = Recheck.parse(verify)
    if calibration is None:
        return resolve(policy, **parameters), kv_dtype, reading
    if policy != DEFAULT_POLICY or kv_dtype != AUTO or parameters:
        raise ValueError("a calibration says itself what policy and kv_dtype to use: leave these and parameters out")
    what = "this calibration" if isinstance(calibration, Calibration) else f"the calibration {os.fspath(calibration)}"
    made = Calibration.load(calibration)
    identity.check_model(made.model, model, what)
    if reading is not None and reading.damage is None:
        reading = replace(reading, damage=made.damage)
    return made.policy(), made.stored(), reading


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a transformers model, or has one inside that runs."""
    decoder_of(model)
