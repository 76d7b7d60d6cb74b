"""What pruning a layer asks of the host: operators, copies to the device, and no wait for it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import refreekv
from helpers.models import build, prompts
from refreekv import ReFreeKVCache, kernels
from refreekv.core.selection import Selection
from refreekv.engines.transformers import layer
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.pruning import decide
from refreekv.storage import arena, leveled, runs

FREE = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten",
    "lift_fresh", "new_empty", "permute", "promote_types", "reshape", "resolve_conj", "resolve_neg", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip
"""Operators that launch nothing on a GPU."""

LENGTH = 700


class Cost(TorchDispatchMode):
    """Counts operators that launch something; kernels that have a twin in plain torch are one each."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.copies = 0
        self.inside = 0
        self.on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # Tensors of a list are made on the host, and on their way to the device by then.
        if not self.inside and name not in FREE:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))

    def kernel(self, function, launches, changed=lambda found: found):
        """The function, whose twin in plain torch counts as so many launches."""

        def counted(*args, **kwargs):
            self.launches[f"kernels.{function.__name__}"] += launches * self.on
            self.inside += 1
            try:
                return changed(function(*args, **kwargs))
            finally:
                self.inside -= 1

        return counted

    def copy(self, function):
        """The function, which is a copy from the host to the device on a GPU."""

        def counted(*args, **kwargs):
            self.copies += self.on
            return function(*args, **kwargs)

        return counted


def in_all_rungs(selection):
    """The selection, with a quarter of the entries in each of four rungs."""
    if not isinstance(selection, Selection) or selection.levels is None:
        return selection
    rungs = (torch.arange(selection.levels.shape[-1]) % 4).to(torch.uint8)
    return replace(selection, levels=rungs.expand_as(selection.levels))


@pytest.fixture
def cost(monkeypatch):
    """Counts while a layer is pruned, the third of the model."""
    found = Cost()
    for module, name, launches in (
        (decide, "both_reductions", 5), (decide, "kept_first", 1), (decide, "leveled", 1), (layer, "centres", 2),
        (kernels, "needed", 3), (kernels, "mapped_means", 1), (kernels, "gather", 1), (kernels, "pack_rungs", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, found.kernel(getattr(module, name), launches))
    for module, name in ((arena, "on_device"), (leveled, "on_device"), (runs, "spread")):
        monkeypatch.setattr(module, name, found.copy(getattr(module, name)))
    chosen = decide.select
    monkeypatch.setattr(decide, "select", lambda *args: in_all_rungs(chosen(*args)))
    prune = ReFreeKVLayer.after_attention

    def counted(own, call):
        if own.index != 2:
            prune(own, call)
            return
        found.on = True
        with found:
            prune(own, call)
        found.on = False

    monkeypatch.setattr(ReFreeKVLayer, "after_attention", counted)
    return found


def model_of(size: int = 32) -> PreTrainedModel:
    return build("llama", attention="sdpa", head_dim=size, max_position_embeddings=2 * LENGTH)


def read(model, policy, ids, arena=None, **arguments):
    """The cache of a prompt that was read."""
    cache = ReFreeKVCache(model, policy)
    cache.state.arena = arena
    model(input_ids=ids, use_cache=True, past_key_values=cache, **arguments)
    return cache


@pytest.mark.parametrize(
    ("policy", "launches", "copies"), [("adaptive", 30, 2), ("snapkv:ratio=0.5", 66, 2)], ids=["adaptive", "snapkv"]
)
def test_a_layer_costs_the_host_no_more_than_this(cost, policy, launches, copies):
    """Launches take the host about 10 microseconds each; over 300 of them once took longer than an 8B layer."""
    model = model_of()
    ids, _ = prompts((LENGTH,))
    with torch.inference_mode(), refreekv.compress(model, policy):
        read(model, policy, ids, arena=True)  # by the second prompt all that belongs to the model is known
        cost.launches.clear()
        cost.copies = 0
        read(model, policy, ids, arena=True)
    assert cost.launches["kernels.gather"] == 1
    assert cost.launches["kernels.pack_rungs"] == (policy == "adaptive")
    assert launches / 2 < cost.launches.total() <= launches, cost.launches
    assert 1 < cost.copies <= copies


class NoWaits:
    """Makes waiting for the device an error while a layer is pruned, once ``on``."""

    on = False

    def around(self, prune):
        """The pruning step, watched."""

        def watched(layer, call):
            torch.cuda.set_sync_debug_mode("error" if self.on else "default")
            try:
                return prune(layer, call)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return watched


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 620)], ids=["alone", "padded"])
@pytest.mark.parametrize("policy", ["adaptive", "adaptive:bits=16", "adaptive:constant=0.02", "snapkv:ratio=0.5"])
def test_no_layer_waits_for_the_device(monkeypatch, policy, lengths):
    watch = NoWaits()
    monkeypatch.setattr(ReFreeKVLayer, "after_attention", watch.around(ReFreeKVLayer.after_attention))
    model = model_of().to("cuda", torch.bfloat16)
    ids, mask = (part.to("cuda") for part in prompts(lengths))
    arguments = {} if len(lengths) == 1 else {"attention_mask": mask}
    with torch.inference_mode(), refreekv.compress(model, policy):
        read(model, policy, ids, **arguments)  # kernels are compiled, and what belongs to the model is measured
        watch.on = True
        cache = read(model, policy, ids, **arguments)
    assert all(layer.ragged is not None for layer in cache.pruned_layers)
    with pytest.raises(RuntimeError, match="synchronizing"):
        watch.around(lambda layer, call: ids.sum().item())(None, None)
