"""Putting refreekv into a model, and taking it out again without a trace."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from refreekv.engines.transformers.attention import PREFIX, twin
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.copy_scores import copy_scores
from refreekv.engines.transformers.graph import Decoder
from refreekv.engines.transformers.naming import NAME, cache_given, name_among
from refreekv.engines.transformers.stop_checks import deferred_stop_checks

ATTRIBUTE = "_refreekv_attachment"
_lock = threading.RLock()


class Session(Protocol):
    """Who makes the cache of a call that brings none."""

    def new_cache(self) -> PrunedCache:
        """Make the cache."""

    def observe(self, cache: PrunedCache) -> None:
        """Look at a cache that was just pruned, or whose call ended."""


class Attachment:
    """What is changed about a model while refreekv is in use on it. One a model, counted.

    Changed are: the name of the attention implementation in the configurations of its
    attention modules; a forward hook before and one after the model; and ``generate``,
    shadowed on the instance so that a cache learns where the prompt ends; while that runs, also
    ``forward``, so that a captured step can take its place. All of it goes back when the last
    user detaches.

    Attributes
    ----------
    sessions : list of Session
        The ``compress`` blocks that are open on the model, the innermost last.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.users = 0
        self.sessions: list[Session] = []
        self._implementations: list[tuple[PreTrainedConfig, str]] = []
        self._hooks: list[Any] = []
        self._signature = inspect.signature(model.forward)
        self._decoder = Decoder(model)
        self._generating = 0
        self._shadowed_forward: Any = None

    @classmethod
    def attach(cls, model: PreTrainedModel) -> "Attachment":
        """The model's attachment, with one more user."""
        with _lock:
            attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
            if attachment is None:
                attachment = cls(model)
                attachment._install()
                model.__dict__[ATTRIBUTE] = attachment
            attachment.users += 1
            return attachment

    def detach(self) -> None:
        """One user less; the last one leaves the model as it was."""
        with _lock:
            self.users -= 1
            if self.users == 0:
                del self.model.__dict__[ATTRIBUTE]
                self._remove()

    # -- installing -----------------------------------------------------------------------

    def _install(self) -> None:
        model = self.model
        # A lower bound check by transformers itself; what it misses, the first forward reports.
        if not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
            raise ValueError(
                f"{type(model).__name__} computes attention without transformers' attention interface; "
                "refreekv cannot prune its cache"
            )
        names = [(config, twin(config._attn_implementation or "eager")) for config in self._attention_configs()]
        for config, name in names:
            self._implementations.append((config, config._attn_implementation))
            config._attn_implementation = {"": name}  # this configuration only, not its parts
        self._shadowed = model.__dict__.get("generate")
        generate: Callable[..., Any] | None = getattr(model, "generate", None)
        if generate is not None:
            model.__dict__["generate"] = self._wrap_generate(generate)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.model.__dict__.pop("generate", None)
        if self._shadowed is not None:
            self.model.__dict__["generate"] = self._shadowed
        self._decoder.close()
        for config, name in self._implementations:
            config._attn_implementation = {"": name}

    def _attention_configs(self) -> list[PreTrainedConfig]:
        """Configurations that the decoder's attention modules and its masks read."""
        text = self.model.config.get_text_config(decoder=True)
        found = {id(text): text}
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and hasattr(module, "layer_idx"):
                found[id(config)] = config
        return [config for config in found.values() if not (config._attn_implementation or "").startswith(PREFIX)]

    # -- forward --------------------------------------------------------------------------

    @contextmanager
    def captured_steps(self) -> Iterator[None]:
        """Within, captured steps may stand in for the model's forward.

        Not longer than that: a copy of the model that is made meanwhile would run the original.
        """
        own = self.model.__dict__
        with _lock:
            self._generating += 1
            if self._generating == 1:
                self._shadowed_forward = own.get("forward")
                own["forward"] = self._wrap_forward(self.model.forward)
        try:
            yield
        finally:
            with _lock:
                self._generating -= 1
                if self._generating == 0:
                    del own["forward"]
                    if self._shadowed_forward is not None:
                        own["forward"] = self._shadowed_forward

    def _wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            out = None if args else self._decoder(forward, kwargs)
            return forward(*args, **kwargs) if out is None else out

        return wrapper

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check what a call brings, and give it a cache if it brings none."""
        given = _arguments(self._signature, args, kwargs)
        cache = cache_given(given)
        if cache is None and self.sessions and self._uses_cache(given):
            cache = self.sessions[-1].new_cache()
            bound = self._signature.bind_partial(*args, **kwargs)
            name = name_among(self._signature.parameters)
            if name in self._signature.parameters:
                bound.arguments[name] = cache
            else:
                bound.arguments["kwargs"] = {**bound.arguments.get("kwargs", {}), name: cache}
            args, kwargs = bound.args, bound.kwargs
        if not isinstance(cache, PrunedCache):
            if cache is not None and self.sessions:
                raise _foreign_cache(cache)
            return args, kwargs
        if given.get("output_attentions") or getattr(self.model.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True is not supported with a pruned cache: the weights would have another length "
                "in every layer and row; call the model without it"
            )
        cache.check_model(self.model)
        for name in ("input_ids", "inputs_embeds"):
            tokens = given.get(name)
            if tokens is not None and tokens.shape[1] == 0:
                raise ValueError("empty prompt: the model was called with no tokens, so there is nothing to cache")
            if tokens is not None and cache.state.lacks_scores(cache.get_seq_length() + tokens.shape[1]):
                cache.state.copy_scores = copy_scores(self.model)
        return args, kwargs

    def _uses_cache(self, given: dict[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        text = self.model.config.get_text_config(decoder=True)
        return bool(getattr(text, "use_cache", True) if use_cache is None else use_cache)

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make sure that the model really went through the cache and through refreekv's attention."""
        cache = cache_given(_arguments(self._signature, args, kwargs))
        if not isinstance(cache, PrunedCache):
            return
        cache.state.check_reported()
        cache.state.settle()
        if cache.is_unused:
            raise RuntimeError(
                f"{type(self.model).__name__} did not store its keys and values in the cache it was given; "
                "refreekv cannot prune it"
            )
        if cache.state.take_news():
            self._observe(cache)

    def _observe(self, cache: PrunedCache) -> None:
        for session in self.sessions:
            session.observe(cache)

    # -- generate -------------------------------------------------------------------------

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        # Not that of the function itself: a wrapper around generate may take anything and say nothing.
        signature = inspect.signature(GenerationMixin.generate.__get__(self.model))

        @functools.wraps(generate)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = _arguments(signature, args, kwargs)
            cache = cache_given(given)
            if cache is None and self.sessions and self._option(given, "use_cache") is not False:
                implementation = self._option(given, "cache_implementation")
                if implementation not in (None, "dynamic"):
                    raise ValueError(
                        f"cache_implementation={implementation!r} cannot be combined with refreekv: static, quantised "
                        "and offloaded caches have no room for pruning; leave it out (quantised storage: "
                        "compress(model, kv_dtype='int4'))"
                    )
                kwargs.pop("cache_implementation", None)
                cache = kwargs[NAME] = self.sessions[-1].new_cache()
            if not isinstance(cache, PrunedCache):
                return generate(*args, **kwargs)
            try:
                with (
                    self.captured_steps(),
                    deferred_stop_checks(self._decoder.may_capture),
                    cache.state.until(_prompt_end(given), generating=True),
                ):
                    return generate(*args, **kwargs)
            finally:
                self._observe(cache)

        return wrapper

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """A generation option, from where `generate` looks for it: arguments first, then configurations."""
        config = given.get("generation_config") or self.model.generation_config
        value = given.get(name)
        return getattr(config, name, None) if value is None else value


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[Attachment]:
    """Within, refreekv stays in the model, and captured steps with it, whatever caches come and go."""
    attachment = Attachment.attach(model)
    try:
        yield attachment
    finally:
        attachment.detach()


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, with those of ``**kwargs`` beside the named ones."""
    if not args:
        return kwargs
    given = signature.bind_partial(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def _prompt_end(given: dict[str, Any]) -> int:
    """Logical length at which the prompt of a `generate` call ends.

    The attention mask spans everything, old turns included, also where only the new
    tokens are passed; without one the tokens themselves are the whole sequence.
    """
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.shape[1])
    for name in ("inputs", "input_ids", "inputs_embeds"):
        tokens = given.get(name)
        if tokens is not None:
            return int(tokens.shape[1])
    return 1  # generate starts from the beginning-of-sequence token


def _foreign_cache(cache: object) -> TypeError:
    kind = type(cache).__name__
    hint = f"leave {NAME} out, or pass a refreekv.ReFreeKVCache"
    if isinstance(cache, Cache) and cache.is_compileable:
        return TypeError(f"a static cache ({kind}) has fixed shapes and cannot be pruned; {hint}")
    return TypeError(f"a {kind} passed inside refreekv.compress would not be pruned; {hint}")
