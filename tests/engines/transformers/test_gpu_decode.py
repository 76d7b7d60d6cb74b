"""Decoding through CUDA graphs: eager decoding is the judge."""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import refreekv
from helpers.driving import POLICIES, RAGGED, Uneven
from helpers.models import build, prompts
from refreekv.engines.transformers import graph
from refreekv.engines.transformers.attachment import attached
from refreekv.storage.arena import KVArena
from refreekv.storage.leveled import LeveledKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def answers(model, ids, mask, decode, policy="refreekv", steps=60, kv_dtype=None, **settings):
    cache = refreekv.ReFreeKVCache(model, policy, decode=decode, kv_dtype=kv_dtype)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out, cache


def policy_of(name):
    if name == "uneven":
        return Uneven()
    kind, parameters = POLICIES.get(name, (name, {}))
    return refreekv.policies.create(kind, **parameters)


@pytest.fixture
def captures(monkeypatch):
    """What was captured."""
    made = []
    original = graph.Step.__init__

    def noted(self, *args):
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(graph.Step, "__init__", noted)
    return made


@pytest.mark.parametrize("policy", ["refreekv", "heavy-hitter", "window", "full"])
@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_a_captured_step_gives_the_tokens_of_eager_decoding(policy, lengths, captures):
    model = build("llama", attention="sdpa").cuda()
    ids, mask = (part.cuda() for part in prompts(lengths, seed=3))
    eager, _ = answers(model, ids, mask, "eager", policy_of(policy))
    captured, cache = answers(model, ids, mask, "graph", policy_of(policy))
    assert torch.equal(eager.sequences, captured.sequences)
    for one, other in zip(eager.logits, captured.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert len(captures) == 1
    assert captures[0]._graph is not None
    # 60 tokens are more than the first room, so that storage moved under the graph.
    assert all(isinstance(layer.ragged, KVArena) for layer in cache.pruned_layers)
    judge = build("llama", attention="sdpa")
    plain, _ = answers(judge, ids.cpu(), mask.cpu(), "eager", policy_of(policy))
    assert torch.equal(plain.sequences, captured.sequences.cpu())


@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_an_answer_that_ends_early_leaves_the_cache_as_eager_decoding_does(lengths):
    """Stop checks are read a token late: the token too many is taken back."""
    model = build("llama", attention="sdpa").cuda()
    ids, mask = (part.cuda() for part in prompts(lengths, seed=3))
    free, _ = answers(model, ids, mask, "eager")
    ends = free.sequences[:, ids.shape[1] + 20].tolist()
    outcome = []
    for decode in ("eager", "graph"):
        out, cache = answers(model, ids, mask, decode, eos_token_id=ends, pad_token_id=0)
        held = [layer.ragged.lengths for layer in cache.pruned_layers]
        for layer in cache.pruned_layers:
            assert layer.ragged.table.tolist() == layer.ragged._lines()
        more = torch.cat([out.sequences, torch.ones_like(ids[:, :5])], dim=1)
        longer = torch.cat([mask, torch.ones_like(more[:, mask.shape[1] :])], dim=1)
        again = model.generate(more, attention_mask=longer, past_key_values=cache, max_new_tokens=9, do_sample=False)
        outcome.append((out.sequences.tolist(), held, len(out.logits), again.tolist()))
    assert outcome[0] == outcome[1]
    assert len(outcome[0][0][0]) < ids.shape[1] + 60


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("policy", ["refreekv", "uneven", "full"])
@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
@pytest.mark.parametrize("kind", ["int8:recent=8", "int4:recent=8", "k4v2+k4v4+k6v6+int8:recent=8"])
def test_codes_are_decoded_through_captured_steps(kind, lengths, policy, name, captures):
    model = build(name, attention="sdpa", head_dim=16).cuda()
    ids, mask = (part.cuda() for part in prompts(lengths, seed=3))
    eager, _ = answers(model, ids, mask, "eager", policy_of(policy), kv_dtype=kind)
    captured, cache = answers(model, ids, mask, "graph", policy_of(policy), kv_dtype=kind)
    assert len(captures) == 1
    assert captures[0]._graph is not None
    assert all(isinstance(layer.ragged, LeveledKV) for layer in cache.pruned_layers)
    # The same kernels, but other ones around them: an element half-way between two codes may go to either, and
    # then logits that are as good as equal change places. From there on they differ by up to 3 % in a row of many.
    tokens = eager.sequences.shape[1] - ids.shape[1]
    for row in range(len(lengths)):
        same = (eager.sequences[row] == captured.sequences[row])[-tokens:].long().cumprod(0).sum()
        pairs = zip(eager.logits[: int(same) + 1], captured.logits, strict=False)
        far = [float((one[row] - other[row]).norm() / other[row].norm()) for one, other in pairs]
        assert sorted(far)[len(far) // 2] < 1e-3
        assert max(far) < 0.05, far


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("refreekv", "int8:recent=8"), ("uneven", "int8:recent=8"), ("uneven", "k6v6+int8:recent=8,generated=0")],
)
def test_coded_prompts_are_stored_as_on_the_cpu(policy, kind):
    model = build("llama", attention="sdpa", head_dim=16)
    ids, mask = prompts(RAGGED, seed=3)
    caches = []
    for device in ("cpu", "cuda"):
        caches.append(refreekv.ReFreeKVCache(model.to(device), policy_of(policy), kv_dtype=kind))
        caches[-1].state.arena = True
        with torch.no_grad():
            model(ids.to(device), attention_mask=mask.to(device), past_key_values=caches[-1])
    assert caches[0].report.bytes_after == caches[1].report.bytes_after
    for one, other in zip(*(cache.pruned_layers for cache in caches), strict=True):
        assert [arena.lengths for arena in one.ragged.tables] == [arena.lengths for arena in other.ragged.tables]
        assert torch.equal(one.ragged.lines.members.packed, other.ragged.lines.members.packed.cpu())
        for mine, theirs in zip(one.kept_columns, other.kept_columns, strict=True):
            assert mine.as_ranges() == theirs.as_ranges()
        for row in range(len(RAGGED)):
            for judged, found in zip(one.ragged.segments(row), other.ragged.segments(row), strict=True):
                for head, mine in zip(judged, found, strict=True):
                    assert (mine.cpu() - head).norm() < 0.02 * head.norm()


def test_int8_and_full_precision_take_turns_on_one_model(captures):
    model = build("llama", attention="sdpa", head_dim=16).cuda()
    ids, mask = (part.cuda() for part in prompts((60,), seed=3))
    outcome = [answers(model, ids, mask, "graph", kv_dtype=kind)[0].sequences for kind in (None, "int8:recent=8") * 2]
    assert torch.equal(outcome[0], outcome[2])
    assert torch.equal(outcome[1], outcome[3])
    assert [step.reads[0].form.packed == () for step in captures[:2]] == [True, False]


def test_one_capture_for_each_batch_size(captures):
    model = build("llama", attention="sdpa").cuda()
    with refreekv.compress(model, "streaming-llm", ratio=0.5) as kv:
        for lengths in [(30,), (90,), (41, 22), (64,), (80, 17)]:
            ids, mask = (part.cuda() for part in prompts(lengths, seed=1))
            out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
            assert out.shape[1] == max(lengths) + 9
            assert kv.report.bytes_after < kv.report.bytes_before
    assert len(captures) == 2


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "mistral"])
def test_other_architectures(name, captures):
    model = build(name, attention="sdpa").cuda()
    ids, mask = (part.cuda() for part in prompts((50, 33), seed=5))
    eager, _ = answers(model, ids, mask, "eager")
    captured, _ = answers(model, ids, mask, "graph")
    assert torch.equal(eager.sequences, captured.sequences)
    assert len(captures) == 1


def test_what_cannot_be_captured_says_so_once_and_decodes(caplog):
    model = build("qwen3_moe", attention="sdpa").cuda()
    hybrid = build("gemma3", attention="sdpa").cuda()
    ids, mask = (part.cuda() for part in prompts((50, 33), seed=5))
    for tried in (model, hybrid):
        eager, _ = answers(tried, ids, mask, "eager", steps=12)
        with caplog.at_level(logging.WARNING, logger="refreekv"):
            captured, _ = answers(tried, ids, mask, "graph", steps=12)
        assert torch.equal(eager.sequences, captured.sequences)
    assert len([record for record in caplog.records if record.name == "refreekv"]) <= 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("policy", ["adaptive", "refreekv", "uneven", "window", "joint", "full"])
@pytest.mark.parametrize("spread", [False, True], ids=["on the second", "on both"])
def test_models_on_other_devices_than_the_first(policy, spread, captures, caplog):
    from accelerate import dispatch_model

    model = build("llama", attention="sdpa")
    ids, mask = prompts(RAGGED, seed=3)
    judge, _ = answers(model, ids, mask, "eager", policy_of(policy), pad_token_id=0)
    if spread:
        where = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
        model = dispatch_model(model, {**where, **{f"model.layers.{layer}": layer // 2 for layer in range(4)}})
        ids, mask = ids.to("cuda:0"), mask.to("cuda:0")
    else:
        model, ids, mask = model.to("cuda:1"), ids.to("cuda:1"), mask.to("cuda:1")
    assert torch.cuda.current_device() == 0
    with caplog.at_level(logging.WARNING, logger="refreekv"):
        out, cache = answers(model, ids, mask, "graph", policy_of(policy), pad_token_id=0)
    assert torch.equal(out.sequences.cpu(), judge.sequences)
    assert [layer.ragged.keys.device.index for layer in cache.pruned_layers] == ([0, 0, 1, 1] if spread else [1] * 4)
    assert ("spread over several devices" in caplog.text) == spread
    assert len(captures) == (not spread)


class SlowAndWaiting(torch.nn.Module):
    """An embedding that is slow to begin, and waits for the device once it is not watched for the first time."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.weight, self.calls = embedding, embedding.weight, 0

    def forward(self, ids):
        if ids.shape[1] > 1:
            return self.embedding(ids)
        self.calls += 1
        if self.calls <= 2:
            torch.cuda._sleep(200_000_000)
        found = self.embedding(ids)
        if self.calls == 2:
            found.sum().item()  # the second warm-up is where waiting is an error
        return found


@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_what_a_refused_capture_launched_harms_nobody(lengths, captures):
    model = build("llama", attention="sdpa").cuda()
    ids, mask = (part.cuda() for part in prompts(lengths, seed=3))
    eager, _ = answers(model, ids, mask, "eager")
    model.model.embed_tokens = SlowAndWaiting(model.model.embed_tokens)
    refused, _ = answers(model, ids, mask, "graph")
    assert len(captures) == 1
    assert captures[0]._graph is None
    assert torch.equal(eager.sequences, refused.sequences)


def test_the_memory_of_an_answer_and_of_graphs_goes_away():
    model = build("llama", attention="sdpa").cuda()
    ids = prompts((2000,), seed=1)[0].cuda()
    with refreekv.compress(model, "full"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with refreekv.compress(model, "full"):
        for _ in range(3):
            model.generate(ids, max_new_tokens=4, do_sample=False)
            gc.collect()
            # The logits' place, the step's inputs and what the graph's pool keeps: not the K/V (2 MiB).
            assert torch.cuda.memory_allocated() - before < 2**20
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**16


@pytest.mark.real_model
def test_smollm2_200_tokens(smollm2, captures):
    model, tokenizer = smollm2
    model = model.cuda()
    texts = [
        "The history of the lighthouse begins",
        "In a small town by the sea there lived a baker who",
        "Water boils at",
        "List ten animals and say where each of them lives:",
        "def fibonacci(n):",
        "Once upon a time",
        "The three laws of motion are",
        "Dear Sir or Madam, I am writing to",
    ]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    long = tokenizer(" ".join(texts * 8), return_tensors="pt").to("cuda")
    several = tokenizer([f"{t} {' '.join(texts)}" for t in texts], return_tensors="pt", padding=True).to("cuda")
    for inputs in (long, several):
        outcome = []
        for decode in ("eager", "graph"):
            # Ends at commas and full stops for some rows, so that these finish early.
            ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "!"])
            with refreekv.compress(model, "streaming-llm", ratio=0.5, decode=decode):
                outcome.append(model.generate(**inputs, max_new_tokens=200, do_sample=False, eos_token_id=ends))
        assert torch.equal(*outcome)
    assert len(captures) == 2
    model.cpu()


def test_threads_with_blocks_of_their_own_share_captured_steps(captures):
    """One model, four policies and plain calls beside them: all as alone, whoever's turn it is."""
    model = build("llama", attention="sdpa").cuda()
    specs = [*POLICIES.values(), ("full", {}), None]
    asked = [prompts((length,), seed=length)[0].cuda() for length in (50, 333)]

    def answer(job):
        spec, ids = job
        if spec is None:
            return model.generate(ids, max_new_tokens=20, do_sample=False).tolist(), None
        with refreekv.compress(model, spec[0], **spec[1]) as kv:
            tokens = model.generate(ids, max_new_tokens=20, do_sample=False).tolist()
        return tokens, [[row.kept_heads for row in layer.rows] for layer in kv.report.prunable]

    jobs = [(spec, ids) for spec in specs for ids in asked]
    with attached(model):
        wanted = [answer(job) for job in jobs]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(answer, jobs * 8)) == wanted * 8
    assert len(captures) == 1
