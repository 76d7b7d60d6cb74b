"""``refreekv chat``: turns on one pruned cache against the same tokens read at once."""

import io
import json
import signal
import sys
import types
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import refreekv
from helpers.command_line import DIALOGUE, assert_refused, runner, save_chat_model, words
from refreekv.cli import loading, running
from refreekv.cli.app import UserError
from refreekv.cli.chatting import printable, status_of, stop_on_interrupt
from refreekv.cli.conversation import Conversation, MessageError, Sampling
from refreekv.serving.answering import Listener

FULL = refreekv.policies.create("full")
ADAPTIVE = refreekv.policies.create(
    "adaptive", min_length=8, window=4, constant=0.2, hit=0.9, follow=1, lost_mass=0.6, copying=0.9, evict_unit=1.0
)
PRUNING = refreekv.policies.create("refreekv", threshold=0.1, frozen_layers=1, probe_rows=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="module")
def loaded(folder):
    return loading.load(loading.find(str(folder)))


@pytest.fixture
def run(capsys):
    return runner(capsys)


def greedy(loaded, tokens, count):
    """What a full cache makes of the same tokens, read at once."""
    ids = torch.tensor([tokens])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(tokens) :].tolist()


def fed(loaded):
    """Collects how many tokens each forward pass is given."""
    counts = []
    hook = loaded.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(
            (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[1]
        ),
        with_kwargs=True,
    )
    return counts, hook


# -- turns ------------------------------------------------------------------------------


def test_each_message_feeds_its_own_tokens_and_the_answers_are_those_of_one_long_prompt(loaded):
    talk = Conversation(loaded, FULL, max_new_tokens=7)
    counts, hook = fed(loaded)
    try:
        for turn, size in enumerate((30, 12, 5)):
            counts.clear()
            before = len(talk.tokens)
            done = talk.say(words(size, turn))
            prompt, answer = talk.tokens[:-7], talk.tokens[-7:]
            # <user>, the words, <end>, <assistant>; later <end> of the cut answer and its last token, never fed before.
            new = size + 3 if turn == 0 else size + 5
            assert counts == [new, *[1] * 6]
            assert (done.prompt_tokens, done.read_tokens, done.answer_tokens) == (len(prompt), new, 7)
            assert len(prompt) == before + size + (3 if turn == 0 else 4)
            assert done.ended == "length"
            hook.remove()
            assert greedy(loaded, prompt, 7) == answer
            counts, hook = fed(loaded)
    finally:
        hook.remove()
    texts = loaded.tokenizer.decode(talk.tokens).split("<user>")[1:]
    assert [text.split("<end> <assistant>")[0].strip() for text in texts] == [
        words(n, t) for t, n in enumerate((30, 12, 5))
    ]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3


def test_the_same_pruned_cache_goes_on_and_holds_less(loaded):
    talk = Conversation(loaded, PRUNING, max_new_tokens=5)
    talk.say(words(60, 1))
    first = talk.report
    turn = talk.say(words(20, 2))
    assert 0 < first.bytes_after < first.bytes_before
    assert turn.report.tokens == turn.prompt_tokens + 4
    assert turn.report.bytes_after < turn.report.bytes_before
    assert turn.report.prunable[-1].rows[0].prompt_length == turn.prompt_tokens

    # The library's own way of a second turn on the same cache.
    cache = refreekv.ReFreeKVCache(loaded.model, PRUNING)
    end = first.tokens - 4
    for stop in (end, turn.prompt_tokens):
        ids = torch.tensor([talk.tokens[:stop]])
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, do_sample=False
        )
        assert out[0, stop:].tolist() == talk.tokens[stop : stop + 5]
    assert cache.report == turn.report


@pytest.mark.parametrize("policy", [FULL, PRUNING], ids=["full", "pruning"])
def test_a_stopped_answer_is_part_of_the_conversation(loaded, policy):
    talk = Conversation(loaded, policy, max_new_tokens=50)
    pieces = []
    stop = Listener(on_text=lambda text, tokens, seconds: pieces.append(text), stopped=lambda: len(pieces) >= 4)
    turn = talk.say(words(40, 3), stop)
    assert turn.ended == "stopped"
    assert turn.answer_tokens in (4, 5), "asked after each token, by some releases before it is handed on"
    assert turn.answer == "".join(pieces).strip() == talk.messages[-1]["content"]
    talk.max_new_tokens = 6
    talk.say(words(8, 4))
    assert loaded.tokenizer.decode(talk.tokens).count(f"{turn.answer} <end> <user> {words(8, 4)} <end>") == 1
    if policy is FULL:
        assert greedy(loaded, talk.tokens[:-6], 6) == talk.tokens[-6:]


# In 16 bits: coded storage may keep spare lines that the message's chunks took.
@pytest.mark.parametrize("policy", [FULL, PRUNING, replace(ADAPTIVE, bits=16)], ids=["full", "pruning", "adaptive"])
@pytest.mark.parametrize("first", [True, False], ids=["first-message", "second-message"])
def test_a_message_stopped_while_it_is_read_leaves_no_trace(loaded, policy, first):
    talks = [Conversation(loaded, policy, max_new_tokens=5, chunk=16) for _ in range(2)]
    if not first:
        for talk in talks:
            talk.say(words(50, 5))
    disturbed, plain = talks
    read = []
    listener = Listener(on_read=lambda done, total: read.append((done, total)), stopped=lambda: len(read) >= 3)
    with pytest.raises(MessageError, match="stopped while reading"):
        disturbed.say(words(70, 6), listener)
    assert read[-1][0] == 32  # two of its chunks were in the cache
    assert disturbed.messages == plain.messages
    assert disturbed.report == plain.report
    answers = [talk.say(words(40, 7)) for talk in talks]
    assert disturbed.tokens == plain.tokens
    assert answers[0].report == answers[1].report


@pytest.mark.parametrize("policy", [PRUNING, ADAPTIVE], ids=["pruning", "adaptive"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_a_message_change_nothing(loaded, policy, chunk):
    whole = Conversation(loaded, policy, max_new_tokens=5)
    pieces = Conversation(loaded, policy, max_new_tokens=5, chunk=chunk)
    for seed in (8, 9):
        ours, theirs = pieces.say(words(45, seed)), whole.say(words(45, seed))
        assert pieces.tokens == whole.tokens
        assert ours.report.bytes_after == theirs.report.bytes_after < theirs.report.bytes_before


def test_an_answer_that_ends_by_itself_is_not_ended_twice(tmp_path):
    model = loading.load(loading.find(str(save_chat_model(tmp_path / "ending", end=True))))
    talk = Conversation(model, FULL, max_new_tokens=60)
    turn = talk.say(words(20, 1))
    assert turn.ended == "end", "the template's <end> stops, though the model's settings name no end token"
    assert talk.tokens[-1] == 5
    assert "<end>" not in turn.answer
    talk.say(words(3, 2))
    text = model.tokenizer.decode(talk.tokens)
    assert "<end> <end>" not in text
    assert f"<end> <user> {words(3, 2)} <end> <assistant>" in text


def test_another_policy_reads_the_conversation_again(loaded):
    talk = Conversation(loaded, PRUNING, max_new_tokens=5)
    talk.say(words(50, 1))
    talk.use(FULL)
    assert talk.report is None
    turn = talk.say(words(4, 2))
    assert turn.read_tokens == turn.prompt_tokens
    assert turn.report.bytes_after == turn.report.bytes_before
    assert greedy(loaded, talk.tokens[:-5], 5) == talk.tokens[-5:]
    talk.reset()
    assert (talk.tokens, talk.turns, talk.messages, talk.report) == ([], [], [], None)


def test_sampling_with_a_seed_can_be_repeated(loaded):
    def tokens(temperature, seed):
        talk = Conversation(loaded, FULL, max_new_tokens=12, sampling=Sampling(temperature, seed))
        talk.say(words(20, 1))
        return talk.tokens[-12:]

    assert tokens(5.0, 1) == tokens(5.0, 1) != tokens(5.0, 2)
    assert tokens(0, 1) == tokens(None, 2)  # the model's own settings are greedy


def test_the_context_ends_an_answer_and_refuses_a_message(tmp_path):
    model = loading.load(loading.find(str(save_chat_model(tmp_path / "short", context=64))))
    talk = Conversation(model, PRUNING, max_new_tokens=50)
    with pytest.raises(MessageError, match=r"has 83 tokens, but the context of short is 64; /reset"):
        talk.say(words(80, 1))
    assert talk.say(words(40, 1)).ended == "context"
    assert len(talk.tokens) == 64
    with pytest.raises(MessageError, match="the context of short is 64"):
        talk.say("w1")


def test_quantised_storage(loaded):
    talk = Conversation(loaded, PRUNING, kv_dtype=refreekv.KVDtype.parse("int8:recent=4"), max_new_tokens=5)
    reports = [talk.say(words(200, seed)).report for seed in (1, 2)]
    plain = Conversation(loaded, PRUNING, max_new_tokens=5)
    plain.say(words(200, 1))
    assert reports[0].bytes_after < 0.6 * plain.report.bytes_after
    assert reports[1].kv_dtype is not None


def test_what_is_evicted_comes_back_for_the_next_message(loaded):
    """Of answers of one token each: the next message is answered as over the full cache."""
    store = refreekv.HostStore()
    talk = Conversation(loaded, PRUNING, max_new_tokens=1, keep_evicted=store)
    for turn, size in enumerate((60, 20, 10)):
        done = talk.say(words(size, turn))
        assert greedy(loaded, talk.tokens[:-1], 1) == talk.tokens[-1:]
        assert done.report.budget < 1
        assert done.report.remembered.restored is (True if turn else None)
    assert "on the host" in str(status_of(done))
    talk.use(ADAPTIVE)
    assert talk.say(words(5, 4)).report.remembered.restored is None  # all is read again
    lost = replace(done.report, remembered=replace(done.report.remembered, lost="no room"))
    assert "evicted is gone" in str(status_of(replace(done, report=lost)))
    talk.reset()
    assert store.nbytes == (0, 0)


def test_a_message_that_is_stopped_leaves_everything_there(loaded):
    talk = Conversation(loaded, PRUNING, max_new_tokens=1, chunk=16, keep_evicted=refreekv.HostStore())
    talk.say(words(60, 1))
    reads = []
    with pytest.raises(MessageError, match="stopped while reading"):
        talk.say(words(50, 2), Listener(on_read=lambda read, _: reads.append(read), stopped=lambda: len(reads) > 2))
    talk.say(words(20, 3))
    assert greedy(loaded, talk.tokens[:-1], 1) == talk.tokens[-1:]


def test_where_evicted_entries_go(run, folder, tmp_path):
    cpu = torch.device("cpu")
    assert running.store_of("auto", cpu) is None
    assert running.store_of("off", torch.device("cuda")) is None
    assert running.store_of("auto", torch.device("cuda")).folder is None
    assert running.store_of(f"host:limit=1GiB,folder={tmp_path}", cpu).limit == 2**30
    with pytest.raises(UserError, match=r"--keep-evicted must be auto, off, 'host'"):
        running.store_of("disk", cpu)
    assert_refused(run("chat", "--model", str(folder), "--keep-evicted", "host:folder=/no/where"), "is no folder")


# -- templates --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 1000])
def test_verified_turns(loaded, chunk):
    """Each message's end is read again; where everything has to stay, answers are the full cache's."""
    strict, loose, full = (
        Conversation(loaded, policy, verify=verify, max_new_tokens=6, sampling=Sampling(temperature=0), chunk=chunk)
        for policy, verify in ((ADAPTIVE, 1e-9), (ADAPTIVE, 1e9), (FULL, False))
    )
    for count in (60, 40):
        answers = [conversation.say(words(count, count)).answer for conversation in (strict, loose, full)]
        assert answers[0] == answers[2]
    assert strict.report.verified.policy == "full"
    assert loose.report.verified.step == 0
    assert loose.report.bytes_after < full.report.bytes_after
    assert "step 1 of 4" in str(status_of(loose.turns[-1]))
    assert "step" not in str(status_of(full.turns[-1]))


def test_without_a_template_the_text_goes_on(tmp_path):
    model = loading.load(loading.find(str(save_chat_model(tmp_path / "base", template=None))))
    talk = Conversation(model, FULL, max_new_tokens=4)
    talk.say("w1 w2")
    first = list(talk.tokens)
    talk.say("w3")
    assert talk.tokens[: len(first)] == first
    assert model.tokenizer.decode(talk.tokens[: len(first) + 1]).startswith("w1 w2")
    assert model.tokenizer.decode(talk.tokens[len(first) :]).split()[0] == "w3"
    with pytest.raises(UserError, match="base has no chat template, so there is no place for a system prompt"):
        Conversation(model, FULL, system="w1")


@pytest.mark.parametrize(
    ("template", "system", "fragment"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + DIALOGUE,
            "w1",
            "does not take this system prompt: no system role",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", None, "does not show answers"),
        ("{{ nonsense( }}", None, "does not take this conversation"),
    ],
)
def test_templates_that_cannot_hold_a_conversation(tmp_path, template, system, fragment):
    model = loading.load(loading.find(str(save_chat_model(tmp_path / "odd", template))))
    with pytest.raises(UserError, match=fragment):
        Conversation(model, FULL, system=system)


def test_a_system_prompt_comes_first(loaded):
    talk = Conversation(loaded, FULL, system="w7 w8", max_new_tokens=3)
    talk.say("w1")
    assert loaded.tokenizer.decode(talk.tokens).startswith("<system> w7 w8 <end> <user> w1 <end>")
    talk.reset()
    talk.say("w2")
    assert loaded.tokenizer.decode(talk.tokens).startswith("<system> w7 w8 <end> <user> w2 <end>")


# -- the command ------------------------------------------------------------------------


@pytest.fixture
def chat(run, folder, monkeypatch):
    """Runs the command on lines of input."""

    def call(*lines, options=(), model=folder):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", str(model), "--max-new-tokens", "6", *options)

    return call


def test_messages_from_a_pipe(chat, loaded):
    outcome = chat(words(40, 1), words(3, 2), options=("--policy", "streaming-llm:ratio=0.5"))
    talk = Conversation(loaded, refreekv.policies.create("streaming-llm", ratio=0.5), max_new_tokens=6)
    turns = [talk.say(words(40, 1)), talk.say(words(3, 2))]
    assert outcome.code == 0
    assert outcome.out == "".join(f"{turn.answer}\n" for turn in turns)
    [status] = [line for line in outcome.err.splitlines() if line.startswith("43 prompt tokens")]
    report = turns[0].report
    assert f"budget {report.budget:.1%}" in status
    assert f"K/V {report.bytes_after / 1024:.1f} KiB of {report.bytes_before / 1024:.1f} KiB" in status
    assert "tokens/s" in status
    assert "chatty, float32 on cpu" in outcome.err


def test_json_is_the_transcript_and_nothing_else(chat):
    outcome = chat(words(30, 1), "/report", "/nope", words(3, 2), options=("--json", "--kv-dtype", "int8"))
    result = json.loads(outcome.out)
    assert [message["role"] for message in result["messages"]] == ["user", "assistant"] * 2
    assert [turn["message"] for turn in result["turns"]] == [words(30, 1), words(3, 2)]
    assert [turn["answer"] for turn in result["turns"]] == [m["content"] for m in result["messages"][1::2]]
    assert result["turns"][1]["report"]["tokens"] == result["turns"][1]["prompt_tokens"] + 5
    assert result["kv_dtype"].startswith("int8")
    assert "there is no command /nope" in outcome.err
    assert result["turns"][0]["answer"] in outcome.err


def test_commands(chat, tmp_path):
    document, saved, page = tmp_path / "doc.txt", tmp_path / "talk.json", tmp_path / "talk.md"
    document.write_text(words(20, 9))
    outcome = chat(
        "/help", "/report", "/policy", f"/file {document}", words(10, 1), "/report",
        "/policy streaming-llm:size=8", words(3, 2), "/policy refrekv", f"/save {saved}", f"/save {page}",
        "/save", f"/save {tmp_path}", "/file", f"/file {tmp_path / 'none'}",
        "/reset", '"""w1', "/not a command", 'w2"""', f"/save {tmp_path / 'after.json'}", "/quit", "w3",
    )  # fmt: skip
    assert outcome.code == 0
    said = outcome.err
    from refreekv.engines import DEFAULT_POLICY

    assert f"Policy: {refreekv.policies.create(DEFAULT_POLICY).spec}" in said
    assert "Ctrl-C stops an answer" in said
    assert "There is nothing in the cache yet." in said
    assert said.count("Kept per layer") == 1
    assert "tokens are read again with your next message" in said
    assert "did you mean 'refreekv'?" in said
    assert "/save needs the name of a file" in said
    assert f"cannot write {tmp_path}" in said
    assert "/file needs the name" in said
    assert "cannot read" in said
    result = json.loads(saved.read_text())
    assert result["turns"][0]["message"] == f"{words(20, 9)}\n\n{words(10, 1)}"
    assert result["turns"][1]["message"] == words(3, 2)
    assert result["turns"][1]["read_tokens"] == result["turns"][1]["prompt_tokens"]
    assert result["turns"][1]["report"]["policy"].startswith("streaming-llm")
    text = page.read_text()
    assert all(turn["answer"] in text and turn["message"] in text for turn in result["turns"])
    after = json.loads((tmp_path / "after.json").read_text())
    assert [turn["message"] for turn in after["turns"]] == ["w1\n/not a command\nw2"]
    assert len(outcome.out.splitlines()) == 3, "nothing is answered after /quit"


def test_a_base_model_is_named_as_one(chat, tmp_path):
    outcome = chat("w1 w2", model=save_chat_model(tmp_path / "base", template=None))
    assert outcome.code == 0
    assert "base has no chat template: what you type is plain text that it continues" in outcome.err


def test_a_message_that_does_not_fit_is_one_line_and_the_chat_goes_on(chat, tmp_path):
    model = save_chat_model(tmp_path / "short", context=64)
    outcome = chat(words(80, 1), words(50, 1), words(30, 1), "/reset", "w1", model=model)
    assert outcome.code == 0
    assert sum("the context of short is 64; /reset starts a new one" in line for line in outcome.err.splitlines()) == 2
    assert len(outcome.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--policy", "refrekv"), "did you mean 'refreekv'?"),
        (("--kv-dtype", "int9"), "int9"),
        (("--weights", "int3"), "--weights must be one of auto, int8, int4, packed, unpacked; got 'int3'"),
        (("--weights", "packed"), "--weights packed is for .gguf files"),
        (("--device-map", "everywhere"), "--device-map must be one of auto"),
        (("--device-map", "auto", "--device", "cpu"), "--device and --device-map exclude each other"),
        (("--temperature", "-1"), "--temperature must be a number from 0 on"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("--dtype", "float8"), "--dtype must be one of"),
    ],
)
def test_bad_options_are_refused_in_a_line(chat, options, fragment):
    assert_refused(chat("w1", options=options), fragment)


def test_models_that_cannot_be_talked_to(chat, tmp_path):
    assert_refused(chat("w1", model="./nowhere"), "no such file or folder")
    assert_refused(chat("w1", model=tmp_path), "holds no model")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert_refused(chat("w1", model=gguf, options=("--weights", "int4")), "model.gguf is quantised already")
    odd = save_chat_model(tmp_path / "odd", "{{ nonsense( }}")
    assert_refused(chat("w1", model=odd), "the chat template of odd does not take this conversation")


def test_interrupts_are_taken_down_and_raise_nothing():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_cannot_take_over_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9bd\x7f é日") == "a[2Jb\n\tcd é日"


# -- weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_quantised_weights_on_a_cpu(tmp_path, weights, library):
    pytest.importorskip(library)
    pytest.importorskip("accelerate")
    from refreekv.cli.weights import weight_bytes

    # Sizes that the 4-bit kernels take, as those of real models are.
    wide = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    source = loading.find(str(save_chat_model(tmp_path / "wide", **wide)))
    plain, packed = loading.load(source), loading.load(source, device="cpu", weights=weights)
    layer = packed.model.model.layers[0].mlp.up_proj
    assert library in type(layer.weight).__module__
    layers = [sum(t.numel() for t in layer.parameters()) for layer in plain.model.model.layers]
    saved = weight_bytes(plain.model) - weight_bytes(packed.model)
    assert saved > sum(layers) * (4 - {"int8": 1.4, "int4": 0.9}[weights])
    with torch.inference_mode():
        inputs = torch.randn(3, 256)
        exact, close = plain.model.model.layers[0].mlp.up_proj(inputs), layer(inputs)
    assert torch.nn.functional.cosine_similarity(exact, close).min() > {"int8": 0.999, "int4": 0.98}[weights]
    talk = Conversation(packed, PRUNING, max_new_tokens=3)
    assert talk.say(words(30, 1)).report.bytes_after > 0


def test_a_device_map_is_left_to_accelerate(folder, monkeypatch):
    pytest.importorskip("accelerate")
    seen = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: seen.append(k.get("device_map")) or real(*a, **k)
    )
    model = loading.load(loading.find(str(folder)), device_map="auto")
    assert seen == ["auto"]
    assert Conversation(model, PRUNING, max_new_tokens=3).say(words(20, 1)).answer


def test_parts_that_are_kept_elsewhere_answer_the_same(loaded, folder, tmp_path):
    pytest.importorskip("accelerate")
    # What accelerate does where a model is larger than its memory: every other layer comes from the disk when needed.
    places = {f"model.layers.{at}": "disk" if at % 2 else "cpu" for at in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path)).eval()
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    talks = [Conversation(given, PRUNING, max_new_tokens=5, chunk=16) for given in (
        loaded, loading.Loaded("offloaded", model, loaded.tokenizer)
    )]  # fmt: skip
    for seed in (1, 2):
        one, other = (talk.say(words(40, seed)) for talk in talks)
        assert one.report == other.report
    assert talks[0].tokens == talks[1].tokens


def test_a_gpu_s_weights_go_through_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from refreekv.cli.weights import quantization_config

    cuda = torch.device("cuda")
    assert quantization_config("auto", cuda, None) is None
    assert quantization_config("int8", cuda, None).load_in_8bit
    four = quantization_config("int4", cuda, torch.float16)
    assert four.load_in_4bit
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.float16)


def test_a_part_on_the_cpu_does_not_move_the_input():
    def device(**placed):
        return loading.Loaded("m", types.SimpleNamespace(hf_device_map=placed), None).device

    assert device(embed_tokens="cpu", layers_0="cuda:1", layers_1="disk") == torch.device("cuda:1")
    assert device(everything="cpu") == torch.device("cpu")


def test_missing_libraries_are_named_with_their_command(chat, monkeypatch):
    real = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    assert_refused(
        chat("w1", options=("--weights", "int4", "--device", "cpu")),
        "--weights int4 on cpu needs bitsandbytes; run: pip install 'refreekv[quant]'",
    )


@pytest.mark.real_model
def test_a_real_model_s_turns_are_what_its_template_writes(smollm2):
    model = loading.Loaded("SmolLM2", *smollm2)
    talk = Conversation(model, FULL, max_new_tokens=24, sampling=Sampling(0))
    turns = [talk.say("My name is Ada and I live in Lisbon."), talk.say("What is my name?")]
    assert turns[1].read_tokens < 30
    said = talk.tokens[turns[1].prompt_tokens :]
    assert greedy(model, talk.tokens[: -len(said)], len(said)) == said
    text = smollm2[1].decode(talk.tokens)
    assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant") == 2
    assert "<|im_end|><|im_end|>" not in text
    assert f"{turns[0].answer}<|im_end|>\n<|im_start|>user\nWhat is my name?<|im_end|>\n" in text
