"""Putting refreekv into a model, and taking it out again without a trace."""

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refreekv.engines.transformers import following, sessions
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.constants import give_constants, measure_again, settle
from refreekv.engines.transformers.decoder import Decoder
from refreekv.engines.transformers.finding import COMPILED, check_can_prune
from refreekv.engines.transformers.naming import arguments, cache_given, name_among, with_argument
from refreekv.engines.transformers.prompt import ATTACHMENT, OutdatedError
from refreekv.engines.transformers.read_again import ReadingCache
from refreekv.engines.transformers.routing import Route, attention_configs
from refreekv.engines.transformers.slices import TOKENS, reading

logger = logging.getLogger("refreekv")

_lock = threading.RLock()
_TOKENS = ("input_ids", "inputs_embeds")
"""Arguments that bring a call's tokens, ``[B, q]`` or ``[B, q, hidden]``."""


class Attachment:
    """What is changed about a model while refreekv is in use on it. One a model, counted.

    Changed are: the name of the attention implementation in the configurations of its
    attention modules; a forward hook before and one after the model; and ``forward`` and what
    `generate` comes by on the model (``following.ROLES``), shadowed on the instance. All of it goes
    back when the last user detaches; what somebody else has put in its place meanwhile stays.

    Attributes
    ----------
    defaults : dict
        What the model's generation configuration said about caches when refreekv came.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.users = 0
        self.defaults = {name: _said(model, name) for name in ("use_cache", "cache_implementation")}
        self._uses_cache = _config_uses_cache(model)
        self._opened: list[sessions.Opened] = []
        self._routes: list[Route] = []
        self._shadows: dict[str, tuple[following.Shadow, Any]] = {}
        self._hooks: list[Any] = []
        self._signature = inspect.signature(model.forward)
        self._decoder = Decoder(model)
        self._generating = 0
        # Threads whose call has come by the hook before the model, and not yet to its forward.
        self._hooked: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """That of a copied model: it follows the copy, and nobody uses it yet; who does first leaves no trace of it."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        own = {**vars(self), "users": 0, "_generating": 0, "_opened": [], "_hooked": set()}
        routes = own.pop("_routes")
        copied.__dict__.update(copy.deepcopy(own, memo))
        copied._routes = [route.of_copy(copy.deepcopy(route.config, memo)) for route in routes]
        return copied

    @classmethod
    def attach(cls, model: PreTrainedModel) -> "Attachment":
        """The model's attachment, with one more user."""
        with _lock:
            attachment: Attachment | None = model.__dict__.get(ATTACHMENT)
            if attachment is None:
                attachment = cls(model)
                attachment._install()
            attachment.users += 1
            return attachment

    def detach(self) -> None:
        """One user less; the last one leaves the model as it was."""
        with _lock:
            self.users -= 1
            if self.users == 0:
                self._remove()

    @property
    def is_installed(self) -> bool:
        """Whether the model is followed."""
        return self.model.__dict__.get(ATTACHMENT) is self

    # -- blocks ---------------------------------------------------------------------------

    def open(self, session: sessions.Session) -> sessions.Opened:
        """Let a session serve what this context calls."""
        opened = sessions.Opened(self, session)
        self._opened.append(opened)
        sessions.enter(opened)
        return opened

    def close(self, opened: sessions.Opened) -> None:
        """Let a session serve no more, in whatever context."""
        self._opened.remove(opened)
        sessions.leave(opened)
        if opened.missed and not opened.served:
            logger.warning(
                "nothing was pruned in a compress block on a %s: the calls that were made meanwhile came from other "
                "threads or contexts, and a block belongs to the one that opened it. Hand calls over with run: "
                "threading.Thread(target=kv.run, args=(model.generate,), kwargs=inputs)",
                type(self.model).__name__,
            )

    # -- installing -----------------------------------------------------------------------

    def _install(self) -> None:
        model = self.model
        check_can_prune(model)  # what that misses, the first forward reports
        if _is_compiled(model):
            raise ValueError(COMPILED)
        self._routes = Route.take(attention_configs(model))
        model.__dict__[ATTACHMENT] = self
        for name, role in following.ROLES.items():
            original = getattr(model, name, None)
            if original is not None:
                self._shadow(name, following.Shadow(self, role, original))
        self._shadow("forward", following.Shadow(self, _forward, model.forward))
        self._hooks = [
            model.register_forward_pre_hook(self._before_call, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for name in list(self._shadows):
            self._unshadow(name)
        del self.model.__dict__[ATTACHMENT]
        self._decoder.close()
        for route in self._routes:
            route.give_back()

    def _shadow(self, name: str, shadow: following.Shadow) -> None:
        own = self.model.__dict__
        self._shadows[name] = shadow, own.get(name)
        own[name] = shadow

    def _unshadow(self, name: str) -> None:
        own = self.model.__dict__
        shadow, before = self._shadows.pop(name)
        if own.get(name) is not shadow:
            return  # somebody has put in something else, or taken it out
        if before is None:
            del own[name]
        else:
            own[name] = before

    # -- forward --------------------------------------------------------------------------

    @contextmanager
    def captured_steps(self) -> Iterator[None]:
        """Within, captured steps may stand in for the model's forward."""
        with _lock:
            self._generating += 1
        try:
            yield
        finally:
            with _lock:
                self._generating -= 1

    @property
    def may_capture(self) -> Callable[[PrunedCache], bool]:
        """Tells whether tokens that follow a cache's prompt are likely to come from a captured step."""
        return self._decoder.may_capture

    def note_unseen(self, cache: PrunedCache) -> None:
        """Say why a call that did not come through the model's `generate` has no captured steps."""
        reason = "generate was taken from the model's class, or from the model before refreekv was in use on it"
        self._decoder.refuse(cache, self.model.device, f"{reason}; call model.generate")

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward``, or a captured step in its place, makes of a call."""
        here = threading.get_ident()
        hooked = here in self._hooked
        if not hooked:
            # Called past the hooks, as some wrappers do: these come here.
            args, kwargs = self._before_forward(self.model, args, kwargs)
        self._hooked.discard(here)
        output = self._decoder(forward, kwargs) if self._generating and not args else None
        if output is None:
            outdated = False
            try:
                output = self._compute(forward, args, kwargs)
            except OutdatedError as error:
                if error.args[0] is not self.model:
                    raise  # that of a model around this one
                outdated = True
            if outdated:
                cache = cache_given(arguments(self._signature, args, kwargs))
                assert isinstance(cache, PrunedCache)
                measure_again(self.model, cache)
                output = self._compute(forward, args, kwargs)
        if not hooked:
            self._after_forward(self.model, args, kwargs, output)
        return output

    def _compute(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward`` makes of a call: of a prompt's without whole matrices unpacked, if that was asked for."""
        given = arguments(self._signature, args, kwargs)
        cache = cache_given(given)
        if not isinstance(cache, PrunedCache) or not cache.state.sliced:
            return forward(*args, **kwargs)
        tokens = next((given[name] for name in _TOKENS if given.get(name) is not None), None)
        if tokens is None or tokens.shape[0] * tokens.shape[1] <= TOKENS:
            return forward(*args, **kwargs)
        with reading(self.model):
            return forward(*args, **kwargs)

    @property
    def _runs_forward(self) -> bool:
        """Whether the model's forward is `run`, and nobody's who put theirs in its place."""
        return self.model.__dict__.get("forward") is self._shadows["forward"][0]

    def _before_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        changed = self._before_forward(module, args, kwargs)
        self._hooked.add(threading.get_ident())
        return changed

    # ``kwargs`` and the rest may be missing: while hooks come and go, a call in another thread may find one of
    # them without the note that it takes keywords. Such a call has no block and no cache of ours.
    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Check what a call brings, and give it a cache if it brings none."""
        if kwargs is None:
            return None
        given = arguments(self._signature, args, kwargs)
        cache, opened = cache_given(given), sessions.innermost(self)
        if (answer := sessions.current(self)) is not None:
            answer.ran = True
        if isinstance(cache, ReadingCache):
            return args, kwargs  # a verification's own call
        if opened is None:
            for other in self._opened:
                other.missed = True
        if cache is None and opened is not None and self._wants_cache(given):
            cache = opened.new_cache()
            args, kwargs = with_argument(self._signature, args, kwargs, name_among(self._signature.parameters), cache)
        if not isinstance(cache, PrunedCache):
            if cache is not None and opened is not None:
                raise following.foreign_cache(cache)
            return args, kwargs
        if opened is not None:
            opened.served = True
        if given.get("output_attentions") or getattr(self.model.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True is not supported with a pruned cache: the weights would have another length "
                "in every layer and row; call the model without it"
            )
        if _is_compiled(self.model, parts=False):
            raise ValueError(COMPILED)
        cache.check_model(self.model)
        if given.get("use_cache") is None:
            # A checkpoint may say no; there is a cache.
            args, kwargs = with_argument(self._signature, args, kwargs, "use_cache", True)
        for route in self._routes:
            route.ensure()
        for name in _TOKENS:
            tokens = given.get(name)
            if tokens is not None and tokens.shape[1] == 0:
                raise ValueError("empty prompt: the model was called with no tokens, so there is nothing to cache")
            if tokens is not None:
                # Calls that do not come by `run` cannot be made once more.
                give_constants(self.model, cache, tokens, may_repeat=self._runs_forward)
        if cache.made_for(self.model):
            if (verification := cache.state.verification) is not None:
                cache.state.refresh()
                place = cache.get_seq_length(cache.first.index), cache.state.end
                if verification.begins(given, *place):
                    verification.carry_out(cache, self.model, at_once=True)
                verification.note(given, *place)
            mask = given.get("attention_mask")
            cache.begin_forward(mask_given=mask is not None and (not isinstance(mask, Tensor) or mask.dim() == 4))
        return args, kwargs

    def _wants_cache(self, given: dict[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        if use_cache is not None:
            return bool(use_cache)
        # What a checkpoint says is nobody's wish, unless somebody trains it.
        says = _config_uses_cache(self.model)
        return says or (not self._uses_cache and not torch.is_grad_enabled())

    def changed(self, name: str) -> Any:
        """What somebody has set in the model's generation configuration since refreekv came; None if nothing."""
        said = _said(self.model, name)
        return None if said == self.defaults[name] else said

    def _after_forward(self, module: Any, args: tuple[Any, ...], kwargs: Any, *output: Any) -> None:
        """Make sure that the model really went through the cache and through refreekv's attention."""
        if not output:
            return
        cache = cache_given(arguments(self._signature, args, kwargs))
        # A part of the model that the cache was made for leaves it to that one.
        if not isinstance(cache, PrunedCache) or not cache.made_for(self.model):
            return
        if cache.state.unconfirmed is not None:
            settle(self.model, cache)
        cache.state.end_forward()
        cache.state.finish()
        if cache.state.verification is not None:
            cache.state.verification.carry_out(cache, self.model)
        if cache.is_unused:
            raise RuntimeError(
                f"{type(self.model).__name__} did not store its keys and values in the cache it was given; "
                "refreekv cannot prune it"
            )
        if cache.state.take_changed():
            if cache.state.host is not None:
                cache.state.host.distribute(cache.pruned_layers)
            cache.tell_owner()


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[Attachment]:
    """Within, refreekv stays in the model, and captured steps with it, whatever caches come and go."""
    attachment = Attachment.attach(model)
    try:
        yield attachment
    finally:
        attachment.detach()


def _forward(attachment: Attachment, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return attachment.run(forward, args, kwargs)


def _said(model: PreTrainedModel, name: str) -> Any:
    return getattr(getattr(model, "generation_config", None), name, None)


def _config_uses_cache(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "use_cache", True))


def _is_compiled(model: nn.Module, *, parts: bool = True) -> bool:
    """Whether attention runs in compiled code: the model's own, or that of a part with attention in it."""
    modules = model.modules() if parts else [model]
    return any(
        (
            module._compiled_call_impl is not None
            or hasattr(module, "_torchdynamo_orig_callable")
            or hasattr(module.forward, "_torchdynamo_orig_callable")
        )
        and (module is model or any(hasattr(part, "layer_idx") for part in module.modules()))
        for module in modules
    )
