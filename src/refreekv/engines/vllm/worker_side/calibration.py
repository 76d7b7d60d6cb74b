"""What is measured of a model inside vLLM: prompts of the plugin's own, computed before the first request comes.

Every worker computes it through its model runner, as if the scheduler had sent it, with blocks
that the scheduler has not handed out yet.
"""

from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from refreekv.core.key_codes import KeyCodes, Moments
from refreekv.engines.vllm.messages import StepOrders
from refreekv.pruning.copy_scores import TOKENS, CopyProbe, tokens_said_twice
from refreekv.pruning.key_codes import TOKENS as FEW_TOKENS
from refreekv.pruning.key_codes import CodeProbe, codes_of, offsets

REQUEST = "refreekv-calibration"


def measure_copy_scores(runner: Any, state: Any, vllm_config: Any) -> list[Tensor]:
    """How much each KV head copies (`pruning.copy_scores`), by layer: ``[H_kv]`` over all ranks.

    Parameters
    ----------
    runner : vLLM model runner
        With its KV cache; no request has been computed yet.
    state : WorkerState or KeptState
        The runner's.
    vllm_config : VllmConfig
        vLLM's configuration.
    """
    prompt, count = _prompt(runner, state, vllm_config, TOKENS)
    probe = CopyProbe(tokens=count)
    _read(runner, state, vllm_config, prompt, probe)
    return probe.scores(len(probe.found))


def measure_constants(runner: Any, state: Any, vllm_config: Any) -> tuple[list[Tensor], list[KeyCodes]]:
    """Copy scores, and from the same prompt and shorter ones at other positions the codes of keys of each layer.

    Parameters
    ----------
    runner, state, vllm_config
        As in `measure_copy_scores`; ``runner.shift`` moves the positions that the model is told.
    """
    model = vllm_config.model_config
    prompt, count = _prompt(runner, state, vllm_config, TOKENS)
    first = CodeProbe(tokens=count)
    _read(runner, state, vllm_config, prompt, first)
    layers = len(first.found)
    scores = first.scores(layers)
    prompt, count = _prompt(runner, state, vllm_config, FEW_TOKENS)
    longest = int(getattr(model.hf_text_config, "max_position_embeddings", 0) or 0)
    # Positions of several dimensions are nothing that can be moved.
    starts = [] if model.uses_mrope else offsets(longest, len(prompt))
    total: dict[int, Moments] = {}
    for start in starts:
        probe, runner.shift = CodeProbe(tokens=count), start
        try:
            _read(runner, state, vllm_config, prompt, probe)
        finally:
            runner.shift = 0
        total = {layer: own.plus(total[layer]) if layer in total else own for layer, own in probe.moments.items()}
    others = CodeProbe(tokens=count, moments=total) if starts else None
    return scores, codes_of(first, others, len(starts), layers)


def warm_up(runner: Any, state: Any, vllm_config: Any) -> None:
    """Have a prompt read and decided about as any request's is, so that the first one waits for no compiler.

    Parameters
    ----------
    runner, state, vllm_config
        As in `measure_copy_scores`.
    """
    prompt, _ = _prompt(runner, state, vllm_config, TOKENS)
    _read(runner, state, vllm_config, prompt, state.policy)


def _prompt(runner: Any, state: Any, vllm_config: Any, most: int) -> tuple[list[int], int]:
    """Tokens said twice, as many as there is room for."""
    model, blocks = vllm_config.model_config, runner.kv_cache_config.num_blocks
    # Where not even this prompt fits, prompts are so short that the scores decide little: fewer tokens will do.
    room = min(model.max_model_len, (blocks - 1) // state.groups * state.block)
    return tokens_said_twice(model.hf_text_config, min(most, (room - 1) // 2))


def _read(runner: Any, state: Any, vllm_config: Any, prompt: list[int], probe: CopyProbe) -> None:
    """Let the model read a prompt for a probe, as if the scheduler had sent it."""
    policy, state.policy = state.policy, probe
    try:
        chunk = vllm_config.scheduler_config.max_num_batched_tokens
        for start in range(0, len(prompt), chunk):
            stop = min(start + chunk, len(prompt))
            runner.execute_model(_chunk(prompt, start, stop, state.groups, state.block))
            runner.sample_tokens(None)
        farewell = SchedulerOutput.make_empty()
        farewell.finished_req_ids = {REQUEST}
        farewell.kv_connector_metadata = StepOrders(finished=[REQUEST])
        runner.execute_model(farewell)
    finally:
        state.policy = policy


def _chunk(prompt: list[int], start: int, stop: int, groups: int, block: int) -> SchedulerOutput:
    """What a scheduler would send to have tokens ``start … stop - 1`` computed."""
    output = SchedulerOutput.make_empty()
    if start == 0:
        each = -(-len(prompt) // block)
        # Block 0 is the null block.
        blocks = tuple(list(range(1 + group * each, 1 + (group + 1) * each)) for group in range(groups))
        output.scheduled_new_reqs = [
            NewRequestData(
                REQUEST, prompt, [], SamplingParams(temperature=0, max_tokens=1), None, blocks, 0, None,
                prefill_token_ids=prompt,
            )
        ]  # fmt: skip
    else:
        output.scheduled_cached_reqs = CachedRequestData([REQUEST], set(), [], {}, [None], [start], [0])
    output.num_scheduled_tokens = {REQUEST: stop - start}
    output.total_num_scheduled_tokens = stop - start
    output.kv_connector_metadata = StepOrders()
    return output
