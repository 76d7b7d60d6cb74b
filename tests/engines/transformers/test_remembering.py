"""Nothing is lost across turns: with ``keep_evicted`` a next turn is read over everything that came before."""

import copy
import functools
import gc
import itertools

import pytest
import torch
from transformers import DynamicCache

import refreekv
from helpers.conversations import Talk, full, turns_of
from helpers.driving import POLICIES, Uneven
from helpers.models import build, full_layers
from refreekv import HostStore, KVDtype, ReFreeKVCache
from refreekv.core.quantisation import centre_of
from refreekv.storage import host
from refreekv.storage import past as past_module

LOOSE = {"constant": 0.03, "copying": 2.0, "window": 8, "follow": 2, "lost_mass": 0.5}
CASES = {
    **POLICIES,
    "uneven": (Uneven(), {}),
    "adaptive": ("adaptive", {"min_length": 16, **LOOSE}),
    "surrogates": ("adaptive", {"min_length": 16, "bits": 16, **LOOSE}),
    "ada-kv": ("ada-kv", {"ratio": 0.3}),
    "spread": ("h2o", {"ratio": 0.3, "queries": 32}),  # every so many-th query is asked, and none at the end
}
ALONE, BATCH = (150,), (150, 40, 121, 99)
TOLERANCE = 2e-4


@functools.cache
def model_of(name="llama"):
    return build(name, attention="sdpa", head_dim=16)


@functools.cache
def wanted(name, lengths, answer):
    """Of a model that refreekv never touched."""
    model = build(name, attention="sdpa", head_dim=16)
    return full(model, turns_of(lengths, answer=answer), len(lengths) > 1)


def talk_of(model, case, *, padded=False, chunk=None, arena=None, store="host", **settings):
    name, parameters = CASES[case]
    cache = ReFreeKVCache(model, name, **parameters, keep_evicted=store, **settings)
    cache.state.arena = arena
    return Talk(model, cache, padded=padded, chunk=chunk)


def is_evicted(cache):
    return any(layer.ragged is not None for layer in cache.pruned_layers)


# -- exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "lengths", "chunk"),
    [*itertools.product(CASES, [ALONE], [None]), *itertools.product(CASES, [BATCH], [37]), ("adaptive", BATCH, None)],
)
def test_each_question_is_read_over_everything(case, lengths, chunk):
    """Answers of one token leave nothing in the cache that was computed over less: all is as with the full cache."""
    talk = talk_of(model_of(), case, padded=len(lengths) > 1, chunk=chunk, prompt_dtype=None)
    for number, (turn, logits) in enumerate(zip(turns_of(lengths), wanted("llama", lengths, 0), strict=True)):
        torch.testing.assert_close(talk.ask(*turn), logits, rtol=0, atol=TOLERANCE)
        assert is_evicted(talk.cache)
        report = talk.cache.report.remembered
        assert report.restored is (True if number else None)
        assert report.tokens == talk.total.shape[1]
        assert not report.lost
        # What decodes is what the policy keeps, of everything, and no more.
        assert [layer.get_seq_length() for layer in talk.cache.pruned_layers] == [talk.total.shape[1]] * 4


def test_without_it_later_questions_are_not():
    """The test above can fail."""
    talk = talk_of(model_of(), "heavy-hitter", store=None)
    first, second, _ = turns_of(ALONE)
    torch.testing.assert_close(talk.ask(*first), wanted("llama", ALONE, 0)[0], rtol=0, atol=TOLERANCE)
    assert (talk.ask(*second) - wanted("llama", ALONE, 0)[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "phi3", "gpt_oss", "qwen3_moe"])
def test_on_other_architectures(name):
    """Of heads that cannot be coded, too, which are kept as they are whatever was asked for."""
    changes = {} if name in ("gpt_oss", "phi3") else {"head_dim": 16}
    attention = "eager" if name == "gpt_oss" else "sdpa"
    plain, model = (build(name, attention=attention, **changes) for _ in range(2))
    exact = {"kv_dtype": None, **({} if "head_dim" not in changes else {"prompt_dtype": None})}
    talk = talk_of(model, "heavy-hitter", **exact)
    for turn, logits in zip(turns_of(ALONE), full(plain, turns_of(ALONE), False), strict=True):
        torch.testing.assert_close(talk.ask(*turn), logits, rtol=0, atol=TOLERANCE)
    assert is_evicted(talk.cache)
    assert len(talk.cache.pruned_layers) == len(full_layers(model))


@pytest.mark.parametrize("arena", [None, True])
@pytest.mark.parametrize("lengths", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("case", ["heavy-hitter", "uneven", "joint", "adaptive"])
def test_answers_come_along_as_they_were_computed(case, lengths, arena):
    """The reference: a full cache of the prompt's own entries and of the answer's, which were computed over less."""
    padded = len(lengths) > 1
    plain, talk = (
        build("llama", attention="sdpa", head_dim=16),
        talk_of(model_of(), case, padded=padded, arena=arena, prompt_dtype=None),
    )
    turns = turns_of(lengths, answer=7)
    reference = Talk(plain, DynamicCache(config=plain.config), padded=padded)
    for turn in turns:
        ids, mask, said = turn
        first = reference.ask(ids, mask, said[:, :0])
        got = talk.ask(*turn)
        torch.testing.assert_close(got[:, :1], first, rtol=0, atol=TOLERANCE)
        talk.cache.state.finish()
        reference.total = talk.total
        for layer, own in zip(talk.cache.pruned_layers, reference.cache.layers, strict=True):
            newest = [torch.stack([part[:, -7:] for part in side]) for side in zip(*layer.ragged.rows(), strict=True)]
            own.keys, own.values = (torch.cat(pair, 2) for pair in zip((own.keys, own.values), newest, strict=True))


# -- coded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("case", ["heavy-hitter", "joint", "adaptive", "window"])
def test_in_eight_bits_a_turn_is_one_more_chunk_of_one_prompt(case, lengths):
    """The reference: all prompts as one, which is coded while it comes in these pieces."""
    padded, turns = len(lengths) > 1, turns_of(lengths, question=70, count=4)
    talk = talk_of(model_of(), case, padded=padded, prompt_dtype="int8:recent=4")
    whole = talk_of(model_of(), case, padded=padded, store=None, prompt_dtype="int8:recent=4")
    end = sum(ids.shape[1] for ids, _, _ in turns)
    whole._prompt = lambda: whole.cache.prompt_until(end)
    for turn, logits in zip(turns, full(build("llama", attention="sdpa", head_dim=16), turns, padded), strict=True):
        got = talk.ask(*turn)
        # Its first chunk is not coded yet when it is read.
        torch.testing.assert_close(got, whole.ask(*turn), rtol=0, atol=TOLERANCE)
        assert (got - logits).norm() < 0.15 * logits.norm()  # of weights that make much of little
    assert is_evicted(talk.cache)


@pytest.mark.parametrize("number", [None, "int8:recent=4"])
@pytest.mark.parametrize("lengths", [(20,), (20, 7)], ids=["alone", "batch"])
def test_a_conversation_may_begin_with_little(lengths, number):
    """With nothing to code, and in a batch with no padding before the second turn brings some."""
    padded, turns = len(lengths) > 1, turns_of((20,) * len(lengths), question=120, count=4)
    talk = talk_of(model_of(), "window", padded=padded, prompt_dtype=number)
    for turn, logits in zip(turns, full(build("llama", attention="sdpa", head_dim=16), turns, padded), strict=True):
        got = talk.ask(*turn)
        assert (got - logits).norm() < (0.15 if number else 1e-4) * logits.norm()
    assert talk.cache.report.remembered.restored


@pytest.mark.parametrize("number", [None, "int8:recent=4"])
def test_in_pages_as_a_gpu_s_memory_is_handed_out(number, monkeypatch):
    """Tensors then lie across pieces that end anywhere, and pieces are used again by the next conversation."""
    real = host._allocated
    monkeypatch.setattr(host, "PAGE", 1000)
    monkeypatch.setattr(host, "SLAB", 17_000)
    monkeypatch.setattr(host, "_allocated", lambda size, pinned: real(size, pinned=False))
    store = HostStore(2**24)
    store._memory = host.HostMemory(2**24, pinned=True)
    for _ in range(3):
        talk = talk_of(model_of(), "heavy-hitter", store=store, prompt_dtype=number)
        for turn, logits in zip(turns_of(ALONE), wanted("llama", ALONE, 0), strict=True):
            got = talk.ask(*turn)
            assert (got - logits).norm() < (0.15 if number else 1e-4) * logits.norm()
        assert talk.cache.report.remembered.restored
        held = store.memory(torch.device("cpu")).held
        del talk
        gc.collect()
    assert store.memory(torch.device("cpu")).used == 0
    assert held == store.memory(torch.device("cpu")).held < 3 * 200_000


def test_in_sixteen_bits():
    model, turns = build("llama", attention="sdpa", head_dim=16).bfloat16(), turns_of(ALONE, answer=3)
    talk = talk_of(model, "heavy-hitter", prompt_dtype=None)
    wide = full(build("llama", attention="sdpa", head_dim=16), turns, False)
    plain = full(build("llama", attention="sdpa", head_dim=16).bfloat16(), turns, False)
    for number, turn in enumerate(turns):
        noise = (plain[number][:, 0] - wide[number][:, 0]).norm()
        assert (talk.ask(*turn)[:, 0] - plain[number][:, 0]).norm() < 2 * noise
    assert talk.cache.report.remembered.host_bytes < 4 * 2 * 180 * 2 * 16 * 2 + 4 * 200_000


def test_lines_are_coded_once_and_kept_once(monkeypatch):
    """A later turn adds its own lines, short turns to one piece, and its report says what all of them take."""
    monkeypatch.setattr(past_module, "TOGETHER", 100)
    talk = talk_of(model_of(), "heavy-hitter", prompt_dtype="int8:recent=4")
    first, second, third = turns_of(ALONE, question=50, answer=5)
    talk.ask(*first)
    past = talk.cache.state.past
    layer = past.layer(0)
    (piece,) = layer.pieces
    before = piece.stored.on_host()
    talk.ask(*second)
    talk.ask(*third)
    pieces = past.layer(0).pieces
    assert pieces[0] is piece
    assert all(torch.equal(part, before[name]) for name, part in piece.stored.on_host().items())
    assert [(one.start, one.stop) for one in pieces] == [(0, 146), (146, 256)]  # of two turns
    report = talk.cache.report.remembered
    heads, lines = 2, 32 + 4
    rest = sum(sum(part.nbytes for part in past.layer(n).rest.on_host().values()) for n in range(4))
    assert report.host_bytes == pytest.approx(4 * heads * 256 * lines + rest, rel=0.02)


def test_what_is_held_while_decoding_does_not_grow():
    talk = talk_of(model_of(), "window", kv_dtype=None)
    for turn in turns_of(ALONE, answer=5):
        talk.ask(*turn)
        report = talk.cache.report
        assert report.bytes_after == 4 * 2 * (20 + 5) * 2 * 16 * 4  # layers, heads, entries, of 32-bit elements
        assert report.remembered.host_bytes > 0
    assert all(
        layer.reading is None and layer._whole is None and layer._read is None for layer in talk.cache.pruned_layers
    )


def test_the_policy_decides_over_everything_again():
    """What one turn evicted the next one may keep: the same as if all were one prompt in chunks."""
    model, turns = model_of(), turns_of(ALONE, count=2)
    talk = talk_of(model, "adaptive", prompt_dtype=None)
    for turn in turns:
        talk.ask(*turn)
    whole = talk_of(model, "adaptive", store=None, prompt_dtype=None, chunk=150)
    whole.ask(torch.cat([turns[0][0], turns[1][0]], 1), torch.cat([turns[0][1], turns[1][1]], 1), turns[1][2])
    one, other = talk.cache.report, whole.cache.report
    for mine, theirs in zip(one.prunable, other.prunable, strict=True):
        assert mine.rows[0].prompt_length == theirs.rows[0].prompt_length
        # Queries that were kept are in 16 bits here.
        assert mine.rows[0].budget == pytest.approx(theirs.rows[0].budget, abs=0.02)
    kept = [set(range(*r)) for cache in (talk.cache, whole.cache) for r in cache.kept_ranges()[0][0][:1]]
    assert kept[0] & kept[1]


# -- what happens to caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("left", [170, 155, 100, 30, 2])
@pytest.mark.parametrize("number", [None, "int8:recent=4"])
def test_a_cropped_conversation_goes_on_over_all_that_is_left(left, number):
    """Also where it is cropped into what was evicted."""
    plain = build("llama", attention="sdpa", head_dim=16)
    talk = talk_of(model_of(), "heavy-hitter", prompt_dtype=number)
    first, second, third = turns_of(ALONE, answer=20)
    talk.ask(*first)
    talk.ask(*second)
    talk.cache.crop(left - talk.total.shape[1])
    talk.total = talk.total[:, :left]
    got = talk.ask(third[0], third[1], third[2][:, :0])
    assert talk.cache.report.remembered.restored
    reference = Talk(plain, DynamicCache(config=plain.config), padded=False)
    ids = torch.cat([part for turn in (first, second) for part in (turn[0], turn[2])], 1)[:, :left]
    logits = reference.ask(torch.cat([ids, third[0]], 1), torch.ones(1, left + 9).long(), third[2][:, :0])
    if left <= 150 and number is None:
        torch.testing.assert_close(got, logits, rtol=0, atol=TOLERANCE)
    elif left <= 150:
        assert (got - logits).norm() < 0.15 * logits.norm()
    # And once more, over what was kept meanwhile.
    talk.ask(*second)
    assert talk.cache.report.remembered.tokens == left + 18


@pytest.mark.parametrize("of_layers", [False, True], ids=["cache", "layers"])
def test_a_tensor_says_how_many_tokens_are_cropped(of_layers):
    """As some versions of transformers have it that verify drafts: lengths are numbers, and nothing is lost."""
    talk = talk_of(model_of(), "heavy-hitter", prompt_dtype=None)
    turns = turns_of(ALONE, answer=4)
    for number, turn in enumerate(turns):
        talk.ask(*turn)
        report = talk.cache.report.remembered
        assert report.tokens == talk.total.shape[1] - 4
        assert report.restored is (True if number else None)
        assert not report.lost
        for part in talk.cache.layers if of_layers else [talk.cache]:
            part.crop(torch.tensor(-3))
        talk.total = talk.total[:, :-3]
        assert {type(layer.get_seq_length()) for layer in talk.cache.layers} == {int}
        assert {type(layer.length) for layer in talk.cache.state.past.layers.values()} == {int}


def test_rows_are_selected_reordered_and_repeated():
    model, turns = model_of(), turns_of(BATCH, count=2)
    order = [2, 0, 0, 3, 1]
    talk = talk_of(model, "heavy-hitter", padded=True, prompt_dtype=None)
    talk.ask(*turns[0])
    cache = talk.cache
    cache.batch_select_indices(torch.tensor([2, 0, 3, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 2, 3, 4, 6]))
    talk.total = talk.total[order]
    ids, mask = turns[1][0][order], turns[1][1][order]
    got = talk.ask(ids, mask, ids[:, :0])
    torch.testing.assert_close(got, wanted("llama", BATCH, 0)[1][order], rtol=0, atol=TOLERANCE)
    got = talk.ask(ids, mask, ids[:, :0])  # and what was kept then is theirs
    assert cache.report.remembered.restored
    assert cache.state.past.layer(0).batch == 5


@pytest.mark.parametrize("number", [None, "int8:recent=4"])
@pytest.mark.parametrize("case", ["heavy-hitter", "joint", "adaptive"])
def test_a_single_row_is_repeated(case, number):
    """Its queries' columns are told once for all rows, and were taken for those of the one row."""
    model, turns = model_of(), turns_of(ALONE, count=3)
    talk = talk_of(model, case, chunk=5, prompt_dtype=number)
    alone = talk_of(model, case, chunk=5, prompt_dtype=number)
    talk.ask(*turns[0])
    alone.ask(*turns[0])
    talk.cache.batch_repeat_interleave(3)
    talk.total = talk.total.repeat(3, 1)
    for ids, mask, said in turns[1:]:
        got = talk.ask(ids.repeat(3, 1), mask.repeat(3, 1), said.repeat(3, 1))
        torch.testing.assert_close(got, alone.ask(ids, mask, said).repeat(3, 1, 1), rtol=0, atol=TOLERANCE)
    assert talk.cache.report.remembered.restored


def test_a_copy_goes_on_by_itself():
    model = model_of()
    talk = talk_of(model, "heavy-hitter", prompt_dtype=None)
    first, second, third = turns_of(ALONE)
    talk.ask(*first)
    other = Talk(model, copy.deepcopy(talk.cache), padded=False)
    other.total = talk.total
    store = talk.cache.state.past.store
    used = store.memory(torch.device("cpu")).used
    torch.testing.assert_close(other.ask(*second), wanted("llama", ALONE, 0)[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(talk.ask(*second), wanted("llama", ALONE, 0)[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(other.ask(*third), wanted("llama", ALONE, 0)[2], rtol=0, atol=TOLERANCE)
    # The first turn's entries are there once.
    assert store.memory(torch.device("cpu")).used < 1.5 * used
    del talk, other
    gc.collect()
    assert store.memory(torch.device("cpu")).used == 0


def test_beams_and_drafts():
    """`generate` with several beams, and with tokens that are looked up and verified, over two turns."""
    model = model_of()
    ids = turns_of(ALONE)[0][0]
    for settings in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        cache = ReFreeKVCache(model, "refreekv-heavy-hitter", threshold=0.1, keep_evicted="host", prompt_dtype=None)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, **settings)
        if "num_beams" in settings:
            # One row goes on.
            cache.batch_select_indices(torch.tensor([0]))
        more = torch.cat([out, turns_of(ALONE)[1][0]], 1)
        out = model.generate(more, past_key_values=cache, max_new_tokens=6, do_sample=False)
        report = cache.report.remembered
        assert report.restored
        assert report.tokens == more.shape[1]
        assert not report.lost
        longer = torch.cat([out, turns_of(ALONE)[2][0]], 1)
        model.generate(longer, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert cache.report.remembered.tokens == longer.shape[1]
        assert not cache.report.remembered.lost


@pytest.mark.parametrize("verify", [True, "answer:tokens=3"])
def test_it_goes_with_verify(verify):
    model = model_of()
    turns = turns_of(ALONE, answer=6)
    talk = talk_of(model, "heavy-hitter", verify=verify, prompt_dtype="auto")
    for number, turn in enumerate(turns):
        got = talk.ask(*turn)
        assert talk.cache.report.verified is not None
        assert talk.cache.report.remembered.restored is (True if number else None)
        assert (got[:, 0] - wanted("llama", ALONE, 6)[number][:, 0]).norm() < 0.3 * got[:, 0].norm()


def test_a_reset_cache_begins_again():
    talk = talk_of(model_of(), "heavy-hitter", prompt_dtype=None)
    talk.ask(*turns_of(ALONE)[0])
    talk.cache.reset()
    assert talk.cache.report.remembered.host_bytes == 0
    talk.total = None
    for turn, logits in zip(turns_of(ALONE), wanted("llama", ALONE, 0), strict=True):
        torch.testing.assert_close(talk.ask(*turn), logits, rtol=0, atol=TOLERANCE)


# -- the switch ---------------------------------------------------------------------------------------


def test_in_a_block():
    model = build("llama", attention="sdpa", head_dim=16)
    ids = turns_of(ALONE)[0][0]
    with refreekv.compress(model, "snapkv", ratio=0.3, keep_evicted="host:limit=1GiB") as kv:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        assert kv.keep_evicted.limit == 2**30
        more = torch.cat([out.sequences, ids[:, :20]], 1)
        model.generate(more, past_key_values=out.past_key_values, max_new_tokens=4, do_sample=False)
    remembered = kv.report.remembered
    assert remembered.restored
    assert f"kept for the next turn: all {remembered.tokens} tokens, in" in str(kv.report)
    assert kv.report.to_dict()["remembered"]["restored"] is True
    assert "over everything" in str(remembered)


def test_what_cannot_be_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="leave one of them out"):
        ReFreeKVCache(model, keep_evicted="host", decode_interval=4)
    for wrong in ("disk", "host:size=3", "host:limit", "host:limit=some"):
        with pytest.raises(ValueError, match=r"keep_evicted must be|limit is a number"):
            ReFreeKVCache(model, keep_evicted=wrong)
    with pytest.raises(TypeError, match="keep_evicted must be"):
        ReFreeKVCache(model, keep_evicted=True)
    with pytest.raises(ValueError, match="is no folder"):
        HostStore(folder="/nowhere/at/all")
    with pytest.raises(ValueError, match="limit is a number"):
        HostStore(limit=-1)


def test_sizes_are_read():
    sizes = {"8GiB": 8 * 2**30, "500M": 500 * 2**20, "4096": 4096, "1.5k": 1536, "2TB": 2**41}
    assert [HostStore.parse(f"host:limit={text}").limit for text in sizes] == list(sizes.values())


def test_where_nothing_can_be_evicted_nothing_is_kept():
    talk = talk_of(model_of(), "window", kv_dtype=None)
    assert ReFreeKVCache(model_of(), "full", kv_dtype=None, keep_evicted="host").report.remembered is None
    assert (
        ReFreeKVCache(model_of(), "full", kv_dtype=KVDtype("int8"), keep_evicted="host").report.remembered is not None
    )
    assert talk.cache.report.remembered is not None


@pytest.mark.parametrize(("lengths", "anew"), [((150, 600), True), ((600, 150), False)])
def test_means_of_a_short_beginning_are_not_those_of_what_follows(lengths, anew):
    """Coded in few bits by these, entries lost up to a fifth more."""
    model, held = model_of(), []
    turns = [torch.randint(first, first + 15, (1, n)) for first, n in zip((5, 80), lengths, strict=True)]
    for policy, settings in (("snapkv:ratio=0.9", {"kv_dtype": "int4", "keep_evicted": "host"}), ("full", {})):
        cache = ReFreeKVCache(model, policy, **settings)
        cache.state.arena = True
        with torch.no_grad():
            for turn in turns:
                model(turn, past_key_values=cache)
        cache.state.finish()
        held.append(cache.pruned_layers[0].ragged)
    keys = torch.stack([own for own, _ in held[1].rows()])
    first, both = (centre_of(part) for part in (keys[:, :, : lengths[0]], keys))
    found = held[0].coding.maps.key_mean
    assert (first - both).abs().max() > 0.1  # they differ
    torch.testing.assert_close(found, both if anew else first, rtol=0, atol=0.03)
