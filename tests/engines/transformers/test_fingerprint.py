"""What a captured graph and measured scores must notice about a model's weights, and what not."""

import copy

import pytest
import torch

from helpers.models import build
from refreekv.engines.transformers import fingerprint


def train(model):
    model(torch.arange(8)[None]).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def replace(model):
    old = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(old.detach().clone())


def assign(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def move(model):
    """As a move to another device does it: the parameter stays, its memory does not."""
    weight = model.model.layers[3].self_attn.q_proj.weight
    weight.data = weight.data.clone()


def convert(model):
    model.to(torch.bfloat16)


def convert_in_place(model):
    """Numbers of another format at the old address."""
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().view(torch.int32), requires_grad=False)


def rotate(model):
    """New rotary frequencies, as some models compute for long prompts."""
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def run(model):
    with torch.no_grad():
        model(torch.arange(8)[None])


@pytest.mark.parametrize(
    ("change", "addresses", "contents"),
    [
        (train, False, True),
        (load, False, True),
        (replace, True, True),
        (assign, True, True),
        (move, True, True),
        (convert, True, True),
        (convert_in_place, True, True),
        (rotate, True, False),
        (run, False, False),
    ],
)
def test_changes_of_weights(change, addresses, contents):
    model = build("llama")
    before = fingerprint.of_addresses(model), fingerprint.of_contents(model)
    kept = list(model.parameters())  # so that no address is given to somebody else
    change(model)
    assert (fingerprint.of_addresses(model) != before[0]) is addresses
    assert (fingerprint.of_contents(model) != before[1]) is contents
    assert len(kept) > 10


def test_weights_made_in_inference_mode_have_no_versions():
    with torch.inference_mode():
        model = torch.nn.Linear(4, 4)
    before = fingerprint.of_contents(model)
    assert fingerprint.of_contents(model) == before
    replaced, model.weight = model.weight, torch.nn.Parameter(torch.zeros(4, 4))
    assert fingerprint.of_contents(model) != before
    assert replaced.is_inference()


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_that_are_replaced():
    """They have no address themselves, but their parts do."""
    quantization = pytest.importorskip("torchao.quantization")
    model, other = (torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    for each in (model, other):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    assert model[0].weight.data_ptr() == other[0].weight.data_ptr() == 0
    before = fingerprint.of_addresses(model), fingerprint.of_contents(model)
    assert (fingerprint.of_addresses(model), fingerprint.of_contents(model)) == before
    kept, model[0].weight = model[0].weight, other[0].weight
    assert kept is not model[0].weight
    assert fingerprint.of_addresses(model) != before[0]
    assert fingerprint.of_contents(model) != before[1]


@pytest.mark.parametrize(
    "change", [{"_active_adapter": ["b"]}, {"_disable_adapters": True}, {"merged_adapters": ["a"]}]
)
def test_adapters_that_are_switched(change):
    """By names, in layers as PEFT makes them; weights stay where they are and what they are."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    vars(model[0]).update(_active_adapter=["a"], _disable_adapters=False, merged_adapters=[])
    before = fingerprint.of_addresses(model), fingerprint.of_contents(model)
    vars(model[0]).update(change)
    assert fingerprint.of_addresses(model) != before[0]
    assert fingerprint.of_contents(model) != before[1]


def test_a_copy_of_a_model_is_another_one():
    model = build("llama")
    assert fingerprint.of_addresses(copy.deepcopy(model)) != fingerprint.of_addresses(model)
