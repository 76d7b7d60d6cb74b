"""Pruned caches in files: the conversation goes on as if it had not been interrupted, or the file is refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refreekv
from helpers.driving import POLICIES, RAGGED, Uneven, feed
from helpers.models import build, prompts
from refreekv.engines.transformers import saving
from refreekv.engines.transformers.cache import PrunedCache
from refreekv.storage import files
from refreekv.storage.arena import KVArena
from refreekv.storage.leveled import LeveledKV
from refreekv.storage.ragged import RaggedKV

STORAGES = {
    "exact": {},
    "arena": {"arena": True},
    "int8": {"kv_dtype": "int8"},
    "int8 in captured steps": {"kv_dtype": "int8:recent=8", "arena": True},
    "int4": {"kv_dtype": "int4:recent=8"},
    "k6v4": {"kv_dtype": "k6v4:recent=0"},
    "ladder": {"kv_dtype": "k4v2+k6v4+int8:recent=8,generated=1"},
}


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=16)


@pytest.fixture(autouse=True)
def arena_for_all(request, monkeypatch):
    """Caches that are made while ``arena`` is asked for, loaded ones too, take the storage of CUDA."""
    made = PrunedCache.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.state.arena = getattr(request.node, "arena", None)

    monkeypatch.setattr(PrunedCache, "__init__", init)


@pytest.fixture(params=STORAGES)
def storage(request):
    chosen = dict(STORAGES[request.param])
    request.node.arena = chosen.pop("arena", None)
    return chosen


def answer(model, cache, sequence, mask, tokens=6):
    out = model.generate(
        sequence, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.cat([mask, torch.ones(len(mask), tokens, dtype=torch.long)], 1), torch.stack(out.logits)


def next_turn(model, cache, sequence, mask, seed, lengths=None):
    ids, own = prompts(lengths or (9,) * len(mask), seed=seed)
    return answer(model, cache, torch.cat([sequence, ids], 1), torch.cat([mask, own], 1))


def summary(cache):
    report = cache.report
    return (
        report.policy,
        report.tokens,
        report.kv_dtype,
        report.reasons,
        [[(row.prompt_length, row.kept_heads, row.cut, row.metric) for row in layer.rows] for layer in report.layers],
        [cache.kept_ranges(row) for row in range(cache.pruned_layers[0].batch)],
    )


def check_goes_on(model, cache, path, sequence, mask, policy=None):
    """Save, load, and let both go on for two turns."""
    cache.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    loaded = refreekv.ReFreeKVCache.load(path, model, policy)
    assert summary(loaded) == summary(cache)
    assert [type(layer.ragged) for layer in loaded.pruned_layers] == [type(la.ragged) for la in cache.pruned_layers]
    for seed in (11, 12):
        want = next_turn(model, cache, sequence, mask, seed)
        got = next_turn(model, loaded, sequence, mask, seed)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
        assert summary(loaded) == summary(cache)
        sequence, mask, _ = want
    return loaded


def check_two_turns(model, policy, storage, lengths, path):
    name, parameters = POLICIES.get(policy, (policy, {}))
    own = Uneven() if policy == "uneven" else None
    cache = refreekv.ReFreeKVCache(model, own or name, **storage, **parameters)
    sequence, mask, _ = answer(model, cache, *prompts(lengths, seed=3))
    sequence, mask, _ = next_turn(model, cache, sequence, mask, 5, (7, 3, 1, 5)[: len(lengths)])
    check_goes_on(model, cache, path, sequence, mask, own)
    return {type(layer.ragged) for layer in cache.pruned_layers}


@pytest.mark.parametrize("policy", [*POLICIES, "full", "adaptive:min_length=0,constant=0.02"])
@pytest.mark.parametrize("arena", [None, True], ids=["exact", "arena"])
def test_a_conversation_goes_on_as_if_it_had_not_been_interrupted(policy, arena, llama, tmp_path, request):
    request.node.arena = arena
    check_two_turns(llama, policy, {}, RAGGED, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("lengths", [(60,), RAGGED], ids=["alone", "batch"])
def test_every_storage_goes_on(lengths, storage, llama, tmp_path, request):
    kinds = check_two_turns(llama, "uneven", storage, lengths, tmp_path / "cache.safetensors")
    in_place = getattr(request.node, "arena", None) is not None
    assert kinds == {LeveledKV if storage else KVArena if in_place else RaggedKV}


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int4:recent=8"}, {"arena": True}], ids=str)
def test_other_architectures(settings, name, tmp_path, request):
    request.node.arena = settings.get("arena")
    model = build(name, attention="eager", head_dim=16)
    cache = refreekv.ReFreeKVCache(model, "streaming-llm", size=24, kv_dtype=settings.get("kv_dtype"))
    sequence, mask, _ = answer(model, cache, *prompts((60, 41), seed=3))
    check_goes_on(model, cache, tmp_path / "cache.safetensors", sequence, mask)


@pytest.mark.parametrize("why", ["heads of 8", "verified"])
def test_what_was_to_be_coded_and_is_not_stays_so(why, llama, tmp_path):
    """Where nobody asked for codes by name: the next turn was refused, and so was a new conversation."""
    model = llama if why == "verified" else build("llama", attention="sdpa")
    verify = "prompt:damage=1e-12" if why == "verified" else False
    # With few tokens at full precision, so that something would be coded.
    cache = refreekv.ReFreeKVCache(model, "adaptive:min_length=8,window=4,constant=0.4,copying=2", verify=verify)
    sequence, mask, _ = answer(model, cache, *prompts((120,), seed=3))
    assert cache.report.kv_dtype is None
    assert " in k" not in str(cache.report)
    cache.save(tmp_path / "cache.safetensors")
    loaded = refreekv.ReFreeKVCache.load(tmp_path / "cache.safetensors", model, verify=verify)
    assert loaded.report.kv_dtype is None
    for seed in (11, 12):
        want = next_turn(model, cache, sequence, mask, seed)
        for one, other in zip(next_turn(model, loaded, sequence, mask, seed), want, strict=True):
            assert torch.equal(one, other)
        sequence, mask, _ = want
    for other in (cache, loaded):
        other.reset()
        answer(model, other, *prompts((120,), seed=4))
    assert summary(loaded) == summary(cache)


def test_what_changed_rows_and_lengths_before(storage, llama, tmp_path):
    cache = refreekv.ReFreeKVCache(llama, "refreekv-heavy-hitter", threshold=0.1, frozen_layers=0, **storage)
    sequence, mask, _ = answer(llama, cache, *prompts(RAGGED, seed=3))
    cache.crop(-2)
    rows = torch.tensor([3, 1, 1])
    cache.batch_select_indices(rows)
    check_goes_on(llama, cache, tmp_path / "cache.safetensors", sequence[rows, :-2], mask[rows, :-2])


def test_generated_tokens_are_pruned_on(llama, storage, tmp_path):
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20, decode_interval=5, **storage)
    sequence, mask, _ = answer(llama, cache, *prompts((40,), seed=3), tokens=8)
    loaded = check_goes_on(llama, cache, tmp_path / "cache.safetensors", sequence, mask)
    assert loaded.state.decode_interval == 5


@pytest.mark.parametrize("arena", [None, True])
def test_hidden_tokens_and_keys_of_another_type_than_values(arena, llama, tmp_path, request):
    request.node.arena = arena
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    ids, mask = prompts((40, 40), seed=3)
    mask[0, 10:15] = 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        llama(ids, attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = refreekv.ReFreeKVCache.load(tmp_path / "cache", llama)
    assert [layer.holds_hidden for layer in loaded.pruned_layers] == [True] * 4
    assert loaded.pruned_layers[0].ragged.types == (torch.float32, torch.bfloat16)
    got, want = (feed(llama, each, ids[:, :1], mask)[0] for each in (loaded, cache))
    assert torch.equal(got, want)


def test_a_cache_of_compress_can_be_saved_within_the_block_and_after_it(llama, tmp_path):
    with refreekv.compress(llama, "streaming-llm", size=20) as kv:
        out = llama.generate(prompts((50,))[0], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        kv.cache.save(tmp_path / "within")
        want = summary(kv.cache)
    kv.cache.save(tmp_path / "after")
    assert summary(refreekv.ReFreeKVCache.load(tmp_path / "within", llama)) == want
    assert summary(refreekv.ReFreeKVCache.load(tmp_path / "after", llama)) == want
    del out


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import refreekv
from helpers.models import build, prompts
model = build("llama", attention="sdpa", head_dim=16)
for line in sys.stdin:
    path, ids = json.loads(line)
    cache = refreekv.ReFreeKVCache.load(path, model)
    out = model.generate(torch.tensor(ids), past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(json.dumps(out.tolist()), flush=True)
"""


@pytest.fixture(scope="module")
def another_process():
    """Loads a file and goes on with it, elsewhere; one process for all, which takes long to start."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=os.environ, **pipes) as process:

        def go_on(path, ids):
            process.stdin.write(json.dumps([str(path), ids.tolist()]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield go_on
        process.stdin.close()


def test_another_process_goes_on(llama, storage, tmp_path, request, another_process):
    cache = refreekv.ReFreeKVCache(llama, "refreekv", threshold=0.2, **storage)
    sequence, _, _ = answer(llama, cache, *prompts((60,), seed=3))
    cache.save(tmp_path / "cache.safetensors")
    ids = torch.cat([sequence, prompts((9,), seed=5)[0]], 1)
    got = another_process(tmp_path / "cache.safetensors", ids)
    request.node.arena = None  # of the other process: entries of an arena come back as the device would have them
    here = refreekv.ReFreeKVCache.load(tmp_path / "cache.safetensors", llama)
    want = llama.generate(ids, past_key_values=here, max_new_tokens=8, do_sample=False)
    assert got == want.tolist()
    if getattr(cache.state, "arena", None) is None:
        assert got == llama.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False).tolist()


# -- refused ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama, tmp_path):
    """A file, and the cache it was made of."""
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    answer(llama, cache, *prompts((40, 23), seed=3))
    cache.save(tmp_path / "cache")
    return tmp_path / "cache", cache


def load(path, model, **settings):
    return refreekv.ReFreeKVCache.load(path, model, **settings)


def test_files_that_are_none_of_ours_are_refused(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "nothing", llama)
    for content in (b"", b"text" * 100, pickle.dumps([1, 2, 3])):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match=r"no saved cache, or was cut off"):
            load(tmp_path / "other", llama)
    save_file({"weight": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="no cache that"):
        load(tmp_path / "weights", llama)


def test_files_that_were_cut_off_are_refused(saved, llama):
    path, _ = saved
    whole = path.read_bytes()
    for size in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"no saved cache, or was cut off"):
            load(path, llama)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), change=st.integers(1, 255))
def test_a_damaged_byte_is_noticed(where, change, saved, llama):
    path, cache = saved
    content = bytearray(path.read_bytes())
    # Half of the tries in the description, which is short.
    size = int.from_bytes(content[:8], "little")
    at = int(2 * where * (size + 7)) if where < 0.5 else int((2 * where - 1) * (len(content) - 1))
    content[at] ^= change
    other = path.with_name("damaged")
    other.write_bytes(content)
    try:
        loaded = load(other, llama)
    except ValueError:
        return
    # A space at the end of the description, which says nothing.
    assert at < size + 8
    assert summary(loaded) == summary(cache)


def rewritten(path, change):
    """The same file with another description, whose sums are right."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, description = load_file(path), json.loads(metadata["cache"])
    change(description, tensors)
    text = json.dumps(description)
    sums = {"": saving.zlib.crc32(text.encode()), **{name: saving.checksum(part) for name, part in tensors.items()}}
    save_file(tensors, path, {"format": saving.FORMAT, "cache": text, "sums": json.dumps(sums)})


def layer_of(change):
    return lambda description, tensors: change(description["layers"][2], tensors)


CONTRADICTIONS = {
    "length": layer_of(lambda layer, _: layer.update(length=layer["length"] + 1)),
    "negative": layer_of(lambda layer, _: layer.update(pruned=-1)),
    "lengths": layer_of(lambda layer, _: layer["storage"].update(lengths=[[10**9, 1], [1, 1]])),
    "fewer rows": layer_of(lambda layer, _: layer["storage"].update(lengths=layer["storage"]["lengths"][:1])),
    "columns": layer_of(lambda layer, _: layer["columns"].pop()),
    "ranges": layer_of(lambda layer, _: layer["columns"].__setitem__(0, [[5, 3]])),
    "ranges behind": layer_of(lambda layer, _: layer["columns"].__setitem__(0, [[0, 10**6]])),
    "kind": layer_of(lambda layer, _: layer.update(kind="sliding")),
    "storage": layer_of(lambda layer, _: layer["storage"].update(kind="other")),
    "a layer less": lambda description, _: description["layers"].pop(),
    "no policy": lambda description, _: description.pop("policy"),
    "a tensor less": lambda _, tensors: tensors.pop("2.keys"),
    "lines less": lambda _, tensors: tensors.update({"2.keys": tensors["2.keys"][:-1]}),
    "another type": lambda _, tensors: tensors.update({"2.values": tensors["2.values"].int()}),
    "other rows": lambda _, tensors: tensors.update({"2.values": tensors["2.values"].view(-1)}),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_descriptions_that_contradict_themselves_are_refused(change, saved, llama):
    path, _ = saved
    rewritten(path, change)
    with pytest.raises(ValueError, match="damaged"):
        load(path, llama)


def test_another_version_model_or_policy_is_refused(saved, llama):
    path, _ = saved
    with pytest.raises(ValueError, match=r"num_hidden_layers = 4; this LlamaForCausalLM has 2"):
        load(path, build("llama", attention="sdpa", num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"model_type = llama; this Qwen2ForCausalLM has qwen2"):
        load(path, build("qwen2", attention="sdpa"))
    tuned = build("llama", attention="sdpa", head_dim=16)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.1 * torch.randn_like(weight)
    with pytest.raises(ValueError, match=r"another model of the same shape"):
        load(path, tuned)
    assert load(path, build("llama", attention="sdpa", head_dim=16).bfloat16()).get_seq_length() == 45
    with pytest.raises(ValueError, match=r"pruned by streaming-llm\(.*this is full"):
        load(path, llama, policy="full")
    with pytest.raises(TypeError, match="expected a transformers model"):
        load(path, "llama")
    rewritten(path, lambda description, _: description.update(version=3))
    with pytest.raises(ValueError, match="version 3"):
        load(path, llama)


def test_files_are_older_than_a_parameter_of_their_policy(saved, llama):
    path, cache = saved

    def older(description, _):
        written = description["policy"]
        del written["parameters"]["sinks"]
        written["text"] = written["text"].replace(f", sinks={cache.policy.sinks}", "")

    rewritten(path, older)
    for policy in (None, cache.policy):
        assert summary(load(path, llama, policy=policy)) == summary(cache)
    with pytest.raises(ValueError, match="was pruned by"):
        load(path, llama, policy=replace(cache.policy, sinks=5))


@pytest.mark.parametrize("unnamed", [(), ("code_length",), ("code_length", "copying_peak")], ids=" ".join)
def test_a_conversation_goes_on_by_the_constants_it_was_pruned_with(unnamed, llama, tmp_path):
    """As the default had them until 2026-11-27; older files do not even name the last two."""
    path = tmp_path / "cache.safetensors"
    constants = {"copying_weight": 4.0, "copying_peak": 0.0, "code_unit": 2.0, "evict_unit": 0.25, "code_length": 0}
    some = {"min_length": 16, "window": 8, "constant": 0.1, "copying": 2.0, "hit": 0.9, "lost_mass": 0.6}
    cache = refreekv.ReFreeKVCache(llama, "adaptive", **some, **constants)
    sequence, mask, _ = answer(llama, cache, *prompts((150,), seed=3))
    assert 0.1 < cache.report.budget < 0.9
    cache.save(path)

    def older(description, _):
        written = description["policy"]
        for name in unnamed:
            written["text"] = written["text"].replace(f", {name}={written['parameters'].pop(name)}", "")

    if unnamed:
        rewritten(path, older)
    loaded = load(path, llama)
    assert loaded.policy == cache.policy
    assert constants.items() <= asdict(loaded.policy).items()
    assert summary(load(path, llama, policy=cache.policy)) == summary(loaded) == summary(cache)
    want, got = (next_turn(llama, one, sequence, mask, 5, (60,)) for one in (cache, loaded))
    assert torch.equal(want[2], got[2])
    assert summary(loaded) == summary(cache)
    with pytest.raises(ValueError, match=r"pruned by adaptive\(.*copying_weight=4.0.*this is adaptive\("):
        load(path, llama, policy=replace(cache.policy, copying_weight=1.0))
    with pytest.raises(ValueError, match="was pruned by"):
        load(path, llama, policy=replace(cache.policy, copying_peak=0.015))


def test_a_policy_that_is_not_registered_has_to_be_given(llama, tmp_path):
    cache = refreekv.ReFreeKVCache(llama, Uneven())
    answer(llama, cache, *prompts((40,), seed=3))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"uneven\(.*pass policy="):
        load(tmp_path / "cache", llama)
    assert summary(load(tmp_path / "cache", llama, policy=Uneven())) == summary(cache)


def test_what_cannot_be_saved_says_why(llama, tmp_path, request):
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    with pytest.raises(ValueError, match="holds nothing yet"):
        cache.save(tmp_path / "cache")
    ids = prompts((40,))[0]
    with torch.no_grad(), cache.prompt_until(40):
        llama(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="middle of a prompt"):
            cache.save(tmp_path / "cache")
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    answer(llama, cache, *prompts((40,), seed=3))
    cache.pruned_layers[0].crop(-1)
    with pytest.raises(ValueError, match="interrupted"):
        cache.save(tmp_path / "cache")
    request.node.arena = True
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    answer(llama, cache, *prompts((40, 40), seed=3))
    cache.free_rows([1])
    with pytest.raises(ValueError, match=r"rows \[1\] were freed"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(saved, llama, monkeypatch):
    path, cache = saved
    before = path.read_bytes()

    def fails(tensors, target, metadata):
        Path(target).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_loaded_cache_does_not_need_its_file(saved, llama):
    path, cache = saved
    loaded = load(path, llama)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    for one, other in zip(loaded.pruned_layers, cache.pruned_layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_pickling_says_what_to_do_instead_and_copies_go_on(llama):
    with refreekv.compress(llama, "streaming-llm", size=20) as kv:
        out = llama.generate(prompts((50,))[0], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = refreekv.ReFreeKVCache(llama, "streaming-llm", size=20)
    answer(llama, cache, *prompts((40,), seed=3))
    for each in (cache, kv.cache):
        with pytest.raises(TypeError, match=r"save\(path\).*load\(path, model\)"):
            pickle.dumps(each)
        copied = copy.deepcopy(each)
        assert type(copied) is type(each)
        assert summary(copied) == summary(each)
        assert copied.pruned_layers[0].keys.data_ptr() != each.pruned_layers[0].keys.data_ptr()
        assert copied.first is copied.pruned_layers[0]
        assert copy.copy(each).layers is each.layers
    del out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4:recent=8"])
def test_written_on_a_gpu_and_read_on_both_kinds_of_device(kv_dtype, tmp_path):
    outcome = []
    on_gpu, on_cpu = build("llama", attention="sdpa", head_dim=16).cuda(), build("llama", attention="sdpa", head_dim=16)
    cache = refreekv.ReFreeKVCache(on_gpu, "streaming-llm", size=20, kv_dtype=kv_dtype)
    ids, mask = (part.cuda() for part in prompts(RAGGED, seed=3))
    with torch.no_grad():
        on_gpu(ids, attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = load(tmp_path / "cache", on_gpu)
    kind = KVArena if kv_dtype is None else LeveledKV
    assert {type(layer.ragged) for layer in loaded.pruned_layers} == {kind}
    for model, each in ((on_gpu, cache), (on_gpu, loaded), (on_cpu, load(tmp_path / "cache", on_cpu))):
        token, own = ids[:, :1].to(model.device), mask.to(model.device)
        outcome.append(feed(model, each, token, own)[0].cpu())
    torch.testing.assert_close(outcome[1], outcome[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(outcome[2], outcome[0], atol=2e-3, rtol=2e-3)
