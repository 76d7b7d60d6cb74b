"""What may be offered to the prefix cache."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM: make test-vllm sets up an environment with it")

from refreekv.engines.vllm.messages import GroupOutcome, PruningOutcome
from refreekv.engines.vllm.scheduler_side.ledger import Ledger


@pytest.mark.parametrize(("freed", "offered"), [(0, 300), (2, 100)])
def test_tokens_after_an_eviction_are_not_offered(freed, offered):
    ledger = Ledger()
    request = SimpleNamespace(request_id="r", num_prompt_tokens=100)
    ledger.open(request)
    assert ledger.untouched(request, 64) == 64
    assert ledger.untouched(request, 120) == 100
    ledger.entries["r"].outcome = PruningOutcome(
        "r", 0, 100, (100,), (100,), (None,), (GroupOutcome(1, 1 + freed),), freed > 0
    )
    assert ledger.untouched(request, 64) == 64
    # A streaming session that goes on: its answer and new input count as prompt now.
    request.num_prompt_tokens = 280
    assert ledger.untouched(request, 300) == offered


def test_of_a_session_that_goes_on_before_the_outcome_is_in_only_the_first_prompt_is_offered():
    """Its new input is read behind what is kept of that."""
    ledger = Ledger()
    request = SimpleNamespace(request_id="r", num_prompt_tokens=100)
    ledger.open(request)
    request.num_prompt_tokens = 280
    assert ledger.untouched(request, 300) == 100
