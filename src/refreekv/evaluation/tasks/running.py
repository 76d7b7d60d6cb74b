"""Task scores: answers with the full and with pruned caches, through lm-eval's tasks.

Each answer is scored as soon as it is there and is one line of the results file, so that a
run may be killed at any point and goes on where it was. `task_tables` makes tables of it.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from refreekv.engines.transformers.attachment import attached
from refreekv.evaluation.records import CHANCE, Key, TaskRecord
from refreekv.evaluation.results import RecordFile
from refreekv.evaluation.sweeps import FULL
from refreekv.evaluation.tasks.lm_eval_model import CompressedLM, Measured
from refreekv.evaluation.tasks.loading import FEWSHOT_SEED, BenchTask, quiet_lm_eval
from refreekv.policies import Policy, create


@dataclass(frozen=True)
class Settings:
    """What a run needs beside tasks and policies."""

    model_name: str  # what to call the model in results
    max_new_tokens: int | None = None  # limit of answers where a task's own is higher
    max_tokens: int | None = None  # longest prompt to be asked
    batch_size: int = 1  # prompts a batch; those with a later question go one by one
    # whether to use the tokenizer's chat template; None: where there is one and the task's prompts suit it
    chat: bool | None = None
    seed: int = 0  # for tasks that shuffle

    def to_dict(self) -> dict[str, Any]:
        """What records of one file must share: everything that changes an answer."""
        return {"kind": "tasks", "model": self.model_name, "max_new_tokens": self.max_new_tokens, "chat": self.chat}


@dataclass(frozen=True)
class Document:
    """One sample of a task, as requests to the model."""

    id: str  # which one it is, with a digest of its requests
    doc: Any  # the row
    requests: list[Any]  # one, or one a choice where likelihoods are compared
    length: int  # tokens of the prompt


@dataclass
class Plan:
    """What a run has to do."""

    documents: dict[str, list[Document]] = field(default_factory=dict)  # names of tasks to their samples
    left_out: list[str] = field(default_factory=list)  # samples that cannot be asked, and why

    @property
    def count(self) -> int:
        """Samples in all."""
        return sum(map(len, self.documents.values()))


def plan(model: Any, tokenizer: Any, tasks: Iterable[BenchTask], settings: Settings) -> Plan:
    """Write the tasks' prompts, and leave out those that do not fit the model's context."""
    planned = Plan()
    with quiet_lm_eval():
        lm = CompressedLM(model, FULL, tokenizer=tokenizer)
        context = int(lm.max_length)
        for task in tasks:
            kept = planned.documents.setdefault(task.name, [])
            for document, reserved in _documents(lm, task, settings):
                longest = (
                    context - reserved if settings.max_tokens is None else min(context - reserved, settings.max_tokens)
                )
                if document.length > longest:
                    planned.left_out.append(
                        f"{task.name}/{document.id}: {document.length:,} tokens, at most {longest:,} can be asked"
                    )
                else:
                    kept.append(document)
    return planned


def _documents(lm: CompressedLM, bench: BenchTask, settings: Settings) -> Iterator[tuple[Document, int]]:
    """A task's samples, each with the tokens that its answer needs."""
    task = bench.task
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    random.seed(settings.seed)
    has_template = bool(getattr(lm.tokenizer, "chat_template", None))
    chat = has_template and (bench.chat if settings.chat is None else settings.chat)
    task.build_all_requests(
        samples=bench.indices,
        apply_chat_template=chat,
        chat_template=lm.apply_chat_template if chat else None,
        tokenizer_name=lm.tokenizer_name,
    )
    groups: dict[int, list[Any]] = {}
    for request in task.instances:
        groups.setdefault(request.doc_id, []).append(request)
    for number, requests in groups.items():
        index = number if bench.indices is None else bench.indices[number]
        if requests[0].request_type == "generate_until":
            asked = lm.ask(requests[0])
            if settings.max_new_tokens is not None and asked.limit > settings.max_new_tokens:
                requests[0].args[1]["max_gen_toks"] = settings.max_new_tokens
                asked = lm.ask(requests[0])
            length, reserved = asked.length, asked.limit
        else:
            length = len(lm.tok_encode(requests[0].args[0]))
            reserved = max(len(lm.tok_encode(request.args[1], add_special_tokens=False)) for request in requests)
        doc = requests[0].doc
        yield Document(f"{getattr(doc, 'id', index)}-{_digest(requests)}", doc, requests, length), reserved


def _digest(requests: Iterable[Any]) -> str:
    whole = "\0".join(str(part) for request in requests for part in request.args)
    return hashlib.sha256(whole.encode("utf-8", "backslashreplace")).hexdigest()[:10]


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[BenchTask],
    planned: Plan,
    policies: Mapping[str, Policy],
    settings: Settings,
    results: RecordFile[TaskRecord],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> list[TaskRecord]:
    """Answer and score every sample with the full cache and with every policy.

    Parameters
    ----------
    model, tokenizer
        The model.
    tasks : sequence of BenchTask
        From `task_loading.load`.
    planned : Plan
        Their samples, from `plan`.
    policies : mapping
        Specifications to policies, as `sweeps.choose` gives them. The full cache is measured always.
    settings : Settings
        See there.
    results : RecordFile
        Where records go; what it holds already is not measured again.
    progress : callable
        Called with the number of (sample, policy) that are done.

    Returns
    -------
    list of TaskRecord
        Of the planned samples and policies, old and new, in the order of the plan.
    """
    wanted: dict[str, Policy] = {FULL: create(FULL), **{spec: one for spec, one in policies.items() if spec != FULL}}
    known = {record.key: record for record in results.results.records}
    # Attached all the while: a graph of a decoding step is captured once, not once a batch.
    with quiet_lm_eval(), attached(model):
        models = {
            spec: CompressedLM(model, policy, tokenizer=tokenizer, batch_size=settings.batch_size)
            for spec, policy in wanted.items()
        }
        for bench in tasks:
            documents = planned.documents[bench.name]
            for spec, lm in models.items():
                missing = [one for one in documents if (bench.name, one.id, spec) not in known]
                progress(len(documents) - len(missing))
                for batch in _batches(missing, settings.batch_size):
                    full = [known.get((bench.name, one.id, FULL)) for one in batch]
                    made = _measure(lm, bench, batch, spec, settings.model_name, full)
                    results.append(made)
                    known |= {record.key: record for record in made}
                    progress(len(made))
                if spec == FULL:
                    made = [one for one in by_chance(bench, documents, known) if one.key not in known]
                    results.append(made)
                    known |= {record.key: record for record in made}
    keys = [
        (bench.name, document.id, spec)
        for bench in tasks
        for document in planned.documents[bench.name]
        for spec in (FULL, CHANCE, *policies)
    ]
    return [known[key] for key in dict.fromkeys(keys) if key in known]


def by_chance(bench: BenchTask, documents: Sequence[Document], known: Mapping[Key, TaskRecord]) -> Iterator[TaskRecord]:
    """Each sample with the full cache's answer to its neighbour; of choices, the share of right ones."""
    if len(documents) < 2:
        return
    for document, other in zip(documents, [*documents[1:], documents[0]], strict=True):
        answer = known[bench.name, other.id, FULL]
        choices = len(document.requests)
        scores = score(bench, document, [answer.text]) if choices == 1 else {"score": 1 / choices}
        yield replace(answer, sample=document.id, policy=CHANCE, scores=scores, place=_place(document.doc))


def _batches(documents: Sequence[Document], size: int) -> Iterator[list[Document]]:
    """Samples of like length together: little padding."""
    ordered = sorted(documents, key=lambda one: -one.length)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _measure(
    lm: CompressedLM,
    bench: BenchTask,
    documents: Sequence[Document],
    spec: str,
    model: str,
    full: Sequence[TaskRecord | None],
) -> list[TaskRecord]:
    requests = [request for document in documents for request in document.requests]
    generates = requests[0].request_type == "generate_until"
    given = (lm.generate_until if generates else lm.loglikelihood)(requests, disable_tqdm=True)
    answers = dict(zip(map(id, requests), zip(given, lm.measured, strict=True), strict=True))
    records = []
    for document, reference in zip(documents, full, strict=True):
        responses = [answers[id(request)][0] for request in document.requests]
        costs: list[Measured] = [answers[id(request)][1] for request in document.requests]
        if generates:
            text = responses[0]
        else:
            best = max(range(len(responses)), key=lambda index: responses[index][0])
            text = document.requests[best].args[1]
        records.append(
            TaskRecord(
                sample=document.id,
                family=bench.name,
                policy=spec,
                model=model,
                prompt_tokens=costs[0].prompt_tokens,
                new_tokens=sum(cost.new_tokens for cost in costs),
                budget=costs[0].budget,
                bytes_full=costs[0].bytes_full,
                bytes_kept=costs[0].bytes_kept,
                text=text,
                scores=score(bench, document, responses),
                same_as_full=None if spec == FULL or reference is None else text == reference.text,
                place=_place(document.doc),
            )
        )
    return records


def _place(doc: Any) -> list[float] | None:
    extra = getattr(doc, "extra", {})
    return [extra["length"], extra["depth"]] if "depth" in extra else None


def score(bench: BenchTask, document: Document, responses: Sequence[Any]) -> dict[str, float]:
    """All metrics of one sample, by the task's own filters and rules.

    Parameters
    ----------
    bench : BenchTask
        The task.
    document : Document
        The sample.
    responses : sequence
        One for each of its requests: a text, or a log-likelihood and whether it is the greedy one.

    Returns
    -------
    dict
        ``"score"`` and whatever else is a number; ``metric,filter`` where the task has filters.

    Raises
    ------
    ValueError
        The task does not give the metric that it should be scored by.
    """
    for request, response in zip(document.requests, responses, strict=True):
        request.resps, request.filtered_resps = [response], {}
    bench.task._instances = document.requests  # lm-eval filters the requests of a whole run at once
    bench.task.apply_filters()
    found: dict[str, float] = {}
    for name in document.requests[0].filtered_resps:
        filtered = [request.filtered_resps[name] for request in document.requests]
        for metric, value in bench.task.process_results(document.doc, filtered).items():
            number = _number(value)
            if number is not None:
                found[metric if name == "none" else f"{metric},{name}"] = number
    metric = bench.metric or next(iter(found), "")
    if metric not in found:
        raise ValueError(f"{bench.name} gives no number named {metric!r}, only {', '.join(found) or 'none'}")
    return {"score": found[metric] * bench.scale, **{name: value for name, value in found.items() if name != "score"}}


def _number(value: Any) -> float | None:
    """A number, or the mean of several; None for what is to be aggregated in another way."""
    if isinstance(value, list) and value and all(isinstance(one, bool | int | float) for one in value):
        return sum(value) / len(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
