"""What stays free beside a prompt that is admitted."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from refreekv.engines.vllm.messages import GroupOutcome, PruningOutcome
from refreekv.engines.vllm.scheduler_side.ledger import Entry
from refreekv.engines.vllm.scheduler_side.reserve import RECENT, Reserve

BLOCK = 16


def outcome(prompt, copies):
    whole = prompt // BLOCK
    return PruningOutcome("r", 0, prompt, (1,), (1,), (None,), (GroupOutcome(copies, whole, copies),), True)


def entry(*told, pending=False):
    return Entry(SimpleNamespace(request_id="r"), 160, outcome(*told) if told else None, [0] if pending else [])


def test_nothing_is_kept_free_before_anything_is_known():
    assert Reserve(None, BLOCK).foresee(8192, []) == 0


def test_a_prompt_leaves_room_for_what_moving_the_last_ones_took():
    reserve = Reserve(None, BLOCK)
    reserve.learn(outcome(1600, 20))
    reserve.learn(outcome(1600, 30))
    assert reserve.foresee(8192, []) == round(0.3 * 512)
    for _ in range(RECENT):
        reserve.learn(outcome(1600, 10))
    assert reserve.foresee(8192, []) == round(0.1 * 512)


def test_little_is_kept_free_where_moving_gives_little_back():
    reserve = Reserve(None, BLOCK)
    reserve.learn(outcome(1600, 95))
    assert reserve.foresee(1600, []) == 2
    # What keeps everything moves nothing.
    nothing = Reserve(None, BLOCK)
    nothing.learn(PruningOutcome("r", 0, 1600, (1600,), (1600,), (None,), (GroupOutcome(0, 0),), False))
    assert nothing.foresee(1600, [entry(1600, 0)] * 9) == 0


def test_those_that_wait_for_private_blocks_come_first():
    reserve = Reserve(None, BLOCK)
    reserve.learn(outcome(1600, 20))
    others = [entry(), entry(3200, 50, pending=True), *[entry(1600, 20)] * 3]
    assert reserve.foresee(160, others) == 50 + 2


def test_vllm_is_told_and_what_its_user_asked_for_stays():
    manager = SimpleNamespace(watermark_blocks=25)
    reserve = Reserve(manager, BLOCK)
    reserve.admit(1600, [])
    assert manager.watermark_blocks == 25
    reserve.learn(outcome(1600, 30))
    reserve.admit(1600, [])
    assert manager.watermark_blocks == 30
    reserve.admit(160, [])
    assert manager.watermark_blocks == 25
    Reserve(SimpleNamespace(), BLOCK).admit(1600, [])
