"""From samples and policies to a results file: plans what is missing, measures it, stores it."""

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import refreekv
from refreekv.evaluation.data.encoding import ANSWER_TOKENS, encode
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job, skip_reason
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.results import RecordFile
from refreekv.evaluation.sweeps import FULL
from refreekv.policies import Policy

MAX_TOKENS = 6500


@dataclass
class Plan:
    """What a run has to do."""

    jobs: list[Job] = field(default_factory=list)  # what is still to measure
    # samples that cannot be measured, as ``(family, id)``, and why
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    done: int = 0  # pairs of sample and policy that the results file holds already


def setup_of(bench: Bench, *, max_tokens: int = MAX_TOKENS, **more: Any) -> dict[str, Any]:
    """The settings that records of one file must share, and the environment, which may differ."""
    config = bench.model.config
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(bench.model.device),
        "date": datetime.date.today().isoformat(),
    }
    return {
        "refreekv": refreekv.__version__,
        "model": bench.name,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "continuation": bench.continuation,
        "answer_tokens": ANSWER_TOKENS,
        "max_tokens": max_tokens,
        **more,
        "environment": environment,
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def plan(
    bench: Bench,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    results: RecordFile[FidelityRecord],
    *,
    max_tokens: int = MAX_TOKENS,
) -> Plan:
    """Tokenize the samples and leave out what was measured or cannot be.

    Parameters
    ----------
    bench : Bench
        The model.
    samples : sequence of Sample
        The samples.
    policies : dict
        Specifications to policies; the full cache is added in front.
    results : RecordFile[FidelityRecord]
        What is there already.
    max_tokens : int
        Longest prompt.
    """
    planned = Plan()
    asked: dict[str, Policy | None] = {FULL: None, **policies}
    measured = results.results.keys
    for sample in samples:
        encoded = encode(bench.tokenizer, sample)
        reason = skip_reason(bench.model, encoded, continuation=bench.continuation, max_tokens=max_tokens)
        if reason is not None:
            planned.skipped[sample.family, sample.id] = reason
            continue
        missing = {name: policy for name, policy in asked.items() if (sample.family, sample.id, name) not in measured}
        planned.done += len(asked) - len(missing)
        if missing:
            planned.jobs.append(Job(sample, encoded, missing))
    return planned


def execute(
    bench: Bench, planned: Plan, results: RecordFile[FidelityRecord], on_sample: Callable[[], None] = lambda: None
) -> None:
    """Measure what is planned; each sample is on the disk before ``on_sample`` is called for it."""
    for records in bench.measure(planned.jobs):
        results.append(records)
        on_sample()


def run(
    bench: Bench,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    path: Path,
    *,
    max_tokens: int = MAX_TOKENS,
    on_sample: Callable[[], None] = lambda: None,
    **setup: Any,
) -> list[FidelityRecord]:
    """Plan and execute in one go; all records of the file, old and new.

    Raises
    ------
    ValueError
        The file holds results of other settings.
    """
    full_names = {name: str(policy) for name, policy in policies.items()}
    with RecordFile(path, setup_of(bench, max_tokens=max_tokens, **setup), full_names, FidelityRecord) as results:
        execute(bench, plan(bench, samples, policies, results, max_tokens=max_tokens), results, on_sample)
        return results.results.records
