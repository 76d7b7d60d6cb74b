"""What ``keep_evicted`` keeps, when memory or the disk ends, files are damaged, or the process does: all or nothing."""

import contextlib
import copy
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refreekv
from helpers.conversations import Talk, full, turns_of
from helpers.models import build
from refreekv import HostStore, ReFreeKVCache
from refreekv.engines.transformers import saving
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.storage import files, host_store, trial
from refreekv.storage.host import Parked
from refreekv.storage.host_store import Filed

ALONE, BATCH = (150,), (150, 40, 121, 99)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama():
    return build("llama", attention="sdpa", head_dim=16)


@pytest.fixture(scope="module")
def wanted():
    return full(build("llama", attention="sdpa", head_dim=16), turns_of(ALONE), padded=False)


def talk_of(model, store, **settings):
    settings = {"prompt_dtype": None, **settings}
    cache = ReFreeKVCache(
        model, "refreekv-heavy-hitter", threshold=0.1, frozen_layers=0, keep_evicted=store, **settings
    )
    return Talk(model, cache, padded=False)


def remembered(talk):
    return talk.cache.report.remembered


def stored_in(talk):
    return {type(part) for part in talk.cache.state.past._stored}


def check_goes_on_as_without(talk, turns, model, reason, caplog, asked=1):
    """The turns after the first are what they are where nothing is kept, and it was said once."""
    plain = talk_of(model, None)
    for number, turn in enumerate(turns):
        want = plain.ask(*turn)
        if number < asked:
            continue
        assert torch.equal(talk.ask(*turn), want)
        report = remembered(talk)
        assert reason in report.lost
        assert (report.tokens, report.host_bytes, report.disk_bytes, report.restored) == (0, 0, 0, False)
    said = [record for record in caplog.records if "not kept any more" in record.message]
    assert len(said) == 1
    assert reason in said[0].message
    assert "nothing any more" in str(talk.cache.report)


# -- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_conversation_that_finds_no_room_goes_on_over_what_was_kept(limit, llama, caplog):
    """Also one of which some layers had found room already: nothing is held of these."""
    store = HostStore(limit)
    talk = talk_of(llama, store)
    talk.ask(*turns_of(ALONE)[0])
    assert store.memory(CPU).used == 0
    check_goes_on_as_without(talk, turns_of(ALONE), llama, "are wanted, and", caplog)


def test_a_conversation_that_outgrows_the_limit(llama, wanted, caplog):
    """The turn that does was read over everything; the next one is read over what that one kept."""
    store = HostStore(bytes_of_one(llama) + 1000)
    talk = talk_of(llama, store)
    turns = turns_of(ALONE)
    talk.ask(*turns[0])
    torch.testing.assert_close(talk.ask(*turns[1]), wanted[1], rtol=0, atol=2e-4)
    assert "are wanted, and" in remembered(talk).lost
    assert store.memory(CPU).used == 0
    assert (talk.ask(*turns[2]) - wanted[2]).abs().max() > 0.01
    assert remembered(talk).restored is False
    assert len(caplog.records) == 1


def test_a_system_without_memory(llama, caplog, monkeypatch):
    talk = talk_of(llama, "host")
    real = torch.empty

    def full_up(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8 and "pin_memory" in kwargs:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", full_up)
    talk.ask(*turns_of(ALONE)[0])
    monkeypatch.setattr(torch, "empty", real)
    check_goes_on_as_without(talk, turns_of(ALONE), llama, "the system gives no", caplog)


def bytes_of_one(model, **settings):
    talk = talk_of(model, "host", **settings)
    talk.ask(*turns_of(ALONE)[0])
    return remembered(talk).host_bytes


def test_the_conversation_used_least_recently_goes_first(llama, wanted):
    store = HostStore(int(2.5 * bytes_of_one(llama)))
    talks = [talk_of(llama, store) for _ in range(3)]
    turns = turns_of(ALONE)
    talks[0].ask(*turns[0])
    talks[1].ask(*turns[0])
    talks[0].ask(*turns[1])
    talks[2].ask(*turns[0])
    assert [bool(remembered(talk).lost) for talk in talks] == [False, True, False]
    assert remembered(talks[1]).lost == "other conversations needed the memory"
    torch.testing.assert_close(talks[0].ask(*turns[2]), wanted[2], rtol=0, atol=2e-4)
    torch.testing.assert_close(talks[2].ask(*turns[1]), wanted[1], rtol=0, atol=2e-4)
    assert store.memory(CPU).used <= store.limit
    del talks
    gc.collect()
    assert store.memory(CPU).used == 0


def test_rows_that_were_freed_end_it(llama, caplog):
    cache = ReFreeKVCache(llama, "streaming-llm", size=20, keep_evicted="host", prompt_dtype=None)
    cache.state.arena = True
    talk = Talk(llama, cache, padded=True)
    first, second, _ = turns_of(BATCH)
    talk.ask(*first)
    cache.free_rows([1])
    with contextlib.suppress(Exception):
        talk.ask(*second)
    assert cache.report.remembered.lost == "rows of the batch were freed"


def test_a_pass_that_was_interrupted_leaves_nothing_half(llama, monkeypatch):
    """The cache itself says that it cannot be used; begun anew it is as a new one."""
    talk = talk_of(llama, "host")
    turns = turns_of(ALONE)
    talk.ask(*turns[0])
    real = ReFreeKVLayer.after_attention

    def fails(self, call):
        if self.index == 2:
            raise KeyboardInterrupt
        return real(self, call)

    monkeypatch.setattr(ReFreeKVLayer, "after_attention", fails)
    with pytest.raises(KeyboardInterrupt):
        talk.ask(*turns[1])
    monkeypatch.setattr(ReFreeKVLayer, "after_attention", real)
    assert remembered(talk).tokens == 0
    with pytest.raises(RuntimeError, match="interrupted"):
        talk.ask(*turns[1])
    talk.cache.reset()
    talk.total = None
    talk.ask(*turns[0])
    assert remembered(talk).tokens == 150


def test_what_was_read_before_it_was_asked_for(llama, tmp_path, caplog):
    talk = talk_of(llama, None)
    talk.ask(*turns_of(ALONE)[0])
    talk.cache.save(tmp_path / "cache")
    later = Talk(llama, ReFreeKVCache.load(tmp_path / "cache", llama, keep_evicted="host"), padded=False)
    later.total = talk.total
    check_goes_on_as_without(later, turns_of(ALONE), llama, "first turns were read without keep_evicted", caplog)


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [None, "int8:recent=4"])
def test_without_memory_it_lies_in_files(number, llama, wanted, tmp_path):
    talk = talk_of(llama, HostStore(0, tmp_path), prompt_dtype=number)
    turns = turns_of(ALONE)
    for number_, (turn, logits) in enumerate(zip(turns, wanted, strict=True)):
        got = talk.ask(*turn)
        assert (got - logits).norm() < (0.15 if number else 1e-4) * logits.norm()
        assert stored_in(talk) == {Filed}
        report = remembered(talk)
        assert report.host_bytes == 0 < report.disk_bytes
        assert report.restored is (True if number_ else None)
    (own,) = tmp_path.iterdir()
    assert own.stat().st_mode & 0o077 == 0
    on_disk = sum(file.stat().st_size for file in own.glob("*.safetensors"))
    assert report.disk_bytes <= on_disk < report.disk_bytes + 4000 * len(list(own.iterdir()))
    del talk
    gc.collect()
    assert not list(own.glob("*.safetensors"))


def test_the_oldest_goes_to_files_and_comes_back(llama, wanted, tmp_path):
    store = HostStore(int(1.5 * bytes_of_one(llama)), tmp_path)
    one, other = talk_of(llama, store), talk_of(llama, store)
    turns = turns_of(ALONE)
    one.ask(*turns[0])
    branch = Talk(llama, copy.deepcopy(one.cache), padded=False)
    branch.total = one.total
    other.ask(*turns[0])
    assert stored_in(one) == {Filed}
    assert stored_in(other) == {Parked}
    for talk in (one, branch, other):
        torch.testing.assert_close(talk.ask(*turns[1]), wanted[1], rtol=0, atol=2e-4)
        assert not remembered(talk).lost


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk(after, llama, caplog, monkeypatch, tmp_path):
    real, written = files.save_file, []

    def fails(tensors, path, metadata):
        written.append(path)
        if len(written) > after:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", fails)
    talk = talk_of(llama, HostStore(0, tmp_path))
    talk.ask(*turns_of(ALONE)[0])
    gc.collect()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["lock"]
    check_goes_on_as_without(talk, turns_of(ALONE), llama, "No space left", caplog)


def test_a_disk_is_not_filled_to_its_end(llama, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(host_store, "LEAST_FREE", 2**60)
    talk = talk_of(llama, HostStore(0, tmp_path))
    talk.ask(*turns_of(ALONE)[0])
    check_goes_on_as_without(talk, turns_of(ALONE), llama, "would have less than", caplog)


@pytest.mark.parametrize("damage", ["short", "empty", "gone", "a byte"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_file_is_found_before_the_turn(damage, which, llama, caplog, tmp_path):
    """Of whatever layer: no layer is read over what came back, and none over what did not."""
    talk = talk_of(llama, HostStore(0, tmp_path))
    talk.ask(*turns_of(ALONE)[0])
    path = talk.cache.state.past._stored[which].path
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "a byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "short" else 0])
    check_goes_on_as_without(talk, turns_of(ALONE), llama, str(path), caplog)


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from helpers.conversations import Talk, turns_of
from helpers.models import build
from refreekv import HostStore, ReFreeKVCache
from refreekv.storage import files
model = build("llama", attention="sdpa", head_dim=16)
cache = ReFreeKVCache(model, "streaming-llm", size=20, keep_evicted=HostStore(0, {folder!r}))
talk = Talk(model, cache, padded=False)
talk.ask(*turns_of((150,))[0])
cache.save({file!r})
talk.ask(*turns_of((150,))[1])
real = files.save_file
def killed(tensors, path, metadata):
    real(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
files.save_file = killed
cache.save({file!r})
"""


def test_a_process_that_is_killed_while_it_writes(llama, tmp_path):
    """The file is that of before, what was beside it is removed by the next process, and the conversation goes on."""
    folder, file = tmp_path / "folder", tmp_path / "saved" / "cache"
    folder.mkdir()
    file.parent.mkdir()
    tests = str(Path(__file__).parents[2])
    script = KILLED.format(tests=tests, folder=str(folder), file=str(file))
    run = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = folder.iterdir()
    assert len(list(left.iterdir())) > 8
    loaded = ReFreeKVCache.load(file, llama, keep_evicted=HostStore(0, folder))
    assert not left.exists()
    assert loaded.report.remembered.tokens == 150
    talk = Talk(llama, loaded, padded=False)
    talk.total = torch.ones(1, 150, dtype=torch.long)
    turns = turns_of(ALONE)
    untouched = Talk(llama, ReFreeKVCache(llama, "streaming-llm", size=20, keep_evicted="host"), padded=False)
    untouched.ask(*turns[0])
    torch.testing.assert_close(talk.ask(*turns[1]), untouched.ask(*turns[1]), rtol=0, atol=2e-4)


def test_a_folder_that_is_in_use_is_left_alone(llama, tmp_path):
    one, other = (talk_of(llama, HostStore(0, tmp_path)) for _ in range(2))
    one.ask(*turns_of(ALONE)[0])
    other.ask(*turns_of(ALONE)[0])
    assert len(list(tmp_path.iterdir())) == 2
    one.ask(*turns_of(ALONE)[1])
    assert remembered(one).restored


# -- conversations in files ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [None, "int8:recent=4"])
@pytest.mark.parametrize("lengths", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("policy", ["refreekv-heavy-hitter", "adaptive"])
def test_a_saved_conversation_goes_on_over_everything(policy, lengths, number, llama, tmp_path):
    padded = len(lengths) > 1
    parameters = {} if policy == "adaptive" else {"threshold": 0.1, "frozen_layers": 0}
    cache = ReFreeKVCache(llama, policy, **parameters, keep_evicted="host", prompt_dtype=number)
    talk = Talk(llama, cache, padded=padded)
    turns = turns_of(lengths, count=4, answer=5)
    talk.ask(*turns[0])
    talk.ask(*turns[1])
    if padded:
        cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        talk.total = talk.total[[1, 0, 3, 2]]
    cache.save(tmp_path / "cache")
    loaded = Talk(llama, ReFreeKVCache.load(tmp_path / "cache", llama), padded=padded)
    loaded.total = talk.total
    assert remembered(loaded).tokens == remembered(talk).tokens
    for turn in turns[2:]:
        torch.testing.assert_close(loaded.ask(*turn), talk.ask(*turn), rtol=0, atol=2e-4)
        assert remembered(loaded).restored
    left_out = ReFreeKVCache.load(tmp_path / "cache", llama, keep_evicted=None)
    assert left_out.report.remembered is None


@pytest.mark.parametrize("left", [155, 149, 120, 2])
@pytest.mark.parametrize(
    ("policy", "lengths", "number"),  # every two of these go together
    [
        ("refreekv-heavy-hitter", ALONE, None),
        ("refreekv-heavy-hitter", (150, 40, 149), "int8:recent=4"),
        ("adaptive", ALONE, "int8:recent=4"),
        ("adaptive", (150, 40, 149), None),
    ],
)
def test_a_saved_conversation_may_have_been_cropped(policy, lengths, number, left, llama, tmp_path):
    """Padding, queries and sinks of what was cropped are in no file: it was taken for damaged."""
    if len(lengths) > 1 and left == 2:
        lengths = (150, 150, 149)  # rows without a token are refused
    parameters = {} if policy == "adaptive" else {"threshold": 0.1, "frozen_layers": 0}
    cache = ReFreeKVCache(llama, policy, **parameters, keep_evicted="host", prompt_dtype=number)
    talk = Talk(llama, cache, padded=len(lengths) > 1)
    turns = turns_of(lengths, count=3, answer=5)
    talk.ask(*turns[0])
    talk.ask(*turns[1])
    cache.crop(left - talk.total.shape[1])
    talk.total = talk.total[:, :left]
    cache.save(tmp_path / "cache")
    loaded = Talk(llama, ReFreeKVCache.load(tmp_path / "cache", llama), padded=talk.padded)
    loaded.total = talk.total
    for turn in (turns[2], turns[1]):
        torch.testing.assert_close(loaded.ask(*turn), talk.ask(*turn), rtol=0, atol=2e-4)
        assert remembered(loaded).restored
        assert remembered(loaded).tokens == remembered(talk).tokens


def test_a_file_finds_no_room(llama, tmp_path, caplog):
    talk = talk_of(llama, "host")
    talk.ask(*turns_of(ALONE)[0])
    talk.cache.save(tmp_path / "cache")
    later = Talk(llama, ReFreeKVCache.load(tmp_path / "cache", llama, keep_evicted="host:limit=1000"), padded=False)
    later.total = talk.total
    check_goes_on_as_without(later, turns_of(ALONE), llama, "are wanted, and", caplog)


def changed(name, change):
    return lambda _, tensors: tensors.update({f"2.remembered.{name}": change(tensors[f"2.remembered.{name}"])})


def plain(**numbers):
    return lambda layer, _: layer["remembered"].update(numbers)


CONTRADICTIONS = {
    "longer": plain(length=151),
    "shorter": plain(length=149),
    "another number format": plain(number="int4"),
    "no number format": plain(number="int9"),
    "rows": plain(batch=2),
    "no rows": plain(batch=0),
    "a layer less": lambda layer, _: layer.pop("remembered"),
    "lines less": changed("lines", lambda part: part[:, :, 1:].contiguous()),
    "other lines": changed("lines", lambda part: part.int()),
    "scales less": changed("factors", lambda part: part[..., :1].contiguous()),
    "newest less": changed("rest.tail_keys", lambda part: part[:, :, 1:].contiguous()),
    "other newest": changed("rest.tail_values", lambda part: part.to(torch.int32)),
    "a mean less": lambda _, tensors: tensors.pop("2.remembered.rest.key_mean"),
    "other means": changed("rest.value_mean", lambda part: part[..., 1:].contiguous()),
    "sinks": changed("rest.sink_keys", lambda part: part[..., 1:].contiguous()),
    "more sinks": changed("rest.sink_values", lambda part: part.repeat(1, 1, 2, 1)),
    "queries of no place": changed("rest.extra_columns", lambda part: part + 1000),
    "queries of before": changed("rest.extra_columns", lambda part: part - 1000),
    "other queries": changed("rest.extra_states", lambda part: part[:, :, 1:].contiguous()),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_descriptions_that_contradict_themselves_are_refused(change, llama, tmp_path):
    talk = talk_of(llama, "host", prompt_dtype="int8:recent=4")
    talk.ask(*turns_of(ALONE)[0])
    path = tmp_path / "cache"
    talk.cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, description = load_file(path), json.loads(metadata["cache"])
    change(description["layers"][2], tensors)
    text = json.dumps(description)
    sums = {"": saving.zlib.crc32(text.encode()), **{name: files.checksum(part) for name, part in tensors.items()}}
    save_file(tensors, path, {"format": saving.FORMAT, "cache": text, "sums": json.dumps(sums)})
    with pytest.raises(ValueError, match="damaged"):
        ReFreeKVCache.load(path, llama)


def test_a_block_that_was_left_gives_its_memory_back(llama, caplog):
    caplog.set_level(logging.WARNING)
    store = HostStore()
    with refreekv.compress(llama, "streaming-llm", size=20, keep_evicted=store):
        llama.generate(turns_of(ALONE)[0][0], max_new_tokens=2, do_sample=False)
    gc.collect()
    assert store.memory(CPU).used == 0
    assert not caplog.records


def test_where_kernels_are_wrong_entries_are_kept_as_they_are(llama, wanted, monkeypatch):
    monkeypatch.setattr(trial, "due", lambda device: True)
    monkeypatch.setattr(trial, "fault", lambda *args: "keys differ by 1")
    talk = talk_of(llama, "host", prompt_dtype="auto", kv_dtype=None)
    for turn, logits in zip(turns_of(ALONE), wanted, strict=True):
        torch.testing.assert_close(talk.ask(*turn), logits, rtol=0, atol=2e-4)
    assert talk.cache.state.past.layer(0).number is None


@pytest.mark.parametrize("files_too", [False, True], ids=["memory", "files"])
def test_conversations_in_several_threads_share_a_limit(files_too, llama, wanted, tmp_path):
    """Whoever finds no room says so; no turn is read over another one's, or over half of its own."""
    store = HostStore(int(1.5 * bytes_of_one(llama)), tmp_path if files_too else None)
    wrong, read = [], []

    def talk(seed):
        model = copy.deepcopy(llama)
        for _ in range(4):
            own = talk_of(model, store)
            for number, turn in enumerate(turns_of(ALONE)):
                got, report = own.ask(*turn), remembered(own)
                off = (got - wanted[number]).abs().max() > 2e-4
                read.append(bool(report.restored))
                if off and (report.restored or number == 0):
                    wrong.append((seed, number, report))
                if files_too and number and not report.restored:
                    wrong.append((seed, number, report))

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert any(read)
    gc.collect()
    assert store.memory(CPU).used == 0
