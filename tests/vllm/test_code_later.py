"""When tokens that came after a prompt are coded, and which blocks that takes and gives back: the scheduler's side."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from test_private_blocks import BLOCK, LAYERS, make_scheduler, request_maker
from vllm.v1.request import RequestStatus

from helpers.vllm_engine import tiny_model
from helpers.vllm_invariants import check
from refreekv.engines.vllm.config import PluginOptions
from refreekv.engines.vllm.messages import CodeOrder, GroupOutcome, PruningOutcome

PROMPT, TOKENS, RECENT, PRIVATE = 100, 38, 8, 3
NOTHING = SimpleNamespace(preempted_req_ids=None, finished_req_ids=set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


class Case:
    """A request that runs, whose prompt is in private blocks."""

    def __init__(self, folder, computed, answer, tokens=TOKENS, **options):
        self.scheduler = make_scheduler(folder, PluginOptions("full", **options), False)
        self.reclaimer = self.scheduler.connector.reclaimer
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.pool = self.manager.block_pool
        self.request = request_maker()("r", list(range(PROMPT)), 200)
        self.request.append_output_token_ids(list(range(answer)))
        self.request.num_computed_tokens, self.request.status = computed, RequestStatus.RUNNING
        self.scheduler.requests["r"] = self.request
        self.reclaimer.ledger.open(self.request)
        self.manager.req_to_blocks["r"] = self.pool.get_new_blocks(-(-computed // BLOCK))
        group = GroupOutcome(PRIVATE, PROMPT // BLOCK, PRIVATE)
        kept = (PROMPT,) * LAYERS
        self.outcome = PruningOutcome("r", 0, PROMPT, kept, kept, (None,) * LAYERS, (group,), True, 0.3, tokens, RECENT)
        self.reclaimer.receive([self.outcome])
        check(self.scheduler)

    @property
    def blocks(self):
        return [block.block_id for block in self.manager.req_to_blocks["r"]]

    def orders(self, output=NOTHING):
        found = self.reclaimer.orders(output)
        check(self.scheduler)
        return found

    def fill(self):
        """Nothing is free any more."""
        self.manager.req_to_blocks["other"] = self.pool.get_new_blocks(self.pool.get_num_free_blocks())


def test_what_is_not_among_the_newest_is_coded(folder):
    case = Case(folder, PROMPT + 2 * TOKENS + RECENT - 1, 120)
    before, free = case.blocks, case.pool.get_num_free_blocks()
    (order,) = case.orders().codes
    # From position 96 on, where the prompt's last block is, to 138.
    assert case.blocks == [0] * 8 + before[8:]
    assert [block.block_id for block in case.manager.private["r"]][PRIVATE:] == [order.block]
    assert case.pool.get_num_free_blocks() == free + 2 - 1
    assert case.reclaimer.ledger.entries["r"].freed == PROMPT // BLOCK - PRIVATE + 2 - 1
    assert not case.orders().codes
    case.request.num_computed_tokens += 1
    assert [order.request_id for order in case.orders().codes] == ["r"]
    assert not case.orders().codes


def test_drafts_are_not(folder):
    """Steps that run ahead may have computed more than there are tokens."""
    case = Case(folder, PROMPT + TOKENS + RECENT + 4, TOKENS + RECENT - 1)
    assert not case.orders().codes
    case.request.append_output_token_ids([7])
    assert len(case.orders().codes) == 1


def test_several_blocks_at_once(folder):
    """As after a preemption, when all has been computed again."""
    case = Case(folder, PROMPT + 3 * TOKENS + RECENT, 3 * TOKENS + RECENT)
    assert len(case.orders().codes) == 3
    assert case.blocks[: (PROMPT + 3 * TOKENS) // BLOCK] == [0] * ((PROMPT + 3 * TOKENS) // BLOCK)
    assert all(case.blocks[(PROMPT + 3 * TOKENS) // BLOCK :])


def test_memory_does_not_decide_when(folder):
    """The block that tokens go to may be one that they leave; not one that somebody else reads, too."""
    case = Case(folder, PROMPT + TOKENS + RECENT, TOKENS + RECENT)
    case.fill()
    own = case.blocks[6:8]
    shared = [case.pool.blocks[block] for block in own]
    case.pool.touch(shared)
    case.manager.req_to_blocks["third"] = shared
    assert not case.orders().codes
    case.manager.req_to_blocks.pop("third")
    case.pool.free_blocks(shared)
    (order,) = case.orders().codes
    assert order.block in own
    assert case.pool.get_num_free_blocks() == 1


def test_of_requests_that_are_gone_nothing_is_coded(folder):
    case = Case(folder, PROMPT + TOKENS + RECENT, TOKENS + RECENT)
    case.request.status = RequestStatus.PREEMPTED
    assert not case.orders().codes
    case.request.status, case.request.num_preemptions = RequestStatus.RUNNING, 1
    assert not case.orders().codes
    case.request.num_preemptions = 0
    assert case.orders().codes == [CodeOrder("r", case.manager.private["r"][-1].block_id)]


def test_where_a_prompt_is_not_coded_its_answer_is_not(folder):
    case = Case(folder, PROMPT + TOKENS + RECENT, TOKENS + RECENT, tokens=0)
    assert not case.orders().codes


def test_answers_stay_as_they_are_where_that_is_asked_for(folder):
    """What is kept of the prompt is moved all the same."""
    case = Case(folder, PROMPT + TOKENS + RECENT, TOKENS + RECENT, coded_answers=False)
    before = case.blocks
    found = case.orders()
    assert [order.request_id for order in found.copies] == ["r"]
    assert not found.codes
    assert case.blocks == before
