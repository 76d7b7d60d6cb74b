"""What is measured once a model, as a cache is given it: codes for its keys, and copy scores.

Whether a model is still what they were measured on takes the host as long as many launches (`fingerprint`), and before
a prompt's first layer the device has nothing to do. So it is asked behind the second layer's attention, when the device
has most of the first one to compute. If the model turns out to be another, everything is measured anew and the call is
made once more.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreekv.engines.transformers import copy_scores, fingerprint, key_codes
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.engines.transformers.prompt import OutdatedError


def asks_later(device: torch.device) -> bool:
    """Whether the host runs ahead of a device, so that there is something to do meanwhile."""
    return device.type == "cuda"


def give_constants(model: PreTrainedModel, cache: PrunedCache, tokens: Tensor, *, may_repeat: bool) -> None:
    """Give a cache that reads ``tokens`` what its policy and its codes need of the model.

    ``may_repeat`` says that the model's call can be made once more, should it have changed.
    """
    state, length = cache.state, cache.get_seq_length()
    lacks_scores = state.lacks_scores(length + tokens.shape[1])
    weights = None
    if state.codes_wanted:
        state.codes_wanted = False
        if may_repeat and length == 0 and asks_later(tokens.device) and _at_hand(model, cache, scores=lacks_scores):
            return
        # Asked once for codes and scores: the device waits meanwhile. A pass that measures may change it.
        asked = fingerprint.of_contents(model)
        weights = asked if key_codes.are_known(model, asked) else None
        state.key_codes = key_codes.key_codes(model, asked)
    if lacks_scores:
        state.copy_scores = copy_scores.copy_scores(model, weights)


def _at_hand(model: PreTrainedModel, cache: PrunedCache, *, scores: bool) -> bool:
    """Give what was measured last, to be confirmed, if everything was, and if the cache can begin anew."""
    codes, own = key_codes.at_hand(model), copy_scores.at_hand(model) if scores else None
    if codes is None or (scores and (own is None or own[0] != codes[0])):
        return False
    # Layers of other kinds do not forget all of a prompt.
    plain = len(cache.pruned_layers) == len(cache.layers) and cache.state.verification is None
    if not plain or not cache.made_for(model):
        return False
    cache.state.key_codes = codes[1]
    if own is not None:
        cache.state.copy_scores = own[1]

    def confirm() -> None:
        if fingerprint.of_contents(model) != codes[0]:
            raise OutdatedError(model)

    cache.state.unconfirmed = confirm
    return True


def settle(model: PreTrainedModel, cache: PrunedCache) -> None:
    """Confirm what no layer confirmed, of a model that has run; RuntimeError if it is another by now."""
    try:
        cache.state.confirm()
    except OutdatedError:
        key_codes.forget(model)
        cache.state.forget_constants()
        raise RuntimeError(
            f"the weights of the {type(model).__name__} were changed since refreekv measured them, and it ran fewer "
            "layers than then: call reset() on this cache, or make a new one, and read the prompt again"
        ) from None


def measure_again(model: PreTrainedModel, cache: PrunedCache) -> None:
    """Make a cache ready for the same call, with what is measured on the model as it is."""
    state, mask_given, scored = cache.state, cache.state.mask_given, cache.state.copy_scores is not None
    cache.reset()
    state.forget_constants()  # should measuring fail
    codes = key_codes.key_codes(model)
    if scored:
        state.copy_scores = copy_scores.copy_scores(model)
    state.key_codes, state.codes_wanted = codes, False
    cache.begin_forward(mask_given=mask_given)
