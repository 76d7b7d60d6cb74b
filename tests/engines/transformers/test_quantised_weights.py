"""Models with weights in few bits: fused modules leave them alone, captured steps run, changes are noticed."""

import logging

import pytest
import torch

import refreekv
from helpers.equivalence import same_steps
from helpers.models import build, prompts
from helpers.quantised import LIBRARIES, MADE_UP, quantise
from refreekv.engines.transformers import fingerprint, fusion, model_constants

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = {**{name: make for name, (make, _) in MADE_UP.items()}, **LIBRARIES}


def quantised(kind, dtype=torch.float16, **changes):
    model = build("llama", attention="sdpa", hidden_size=128, intermediate_size=256, **changes).to(WHERE, dtype)
    assert quantise(model, ALL[kind]) == 4 * 7
    return model


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "bitsandbytes-nf4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_fused_modules_leave_quantised_layers_alone(kind, rows):
    pytest.importorskip("triton")
    model = quantised(kind)
    ids = prompts((1,) * rows, seed=4)[0].to(WHERE)
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, rows) as count:
            layers = [m for name, m in model.named_modules() if name.endswith("_proj")]
            assert len(layers) == 4 * 7
            assert not any("forward" in vars(layer) for layer in layers)
            if kind in MADE_UP:
                counted = MADE_UP[kind][1]
                counted.calls = 0
                model(ids)
                # torch may look at such a weight more than once in one product.
                assert counted.calls >= 28 if kind == "disguised" else counted.calls == 28
            after = model(ids).logits
    # What is around them is fused: norms, rotary embeddings, gated activations, and the output layer.
    assert count >= 2 * 4 + 1 + 4 + 4 + (rows == 1)
    assert (after - before).norm() <= 2e-2 * before.norm()


@pytest.mark.parametrize("kind", ALL)
def test_captured_steps_give_what_the_plain_cache_gives(kind, steps, caplog):
    model = quantised(kind, torch.float32 if kind in MADE_UP else torch.float16)
    ids, mask = (part.to(WHERE) for part in prompts((60,), seed=3))
    outcome = []
    with caplog.at_level(logging.WARNING, "refreekv"):
        for arena in (False, True):
            decode = "graph" if arena else "eager"
            cache = refreekv.ReFreeKVCache(model, "snapkv", ratio=0.5, window=8, decode=decode)
            cache.state.arena = arena
            outcome.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=12,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
    assert steps == {"made": 1, "run": 11}
    assert not [record for record in caplog.records if "without a CUDA graph" in record.message]
    made_up = kind in MADE_UP  # and in 32 bits
    assert same_steps(*outcome, 60, 1e-3 if made_up else 3e-2) == 12 or not made_up


# -- what is noticed -------------------------------------------------------------------------------


def of_file(kind):
    model = quantised(kind)
    model.config._name_or_path = "somewhere"
    return model


def prints(model):
    return fingerprint.of_addresses(model), fingerprint.of_contents(model), model_constants.key_of(model)


def scale_nf4(layer):
    """The same codes, all weights twice as large."""
    layer.weight.quant_state.offset.mul_(2)
    layer.weight.quant_state.state2.absmax.mul_(2)


def scale_int8(layer):
    layer.weight.tensor_impl.scale.mul_(2) if hasattr(layer.weight, "tensor_impl") else layer.weight.scale.mul_(2)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bitsandbytes-nf4", scale_nf4),
        ("torchao-int8", scale_int8),
        ("blocks", lambda layer: layer.scales.mul_(2)),
        ("blocks", lambda layer: layer.weight.add_(1)),
        ("disguised", lambda layer: layer.weight.scale.mul_(2)),
        ("disguised", lambda layer: layer.weight.codes.add_(1)),
    ],
)
def test_weights_that_change_where_they_are_are_other_contents(kind, change):
    model = of_file(kind)
    with torch.no_grad():
        model(prompts((4,))[0].to(WHERE))
        before = prints(model)
        assert prints(model) == before
        change(model.model.layers[2].mlp.up_proj)
        after = prints(model)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[2] not in (before[2], None)


def test_scales_of_8_bits_stay_the_same_when_they_move_to_their_module():
    """Bitsandbytes takes them from the weight at the first use."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer = layer.to("cpu")
    (scales,) = fingerprint.scales(vars(layer))
    before = fingerprint.of_addresses(layer), fingerprint.of_contents(layer)
    layer(torch.randn(1, 64))
    assert layer.weight.SCB is None
    assert fingerprint.scales(vars(layer))[0] is scales
    assert (fingerprint.of_addresses(layer), fingerprint.of_contents(layer)) == before
    scales.mul_(2)
    assert fingerprint.of_contents(layer) != before[1]


def test_columns_of_bytes_have_few_sums():
    """One a byte would need eight times the memory of the weights."""
    column = torch.randint(0, 256, (100_003, 1), dtype=torch.uint8)
    sums = model_constants._row_sums(column)
    assert len(sums) == 100_003 // model_constants.ROW + 1
    other = column.clone()
    for place in (0, 50_000, 100_002):
        other[place] += 1
        assert not torch.equal(model_constants._row_sums(other), sums)
        other[place] -= 1
    assert torch.equal(model_constants._row_sums(other), sums)
