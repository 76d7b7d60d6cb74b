"""Fused kernels in models that are not quite what they seem: residual sums with the norms behind them, rotation."""

import functools

import pytest
import torch
from torch import nn

from helpers.models import build, prompts
from refreekv.engines.transformers import fusion

pytest.importorskip("triton")
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


class Layers(nn.ModuleList):
    """A model's layers, run in another order or with something between them."""

    def __init__(self, layers, order, between=None):
        super().__init__(layers)
        self.order, self.between = order, between

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return [functools.partial(self.run, super(Layers, self).__getitem__(number)) for number in self.order]

    def run(self, layer, hidden_states, **kwargs):
        hidden_states = layer(hidden_states, **kwargs)
        if self.between is not None:
            self.between(hidden_states)
        return hidden_states


@pytest.fixture
def llama():
    """Four layers, each with norms of its own."""
    model = build("llama", attention="sdpa").to(WHERE).half()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def judged(model, *, whole):
    """Compare a model with itself while it is fused; ``whole``: whether its layers are."""
    ids = prompts((1,), seed=4)[0].to(WHERE)
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, 1):
            assert all(("forward" in vars(layer)) is whole for layer in model.model.layers)
            after = model(ids).logits
    assert (after - before).norm() <= 1e-2 * before.norm()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (0, 0, 1, 3)])
def test_a_sum_is_normalised_by_the_layer_that_comes_next(order, llama):
    llama.model.layers = Layers(list(llama.model.layers), order)
    judged(llama, whole=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_sum_that_was_written_into_is_normalised_anew(mode, llama):
    llama.model.layers = Layers(list(llama.model.layers), range(4), lambda sums: sums[..., ::2].mul_(3))
    with mode():
        judged(llama, whole=True)


def test_a_layer_with_numbers_of_its_own_keeps_its_code(llama, monkeypatch):
    """They may be ones now, and something else later."""
    kind = type(llama.model.layers[0])
    own = kind.forward

    @functools.wraps(own)
    def scaled(layer, hidden_states, *args, **kwargs):
        return own(layer, hidden_states, *args, **kwargs) * layer.scale

    monkeypatch.setattr(kind, "forward", scaled)
    for layer in llama.model.layers:
        layer.register_buffer("scale", torch.ones(1, dtype=torch.half, device=WHERE))
    judged(llama, whole=False)


@pytest.mark.parametrize("name", ["mlp", "self_attn"])
def test_a_layer_that_asks_for_the_class_of_a_part_keeps_its_code(name, llama, monkeypatch):
    """As ERNIE 4.5 VL asks whether its MLP has experts."""
    kind, part = type(llama.model.layers[0]), type(getattr(llama.model.layers[0], name))
    own = kind.forward

    @functools.wraps(own)
    def asking(layer, hidden_states, *args, **kwargs):
        out = own(layer, hidden_states, *args, **kwargs)
        return 2 * out if isinstance(getattr(layer, name), part) else out

    monkeypatch.setattr(kind, "forward", asking)
    judged(llama, whole=False)


def test_a_layer_that_runs_attention_twice_keeps_its_code(llama, monkeypatch):
    kind = type(llama.model.layers[0])
    own = kind.forward

    @functools.wraps(own)
    def twice(layer, hidden_states, *args, **kwargs):
        own(layer, hidden_states, *args, **kwargs)
        return own(layer, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", twice)
    judged(llama, whole=False)


def apply_rotary_pos_emb(q, k=None, cos=None, sin=None):
    """As Qwen4's: of queries alone, too."""
    cos, sin = cos[:, None], sin[:, None]
    turned = [x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k) if x is not None]
    return turned[0] if k is None else tuple(turned)


class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, cos=cos, sin=sin), *apply_rotary_pos_emb(q, k, cos, sin)


def test_a_rotation_that_is_called_in_another_way_is_the_model_s():
    module, like = Attention(), torch.zeros(1, device=WHERE)
    assert fusion._rotary_is_standard(module, like)
    q, k, angle = (torch.randn(*shape, device=WHERE) for shape in ((2, 4, 1, 32), (2, 2, 1, 32), (2, 1, 32)))
    want = module(q, k, angle.cos(), angle.sin())
    for got, part in zip(fusion._rotary(module)[module](q, k, angle.cos(), angle.sin()), want, strict=True):
        torch.testing.assert_close(got, part, atol=1e-5, rtol=1e-5)
