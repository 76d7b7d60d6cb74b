"""What a conversation's turns ask of a GPU: launches, copies and waits a layer, counted on the CPU.

The host sets the time of a turn of few tokens: each launch costs it some microseconds, whatever is launched. Counts do
not depend on how long a conversation is. `lab/turns.md` has what they were.
"""

import gc
from collections import Counter

import pytest
import torch

from helpers.counting import counting
from helpers.models import build
from refreekv import ReFreeKVCache
from refreekv.engines.transformers import layer
from refreekv.policies.adaptive import Adaptive
from refreekv.storage import host, past

FEW, MANY = 2, 4
EVICTING = {
    "min_length": 16, "copying": 2.0, "constant": 0.05, "evict_unit": 1.0, "follow": 2, "hit": 0.3, "lost_mass": 0.6,
    "spread_factor": 50.0, "code_length": 0,
}  # fmt: skip
"""Parameters of `adaptive` under which heads of a random model keep different numbers of entries."""


@pytest.fixture(scope="module")
def models():
    found = []
    for layers in (FEW, MANY):
        torch.manual_seed(0)
        found.append(build("llama", attention="sdpa", head_dim=64, num_hidden_layers=layers))
    return found


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(layer, "is_late", lambda device: True)


@pytest.fixture
def _asked_each_time(monkeypatch):
    """The policy looks at short turns, too, as at longer ones."""
    monkeypatch.setattr(Adaptive, "waits", lambda policy, new, settled: False)


def feed(model, cache, ids):
    """The counts of a prompt, or of a turn."""
    with torch.no_grad(), counting() as counts:
        with cache.prompt_until(cache.get_seq_length() + ids.shape[1]):
            model(ids, past_key_values=cache, logits_to_keep=1)
        cache.state.finish()
    return counts


def turns_of(model, keep, length, turn=32):
    """The counts of a prompt of so many tokens and of three turns behind it."""
    torch.manual_seed(1)
    feed(model, ReFreeKVCache(model, "adaptive", **EVICTING), torch.randint(2, 90, (1, 200)))  # measured and proved
    cache = ReFreeKVCache(model, "adaptive", **EVICTING, keep_evicted=keep)
    cache.state.arena = True
    found = [feed(model, cache, torch.randint(2, 90, (1, n))) for n in (length, turn, turn, turn)]
    held = cache.pruned_layers[0].ragged.lengths[0]
    assert len(set(held)) > 1, "heads that keep equally many would be the easy case"
    assert max(held) < cache.get_seq_length()
    return found


def a_layer(models, keep, length=700):
    """Launches, waits and lists of numbers that are sent of each call, by layer."""
    pairs = zip(*(turns_of(model, keep, length) for model in models), strict=True)
    layers = MANY - FEW
    return [
        (
            (more.total - few.total) / layers,
            sum((more.waits - few.waits).values()) / layers,
            (more.sent - few.sent) / layers,
        )
        for few, more in pairs
    ]


@pytest.mark.usefixtures("_asked_each_time")
def test_a_turn_over_what_was_kept(models):
    """It was 2,180 launches and 69 waits a layer, most of them for entries that went to narrower rungs, then 201."""
    _, *turns = a_layer(models, None)
    for launches, waits, sent in turns:
        assert launches <= 195
        assert waits <= 4
        assert sent <= 24


def test_a_turn_over_everything(models):
    """It was 370 launches a layer, then 110."""
    _, *turns = a_layer(models, "host")
    for launches, waits, sent in turns:
        assert launches <= 86
        assert waits <= 1  # for what the policy decided, a layer later
        assert sent <= 3


@pytest.mark.usefixtures("_asked_each_time")
def test_a_turn_over_what_was_kept_of_many_heads():
    """It was 238 launches: heads were padded, joined and chosen from one by one."""
    many = [
        build(
            "llama", attention="sdpa", head_dim=16, num_hidden_layers=n, num_key_value_heads=8, num_attention_heads=32
        )
        for n in (FEW, MANY)
    ]
    _, *turns = a_layer(many, None)
    assert all(launches <= 197 for launches, _, _ in turns)


def test_keeping_costs_a_prompt_few_launches(models):
    (plain, *_), (kept, *_) = a_layer(models, None), a_layer(models, "host")
    assert kept[0] - plain[0] <= 8
    assert kept[1] <= plain[1]


def test_a_prompt(models):
    """It was 69 launches a layer, of which 41 are the model's own."""
    (launches, waits, sent), *_ = a_layer(models, None)
    assert launches <= 59
    assert waits <= 1
    assert sent <= 2


@pytest.mark.usefixtures("_asked_each_time")
@pytest.mark.parametrize("keep", [None, "host"])
def test_the_length_changes_nothing(models, keep):
    short, long = (turns_of(models[0], keep, length)[-1] for length in (540, 1100))
    assert abs(long.total - short.total) <= 0.04 * short.total  # a block more, or less, is coded
    assert sum(long.waits.values()) == sum(short.waits.values())


def test_copies_of_a_layer(models, monkeypatch):
    """Codes leave a layer at a prompt's end, and the rest; the rest comes back in one copy, and each piece in one.

    Short turns are one piece, however many they are.
    """
    copies, real = Counter(), host._copy

    def noting(buffer, start, tensor, *, out):
        if tensor.numel():
            copies[out] += 1
        real(buffer, start, tensor, out=out)

    monkeypatch.setattr(host, "_copy", noting)
    monkeypatch.setattr(host, "APART", 2**16)  # as codes of a long prompt
    monkeypatch.setattr(past, "TOGETHER", 500)
    model = models[0]
    cache = ReFreeKVCache(model, "adaptive", **EVICTING, keep_evicted="host")
    for number in range(5):
        copies.clear()
        feed(model, cache, torch.randint(2, 90, (1, 700 if number == 0 else 100)))
        assert copies[True] <= 4 * FEW  # lines, factors, queries, and what is put together
        assert copies[False] == (0, 2, 3, 3, 3)[number] * FEW
        gc.collect()
