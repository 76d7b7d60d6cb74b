"""Whatever is done to a cache, in whatever order: it stays the full cache of the tokens that are left."""

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

import refreekv
from helpers.equivalence import TOLERANCE
from helpers.models import build, prompts
from helpers.reference import positions_of

KEEPS_ALL = [
    ("full", {}),
    ("streaming-llm", {"size": 10**6}),
    ("snapkv", {"ratio": 1.0, "window": 4}),
    ("h2o", {"ratio": 1.0, "queries": 8}),
    ("cake", {"ratio": 1.0, "window": 4}),
]
"""Policies that evict nothing, by what they are asked for."""
SETTINGS = [{"keep_evicted": "host"}, {"verify": "answer:tokens=3"}, {"decode_interval": 3}, {"verify": True}]
MOST = 160


@functools.cache
def model_of(name):
    return build(name, attention="eager" if name == "gpt_oss" else "sdpa", head_dim=16)


class AnyOrder(RuleBasedStateMachine):
    """A cache that keeps all, beside the tokens that were read into it."""

    folder = None

    @initialize(
        name=st.sampled_from(["llama", "qwen2", "qwen3", "phi3"]),
        policy=st.sampled_from(KEEPS_ALL),
        more=st.sampled_from(SETTINGS),
        arena=st.sampled_from([None, True]),
        rows=st.integers(1, 3),
    )
    def begin(self, name, policy, more, arena, rows):
        """Make the cache."""
        if policy[0] == "cake" and "verify" in more:  # refused
            more = {}
        self.model, self.verify, self.arena = model_of(name), more.get("verify", False), arena
        # In the precision of the model, also what earlier turns held.
        self.cache = refreekv.ReFreeKVCache(
            self.model, policy[0], **policy[1], **more, kv_dtype=None, prompt_dtype=None
        )
        self.cache.state.arena = arena
        self._forget(rows)

    def _forget(self, rows):
        self.ids, self.mask = torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0, dtype=torch.long)

    @property
    def _length(self):
        return self.ids.shape[1]

    @torch.no_grad()
    def _feed(self, ids, mask, chunk=None):
        """Read tokens in chunks, and compare what they predict with the model's own full cache."""
        start = self._length
        self.ids, self.mask = torch.cat([self.ids, ids], 1), torch.cat([self.mask, mask], 1)
        found = []
        for first in range(start, self._length, chunk or ids.shape[1]):
            last = min(first + (chunk or ids.shape[1]), self._length)
            found.append(self._run(self.cache, first, last))
        wanted = self._run(DynamicCache(config=self.model.config), 0, self._length)[:, start:]
        real = mask.bool()
        torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], rtol=0, atol=10 * TOLERANCE)

    def _run(self, cache, first, last):
        """Logits ``[B, last - first, V]``."""
        positions = positions_of(self.mask[:, :last])[:, first:]
        return self.model(
            self.ids[:, first:last], attention_mask=self.mask[:, :last], position_ids=positions, past_key_values=cache
        ).logits

    @rule(data=st.data(), longest=st.integers(1, 40), chunk=st.sampled_from([None, 1, 7, 16]))
    @precondition(lambda self: self._length < MOST)
    def read(self, data, longest, chunk):
        """Read a prompt, or a later turn's, with padding in front of shorter rows."""
        rows = len(self.ids)
        lengths = data.draw(st.lists(st.integers(1, longest), min_size=rows, max_size=rows))
        ids, mask = prompts(tuple(lengths), seed=data.draw(st.integers(0, 99)))
        with self.cache.prompt_until(self._length + ids.shape[1]):
            self._feed(ids, mask, chunk)

    @rule(count=st.integers(1, 5), together=st.booleans(), seed=st.integers(0, 99))
    @precondition(lambda self: 0 < self._length < MOST)
    def answer(self, count, together, seed):
        """Feed tokens of an answer, one by one or as drafts."""
        ids, mask = prompts((count,) * len(self.ids), seed=seed)
        with self.cache.decoding():
            self._feed(ids, mask, None if together else 1)

    @rule(removed=st.integers(0, 60))
    def crop(self, removed):
        """Take back the newest tokens, as far as each row has others."""
        left = max(self._length - removed, 0)
        if left and not self.mask[:, :left].any(1).all():
            return
        self.cache.crop(left - self._length)
        self.ids, self.mask = self.ids[:, :left], self.mask[:, :left]

    @rule(data=st.data())
    @precondition(lambda self: self._length > 0)
    def take_rows(self, data):
        """Choose rows, some of them several times."""
        last = len(self.ids) - 1
        rows = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3))
        self.cache.batch_select_indices(torch.tensor(rows))
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    @rule(times=st.integers(2, 3))
    @precondition(lambda self: self._length > 0 and len(self.ids) == 1)
    def repeat(self, times):
        """Repeat the only row."""
        self.cache.batch_repeat_interleave(times)
        self.ids, self.mask = self.ids.repeat(times, 1), self.mask.repeat(times, 1)

    @rule()
    def copy(self):
        """Go on with a copy."""
        self.cache = copy.deepcopy(self.cache)

    @rule()
    @precondition(lambda self: self._length > 0)
    def save(self):
        """Go on with what a file says."""
        verification = self.cache.state.verification
        if verification is not None and verification.pending:  # refused
            return
        self.cache.save(self.folder / "cache")
        self.cache = refreekv.ReFreeKVCache.load(self.folder / "cache", self.model, verify=self.verify)
        self.cache.state.arena = self.arena

    @rule(rows=st.integers(1, 3))
    def reset(self, rows):
        """Begin another conversation."""
        self.cache.reset()
        self._forget(rows)

    @rule(seed=st.integers(0, 99))
    def elsewhere(self, seed):
        """Use the model with another cache, and without one."""
        ids, _ = prompts((20,), seed=seed)
        with torch.no_grad():
            self.model(ids, past_key_values=refreekv.ReFreeKVCache(self.model, "streaming-llm", size=5))
            self.model(ids)

    @invariant()
    def tells(self):
        """The report can be made, and says how much was read."""
        if hasattr(self, "cache"):
            assert self.cache.get_seq_length() == self._length
            if self._length:
                assert self.cache.report.tokens == self._length
                assert str(self.cache.report)


@pytest.mark.filterwarnings("ignore:.*past_key_values.*")
def test_a_cache_that_keeps_all_is_the_full_cache_whatever_is_done_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(AnyOrder, "folder", tmp_path)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=120, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
