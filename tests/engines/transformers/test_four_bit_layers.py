"""Linear layers of 4 bits: which ones are recognised, and what captured steps run in their place."""

import pytest
import torch
from torch import nn

from helpers.four_bits import NF4, FourBitLinear
from helpers.models import build, prompts
from helpers.quantised import quantise
from refreekv.core.four_bits import unpacked
from refreekv.engines.transformers import four_bits, fusion

WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_what_bitsandbytes_holds_is_read_as_it_reads_it(kind, nested, block):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256, device=WHERE)
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    layer = nn.Linear(256, 96, bias=False, device="meta")
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight.quant_state = state
    found = four_bits.held(layer)
    assert (found.nested is not None) == nested
    want = functional.dequantize_4bit(codes, state).double()
    assert (unpacked(found, torch.float64) - want).norm() <= 1e-6 * want.norm()
    assert found.codes.data_ptr() == codes.data_ptr()


def changed(name, value):
    def change(layer):
        setattr(layer.weight.quant_state, name, value(getattr(layer.weight.quant_state, name)))

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("packing_format_for_cpu", lambda _: True),
        changed("shape", lambda shape: shape[::-1]),
        changed("shape", lambda shape: None),
        changed("code", lambda code: code[:8]),
        changed("code", lambda code: code.half()),
        changed("absmax", lambda absmax: absmax[:-1]),
        changed("absmax", lambda absmax: absmax.double()),
        changed("blocksize", lambda _: 16),
        lambda layer: setattr(layer.weight, "quant_state", None),
        lambda layer: setattr(layer.weight, "quant_state", "nf4"),
        lambda layer: setattr(layer.weight.quant_state.state2, "blocksize", 128),
        lambda layer: setattr(layer.weight.quant_state.state2, "code", torch.zeros(16)),
    ],
)
def test_what_is_not_quite_that_is_left_alone(change):
    layer = FourBitLinear(nn.Linear(128, 64), nested=True)
    assert four_bits.held(layer) is not None
    change(layer)
    assert four_bits.held(layer) is None


def quantised(**options):
    model = build("llama", attention="sdpa", hidden_size=128, intermediate_size=256).to(torch.float16)
    assert quantise(model, lambda linear: FourBitLinear(linear, **options)) == 4 * 7
    return model.to(WHERE)


def moved(model):
    """States follow their module, as the library's do."""
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            state = layer.weight.quant_state
            for part in (state, state.state2):
                for name, value in vars(part).items() if part is not None else ():
                    if isinstance(value, torch.Tensor):
                        setattr(part, name, value.to(WHERE))
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_few_rows_run_our_products(nested, rows):
    pytest.importorskip("triton")
    model = moved(quantised(nested=nested))
    ids = prompts((1,) * rows, seed=4)[0].to(WHERE)
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, rows):
            FourBitLinear.calls = 0
            after = model(ids).logits
            assert FourBitLinear.calls == (28 if rows == 5 else 0)
            longer = model(ids.repeat(1, 3))  # not what was captured for
            assert longer.logits.shape[1] == 3
        assert not any("forward" in vars(module) for module in model.modules())
    assert (after - before).norm() <= 1e-2 * before.norm()


def test_layers_that_compute_something_else_are_left_alone():
    pytest.importorskip("triton")

    class Doubled(FourBitLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("llama", attention="sdpa", hidden_size=128, intermediate_size=256).to(torch.float16)
    quantise(model, Doubled)
    model = moved(model.to(WHERE))
    with torch.no_grad(), fusion.fused(model, 1):
        assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, Doubled))


def test_projections_of_different_kinds_are_products_of_their_own():
    pytest.importorskip("triton")
    model = moved(quantised())
    attention = model.model.layers[1].self_attn
    attention.k_proj = FourBitLinear(nn.Linear(128, attention.k_proj.out_features, bias=False).half(), book=-NF4)
    moved(model.to(WHERE))
    ids = prompts((1,), seed=4)[0].to(WHERE)
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, 1):
            after = model(ids).logits
    assert (after - before).norm() <= 1e-2 * before.norm()


def test_biases_of_different_types_are_added_in_launches_of_their_own(monkeypatch):
    """bitsandbytes makes a bias the input's type when the layer first computes: some may have, others not."""
    pytest.importorskip("triton")
    from refreekv.kernels import four_bits as kernels

    class Converting(FourBitLinear):
        def forward(self, x):
            self.bias = None if self.bias is None else nn.Parameter(self.bias.to(x.dtype), requires_grad=False)
            return super().forward(x)

    model = build("llama", attention="sdpa", hidden_size=128, intermediate_size=256, attention_bias=True)
    quantise(model.to(torch.float16), Converting)
    model = moved(model.to(WHERE))
    for layer in model.model.layers[1:]:
        layer.self_attn.q_proj.bias.data = layer.self_attn.q_proj.bias.data.float()
    launched, linears = [], kernels.linears

    def watched(x, weights, biases, *rest):
        launched.append({None if bias is None else bias.dtype for bias in biases})
        return linears(x, weights, biases, *rest)

    monkeypatch.setattr(kernels, "linears", watched)
    ids = prompts((1,), seed=4)[0].to(WHERE)
    with torch.no_grad():
        with fusion.fused(model, 1):
            Converting.calls = 0
            after = model(ids).logits
            assert Converting.calls == 0
        assert max(map(len, launched)) == 1
        assert {torch.float32} in launched
        before = model(ids).logits
    assert (after - before).norm() <= 1e-2 * before.norm()
