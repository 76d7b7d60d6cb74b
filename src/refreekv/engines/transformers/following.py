"""Following `generate`, whatever way it is called: where its prompt ends, which cache it uses, what it drafts.

`generate` may be called as the model's attribute, or through something that was taken from the model before
(``functools.partial(model.generate)``, a bound method, the class's function). All of them call methods of the
model by name on their way, which are shadowed here.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from refreekv.engines.transformers import sessions
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.fitting import prefill
from refreekv.engines.transformers.naming import NAME, arguments, cache_given
from refreekv.engines.transformers.stop_checks import deferred_stop_checks

if TYPE_CHECKING:
    from refreekv.engines.transformers.attachment import Attachment


class Shadow:
    """Stands in for a method on the model itself. A copied model has a copy, that leads to the copied model."""

    def __init__(self, attachment: "Attachment", role: Callable[..., Any], original: Callable[..., Any]):
        update_wrapper(self, original)
        self._attachment, self._role, self._original = attachment, role, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what follows the method, and through that the method itself."""
        if not self._attachment.is_installed:  # somebody has kept it
            return self._original(*args, **kwargs)
        return self._role(self._attachment, self._original, *args, **kwargs)


# Not that of the model's own: a wrapper around generate may take anything and say nothing.
_SIGNATURE = inspect.signature(GenerationMixin.generate.__get__(object()))


def generate(attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Follow `generate` from its begin to its end."""
    given = arguments(_SIGNATURE, args, kwargs)
    with sessions.answering(attachment) as answer:
        cache = cache_given(given)
        if isinstance(cache, PrunedCache):
            _follow(attachment, answer, cache, _prompt_end(given))
        generated = original(*args, **kwargs)
        if cache is None and not answer.started and not answer.ran and sessions.innermost(attachment) is not None:
            raise _handed_over(attachment.model)
        return generated


def prepare_generation_config(
    attachment: "Attachment", original: Callable[..., Any], generation_config: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Settle which cache a call uses: the first thing that `generate` asks of a model.

    What the checkpoint says about caches (``use_cache``, ``cache_implementation``) is nobody's wish; what the
    call itself says is.
    """
    settings, model_kwargs = original(generation_config, *args, **kwargs)
    answer = sessions.claimed(attachment, sys._getframe(2))  # the frame that called the shadow
    cache, opened = cache_given(model_kwargs), sessions.innermost(attachment)
    if cache is not None and not isinstance(cache, PrunedCache):
        if opened is not None:
            raise foreign_cache(cache)
        return settings, model_kwargs
    if cache is None and opened is None:
        return settings, model_kwargs

    def wish(name: str) -> Any:
        said = kwargs.get(name)
        if said is None:
            said = getattr(generation_config, name, None)
            # Pipelines and others pass a copy of the model's own.
            said = None if said == attachment.defaults[name] else said
        return attachment.changed(name) if said is None else said

    # Embeddings can be read once only: transformers then uses a cache whatever was said.
    if wish("use_cache") is False and kwargs.get("inputs_embeds") is None:
        if cache is not None:
            raise ValueError("use_cache=False was given together with a cache; leave one of them out")
        return settings, model_kwargs
    implementation = wish("cache_implementation")
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={implementation!r} cannot be combined with refreekv: static, quantised, paged "
            "and offloaded caches have no room for pruning; leave it out (quantised storage: "
            "compress(model, kv_dtype='int4'))"
        )
    settings.use_cache, settings.cache_implementation = True, None
    if cache is None:
        assert opened is not None
        cache = model_kwargs[NAME] = opened.new_cache()
        if settings.is_assistant:
            # Drafts are taken back, also out of layers with a window, which have to be told before.
            cache.activate_past_recording()
    if not answer.is_seen:
        # The settings end with the call, just before the cache may.
        weakref.finalize(settings, _tell_owner, weakref.ref(cache)).atexit = False
    return settings, model_kwargs


def _tell_owner(held: "weakref.ref[PrunedCache]") -> None:
    cache = held()
    if cache is not None:
        cache.tell_owner()


def prepare_model_inputs(
    attachment: "Attachment",
    original: Callable[..., Any],
    inputs: Any = None,
    bos_token_id: Any = None,
    model_kwargs: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Learn where the prompt ends: from the tokens and the mask that `generate` was given."""
    given = {**(model_kwargs or {})} | ({} if inputs is None else {"inputs": inputs})
    cache, answer = cache_given(given), sessions.current(attachment)
    if answer is not None:
        if isinstance(cache, PrunedCache):
            _follow(attachment, answer, cache, _prompt_end(given))
        answer.started = True
    return original(inputs, bos_token_id, model_kwargs, *args, **kwargs)


def prepare_inputs_for_generation(
    attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Stay with the cache of a call where a model drops it, as Phi-3 does where its long rotary factors begin.

    Everything is read again from there on: into the same cache, which forgets what it held.
    """
    cache, inputs = cache_given(kwargs), original(*args, **kwargs)
    if isinstance(cache, PrunedCache) and cache_given(inputs) is None:
        if not cache.is_unused:
            cache.reset()
        inputs[NAME] = cache
    return inputs


def get_candidate_generator(attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep drafts to where the cache stays as it is: what is pruned is decided on over verified tokens alone."""
    generator = original(*args, **kwargs)
    cache = cache_given(kwargs.get("model_kwargs") or {})
    if isinstance(cache, PrunedCache):
        # Weak, both: the generator would hold itself and the cache.
        draft, held = weakref.WeakMethod(generator.get_candidates), weakref.ref(cache)
        generator.get_candidates = partial(_draft, draft, held)
    return generator


def _draft(
    draft: "weakref.WeakMethod[Callable[..., Any]]",
    held: "weakref.ref[PrunedCache]",
    input_ids: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    get_candidates, cache = draft(), held()
    assert get_candidates is not None
    ids, logits = get_candidates(input_ids, *args, **kwargs)
    limit = None if cache is None else cache.draft_limit
    if limit is None or ids.shape[1] - input_ids.shape[1] <= limit:
        return ids, logits
    # Without any, None: transformers would read no logits as all.
    return ids[:, : input_ids.shape[1] + limit], None if logits is None or limit == 0 else logits[:, :limit]


def init_continuous_batching(attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse continuous batching, to which all its entry points come."""
    raise RuntimeError(
        "continuous batching (generate_batch) keeps keys and values in pages of its own, which refreekv cannot prune, "
        "and refreekv is in use on this model: call it outside of refreekv.compress and when no ReFreeKVCache of the "
        "model is left, or use generate"
    )


def _follow(attachment: "Attachment", answer: sessions.Answer, cache: PrunedCache, end: int) -> None:
    """Tell the cache where its prompt ends, for as long as a call runs."""
    if answer.started:
        return
    answer.started = True
    state = cache.state
    state.refresh()
    if not answer.is_seen:
        if state.end is None:  # else who drives the cache has said so
            assert answer.frame is not None
            state.follow(end, answer.frame)
            attachment.note_unseen(cache)
        return
    enter = answer.stack.enter_context
    answer.stack.callback(cache.tell_owner)
    # Whatever blocks and caches end meanwhile in other threads.
    answer.stack.callback(type(attachment).attach(attachment.model).detach)
    enter(attachment.captured_steps())
    enter(deferred_stop_checks(attachment.may_capture))
    enter(state.until(end, generating=True))


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


def _handed_over(model: torch.nn.Module) -> RuntimeError:
    """The error for a model that has another one inside of it generate, which a block on it does not see."""
    inside = {name: part for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)}
    names = " or ".join(f"model.{name}" for name, part in inside.items() if part.can_generate())
    return RuntimeError(
        f"{type(model).__name__} has a model inside of it generate, so that nothing was pruned: compress that one"
        + (f", which is {names}" if names else "")
    )


def foreign_cache(cache: object) -> TypeError:
    """The error for a cache of another kind inside a block."""
    kind = type(cache).__name__
    hint = (
        f"leave {NAME} out, pass a refreekv.ReFreeKVCache, or, where a model around this one made it, compress that one"
    )
    if isinstance(cache, Cache) and cache.is_compileable:
        return TypeError(f"a static cache ({kind}) has fixed shapes and cannot be pruned; {hint}")
    return TypeError(f"a {kind} passed inside refreekv.compress would not be pruned; {hint}")


ROLES = {
    "generate": generate,
    "_prepare_generation_config": prepare_generation_config,
    "_prepare_model_inputs": prepare_model_inputs,
    "prepare_inputs_for_generation": prepare_inputs_for_generation,
    "_prefill": prefill,
    "_get_candidate_generator": get_candidate_generator,
    "init_continuous_batching": init_continuous_batching,
}
"""Methods of a model that are shadowed while refreekv is attached, as far as the model has them, and by what."""
