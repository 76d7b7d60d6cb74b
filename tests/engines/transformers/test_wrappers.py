"""What is wrapped around a model is followed to the model that runs, or refused."""

import pytest
import torch
from torch import nn
from transformers import LlamaModel, MambaConfig, MambaForCausalLM

import refreekv
from helpers.driving import generate, state_of
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers.finding import decoder_of

WINDOW = {"policy": "streaming-llm", "size": 20}


class Plain(nn.Module):
    """A module of one's own, two of them deep."""

    def __init__(self, model):
        super().__init__()
        self.inside = nn.ModuleDict({"model": model})
        self.config = getattr(model, "config", None)
        self.head = nn.Linear(2, 2)

    def forward(self, *args, **kwargs):
        return self.inside["model"](*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inside["model"].generate(*args, **kwargs)


class PastTheHooks(Plain):
    """One that calls forward itself, as older versions of PEFT do."""

    def forward(self, *args, **kwargs):
        return self.inside["model"].forward(*args, **kwargs)


def _peft(model, **changes):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would not show
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def _accelerate(model):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


def _distributed(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "none": lambda model: model,
    "plain": Plain,
    "peft": _peft,
    "accelerate": _accelerate,
    "distributed": _distributed,
    "data-parallel-on-one-device": nn.DataParallel,
    "past-the-hooks": PastTheHooks,
    "peft-in-plain": lambda model: Plain(_peft(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request, model):
    if request.param == "distributed":
        request.getfixturevalue("process_group")
    return WRAPPERS[request.param](model)


@pytest.fixture(scope="module")
def long():
    return torch.randint(2, 120, (1, 600), generator=torch.Generator().manual_seed(0))


def outer_generate(wrapped):
    """As users call it: on the wrapper where that has it, on what it wraps where not."""
    return wrapped.generate if hasattr(wrapped, "generate") else wrapped.module.generate


def test_the_default_policy_has_its_copy_scores(wrapped, long):
    inner = decoder_of(wrapped)
    with refreekv.compress(inner) as kv:
        wanted = inner.generate(input_ids=long, max_new_tokens=4, do_sample=False), kv.report
    before = state_of(inner)
    with refreekv.compress(wrapped) as kv:
        got = outer_generate(wrapped)(input_ids=long, max_new_tokens=4, do_sample=False)
        assert torch.equal(got, wanted[0])
        assert kv.report == wanted[1]
    assert state_of(inner) == before
    cache = ReFreeKVCache(wrapped)
    got = outer_generate(wrapped)(input_ids=long, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, wanted[0])
    assert cache.report == wanted[1]
    assert "copying" in cache.report.prunable[1].rows[0].reasons
    del cache
    assert state_of(inner) == before


def test_calls_of_the_wrapper_itself(wrapped, ids):
    with torch.no_grad():
        with refreekv.compress(wrapped, **WINDOW) as kv:
            output = wrapped(ids)
            assert kv.report.budget == 20 / 50
            assert output.past_key_values is kv.cache
        cache = ReFreeKVCache(wrapped, **WINDOW)
        wrapped(ids, past_key_values=cache)
        assert cache.report.budget == 20 / 50


# -- refused ---------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)


class FullyShardedDataParallel(nn.Module):
    """By its name, which is all that is asked: the real one needs several processes to be of use."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def _parallel(model):
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    return wrapper


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Two(nn.Linear(2, 2)), "Two, which has none inside"),
        (lambda model: Two(model, build("llama", seed=1)), "several transformers models inside"),
        (_parallel, "DataParallel runs copies"),
        (FullyShardedDataParallel, "fully_shard"),
        (lambda model: Plain(_parallel(model)), "DataParallel runs copies"),
        (lambda model: lambda ids: model(ids), "expected a transformers model, got function"),
    ],
)
def test_wrappers_that_are_refused(model, make, message):
    thing, before = make(model), state_of(model)
    with pytest.raises(TypeError, match=message), refreekv.compress(thing):
        pass
    with pytest.raises(TypeError, match=message):
        ReFreeKVCache(thing)
    assert state_of(model) == before


def test_virtual_tokens_are_refused(model):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        with pytest.raises(TypeError, match=f"{type(config).__name__} puts virtual tokens"):
            ReFreeKVCache(peft.get_peft_model(model, config))


def test_the_one_that_generates_is_taken(model):
    """A language model beside an encoder that is a transformers model, too."""
    both = Two(LlamaModel(model.config), model)
    assert decoder_of(both) is model


def test_a_wrapped_model_that_cannot_be_pruned(ids):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="mamba has no full-attention layer"):
        ReFreeKVCache(Plain(mamba))


# -- several that share something ------------------------------------------------------------------


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_model_and_its_inner_model(model, ids, outer_first):
    before = state_of(model)
    with refreekv.compress(model, **WINDOW) as kv:
        wanted = generate(model, ids), kv.report
    parts = [model, model.model] if outer_first else [model.model, model]
    other = {"policy": "streaming-llm", "size": 30}
    settings = {id(model): WINDOW, id(model.model): other}
    with (
        refreekv.compress(parts[0], **settings[id(parts[0])]) as first,
        refreekv.compress(parts[1], **settings[id(parts[1])]) as second,
    ):
        outer, inner = (first, second) if outer_first else (second, first)
        assert torch.equal(generate(model, ids), wanted[0])
        assert outer.report == wanted[1]
        with torch.no_grad():
            model(ids)
            assert outer.report.tokens == 50
            assert inner.report.tokens == 0
            model.model(ids)
        assert inner.report.budget == 30 / 50
        assert outer.report.budget == 20 / 50
    assert state_of(model) == before


def test_the_inner_model_alone(model, ids):
    """Whoever calls the outer one is told which to compress."""
    with refreekv.compress(model.model, **WINDOW) as kv:
        with torch.no_grad():
            model.model(ids)
        assert kv.report.budget == 20 / 50
        with pytest.raises(TypeError, match="compress that one"):
            generate(model, ids)
    assert generate(model, ids).shape == (1, 56)
