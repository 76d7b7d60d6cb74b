"""Models whose weights stay in the blocks of their .gguf file, against transformers' unpacked ones."""

import logging

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

import refreekv
from helpers.equivalence import same_steps
from helpers.gguf_files import write_model
from helpers.models import prompts
from refreekv.core.weight_blocks import FORMATS
from refreekv.engines.transformers import fingerprint, fusion, model_constants, packed_weights
from refreekv.engines.transformers.packed_weights import PackedEmbedding, PackedLinear, UnpackableError

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path, dtype=torch.float32):
    return packed_weights.load(path, device=WHERE, dtype=dtype)


def packed(model):
    return [module for module in model.modules() if packed_weights.is_packed(module)]


def unpacked(path, dtype=torch.float32):
    """As transformers reads it."""
    from refreekv.engines.transformers.gguf import gguf_config

    config = gguf_config("unpacked")
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
    return model.to(WHERE).eval()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen2", True)])
def test_logits_are_those_of_the_unpacked_model(kind, architecture, tied, tmp_path):
    path = write_model(tmp_path / "a.gguf", kind, architecture=architecture, tied=tied, hidden=256, inner=512)
    model, wanted = load(path), unpacked(path)
    ids = prompts((20,), seed=2)[0].to(WHERE) % 96
    with torch.no_grad():
        got, want = model(ids).logits, wanted(ids).logits
    assert torch.isfinite(want).all()
    assert (got - want).norm() <= (2e-2 if kind.endswith("_K") else 1e-4) * want.norm()
    assert model.config.tie_word_embeddings is tied
    matrices = [m for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    assert len(matrices) == 2 * 7 + 2
    if tied:
        assert model.lm_head.low.data_ptr() == model.model.embed_tokens.low.data_ptr()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plain", ["token_embd", "blk.1.ffn_down"])
def test_single_matrices_in_other_formats_become_plain(plain, tied, tmp_path):
    path = write_model(tmp_path / "a.gguf", "Q4_0", plain=plain, tied=tied)
    model, wanted = load(path), unpacked(path)
    ids = prompts((20,), seed=2)[0].to(WHERE) % 96
    with torch.no_grad():
        got, want = model(ids).logits, wanted(ids).logits
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert len(packed(model)) == 2 * 7 + 2 - 1 - (tied and plain == "token_embd")
    if tied and plain == "token_embd":
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_are_those_of_the_file(kind, tmp_path):
    """And up to an eighth more where a group's scales are products of two in the file."""
    from refreekv.cli.weights import weight_bytes

    path = write_model(tmp_path / "a.gguf", kind, hidden=1024, inner=1024)
    assert weight_bytes(load(path)) < (1.125 if kind.endswith("_K") else 1.01) * path.stat().st_size
    assert weight_bytes(unpacked(path)) > 3 * path.stat().st_size


def test_conversions_of_types_leave_blocks_alone(tmp_path):
    path = write_model(tmp_path / "a.gguf", "Q5_K", hidden=256, inner=512)
    model = load(path)
    before = model.model.layers[0].mlp.up_proj.blocks
    model.half().bfloat16()
    after = model.model.layers[0].mlp.up_proj.blocks
    assert all(torch.equal(one, other) for one, other in zip(before[1:], after[1:], strict=True))
    assert after.scales.dtype == torch.float16
    ids = prompts((5,), seed=2)[0].to(WHERE) % 96
    assert load(path, torch.bfloat16)(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_pruned_and_captured(kind, tmp_path, steps, caplog):
    model = load(write_model(tmp_path / "a.gguf", kind, hidden=256, inner=512))
    ids, mask = (part.to(WHERE) for part in prompts((60,), seed=3))
    outcome = []
    with caplog.at_level(logging.WARNING, "refreekv"):
        for arena in (False, True):
            decode = "graph" if arena else "eager"
            cache = refreekv.ReFreeKVCache(model, "snapkv", ratio=0.5, window=8, decode=decode)
            cache.state.arena = arena
            outcome.append(
                model.generate(
                    ids % 96, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False,
                    eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
                )
            )  # fmt: skip
    assert steps == {"made": 1, "run": 11}
    assert [record.message for record in caplog.records] == []
    assert same_steps(*outcome, 60, 1e-3) == 12


def test_fused_modules_leave_them_alone(tmp_path):
    pytest.importorskip("triton")
    model = load(write_model(tmp_path / "a.gguf", "Q4_0", hidden=128, inner=256), torch.float16)
    ids = prompts((1,), seed=4)[0].to(WHERE) % 96
    with torch.no_grad():
        before = model(ids).logits
        with fusion.fused(model, 1) as count:
            assert not any("forward" in vars(module) for module in packed(model))
            after = model(ids).logits
    assert count == 2 * 2 + 1 + 2 + 2 + 2  # norms, rotary embeddings, gated activations, residual sums
    assert (after - before).norm() <= 2e-2 * before.norm()


def test_codes_and_scales_are_part_of_the_fingerprint(tmp_path):
    model = load(write_model(tmp_path / "a.gguf", "Q6_K", hidden=256, inner=512))
    assert model.config._name_or_path
    layer = model.model.layers[1].mlp.up_proj
    for part in (layer.low, layer.high, layer.scales, layer.rows):
        before = fingerprint.of_contents(model), model_constants.key_of(model)
        part[0] += 1
        assert fingerprint.of_contents(model) != before[0]
        assert model_constants.key_of(model) not in (before[1], None)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UnpackableError, match="the architecture stablelm are not read that way"):
        load(write_model(tmp_path / "a.gguf", architecture="stablelm"))
    with pytest.raises(UnpackableError, match=r"the file has no blk\.0\.attn_v\.weight for model\.layers\.0"):
        load(write_model(tmp_path / "b.gguf", leave_out="blk.0.attn_v"))
    path = write_model(tmp_path / "c.gguf", layers=3)
    # As if the configuration said less than there is.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path, gguf_file="c.gguf")
    for name, value, message in (
        ("num_hidden_layers", 2, r"tensors that the model does not, such as blk\.2"),
        ("intermediate_size", 96, r"has the shape \[128, 64\] in the file and \[96, 64\] in the model"),
    ):
        changed = type(config)(**{**config.to_dict(), name: value})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AutoConfig, "from_pretrained", lambda *a, changed=changed, **k: changed)
            with pytest.raises(UnpackableError, match=message):
                load(path)


def test_benchmarks_can_keep_them_packed(tmp_path):
    import checkpoints

    path = write_model(tmp_path / "a.gguf")
    model, tokenizer, name = checkpoints.load(str(path), str(WHERE), "float32", packed=True)
    assert name == "a.gguf, packed"
    assert packed(model)
    assert tokenizer("ab")["input_ids"]
