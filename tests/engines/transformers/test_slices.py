"""Prompts over bitsandbytes' weights of 4 bits, unpacked some rows at a time, against the whole matrix."""

import pytest
import torch
from torch import nn

import refreekv
from helpers.models import build
from helpers.quantised import quantise
from refreekv.core import slices as rows_of
from refreekv.engines.transformers import slices
from refreekv.engines.transformers.attachment import Attachment, attached
from refreekv.engines.transformers.naming import cache_argument

bitsandbytes = pytest.importorskip("bitsandbytes")
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(count, size, *, kind="nf4", nested=False, block=64, bias=False, dtype=torch.bfloat16, compute=torch.bfloat16):
    """The library's layer of random weights."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        torch.randn(count, size, device=WHERE).to(dtype), blocksize=block, quant_type=kind, compress_statistics=nested
    )
    with torch.device("meta"):
        made = bitsandbytes.nn.Linear4bit(size, count, bias=bias, compute_dtype=compute, quant_type=kind)
    made.weight = bitsandbytes.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=block, compress_statistics=nested, quant_type=kind,
        module=made, bnb_quantized=True,
    )  # fmt: skip
    if bias:
        made.bias = nn.Parameter(torch.randn(count, device=WHERE).to(dtype), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # else its first call there puts codes in another order
    return made


@pytest.fixture
def few_rows(monkeypatch):
    """Slices of 64 rows, on any device and for any number of tokens."""
    monkeypatch.setattr(rows_of, "slice_rows", lambda size, tokens: 64)
    monkeypatch.setattr(slices, "_is_worth_it", lambda linear, x, coded: x.numel() > x.shape[-1])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_are_rows_of_the_matrix(kind, nested, block, dtype, few_rows, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit

    linear = layer(200, 384, kind=kind, nested=nested, block=block, dtype=dtype, compute=dtype)
    whole, seen = dequantize_4bit(linear.weight.data, linear.weight.quant_state), []

    def product(x, count, unpack, bias):
        seen.extend(unpack(start, min(start + 64, count)) for start in range(0, count, 64))
        return x.new_zeros(*x.shape[:-1], count)

    monkeypatch.setattr(rows_of, "product", product)
    slices.product(linear, torch.randn(3, 384, device=WHERE).to(dtype), slices.four_bits.held(linear))
    assert [len(part) for part in seen] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(seen), whole)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_a_product_is_that_of_the_whole_matrix(nested, bias, given, few_rows):
    linear = layer(200, 384, nested=nested, bias=bias)
    x = torch.randn(2, 70, 384, device=WHERE).to(given)
    got = slices.product(linear, x, slices.four_bits.held(linear))
    want = linear(x)
    assert got.dtype == want.dtype == given
    assert got.shape == want.shape
    assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()


def test_a_bias_of_another_type_becomes_the_input_s(few_rows):
    """As the library makes it, so that projections that are read in slices and others still fit in one launch."""
    linear, other = layer(200, 384, bias=True), layer(200, 384, bias=True)
    for one in (linear, other):
        one.bias.data = one.bias.data.float()
    x = torch.randn(70, 384, device=WHERE).bfloat16()
    slices.product(linear, x, slices.four_bits.held(linear))
    other(x)
    assert linear.bias.dtype == other.bias.dtype == torch.bfloat16


def test_no_more_than_a_slice_is_unpacked(few_rows, monkeypatch):
    from bitsandbytes import functional

    linear, made = layer(200, 384), []
    unpack = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: made.append(unpack(*args)) or made[-1])
    slices.product(linear, torch.randn(70, 384, device=WHERE).bfloat16(), slices.four_bits.held(linear))
    assert [tuple(part.shape) for part in made] == [(64, 384)] * 3 + [(8, 384)]


def quantised():
    model = build("llama", attention="sdpa", hidden_size=128, intermediate_size=256).bfloat16()
    # Weights as the library holds them from the start: on CPUs it reorders them at the first call.
    assert quantise(model, lambda linear: layer(linear.out_features, linear.in_features)) == 4 * 7
    return model.to(WHERE)


@pytest.fixture
def counted(few_rows, monkeypatch):
    """Products in slices, counted."""
    counts, product = [], slices.product
    monkeypatch.setattr(slices, "product", lambda *args: counts.append(args) or product(*args))
    return counts


@torch.no_grad()
def test_prompts_for_our_caches_are_read_in_slices(counted):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    with refreekv.compress(model, "full", kv_dtype=None):
        model(ids)
    assert len(counted) == 4 * 7
    assert not any("forward" in vars(module) for module in model.modules())
    with attached(model):
        model(ids, use_cache=False)  # nobody asked us
        cache = refreekv.ReFreeKVCache(model, "full")
        model(ids[:, :60], **cache_argument(model.forward, cache))  # a call as short as answers' may be
    assert len(counted) == 4 * 7


@torch.no_grad()
def test_logits_are_those_of_whole_matrices(counted):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    want = model(ids).logits.float()
    del counted[:]
    with refreekv.compress(model, "full", kv_dtype=None):
        got = model(ids).logits.float()
    assert counted
    assert (got - want).norm() <= 2e-2 * want.norm()


def test_forwards_go_back_when_a_call_fails(counted, monkeypatch):
    model = quantised()
    broken = model.model.layers[2].mlp
    monkeypatch.setattr(type(broken), "forward", lambda *args: 1 / 0)
    with refreekv.compress(model, "full", kv_dtype=None), torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(torch.randint(2, 90, (1, 200), device=WHERE))
    assert counted
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_the_library_s_own_layers_are_known():
    linear = layer(128, 128)
    assert slices.is_known(linear)

    class Doubled(bitsandbytes.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    linear.__class__ = Doubled
    assert not slices.is_known(linear)
    linear.__class__ = bitsandbytes.nn.LinearNF4
    assert slices.is_known(linear)
    linear.forward = linear.forward  # as hooks of accelerate put one there
    assert not slices.is_known(linear)
    assert not slices.is_known(nn.Linear(2, 2))


def test_copies_of_an_attachment_have_their_own_layers(counted):
    import copy

    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    with torch.no_grad(), attached(model):
        cache = refreekv.ReFreeKVCache(model, "full")
        model(ids, **cache_argument(model.forward, cache))
        copied = copy.deepcopy(model)
        cache = refreekv.ReFreeKVCache(copied, "full")
        del counted[:]
        copied(ids, **cache_argument(copied.forward, cache))
    own = set(copied.modules())
    assert counted
    assert all(linear in own for linear, *_ in counted)
    assert isinstance(copied.__dict__["_refreekv_attachment"], Attachment)


@pytest.mark.parametrize("what", ["few tokens", "one slice", "autocast", "gradients", "compute type", "cpu", "all"])
def test_where_slices_save_nothing_the_library_computes(what, monkeypatch):
    monkeypatch.setattr(slices, "_most_tokens", lambda device: 64)
    linear = layer(4096, 256)
    monkeypatch.setattr(rows_of, "slice_rows", lambda size, tokens: 4096 if what == "one slice" else 1024)

    class Placed(torch.Tensor):
        is_cuda = what != "cpu"

    x = torch.zeros(64 if what == "few tokens" else 65, 256, device=WHERE).bfloat16().as_subclass(Placed)
    coded = slices.four_bits.held(linear)
    linear.compute_type_is_set = what != "compute type"
    if what == "gradients":
        x.requires_grad_()
    with torch.autocast(WHERE, dtype=torch.bfloat16, enabled=what == "autocast"):
        assert slices._is_worth_it(linear, x, coded) == (what == "all")


@pytest.mark.gpu
@pytest.mark.skipif(WHERE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("count", "size"), [(14336, 4096), (4096, 14336)])
@torch.inference_mode()
def test_memory_on_a_card_is_the_result_and_a_slice(count, size, nested):
    linear, tokens = layer(count, size, nested=nested), 600
    forward, x = slices._forward_of(linear), torch.randn(1, tokens, size, device=WHERE).bfloat16()
    want = linear(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = forward(x)
    taken = torch.cuda.max_memory_allocated() - before
    rows = rows_of.slice_rows(size, tokens)
    assert rows < count
    # Factors of nested codes are numbers for the length of a product, twice at most.
    assert taken <= got.nbytes + 2 * rows * size + nested * 2 * 4 * count * size // 64 + 2**22
    assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()
