"""Fidelity: metrics by hand, the shared prefill against separate physical runs, encoding."""

import copy
import math

import pytest
import torch

from helpers.fidelity import ASKED, NumberTokenizer, bench, job
from helpers.models import build, full_layers
from refreekv import ReFreeKVCache
from refreekv.evaluation import sweeps
from refreekv.evaluation.data.encoding import encode
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity import choosing, masked, metrics
from refreekv.evaluation.fidelity.decoding import until_stop

# -- metrics ------------------------------------------------------------------------------


def test_divergence_by_hand():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.8, 0.0]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.8, 0.0]]).log()
    kl, agrees = metrics.divergence(reference, torch.stack([reference, other]) + 3.0)
    torch.testing.assert_close(kl[0], torch.zeros(2), atol=1e-6, rtol=0)
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    torch.testing.assert_close(kl[1], torch.tensor([expected, 0.0]), atol=1e-6, rtol=0)
    assert agrees.tolist() == [[True, True], [False, True]]


def test_divergence_in_chunks_is_the_same(monkeypatch):
    torch.manual_seed(0)
    reference, rows = torch.randn(7, 11), torch.randn(3, 7, 11)
    whole = metrics.divergence(reference, rows)
    monkeypatch.setattr(metrics, "CHUNK", 23)
    torch.testing.assert_close(metrics.divergence(reference, rows), whole)
    for row in range(3):
        expected = torch.nn.functional.kl_div(
            rows[row].double().log_softmax(-1), reference.double().softmax(-1), reduction="none"
        ).sum(-1)
        torch.testing.assert_close(whole[0][row].double(), expected, atol=1e-6, rtol=1e-5)


def test_token_metrics_by_hand():
    kl = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    agrees = torch.tensor([[True, True, False, True], [True] * 4])
    first, second = metrics.token_metrics(kl, agrees)
    assert first.pop("kl_p99") == pytest.approx(2.0 + 0.97 * 3.0)
    assert first == {"kl_mean": 2.0, "kl_max": 5.0, "top1": 0.75, "same_path": False, "first_divergence": 2}
    assert (second["kl_mean"], second["same_path"], second["first_divergence"]) == (0.0, True, None)


def test_logits_that_are_not_numbers_are_an_error():
    kl, agrees = metrics.divergence(torch.zeros(2, 3), torch.full((1, 2, 3), math.nan))
    with pytest.raises(ValueError, match="not numbers"):
        metrics.token_metrics(kl, agrees)


def test_negative_log_likelihood_by_hand(monkeypatch):
    logits = torch.tensor([[[0.5, 0.5], [0.1, 0.9]], [[0.25, 0.75], [1.0, 1.0]]]).log()
    expected = torch.tensor([-math.log(0.5) - math.log(0.9), -math.log(0.25) - math.log(0.5)])
    target = torch.tensor([0, 1])
    torch.testing.assert_close(metrics.negative_log_likelihood(logits, target), expected)
    monkeypatch.setattr(metrics, "CHUNK", 2)
    torch.testing.assert_close(metrics.negative_log_likelihood(logits, target), expected)


# -- the shared prefill against separate physical runs --------------------------------------


def feed(model, ids, cache, start):
    ids = torch.tensor([ids])
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]


@torch.no_grad()
def reference_path(model, encoded, count):
    """The full cache's greedy tokens from the first on, each from a forward over the whole sequence."""
    sequence = encoded.context + encoded.question
    found = []
    for _ in range(count):
        found.append(int(model(torch.tensor([sequence + found])).logits[0, -1].argmax()))
    return found


@torch.no_grad()
def separately(model, encoded, policy, continuation):
    """KL and argmax of each token, and the answer's NLL change, from one policy's cache alone, token by token."""
    path = reference_path(model, encoded, continuation + 1)
    compared = path[:continuation] if encoded.question else path[1:]
    sequence = encoded.context + encoded.question
    after = sequence if encoded.question else sequence + path[:1]
    full = model(torch.tensor([after + compared[:-1]])).logits[0, -continuation:]
    cache = ReFreeKVCache(model, policy) if policy else None
    if cache is None:
        return full, full, compared, 0.0
    feed(model, encoded.context, cache, 0)
    start, report, records = len(encoded.context), cache.report, [layer.reports[0] for layer in cache.pruned_layers]
    rewound = copy.deepcopy(cache)
    others = [copy.copy(layer) for layer in cache.layers if layer not in cache.pruned_layers]

    def read(some_cache, ids):
        lines = []
        with some_cache.decoding():
            for at, token in enumerate(ids):
                lines.append(feed(model, [token], some_cache, start + at)[0])
        return torch.stack(lines)

    fed = after[start:] + compared[:-1]
    pruned = read(cache, fed)[-continuation:]

    answer = torch.tensor(encoded.answer)
    lines = model(torch.tensor([sequence + encoded.answer[:-1]])).logits[0, -len(answer) :].log_softmax(-1)
    full_nll = -lines.gather(1, answer[:, None])[:, 0]
    with_answer = encoded.question + encoded.answer[:-1]
    lines = read(rewound, with_answer).log_softmax(-1)
    wanted = answer if encoded.question else answer[1:]
    nll = -lines[-len(wanted) :].gather(1, wanted[:, None])[:, 0]
    change = (nll.sum() - full_nll[-len(wanted) :].sum()) / len(answer)
    return full, pruned, compared, (float(change), report, records, others)


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("gpt_oss", "eager")]
)
@pytest.mark.parametrize("question", [(), (7, 3, 90, 14)], ids=["one-turn", "question"])
def test_shared_prefill_equals_separate_runs(name, attention, question):
    model = build(name, attention=attention)
    one = job(question=question)
    (records,) = bench(model).measure([one])
    assert [record.policy for record in records] == list(ASKED)
    for record in records:
        full, pruned, path, rest = separately(model, one.encoded, ASKED[record.policy], 12)
        expected = torch.nn.functional.kl_div(
            pruned.double().log_softmax(-1), full.double().softmax(-1), reduction="none"
        ).sum(-1)
        assert full.argmax(-1).tolist() == path
        agrees = (pruned.argmax(-1) == full.argmax(-1)).tolist()
        assert record.kl_mean == pytest.approx(expected.mean().item(), abs=1e-4)
        assert record.kl_max == pytest.approx(expected.max().item(), abs=1e-4)
        assert record.top1 == sum(agrees) / 12
        assert record.same_path == all(agrees)
        assert record.first_divergence == (None if all(agrees) else agrees.index(False))
        assert (record.prompt_tokens, record.continuation_tokens) == (57, 12)
        if record.policy == "full":
            assert record.kl_max < 1e-5
            assert (record.budget, record.bytes_kept) == (1.0, record.bytes_full)
            assert record.answer_nll_change == pytest.approx(0.0, abs=1e-5)
            continue
        change, report, rows, _ = rest
        assert record.answer_nll_change == pytest.approx(change, abs=1e-4)
        assert record.budget == pytest.approx(report.budget)
        # Sliding-window layers: what is needed of them, in both.
        sliding = sum(layer.keys.numel() * 4 * 2 for layer in rest[3])
        before, after = (sum(getattr(x, f"bytes_{when}") for x in report.prunable) for when in ("before", "after"))
        assert (record.bytes_full, record.bytes_kept) == (before + sliding, after + sliding)
        assert len(record.kept_heads) == len(full_layers(model))
        expected_heads = [[kept / 57 for kept in row.kept_heads] for row in rows]
        assert record.kept_heads == [pytest.approx(layer, abs=1e-6) for layer in expected_heads]
        assert record.budget < 1.0
        assert record.kl_mean > 1e-3  # something was lost, so that equality means something


def check_against_separate_run(model, one, record, policy):
    """One record against the physical run of its policy alone."""
    full, pruned, _, (change, report, rows, _) = separately(model, one.encoded, policy, 12)
    expected = torch.nn.functional.kl_div(
        pruned.double().log_softmax(-1), full.double().softmax(-1), reduction="none"
    ).sum(-1)
    assert record.kl_mean == pytest.approx(expected.mean().item(), abs=1e-4)
    assert record.answer_nll_change == pytest.approx(change, abs=1e-4)
    assert record.budget == pytest.approx(report.budget)
    for row, shares in zip(rows, record.kept_heads, strict=True):
        # A layer that lost nothing says so with one number for all heads.
        kept = row.kept_heads if len(row.kept_heads) == len(shares) else row.kept_heads * len(shares)
        assert shares == pytest.approx([count / 57 for count in kept], abs=1e-6)


@pytest.mark.parametrize("together", [2, None], ids="layers-{}".format)
def test_every_policy_equals_a_separate_run(llama, monkeypatch, together):
    """Also where memory allows few layers at once."""
    if together:
        # 128 probe rows of 8 heads (expected attention, H2O) over 57 tokens, clipped to the prompt.
        monkeypatch.setitem(choosing.ROWS, "cpu", together * 8 * 57 * 57)
    # The default keeps short prompts whole: asked to look at them, too.
    short = "adaptive:min_length=8,window=6,spread=12,constant=0.2,lost_mass=0.5,follow=2,copying=0.3"
    chosen = sweeps.choose([short], suites=["peers"])
    one = job(asked={"full": None, **chosen})
    (records,) = bench(llama).measure([one])
    assert len(records) == len(chosen) + 1
    assert (records[1].policy.partition(":")[0], records[1].budget < 1) == ("adaptive", True)
    for record in records[1:]:
        check_against_separate_run(llama, one, record, chosen[record.policy])


def test_little_memory_for_attention_changes_nothing(monkeypatch):
    model = build("gemma3", attention="sdpa")
    (expected,) = bench(model).measure([job(question=(4, 5))])
    monkeypatch.setitem(masked.LOGITS, "cpu", 1)
    (got,) = bench(model).measure([job(question=(4, 5))])
    assert [record.kl_mean for record in got] == pytest.approx([record.kl_mean for record in expected], abs=1e-6)


def test_uneven_heads_differ_in_the_record(llama):
    (records,) = bench(llama).measure([job()])
    (record,) = [record for record in records if record.policy == "uneven"]
    assert len(record.kept_heads[0]) == 2
    assert record.kept_heads[0][0] > record.kept_heads[0][1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("settings", [{"rows": 2}, {"rows": 1}, {"together": 3}])
def test_batches_do_not_change_results(name, settings):
    model = build(name, attention="sdpa")
    jobs = [job(40, seed=1), job(11, seed=2, question=(4, 5)), job(57, seed=3)]
    expected = list(bench(model, rows=16, together=1).measure(jobs))
    got = list(bench(model, **settings).measure(jobs))
    for some, others in zip(expected, got, strict=True):
        assert [record.policy for record in some] == [record.policy for record in others]
        for one, other in zip(some, others, strict=True):
            assert other.sample == one.sample
            assert other.kl_mean == pytest.approx(one.kl_mean, abs=1e-5)
            assert other.same_path == one.same_path
            assert other.budget == one.budget


def test_model_is_left_as_it_was(model):
    before = copy.deepcopy(vars(model.config))
    attributes = set(vars(model))
    list(bench(model).measure([job()]))
    assert vars(model.config) == before
    assert set(vars(model)) == attributes
    assert not model._forward_hooks


# -- stops and short answers --------- -------------------------------------------------------


def test_answers_are_compared_to_their_end(llama):
    encoded = job().encoded
    path = reference_path(llama, encoded, 8)
    stop = next(index for index, token in enumerate(path) if token not in path[:index] and index >= 3)
    llama.generation_config.eos_token_id = path[stop]
    try:
        (records,) = bench(llama).measure([job()])
        (first_ends,) = bench(llama).measure([job(question=(7, 3))])
        llama.generation_config.eos_token_id = path[0]
        (at_once,) = bench(llama).measure([job()])
    finally:
        llama.generation_config.eos_token_id = None
    assert {record.continuation_tokens for record in records} == {stop}
    assert records[0].same_path
    assert first_ends[0].same_path
    assert {record.continuation_tokens for record in at_once} == {1}
    assert until_stop([3, 4, 5], {4}) == [3, 4]
    assert until_stop([3, 4, 5], {9}) == [3, 4, 5]


def test_answers_of_one_token_and_none(llama):
    (records,) = bench(llama).measure([job(answer=(5,))])
    assert {record.answer_nll_change for record in records} == {0.0}  # the prefill predicts it
    (records,) = bench(llama).measure([job(answer=(5,), question=(8, 9))])
    assert all(abs(record.answer_nll_change) > 1e-5 for record in records if record.policy != "full")
    (records,) = bench(llama).measure([job(answer=())])
    assert {record.answer_nll_change for record in records} == {None}


@pytest.mark.parametrize("name", ["continuation", "rows", "together"])
def test_settings_that_make_no_sense(llama, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        bench(llama, **{name: 0})


# -- samples to tokens ------------------------------------------------------------------------


class ChatTokenizer(NumberTokenizer):
    chat_template = "yes"

    def __init__(self):
        self.special = []

    def __call__(self, text, *, add_special_tokens, **_):
        self.special.append(add_special_tokens)
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        if messages[0]["role"] == "system" and getattr(self, "no_system", False):
            from jinja2 import TemplateError

            raise TemplateError("System role not supported")
        return "".join(f"<{message['role']}>{message['content'].strip()}" for message in messages) + "<assistant>"


def spelled(ids):
    return "".join(map(chr, ids))


def test_encoding_of_chat_questions_and_answers():
    tokenizer = ChatTokenizer()
    encoded = encode(tokenizer, Sample("1", "f", "text", system="be", question="why?", answers=("so", "no")))
    assert encoded.text == spelled(encoded.context) == "<system>be<user>text"
    assert spelled(encoded.question) == "\n\nwhy?<assistant>"
    assert spelled(encoded.answer) == "so"
    assert not any(tokenizer.special)
    tokenizer.no_system = True
    encoded = encode(tokenizer, Sample("1", "f", "text", system="be"))
    assert spelled(encoded.context) == "<user>be\n\ntext<assistant>"
    assert (encoded.question, encoded.answer) == ([], [])


def test_encoding_of_plain_text():
    tokenizer = ChatTokenizer()
    encoded = encode(tokenizer, Sample("1", "f", "text", answers=("so",), chat=False))
    assert (spelled(encoded.context), spelled(encoded.answer)) == ("text", " so")
    assert tokenizer.special == [True, False]
    with pytest.raises(ValueError, match="empty prompt"):
        encode(tokenizer, Sample("1", "f", "", chat=False))
