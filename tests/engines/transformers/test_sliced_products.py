"""Prompts over bitsandbytes' weights of 4 bits, unpacked some rows at a time, against the whole matrix."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import refreekv
from helpers.models import build
from helpers.quantised import quantise
from refreekv.core import slices as rows_of
from refreekv.engines.transformers import fitting, slices
from refreekv.engines.transformers.attachment import Attachment, attached
from refreekv.engines.transformers.fitting import Manner
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
def in_place():
    """The library unpacks into a given tensor on CUDA alone: here as it does into a new one."""
    name = "bitsandbytes::dequantize_4bit"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}.out", "CPU"):
        yield
        return

    def unpack(*args):
        args[-1].copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*args[:-1]))

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("dequantize_4bit.out", unpack, "CPU")
        yield


@pytest.fixture
def few_rows(monkeypatch, in_place):
    """Slices of 64 rows, on any device and for any number of tokens."""
    monkeypatch.setattr(rows_of, "slice_rows", lambda count, size, tokens: 64)
    monkeypatch.setattr(slices, "_is_worth_it", lambda linear, x: x.numel() > x.shape[-1])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_are_rows_of_the_matrix(kind, nested, block, dtype, few_rows, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit

    linear = layer(200, 384, kind=kind, nested=nested, block=block, dtype=dtype, compute=dtype)
    whole, seen = dequantize_4bit(linear.weight.data, linear.weight.quant_state), []

    def product(x, count, rows, unpack, bias):
        seen.extend(unpack(index).clone() for index in range(-(-count // rows)))
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
    linear, made, product = layer(200, 384), [], rows_of.product

    def watched(x, count, rows, unpack, bias):
        return product(x, count, rows, lambda index: made.append(unpack(index)) or made[-1], bias)

    monkeypatch.setattr(rows_of, "product", watched)
    slices.product(linear, torch.randn(70, 384, device=WHERE).bfloat16(), slices.four_bits.held(linear))
    assert [tuple(part.shape) for part in made] == [(64, 384)] * 3 + [(8, 384)]
    assert len({part.untyped_storage().data_ptr() for part in made}) == 1
    assert made[0].untyped_storage().nbytes() == 2 * 64 * 384


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


def cache_for(model, *, sliced=True):
    """A cache whose prompts are read in slices, or not."""
    cache = refreekv.ReFreeKVCache(model, "full", kv_dtype=None)
    cache.state.sliced = sliced
    return cache


def read(model, ids, **settings):
    return model(ids, **cache_argument(model.forward, cache_for(model, **settings))).logits.float()


@torch.no_grad()
def test_calls_are_read_in_slices_where_that_was_asked_for(counted):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    want = model(ids).logits.float()
    with attached(model):
        read(model, ids, sliced=False)
        model(ids, use_cache=False)
        read(model, ids[:, :60])  # a call as short as answers' may be
        assert not counted
        got = read(model, ids)
        assert len(counted) == 4 * 7
    assert (got - want).norm() <= 2e-2 * want.norm()
    assert not any("forward" in vars(module) for module in model.modules())
    with refreekv.compress(model, "full", kv_dtype=None):
        model(ids)
    assert len(counted) == 4 * 7


@pytest.mark.parametrize(
    ("manner", "calls"), [(Manner(), 0), (Manner(sliced=True), 1), (Manner(100), 0), (Manner(100, sliced=True), 2)]
)
def test_generate_reads_a_prompt_in_slices_where_memory_is_short(manner, calls, counted, monkeypatch, caplog):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    monkeypatch.setattr(fitting, "forecast", lambda *_: manner)
    for asked in (False, True):
        cache = cache_for(model, sliced=asked)
        del counted[:]
        with caplog.at_level(logging.INFO, "refreekv"):
            got = model.generate(ids, max_new_tokens=3, do_sample=False, **cache_argument(model.forward, cache))
        assert len(counted) == 4 * 7 * (calls if not asked else calls or 1 + (manner.chunk is not None))
        assert cache.state.sliced is asked  # what is decided of a prompt is of that prompt
        assert got.shape == (1, 203)
    assert ("matrices unpacked in slices, as memory is short" in caplog.text) == manner.sliced


def test_memory_that_ran_out_is_answered_by_slices_too(counted, monkeypatch, caplog):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    whole, failed = bitsandbytes.nn.Linear4bit.forward, []

    def forward(self, x):
        if x.shape[1] > 64 and not failed:
            failed.append(x)
            raise torch.OutOfMemoryError("no memory")
        return whole(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)
    monkeypatch.setattr(fitting, "CHUNKS", (100,))
    monkeypatch.setattr(fitting, "forecast", lambda *_: Manner())
    cache = cache_for(model, sliced=False)
    model.generate(ids, max_new_tokens=3, do_sample=False, **cache_argument(model.forward, cache))
    assert len(counted) == 2 * 4 * 7
    assert "is read again in chunks of 100, matrices unpacked in slices" in caplog.text


@torch.no_grad()
def test_forwards_go_back_when_a_call_fails(counted, monkeypatch):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    monkeypatch.setattr(type(model.model.layers[2].mlp), "forward", lambda *args: 1 / 0)
    with attached(model), pytest.raises(ZeroDivisionError):
        read(model, ids)
    assert counted
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_weights_that_are_replaced_between_calls_are_those_that_are_read(counted):
    """In the layer's own objects, as moves do, and with the layer."""
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    with attached(model):
        read(model, ids)
        assert len(counted) == 4 * 7
        del counted[:]
        one, other = model.model.layers[0].mlp.up_proj, layer(256, 128)
        one.weight.data, one.weight.quant_state.absmax = other.weight.data, other.weight.quant_state.absmax
        gone = weakref.ref(model.model.layers[1].mlp.up_proj)
        model.model.layers[1].mlp.up_proj = layer(256, 128)
        gc.collect()
        assert gone() is None
        got, want = read(model, ids), model(ids, use_cache=False).logits.float()
    assert len(counted) == 4 * 7
    assert (got - want).norm() <= 2e-2 * want.norm()


@torch.no_grad()
def test_a_forward_that_somebody_puts_in_meanwhile_stays(counted):
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    linear = model.model.layers[3].mlp.up_proj

    def put_in(*_):
        linear.forward = theirs

    def theirs(x):
        return type(linear).forward(linear, x)

    model.model.layers[2].register_forward_hook(put_in)
    with attached(model):
        read(model, ids)
    assert linear.__dict__.pop("forward") is theirs
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
    model, ids = quantised(), torch.randint(2, 90, (1, 200), device=WHERE)
    with torch.no_grad(), attached(model):
        read(model, ids)
        copied = copy.deepcopy(model)
        del counted[:]
        cache = cache_for(copied)
        copied(ids, **cache_argument(copied.forward, cache))
    own = set(copied.modules())
    assert counted
    assert all(linear in own for linear, *_ in counted)
    assert isinstance(copied.__dict__["_refreekv_attachment"], Attachment)


@pytest.mark.parametrize(
    "what", ["few tokens", "one slice", "autocast", "gradients", "compute type", "cpu", "another device", "all"]
)
def test_where_slices_save_nothing_the_library_computes(what, monkeypatch):
    monkeypatch.setattr(slices, "_most_tokens", lambda device: 64)
    linear = layer(4096, 256)
    monkeypatch.setattr(rows_of, "slice_rows", lambda count, size, tokens: 4096 if what == "one slice" else 1024)

    class Placed(torch.Tensor):
        is_cuda = what != "cpu"

    x = torch.zeros(64 if what == "few tokens" else 65, 256, device=WHERE).bfloat16().as_subclass(Placed)
    linear.compute_type_is_set = what != "compute type"
    if what == "gradients":
        x.requires_grad_()
    if what == "another device":
        linear.weight = nn.Parameter(torch.empty(1, device="meta"))
    with torch.autocast(WHERE, dtype=torch.bfloat16, enabled=what == "autocast"):
        assert slices._is_worth_it(linear, x) == (what == "all")


@pytest.mark.gpu
@pytest.mark.skipif(WHERE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("count", "size"), [(14336, 4096), (4096, 14336)])
@torch.inference_mode()
def test_memory_on_a_card_is_the_result_and_a_slice(count, size, nested):
    linear, tokens = layer(count, size, nested=nested), 600
    x = torch.randn(1, tokens, size, device=WHERE).bfloat16()
    want = linear(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = slices._forward(linear, x)
    taken = torch.cuda.max_memory_allocated() - before
    rows = rows_of.slice_rows(count, size, tokens)
    assert rows < count
    # Factors of nested codes are numbers for the length of a product, twice at most.
    assert taken <= got.nbytes + 2 * rows * size + nested * 2 * 4 * count * size // 64 + 2**22
    assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()
