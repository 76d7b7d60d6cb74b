"""`verify=True`: the end of a prompt read again over what was kept, and what follows where it differs."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache

import refreekv
from helpers.models import ARCHITECTURES, HAS_SDPA, VOCAB, build, build_mllama, prompts
from refreekv import ReFreeKVCache, policies
from refreekv.engines.transformers import verifying
from refreekv.engines.transformers.read_again import ANSWER, DAMAGE, PROMPT, Recheck, divergence
from refreekv.engines.transformers.read_again import TOKENS as COUNTS
from refreekv.engines.transformers.verifying import steps_of
from refreekv.policies.base import ladder_for
from refreekv.serving.conversations import Conversations

LENGTH = 96
TOKENS = COUNTS[PROMPT]
HARSH = "adaptive:min_length=8,window=4,constant=0.4,copying=2,hit=0.9,follow=0,lost_mass=0.9"
"""Evicts a good part of a prompt of a hundred tokens."""
CUT = "streaming-llm:ratio=0.5"


def read(model, cache, lengths=(LENGTH,), seed=1, **more):
    ids, mask = prompts(lengths, seed=seed)
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache, **more).logits


def following(model, cache, tokens=6, seed=9, rows=1):
    """What some further tokens predict."""
    fed, _ = prompts((tokens,) * rows, seed=seed)
    with torch.no_grad(), cache.decoding() if hasattr(cache, "decoding") else torch.no_grad():
        return model(fed, past_key_values=cache).logits


def readings(model, cache, monkeypatch, **call):
    """Logits that a verification compares: over everything, then over each step."""
    found = []
    original = verifying.Verification._read

    def noted(self, *args):
        logits = original(self, *args)
        found.append(logits)
        return logits

    monkeypatch.setattr(verifying.Verification, "_read", noted)
    return found, read(model, cache, **call)


# -- what is compared ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 61, 20)], ids=["one row", "padded"])
def test_everything_predicts_what_the_prefill_predicted(name, lengths, monkeypatch):
    """Of full-attention models; a window has forgotten some tokens, on both sides."""
    model = build(name, attention="sdpa" if name in HAS_SDPA else "eager")
    if name in ("gemma3", "gpt_oss"):
        model = build(name, attention="eager", layer_types=["full_attention"] * 4)
    cache = ReFreeKVCache(model, CUT, verify=1e-9)
    found, logits = readings(model, cache, monkeypatch, lengths=lengths)
    _, mask = prompts(lengths, seed=1)
    real = mask[:, -TOKENS:].bool()
    torch.testing.assert_close(found[0][real], logits[:, -TOKENS:][real], atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_with_sliding_windows_too_where_they_have_not_slid(name, monkeypatch):
    model = build(name, attention="eager", sliding_window=200)
    cache = ReFreeKVCache(model, CUT, verify=1e-9)
    found, logits = readings(model, cache, monkeypatch, lengths=(LENGTH, 61))
    torch.testing.assert_close(found[0], logits[:, -TOKENS:], atol=3e-4, rtol=1e-3)
    # And where they have, the tokens that have all of their window.
    model = build(name, attention="eager", sliding_window=40)
    cache = ReFreeKVCache(model, CUT, verify=1e-9)
    found.clear()
    logits = read(model, cache, lengths=(150,))
    off = (found[0] - logits[:, -TOKENS:]).abs().amax(-1)[0]
    assert off[0] < off.max() or off.max() < 1e-3


@pytest.mark.parametrize("policy", [CUT, HARSH, "snapkv:ratio=0.5", "refreekv:threshold=0.3,frozen_layers=0"])
@pytest.mark.parametrize("kv_dtype", [None, "int8:recent=8", "k4v2+int8:recent=8"])
def test_a_rung_predicts_what_its_storage_predicts(policy, kv_dtype, monkeypatch):
    """Compared with a cache that was pruned as ever, cropped by the tokens and fed them again."""
    model = build("llama", attention="sdpa", hidden_size=128)
    cache = ReFreeKVCache(model, policy, kv_dtype=kv_dtype, verify=1e-9)
    found, _ = readings(model, cache, monkeypatch)
    plain = ReFreeKVCache(model, policy, kv_dtype=kv_dtype)
    read(model, plain)
    plain.crop(-TOKENS)
    ids, _ = prompts((LENGTH,), seed=1)
    positions = torch.arange(LENGTH - TOKENS, LENGTH)[None]
    with torch.no_grad(), plain.decoding():
        again = model(ids[:, -TOKENS:], past_key_values=plain, position_ids=positions).logits
    torch.testing.assert_close(found[1], again, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_the_damage_is_the_mean_divergence_of_the_worst_row(monkeypatch):
    model = build("llama", attention="sdpa")
    cache = ReFreeKVCache(model, CUT, verify=1e-9)
    lengths = (LENGTH, 70, 20)
    found, _ = readings(model, cache, monkeypatch, lengths=lengths)
    rows = []
    for row, length in enumerate(lengths):
        count = min(length, TOKENS)
        a, b = (part[row, -count:].log_softmax(-1) for part in found[:2])
        rows.append(float((a.exp() * (a - b)).sum(-1).mean()))
    assert cache.report.verified.tried[0] == pytest.approx(max(rows), rel=1e-3)


# -- what follows -------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 61, 40)], ids=["one row", "padded"])
@pytest.mark.parametrize("policy", [CUT, HARSH])
def test_a_first_rung_that_passes_is_the_policy(policy, lengths, llama):
    verified, plain = ReFreeKVCache(llama, policy, verify=1e9), ReFreeKVCache(llama, policy)
    for cache in (verified, plain):
        read(llama, cache, lengths)
    assert verified.report.verified.step == 0
    assert len(verified.report.verified.tried) == 1
    for row in range(len(lengths)):
        assert verified.kept_ranges(row) == plain.kept_ranges(row)
    rows = len(lengths)
    torch.testing.assert_close(following(llama, verified, rows=rows), following(llama, plain, rows=rows))
    assert verified.report.bytes_after == plain.report.bytes_after
    assert dataclasses.replace(verified.report, verified=None) == plain.report


@pytest.mark.parametrize("kv_dtype", [None, "int4:recent=8", "k4v2+int8:recent=8"])
@pytest.mark.parametrize("lengths", [(LENGTH,), (LENGTH, 61, 40)], ids=["one row", "padded"])
@pytest.mark.parametrize("policy", [CUT, HARSH])
def test_the_last_rung_is_the_full_cache(policy, lengths, kv_dtype):
    model = build("llama", attention="sdpa", hidden_size=128)
    cache, full = ReFreeKVCache(model, policy, kv_dtype=kv_dtype, verify=1e-9), ReFreeKVCache(model, "full")
    for one in (cache, full):
        read(model, one, lengths)
    verified = cache.report.verified
    assert verified.step == verified.steps - 1
    assert verified.policy == "full"
    assert all(damage > 1e-9 for damage in verified.tried)
    rows = len(lengths)
    torch.testing.assert_close(following(model, cache, rows=rows), following(model, full, rows=rows), atol=0, rtol=0)
    assert cache.report.bytes_after == full.report.bytes_after
    assert cache.report.kv_dtype is None
    cache.reset()
    assert cache.kv_dtype == ladder_for(policies.parse(policy), kv_dtype)
    assert all(layer.ladder == cache.kv_dtype for layer in cache.pruned_layers)


def test_surrogates_of_a_rung_that_failed_are_taken_back(llama):
    """They are written over evicted entries of the very tensors that the next step starts from."""
    cache, full = ReFreeKVCache(llama, HARSH, verify=1e-9), ReFreeKVCache(llama, "full")
    for one in (cache, full):
        read(llama, one)
    assert cache.report.verified.policy == "full"
    passed = ReFreeKVCache(llama, HARSH, verify=1e9)
    read(llama, passed)
    assert passed.report.reasons.get("stand-ins", 1), "there are some, as long as the policy makes any"
    for one, other in zip(cache.pruned_layers, full.pruned_layers, strict=True):
        for entries, wanted in zip(one.dense, other.dense, strict=True):
            torch.testing.assert_close(entries, wanted, atol=0, rtol=0)


def test_a_middle_rung(llama):
    base = policies.parse(HARSH)
    tried = ReFreeKVCache(llama, base, verify=1e-9)
    read(llama, tried)
    damages = tried.report.verified.tried
    assert damages[0] > damages[1] > damages[2], "stricter constants do less damage"
    between = (damages[0] * damages[1]) ** 0.5
    cache, plain = ReFreeKVCache(llama, base, verify=between), ReFreeKVCache(llama, steps_of(base)[1])
    for one in (cache, plain):
        read(llama, one)
    report = cache.report
    assert report.verified.step == 1
    assert report.verified.tried == pytest.approx(damages[:2])
    assert report.verified.policy == steps_of(base)[1].spec
    assert cache.kept_ranges() == plain.kept_ranges()
    torch.testing.assert_close(following(llama, cache), following(llama, plain))
    assert "verified: step 2 of 4" in str(report)
    assert report.to_dict()["verified"]["step"] == 1


def test_a_row_that_is_hurt_decides_for_all(llama):
    alone = []
    for row in range(2):
        ids, _ = prompts((LENGTH, LENGTH), seed=1)
        cache = ReFreeKVCache(llama, CUT, verify=1e-9)
        with torch.no_grad():
            llama(ids[row : row + 1], past_key_values=cache)
        alone.append(cache.report.verified.tried[0])
    both = ReFreeKVCache(llama, CUT, verify=1e-9)
    read(llama, both, (LENGTH, LENGTH))
    assert both.report.verified.tried[0] == pytest.approx(max(alone), rel=1e-3)


def test_nothing_is_read_where_nothing_goes(llama, monkeypatch):
    monkeypatch.setattr(verifying.Verification, "_read", lambda *args: pytest.fail("nothing is to be read"))
    cache = ReFreeKVCache(llama, verify=True)  # keeps short prompts whole
    read(llama, cache)
    assert cache.report.verified.step == 0
    assert cache.report.verified.tried == (0.0,)


# -- ways to come by ----------------------------------------------------------------------


def test_chunks(llama):
    """The last tokens of the prompt, from whatever chunks they come; the second one here has four."""
    ids, _ = prompts((LENGTH,), seed=1)
    whole, chunked = (ReFreeKVCache(llama, CUT, verify=1e-9) for _ in range(2))
    with torch.no_grad():
        llama(ids, past_key_values=whole)
        with chunked.prompt_until(LENGTH):
            for start, stop in ((0, 50), (50, 92), (92, LENGTH)):
                llama(ids[:, start:stop], past_key_values=chunked)
    assert chunked.report.verified.tokens == TOKENS
    assert chunked.report.verified.tried == pytest.approx(whole.report.verified.tried, rel=1e-2)


@pytest.mark.parametrize("kv_dtype", [None, "int8:recent=8"])
@pytest.mark.parametrize("policy", [CUT, HARSH])
@pytest.mark.parametrize("arena", [False, True])
def test_turns(policy, kv_dtype, arena):
    """A later turn evicts from what is left; its last step keeps all of that."""
    model = build("llama", attention="sdpa", hidden_size=128)

    def turns(verify):
        cache = ReFreeKVCache(model, policy, kv_dtype=kv_dtype, verify=verify)
        cache.state.arena = arena
        read(model, cache)
        following(model, cache, 5)
        ids, _ = prompts((40,), seed=3)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        return cache

    passed, plain = turns(1e9), turns(False)
    assert passed.report.verified.step == 0
    assert passed.kept_ranges() == plain.kept_ranges()
    torch.testing.assert_close(following(model, passed), following(model, plain), atol=1e-5, rtol=1e-4)
    kept = turns(1e-9)
    assert kept.report.verified.step == kept.report.verified.steps - 1
    assert all(head == ((0, LENGTH + 45),) for layer in kept.kept_ranges() for head in layer)


@pytest.mark.parametrize("size", [3e-5, 1e-3, 1.0])
def test_a_small_divergence_is_not_lost_in_rounding(size):
    logits = 3 * torch.randn(1, 20, 50_000)
    other = logits + size * torch.randn_like(logits)
    logits[..., :10] = float("-inf")  # ruled out: on one side, and on both
    other[..., :5] = float("-inf")
    exact = [part.double().log_softmax(-1) for part in (logits, other)]
    wanted = (exact[0].exp() * (exact[0] - exact[1])).nan_to_num(0.0).sum(-1)
    found = divergence(logits, other)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0)
    assert torch.equal(divergence(logits, logits), torch.zeros(1, 20))


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("first", [20, LENGTH])
def test_the_last_rung_codes_nothing_on_later_turns(first, arena):
    """A first prompt that its first step serves, as nothing goes; the next one is the full cache's, to the bit.

    Of a short first prompt nothing is coded: then everything before is the full cache's, too.
    """
    model = build("llama", attention="sdpa", hidden_size=128)
    kept = ReFreeKVCache(model, "snapkv", ratio=1.0, window=4, kv_dtype="int8:recent=16", verify=1e9)
    full = ReFreeKVCache(model, "full")
    kept.state.arena = arena
    for one in (kept, full):
        read(model, one, (first,))
    assert kept.report.verified.step == 0
    assert (kept.report.formats["int8"] > 0) == (first == LENGTH)
    before = [layer.ragged.full().stacked() for layer in kept.pruned_layers]
    kept.state.verification.reading = Recheck(damage=1e-9)
    for one in (kept, full):
        with torch.no_grad():
            model(prompts((40,), seed=3)[0], past_key_values=one)
    verified = kept.report.verified
    assert verified.step == verified.steps - 1
    assert min(verified.tried) > 1e-9
    assert kept.kv_dtype is kept.report.kv_dtype is None
    assert not kept.report.formats
    for layer, plain, old in zip(kept.pruned_layers, full.pruned_layers, before, strict=True):
        assert layer.ragged.coding is None
        for part, whole, earlier in zip(layer.ragged.full().stacked(), plain.dense, old, strict=True):
            assert torch.equal(part[:, :, :first], earlier)
            if first == 20:
                torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)
    if first == 20:
        torch.testing.assert_close(following(model, kept), following(model, full), atol=1e-5, rtol=1e-4)
    else:
        following(model, kept)


def test_generate_prunes_where_the_prompt_ends(llama):
    ids, mask = prompts((LENGTH, 60), seed=1)

    def answer(**how):
        with refreekv.compress(llama, HARSH, **how) as kv:
            tokens = llama.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        return tokens, kv.report

    plain, _ = answer()
    passed, report = answer(verify=1e9)
    assert torch.equal(passed, plain)
    assert report.verified.step == 0
    full = llama.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    kept, report = answer(verify=1e-9)
    assert torch.equal(kept, full)
    assert report.verified.policy == "full"


def test_beams_and_drafts(llama):
    ids, _ = prompts((LENGTH,), seed=1)
    for how in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        wanted = llama.generate(ids, max_new_tokens=8, do_sample=False, **how)
        with refreekv.compress(llama, CUT, verify=1e-9) as kv:
            found = llama.generate(ids, max_new_tokens=8, do_sample=False, **how)
        assert torch.equal(found, wanted)
        assert kv.report.verified.tokens == TOKENS


def test_embeddings_in_place_of_tokens(llama):
    ids, _ = prompts((LENGTH,), seed=1)
    by_tokens, by_embeddings = (ReFreeKVCache(llama, CUT, verify=1e-9) for _ in range(2))
    with torch.no_grad():
        llama(ids, past_key_values=by_tokens)
        llama(inputs_embeds=llama.get_input_embeddings()(ids), past_key_values=by_embeddings)
    assert by_embeddings.report.verified.tried == pytest.approx(by_tokens.report.verified.tried)


def test_a_captured_step_follows(llama, ids, steps):
    """On storage with room to grow, as on CUDA; here steps are not captured, and the storage is the same."""
    cache = ReFreeKVCache(llama, CUT, verify=1e9)
    cache.state.arena = True
    read(llama, cache)
    assert all(layer.ragged.tables for layer in cache.pruned_layers)
    full = ReFreeKVCache(llama, CUT, verify=1e-9)
    full.state.arena = True
    read(llama, full)
    assert full.report.verified.policy == "full"
    assert all(layer.ragged.tables for layer in full.pruned_layers)
    torch.testing.assert_close(following(llama, full, 1), following(llama, _read_plain(llama), 1), atol=1e-4, rtol=1e-4)


def _read_plain(model):
    cache = DynamicCache(config=model.config)
    read(model, cache)
    return cache


def test_with_a_calibration_its_damage_is_allowed(llama):
    from refreekv.engines.calibration import Calibration
    from refreekv.engines.transformers import identity

    made = Calibration(identity.described(llama), ("full", "adaptive"), ((0.0, 0.0),) * 19, (1.0, 0.5), 0.05, 0.07)
    assert ReFreeKVCache(llama, calibration=made, verify=True).state.verification.reading.allowed == 0.07
    assert ReFreeKVCache(llama, calibration=made, verify=0.1).state.verification.reading.allowed == 0.1
    assert ReFreeKVCache(llama, calibration=made).state.verification is None
    assert ReFreeKVCache(llama, verify=True).state.verification.reading.allowed == DAMAGE


def test_a_copied_cache_verifies_its_own_turns(llama):
    cache = ReFreeKVCache(llama, CUT, verify=1e9)
    read(llama, cache)
    copied = copy.deepcopy(cache)
    ids, _ = prompts((40,), seed=3)
    with torch.no_grad():
        llama(ids, past_key_values=copied)
    assert copied.report.verified.tried != cache.report.verified.tried
    assert copied.report.tokens == LENGTH + 40


# -- memory -------------------------------------------------------------------------------


def test_the_full_cache_stays_until_a_rung_has_passed_and_no_longer(llama, monkeypatch):
    held = []
    original = verifying.Verification._read

    def noted(self, cache, *args):
        held.append(
            sum(part.nbytes for one in self._held for part in one.before.values() if isinstance(part, torch.Tensor))
        )
        return original(self, cache, *args)

    monkeypatch.setattr(verifying.Verification, "_read", noted)
    cache = ReFreeKVCache(llama, CUT, verify=1e9)
    read(llama, cache)
    full = ReFreeKVCache(llama, "full")
    read(llama, full)
    assert held == [full.report.bytes_after] * 2
    assert cache.state.verification._held == []
    assert cache.report.bytes_after < 0.6 * full.report.bytes_after


def test_queries_of_the_whole_prompt_are_not_held(llama, monkeypatch):
    seen = []
    original = verifying.Verification._first_that_passes

    def noted(self, *args):
        seen.extend(part.queries.states.untyped_storage().nbytes() for one in self._held for part in one.parts)
        return original(self, *args)

    monkeypatch.setattr(verifying.Verification, "_first_that_passes", noted)
    read(llama, ReFreeKVCache(llama, HARSH, verify=1e9))
    assert seen == [0] * len(seen) != []


# -- what is refused ----------------------------------------------------------------------


def test_what_does_not_go_together(llama):
    for how, message in (
        ({"policy": "cake:ratio=0.5"}, "decides about all layers together"),
        ({"decode_interval": 8}, "verify and decode_interval exclude each other"),
        ({"prompt_dtype": "int8"}, "prompt_dtype codes it on the way"),
        ({"verify": 0.0}, "verify takes a damage in nats above 0"),
        ({"verify": float("nan")}, "verify takes a damage"),
        ({"verify": "question"}, "verify reads prompt or answer again, got 'question'"),
        ({"verify": "answer:rows=3"}, "verify has no parameter 'rows'"),
        ({"verify": "answer:tokens=x"}, "tokens of verify is to be a number, got 'x'"),
        ({"verify": "answer:tokens=0"}, "tokens must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ReFreeKVCache(llama, **{"verify": True, **how})
        with pytest.raises(ValueError, match=message), refreekv.compress(llama, **{"verify": True, **how}):
            pass


def test_layers_that_keep_a_state_are_refused():
    with pytest.raises(ValueError, match=r"layer 1 of this model \(cross_attention\) keeps a state"):
        ReFreeKVCache(build_mllama(), verify=True)


def test_a_mask_of_ones_own_keeps_everything(llama):
    ids, _ = prompts((LENGTH,), seed=1)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    cache = ReFreeKVCache(llama, CUT, verify=1e9)
    with torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.report.verified.reason == "a mask of one's own"
    assert cache.report.budget == 1.0
    assert "not verified" in str(cache.report)


def test_a_part_of_the_model_is_refused(llama):
    ids, _ = prompts((LENGTH,), seed=1)
    cache = ReFreeKVCache(llama, CUT, verify=1e9)
    with torch.no_grad():
        llama.model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="call the model itself, or leave verify out"):
            llama.model(ids[:, :3], past_key_values=cache)


def test_after_an_error_the_full_cache_is_there(llama, monkeypatch):
    calls = []
    original = verifying.Verification._read

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("too much")
        return original(self, *args)

    monkeypatch.setattr(verifying.Verification, "_read", fails)
    cache, full = ReFreeKVCache(llama, HARSH, verify=1e9), ReFreeKVCache(llama, "full")
    with pytest.raises(torch.OutOfMemoryError):
        read(llama, cache)
    read(llama, full)
    torch.testing.assert_close(following(llama, cache), following(llama, full), atol=0, rtol=0)


def test_rungs():
    base = policies.create("adaptive")
    found = steps_of(base)
    assert found[0] is base
    assert [one.constant for one in found[:-1]] == [base.constant, base.constant / 4, base.constant / 16]
    assert found[-1] == policies.create("full")
    assert steps_of(policies.parse(CUT)) == [policies.parse(CUT), policies.create("full")]
    assert len(steps_of(policies.create("adaptive", constant=0.0))) == 2


def test_the_models_of_these_tests_have_more_tokens_than_are_read():
    assert VOCAB > 100
    assert LENGTH > 2 * TOKENS


# -- the beginning of the answer ----------------------------------------------------------

EARLY = COUNTS[ANSWER]


def generated(model, count=EARLY + 8, rows=1, **how):
    ids, mask = prompts((LENGTH, 60)[:rows], seed=1)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **how)[:, LENGTH:]


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("policy", [CUT, HARSH])
def test_the_beginning_of_the_answer_is_the_full_caches(llama, policy, rows, arena):
    wanted = generated(llama, rows=rows)

    def answer(damage):
        cache = ReFreeKVCache(llama, policy, verify=f"answer:damage={damage}")
        cache.state.arena = arena
        tokens = generated(llama, rows=rows, past_key_values=cache)
        return tokens, cache

    tokens, strict = answer(1e-9)
    assert torch.equal(tokens, wanted)
    assert strict.report.verified.policy == "full"
    assert strict.report.verified.where == "answer"
    tokens, loose = answer(1e9)
    # One more: it comes out of the call that brings the last of them.
    assert torch.equal(tokens[:, : EARLY + 1], wanted[:, : EARLY + 1])
    assert loose.report.verified.step == 0
    assert loose.report.verified.tokens == EARLY
    assert f"answer's first {EARLY} tokens" in str(loose.report)
    plain = ReFreeKVCache(llama, policy)
    plain.state.arena = arena
    generated(llama, rows=rows, past_key_values=plain)
    for row in range(rows):
        assert loose.kept_ranges(row) == plain.kept_ranges(row)


@pytest.mark.parametrize("kv_dtype", [None, "k4v2+int8:recent=8"])
@pytest.mark.parametrize("policy", [CUT, HARSH, "snapkv:ratio=0.5"])
def test_what_is_read_of_the_answer_is_what_the_storage_predicts(policy, kv_dtype, monkeypatch):
    model = build("llama", attention="sdpa", hidden_size=128)
    cache = ReFreeKVCache(model, policy, kv_dtype=kv_dtype, verify="answer:damage=1e-9")
    found = []
    original = verifying.Verification._read
    monkeypatch.setattr(
        verifying.Verification, "_read", lambda self, *args: found.append(original(self, *args)) or found[-1]
    )
    ids, _ = prompts((LENGTH,), seed=1)
    fed, _ = prompts((EARLY,), seed=7)
    with torch.no_grad(), cache.prompt_until(LENGTH):
        model(ids, past_key_values=cache)
        step = [model(fed[:, at : at + 1], past_key_values=cache).logits for at in range(EARLY)]
    torch.testing.assert_close(found[0], torch.cat(step, 1), atol=3e-4, rtol=1e-3)
    plain = ReFreeKVCache(model, policy, kv_dtype=kv_dtype)
    read(model, plain)
    with torch.no_grad(), plain.decoding():
        pruned = model(fed, past_key_values=plain).logits
    torch.testing.assert_close(found[1], pruned, atol=3e-4, rtol=1e-3)


def test_files_and_copies(llama, tmp_path):
    cache = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9")
    read(llama, cache)
    with pytest.raises(ValueError, match="waits for the first tokens of an answer"):
        cache.save(tmp_path / "a.safetensors")
    copied = copy.deepcopy(cache)
    for one in (cache, copied):
        for at in range(EARLY):
            following(llama, one, 1, seed=at)
    assert copied.kept_ranges() == cache.kept_ranges()
    assert copied.report == cache.report
    cache.save(tmp_path / "a.safetensors")
    loaded = ReFreeKVCache.load(tmp_path / "a.safetensors", llama)
    torch.testing.assert_close(following(llama, loaded), following(llama, cache))
    assert loaded.state.verification is None, "a file holds a cache, and no wish to verify"
    again = ReFreeKVCache.load(tmp_path / "a.safetensors", llama, verify=0.1)
    assert again.state.verification.reading.allowed == 0.1
    conversations = Conversations(llama, again.policy, verify=0.1, memory_limit=0)
    assert conversations.new_cache().state.verification.reading.allowed == 0.1


def test_until_then_everything_is_held_and_no_longer(llama):
    cache, full = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9"), ReFreeKVCache(llama, "full")
    for one in (cache, full):
        read(llama, one)
    for at in range(EARLY):
        assert cache.state.verification.pending
        assert cache.report.bytes_after == full.report.bytes_after
        following(llama, cache, 1, seed=at)
        following(llama, full, 1, seed=at)
    assert not cache.state.verification.pending
    assert cache.report.bytes_after < 0.7 * full.report.bytes_after
    assert cache.report.verified.step == 0


def test_a_short_answer_is_read_when_the_next_prompt_comes(llama):
    def turns(**how):
        cache = ReFreeKVCache(llama, HARSH, **how)
        read(llama, cache)
        following(llama, cache, 5)
        if cache.state.verification is not None:
            assert cache.state.verification.pending
            assert cache.report.budget == 1.0
        ids, _ = prompts((40,), seed=3)
        with torch.no_grad():
            model_output = llama(ids, past_key_values=cache).logits
        return cache, model_output

    passed, _ = turns(verify="answer:damage=1e9")
    assert passed.report.verified.tokens == 5
    assert passed.report.verified.step == 0
    assert any(len(head) > 1 for layer in passed.kept_ranges() for head in layer), "the first prompt was pruned"
    kept, logits = turns(verify="answer:damage=1e-9")
    full = ReFreeKVCache(llama, "full")
    read(llama, full)
    following(llama, full, 5)
    ids, _ = prompts((40,), seed=3)
    with torch.no_grad():
        torch.testing.assert_close(logits, llama(ids, past_key_values=full).logits, atol=1e-4, rtol=1e-4)
    assert kept.report.verified.policy == "full"


def test_no_answer_at_all_keeps_everything(llama):
    cache = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9")
    read(llama, cache)
    ids, _ = prompts((40,), seed=3)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
    assert cache.report.verified.reason == "there are no tokens to read again"
    assert cache.report.bytes_after == cache.report.bytes_before


def test_beams_keep_everything_and_drafts_do_not(llama):
    wanted = generated(llama, num_beams=3)
    with refreekv.compress(llama, CUT, verify="answer:damage=1e9") as kv:
        assert torch.equal(generated(llama, num_beams=3), wanted)
    assert "beam search" in kv.report.verified.reason
    # Drafts that were not taken are no part of the answer.
    with refreekv.compress(llama, CUT, verify="answer:damage=1e-9") as kv:
        assert torch.equal(generated(llama, prompt_lookup_num_tokens=3), generated(llama))
    assert kv.report.verified.tokens == EARLY
    drafted = kv.report.verified.tried
    with refreekv.compress(llama, CUT, verify="answer:damage=1e-9") as kv:
        generated(llama)
    assert drafted == pytest.approx(kv.report.verified.tried, rel=0.05)


@pytest.mark.parametrize("rows", [[2, 1, 0], [1, 1], [0, 0, 1, 1, 2, 2]], ids=["moved", "fewer", "more"])
@pytest.mark.parametrize("first", [True, False], ids=["first turn", "later turn"])
@pytest.mark.parametrize("policy", [CUT, HARSH])
def test_rows_that_are_moved_meanwhile_keep_their_own(llama, policy, first, rows):
    """Padding was told apart by what had been in a row's place, and real entries went with it."""
    cache = ReFreeKVCache(llama, policy, verify="answer:damage=1e9,tokens=4")
    total = torch.zeros(3, 0, dtype=torch.long)

    def feed(to, ids, total):
        positions = (total.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return llama(ids, attention_mask=total, position_ids=positions, past_key_values=to).logits[:, -1]

    for lengths in [(40, LENGTH, 61)] if first else [(40, LENGTH, 61), (9, 50, 20)]:
        for _ in range(5 if total.shape[1] else 0):  # an answer, behind which the first prompt was pruned
            total = torch.cat([total, torch.ones(3, 1, dtype=torch.long)], 1)
            feed(cache, torch.full((3, 1), 7), total)
        ids, mask = prompts(lengths, seed=1)
        total = torch.cat([total, mask], 1)
        feed(cache, ids, total)
    assert first or cache.report.budget < 0.9
    stays = copy.deepcopy(cache)
    stays.state.verification.reading = Recheck(ANSWER, 4, 1e-9)  # to its last step
    cache.batch_select_indices(torch.tensor(rows))
    for at in range(6):
        ids, _ = prompts((1,) * 3, seed=20 + at)
        total = torch.cat([total, torch.ones_like(ids)], 1)
        wanted = feed(stays, ids, total)
        torch.testing.assert_close(feed(cache, ids[rows], total[rows]), wanted[rows], atol=1e-4, rtol=1e-4)
    assert "rows of the batch" in cache.report.verified.reason
    assert cache.report.verified.policy == stays.report.verified.policy == "full"


def test_a_prompt_that_was_cropped_meanwhile_stays(llama):
    cache = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9")
    read(llama, cache)
    following(llama, cache, 4)
    cache.crop(-2)
    assert cache.state.verification.pending, "of the answer something may be taken back"
    cache.crop(-20)
    for at in range(EARLY + 20):
        following(llama, cache, 1, seed=at)
    assert cache.report.bytes_after == cache.report.bytes_before
    assert "cropped" in cache.report.verified.reason


def test_a_prompt_that_was_cropped_to_nothing_meanwhile_is_gone(llama):
    cache = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9,tokens=4")
    read(llama, cache)
    cache.crop(-LENGTH)
    wanted = read(llama, ReFreeKVCache(llama, "full"), seed=2)
    torch.testing.assert_close(read(llama, cache, seed=2), wanted)
    following(llama, cache, 4)
    assert cache.report.verified.step == 0
    assert cache.report.tokens == LENGTH + 4


def test_rows_that_have_ended_do_not_count(llama, monkeypatch):
    """What is fed to a row behind its end token is padding."""
    seen = []
    original = verifying.Verification._counted
    monkeypatch.setattr(
        verifying.Verification, "_counted", lambda self, *args: seen.append(original(self, *args)) or seen[-1]
    )
    tokens = generated(llama, rows=2)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", int(tokens[0, 4]))
    first = int((tokens[0] == tokens[0, 4]).nonzero()[0])
    cache = ReFreeKVCache(llama, CUT, verify="answer:damage=1e9")
    generated(llama, rows=2, past_key_values=cache)
    if seen:  # unless both rows ended before
        assert seen[0][0].sum() == first + 1


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        (True, Recheck()),
        (False, None),
        (0.1, Recheck(damage=0.1)),
        ("prompt", Recheck(PROMPT, 32)),
        ("answer", Recheck(ANSWER, 16)),
        ("answer:damage=0.05,tokens=8", Recheck(ANSWER, 8, 0.05)),
        (Recheck(ANSWER), Recheck(ANSWER)),
    ],
)
def test_ways_to_say_what_is_read(text, reading):
    assert Recheck.parse(text) == reading
