"""What comes into a layer: checked, then stored as it is, or coded while the prompt's other chunks are to come."""

import logging
from typing import Any

import torch
from torch import Tensor

from refreekv.core.autocast import without_autocast
from refreekv.core.quantisation import CODED_TYPES, KVDtype, Ladder
from refreekv.engines.transformers.handout import hand_out
from refreekv.engines.transformers.prompt import PromptState
from refreekv.engines.transformers.reading import LEAST_CHUNK, Reading
from refreekv.engines.transformers.stored_layer import StoredLayer
from refreekv.policies.joint import JointPolicy
from refreekv.storage import trial
from refreekv.storage.coding import Pair
from refreekv.storage.hosted import HostedPrompts
from refreekv.storage.made_up import MadeUpEntries
from refreekv.storage.past import Past
from refreekv.storage.unfinished import UnfinishedKV

_log = logging.getLogger("refreekv")


class IntakeLayer(StoredLayer):
    """A layer that takes in what the model computes.

    Attributes
    ----------
    ladder : Ladder or None
        The number formats that what is kept is stored in; None: in the precision it came in.
    is_decoded_for_call : bool
        Whether the present call reads a copy of what is coded otherwise.
    """

    def __init__(self, index: int, ordinal: int, state: PromptState, ladder: Ladder | None = None):
        super().__init__(index, ordinal, state)
        self.ladder = ladder

    def _clear(self) -> None:
        super()._clear()
        self.is_decoded_for_call = False
        self._appended = 0
        # Whether a decision about the entries waits until the host need not wait for it.
        self._undecided = False
        # The prompt as it was coded while it was read, until what is kept was moved.
        self._read: UnfinishedKV | None = None
        # The same with what came before, until all of it is kept elsewhere.
        self._whole: Reading | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the geometry of the first entries."""
        super().lazy_initialization(key_states, value_states)
        if self.values is not None:  # older transformers give them the keys' type
            self.values = self.values.to(value_states.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new entries ``[B, H_kv, q, D]`` and return what attention is to read.

        Dense: all keys and values. Ragged: the new ones only, as the rest has no common
        shape; the attention function reads the storage itself.

        Raises
        ------
        ValueError
            No new tokens, or another batch size or geometry than what is stored.
        RuntimeError
            Gradients, or attention that bypasses refreekv.
        """
        if key_states.shape[-2] == 0:
            raise ValueError("empty prompt: the model was called with no new tokens, so there is nothing to cache")
        if key_states.requires_grad or value_states.requires_grad:
            raise RuntimeError(
                "refreekv prunes the cache at inference only, and these keys and values carry gradients: "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
        self.state.check_reported(self.index)
        if self.state.verification is not None:
            self.state.verification.check_done(self)
        if self._undecided:
            self.state.finish()
        self._check_geometry(key_states, value_states)
        self._appended = key_states.shape[-2]
        self._length += self._appended
        with without_autocast(key_states.device):
            if self.state.past is not None:
                self._come_back(self.state.past, key_states, value_states)
            self.is_decoded_for_call = self._is_read_on(key_states, value_states)
            if self.is_decoded_for_call:
                key_states, value_states = self._read_on(key_states, value_states)
            elif self.ragged is None:
                key_states, value_states = super().update(key_states, value_states)
            else:
                self._store(self.ragged.append(key_states, value_states))
        self.state.awaiting = hand_out(self, key_states, value_states, self.index)
        return key_states, value_states

    def _come_back(self, past: Past, keys: Tensor, values: Tensor) -> None:
        """Bring back what is kept elsewhere, before new entries are stored."""
        raise NotImplementedError

    def _check_geometry(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.index} brings keys {list(keys.shape)} and values {list(values.shape)}: one value belongs "
                "to each key, in each row and KV head"
            )
        if self._length == 0:
            sizes = keys.shape[3], values.shape[3]
            # Nobody asked for codes; who asks for them in host memory did.
            takes = {keys.dtype, values.dtype} <= CODED_TYPES and not any(size % 16 for size in sizes)
            if self.ladder is not None and (takes or not self.state.codes_optional or self.state.host is not None):
                self.ladder.forms(sizes)
                if not takes:
                    raise ValueError(
                        f"kv_dtype {self.ladder} codes float16, bfloat16 and float32, and this model's keys are in "
                        f"{keys.dtype} and its values in {values.dtype}; leave kv_dtype out"
                    )
                self._try_codes(keys, values)
            else:
                self.ladder = None
            return
        stored = (self.batch, self.kv_heads, *self.sizes)
        brought = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        if brought != stored:
            raise ValueError(
                f"layer {self.index} of this cache holds (batch, KV heads, key size, value size) = {stored} and the "
                f"model brings {brought}: the cache belongs to another batch or another model"
            )

    def _try_codes(self, keys: Tensor, values: Tensor) -> None:
        """Go without codes, or refuse, if a GPU's kernels for them are wrong."""
        assert self.ladder is not None
        if not trial.due(keys.device):
            return
        wrong = self._fault(keys, values, self.ladder)
        if wrong is None:
            return
        said = f"K/V cannot be coded on {keys.device}: {wrong}"
        if not self.state.codes_optional:
            raise RuntimeError(f"{said}; leave kv_dtype out, or pass kv_dtype=None")
        if self.ordinal == 0:
            _log.warning("%s; they stay in the model's precision", said)
        self.ladder = None

    def _fault(self, keys: Tensor, values: Tensor, ladder: Ladder, *, attends: bool = True) -> str | None:
        """What is wrong with entries like these, coded on their device; one trial serves all layers that are alike."""
        sizes, codes = (keys.shape[3], values.shape[3]), self.state.codes_of(0)
        if codes is not None and codes.order.shape != (keys.shape[1], keys.shape[3]):
            codes = self.state.codes_of(self.ordinal)
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return trial.fault(MadeUpEntries(keys.device, dtype, keys.shape[1], sizes, ladder, codes, attends))

    # -- a prompt in chunks ----------------------------------------------------------------

    def _is_read_on(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these belong to a prompt that is coded as it is read, of which they may be the first chunk."""
        if self.reading is None and self.state.continues(self._length) and self._is_worth_coding():
            number = Reading.form_for(self.state.prompt_dtype, (keys, values), self.state.held_as)
            if number is not None and not Reading.codes_anyway(self.ragged, number):
                if not self.is_initialized:
                    self.lazy_initialization(keys, values)
                start, end = self._length - self._appended, self.state.end
                assert end is not None
                earlier = self.ragged or (self.dense if start else None)
                codes, host = self.state.codes_of(self.ordinal), self._host_for((keys, values), start, end, number)
                self.reading = Reading(number, start, end, earlier, (keys, values), codes, host)
        return self.reading is not None

    def _host_for(self, like: Pair, start: int, end: int, number: KVDtype) -> tuple[HostedPrompts, int] | None:
        """Where in host memory a prompt's codes go; None: they stay on the device."""
        host = self.state.host
        if host is not None and self.ordinal == 0:
            host.begin(like, self.state.layers, end - start, number, start)
        return None if host is None else host.place(self.ordinal)

    def _is_worth_coding(self) -> bool:
        """Whether the present chunk is long enough, where nobody has asked: each decodes all that was read before."""
        return not isinstance(self.state.prompt_dtype, str) or self._appended >= LEAST_CHUNK

    def _read_on(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a chunk; what attention is to read, as in `update`."""
        assert self.reading is not None
        # A policy that looks at all layers before it decides leaves this one's prompt coded until then.
        joint = isinstance(self.state.policy, JointPolicy) and not self.state.policy.freezes(self.ordinal)
        last = not joint and not self.state.continues(self._length)
        # The layer before this one is compacted first, so that never two are there in full. The device has that
        # layer's other half to compute while the host waits for the numbers.
        self.state.finish()
        self._take_over(self.reading.whole_with(keys, values, last=last, ends=last and self._length == self.state.end))
        if last:
            self._read = self._lines_of(self.reading)
            self._whole, self.reading = None if self.state.past is None else self.reading, None
        return (keys, values) if self.ragged is not None else self.dense

    def _put_away(self, *, code: bool = True) -> None:
        """Code what was read, after its attention, and let go of copies in full precision."""
        assert self.reading is not None
        storage = self.reading.put_away(self._padding.real_since(self.reading.start), code=code)
        if storage is None:
            # Nothing, and not None: models look at what an initialised layer holds (Llama-3.2-Vision).
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        else:
            self._store(storage)

    def _lines_of(self, reading: Reading) -> UnfinishedKV | None:
        """The prompt as it was coded while it was read, if what is kept of it may be stored in those very lines."""
        prompt = reading.prompt
        if self.ladder is None or self.ragged is not None or reading.earlier is not None or not prompt.coded:
            return None
        codes = self.state.codes_of(self.ordinal)
        if prompt.codes is not codes:  # kept by a process whose model has others
            return None
        forms = self.ladder.forms(prompt.sizes, sorted_keys=codes is not None)
        return prompt if prompt.form in forms else None
