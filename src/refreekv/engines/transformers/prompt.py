"""Where the prompt ends, and which layers still have to be compacted: what a cache's layers share."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import PROMPT_DTYPE, KVDtype
from refreekv.engines.transformers.handout import Handout, missing
from refreekv.engines.transformers.host_tier import HostTier
from refreekv.engines.transformers.proof import Proof
from refreekv.policies import Policy
from refreekv.pruning.joint import JointPruning
from refreekv.storage.past import Past

if TYPE_CHECKING:
    from refreekv.engines.transformers.verifying import Verification

ATTACHMENT = "_refreekv_attachment"
"""Attribute of a model that leads to its attachment, while it has one."""


class OutdatedError(Exception):
    """The codes and scores that a prompt's first layers used are those of other weights; its argument is the model."""


@dataclass
class PromptState:
    """Tells a layer, after each attention call, whether the prompt ended in that call.

    A cache sees calls, not prompts: a call of many tokens may be a whole prompt, one
    chunk of it, or draft tokens to verify. Whoever drives the cache and knows says so
    with `until`.

    Attributes
    ----------
    policy : Policy
        Decides what each layer keeps.
    layers : int
        Number of layers that may be pruned.
    end : int or None
        Logical length at which the current prompt ends; 0 while decoding. None: nobody
        said, so the first call and any call of several tokens is a prompt of its own.
    awaiting : Handout or None
        Keys and values that a layer handed out and no attention got yet.
    proofs : list of Proof
        Attention calls of modules that were not seen before, compared with what refreekv would compute.
    mask_given : bool
        Whether the caller of the forward that is under way brought a mask for each query, which is then none of the
        model's.
    copy_scores : sequence of Tensor or None
        By layer that may be pruned, ``[H_kv]``; None until somebody measures them for a policy that reads them.
    key_codes : sequence of KeyCodes, or None
        By layer that may be pruned, codes of the model's own for keys; None: keys are rotated.
    codes_wanted : bool
        Whether entries are coded, and nobody has tried yet to measure codes for them.
    unconfirmed : callable or None
        Raises OutdatedError if the model has changed since codes and scores were measured: asked while the device is
        busy.
    codes_optional : bool
        Whether what cannot be coded is stored as it is, without a word: nobody asked for codes by name.
    decode_interval : int or None
        Generated tokens after which the policy looks again; None: only prompts are pruned.
    prompt_dtype : KVDtype, str or None
        How a prompt that comes in chunks is held until its end; "auto": as ``held_as`` says, where it can be.
    held_as : KVDtype
        What "auto" stands for, of the prompt that is read.
    sliced : bool
        Whether weights of 4 bits are unpacked some rows at a time while prompts are read, as memory is short.
    changed : bool
        Whether a layer came to a prompt's end, or was pruned, since `take_changed` was last asked.
    joint : JointPruning
        Layers that wait for the last one, under a policy that decides about all together.
    generating : bool
        Whether `generate` drives the cache: what it feeds behind the prompt are real tokens, one
        a row, which masks would say again.
    arena : bool or None
        Whether layers go to storage that can grow; None: on CUDA they do.
    model : weakref to Module, or None
        The model that the cache is for; None: any.
    forward : int or None
        The thread in which the model runs with the cache; None: it does not.
    verification : Verification or None
        What prunes layers when the prompt has been read, and keeps more where that shows; None: layers prune
        themselves.
    past : Past or None
        Where all that prompts held is kept, for the next turn to be read over; None: what is evicted is gone.
    host : HostTier or None
        Decides which layers' codes are in host memory; None: none are.
    """

    policy: Policy
    layers: int = 0
    end: int | None = None
    awaiting: Handout | None = None
    proofs: list[Proof] = field(default_factory=list)
    mask_given: bool = False
    copy_scores: Sequence[Tensor] | None = None
    key_codes: Sequence[KeyCodes] | None = None
    codes_wanted: bool = False
    unconfirmed: Callable[[], None] | None = None
    codes_optional: bool = False
    decode_interval: int | None = None
    prompt_dtype: KVDtype | str | None = "auto"
    held_as: KVDtype = PROMPT_DTYPE
    sliced: bool = False
    changed: bool = False
    joint: JointPruning = field(default_factory=JointPruning)
    generating: bool = False
    arena: bool | None = None
    model: weakref.ref[nn.Module] | None = None
    forward: int | None = None
    verification: "Verification | None" = None
    past: Past | None = None
    host: HostTier | None = None
    _frame: int | None = None
    _pending: list[Callable[[], None]] = field(default_factory=list)

    @contextmanager
    def until(self, end: int, *, generating: bool = False) -> Iterator[None]:
        """Within, the prompt ends at logical length ``end`` and what follows is decoding."""
        before = self.end, self.generating, self._frame
        self.end, self.generating, self._frame = end, generating, None
        try:
            yield
        finally:
            self.end, self.generating, self._frame = before

    def follow(self, end: int, frame: int) -> None:
        """The prompt ends at logical length ``end`` as long as a function runs; ``frame`` as for `on_stack`."""
        self.end, self._frame = end, frame

    def refresh(self) -> None:
        """Forget the end of a prompt if the function that it was said for has returned."""
        if self._frame is not None and not on_stack(self._frame):
            self.end = self._frame = None

    def decodes(self, before: int) -> bool:
        """Whether the token at logical length ``before`` is one that `generate` made."""
        return self.generating and self.end is not None and before >= self.end

    def begins_prompt(self, before: int, after: int) -> bool:
        """Whether a call from logical length ``before`` to ``after`` has tokens of a prompt, given it is no chunk."""
        return after - before > 1 if self.end is None else before < self.end

    def tokens_after_prompt(self, before: int, after: int) -> int | None:
        """Tokens of a call that lie behind the prompt's end; None if it does not end in this call.

        ``before`` and ``after`` are the logical lengths around the call.
        """
        if self.end is None:
            return 0 if before == 0 or after - before > 1 else None
        return after - self.end if before < self.end <= after else None

    def continues(self, after: int) -> bool:
        """Whether more of the current prompt is to come at logical length ``after``."""
        return self.end is not None and after < self.end

    def scores_of(self, layer: int) -> Tensor | None:
        """Copy scores ``[1, H_kv]`` of a layer that may be pruned; None if nobody measured any."""
        return None if self.copy_scores is None else self.copy_scores[layer][None]

    def codes_of(self, layer: int) -> KeyCodes | None:
        """Codes of the model's own for the keys of a layer that may be pruned; None if nobody measured any."""
        return None if self.key_codes is None else self.key_codes[layer]

    def lacks_scores(self, length: int) -> bool:
        """Whether a prompt of ``length`` tokens would be pruned by a policy that misses its copy scores."""
        reads = self.policy.reads_copy_scores and self.policy.frozen_layers != "all"
        return reads and self.copy_scores is None and self.policy.probe_plan(length).count > 0

    def forget_constants(self) -> None:
        """Let codes and scores be measured, or found to be the model's, when the next prompt begins."""
        self.unconfirmed = self.key_codes = self.copy_scores = None
        self.codes_wanted = True

    def confirm(self) -> None:
        """Raise OutdatedError if the model has changed since its codes and scores were measured."""
        check, self.unconfirmed = self.unconfirmed, None
        if check is not None:
            check()

    def later(self, carry_out: Callable[[], None]) -> None:
        """Compact a layer when the next one was decided on: by then its numbers are on the host."""
        self.finish()
        self._pending.append(carry_out)

    def finish(self) -> None:
        """Compact what was decided on and not compacted yet."""
        while self._pending:
            self._pending.pop()()

    def clear(self) -> None:
        """Forget what is under way."""
        self.awaiting = self.forward = None
        self.mask_given = False
        if self.unconfirmed is not None:  # nobody came to ask whether these are the model's
            self.forget_constants()
        self.proofs.clear()
        self.joint.clear()
        self._pending.clear()
        if self.verification is not None:
            self.verification.clear()
        if self.past is not None:
            self.past.clear()
        if self.host is not None:
            self.host.clear()

    def take_changed(self) -> bool:
        """Whether a layer came to a prompt's end, or was pruned, since this was last asked."""
        changed, self.changed = self.changed, False
        return changed

    # -- forwards ---------------------------------------------------------------------------

    def begin_forward(self, lengths: Callable[[], set[int]]) -> None:
        """Note that the model begins to run with the cache; ``lengths`` tells those of the layers.

        Raises
        ------
        RuntimeError
            An earlier forward was interrupted on its way, or another one has not ended.
        """
        here = threading.get_ident()
        if self.forward is None:
            self._check_reported()
        elif self.awaiting is not None or len(lengths()) > 1:
            raise RuntimeError(
                "the last forward pass with this cache was interrupted, by an exception or a key, and some layers "
                "hold tokens that others do not: call reset() on it, or make a new one, and read the prompt again"
                if self.forward == here
                else "a forward pass with this cache has begun in another thread and has not ended. A cache serves one "
                "call at a time: make one for each thread; if that pass was interrupted, call reset() on the cache"
            )
        self.forward = here

    def end_forward(self) -> None:
        """Note that the model has run; RuntimeError if attention is not what refreekv takes it for."""
        self._check_reported()
        self._check_proofs()
        self.forward, self.mask_given = None, False

    def check_reported(self, layer: int) -> None:
        """Raise RuntimeError if what is stored next could not be pruned; asked by each layer before it stores."""
        self.refresh()
        model = None if self.model is None else self.model()
        if model is not None and ATTACHMENT not in vars(model):
            raise RuntimeError(
                f"this cache was made in a refreekv.compress block that was left, and the {type(model).__name__} now "
                "computes attention as if there were no refreekv: use the cache inside of the block or of another one "
                "on the same model, or make a refreekv.ReFreeKVCache, which needs no block"
            )
        self._check_reported()
        if self.proofs and layer <= self.proofs[0].layer:
            self._check_proofs()  # of a forward that nobody looks after

    def check_scores(self, length: int) -> None:
        """Raise RuntimeError if the policy misses its copy scores: nothing came by that could measure them."""
        if self.lacks_scores(length):
            raise RuntimeError(
                f"policy {self.policy.name!r} needs copy scores, which are measured when the model that the cache was "
                "made for is called; a module inside it was called in its place. Call the model itself, or make the "
                "cache for the module that you call"
            )

    def _check_proofs(self) -> None:
        proofs, self.proofs = self.proofs, []
        for proof in proofs:
            proof.check()

    def _check_reported(self) -> None:
        if self.awaiting is None:
            return
        model = None if self.model is None else self.model()
        name = "its model" if model is None else f"the {type(model).__name__} that it was made for"
        if self.forward is None:
            raise RuntimeError(
                f"something else than {name} has stored keys in layer {self.awaiting.index} of this cache: another "
                "model, or a call of update() itself. refreekv cannot follow what is done with them; make one cache "
                "for each model, and call reset() on this one"
            )
        raise RuntimeError(missing(self.awaiting))


def on_stack(frame: int) -> bool:
    """Whether a function has not returned yet, asked from inside of it or from elsewhere.

    ``frame`` is the ``id`` of its frame, as the frame itself would keep all its variables alive.
    """
    at = sys._getframe(1)
    while at is not None:
        if id(at) == frame:
            return True
        at = at.f_back  # type: ignore[assignment]
    return False
