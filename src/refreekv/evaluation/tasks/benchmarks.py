"""Public benchmarks as data: which task of lm-eval each is, its metric, and its rows in a local file.

Prompts, few-shot examples, answer extraction and metrics are lm-eval's. A local file takes
the place of the hub's dataset; `rows` puts its fields into the form that lm-eval's task expects.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refreekv.evaluation.data import readers
from refreekv.evaluation.data.readers import Row
from refreekv.evaluation.tasks import coqa

RowsOf = Callable[..., Iterable[Row]]
"""From the rows of each of a benchmark's files to those of lm-eval's task."""

PUNKT = "nltk:tokenizers/punkt_tab"
"""A requirement: data that nltk downloads on first use."""


def _as_they_are(rows: Sequence[Row]) -> Iterable[Row]:
    return rows


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes
    ----------
    summary : str
        One line.
    base : str
        lm-eval's task, with the folder it is in before a slash; empty where lm-eval has none that can
        be used, and ``config`` is all.
    metric : str
        Of lm-eval's results the one that tables show; ``metric,filter`` where the task has filters.
    files : tuple of str
        JSONL files that hold it in a data directory; all are needed.
    rows : RowsOf
        Puts their rows into form.
    split : str
        Split that ``base`` evaluates.
    config : dict
        What differs from ``base``.
    scale : float
        Factor that brings the metric to 0 … 1.
    chat : bool
        Whether the prompt suits a chat template: no few-shot prompt, no text to be gone on with.
    hub : bool
        Whether it can come from the hub.
    requires : str
        `PUNKT`, or nothing.
    context_end : callable or None
        From a row and its prompt to where the text ends that a question is asked about, so that
        the question can come after the text was compressed; None where there is no such place.
    executes_code : bool
        Whether scoring runs what the model wrote.
    """

    summary: str
    base: str
    metric: str
    files: tuple[str, ...]
    rows: RowsOf = _as_they_are
    split: str = "test"
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    chat: bool = True
    hub: bool = True
    requires: str = ""
    context_end: Callable[[Row, str], int] | None = None
    executes_code: bool = False


def _truthfulqa(rows: Sequence[Row]) -> Iterable[Row]:
    for row in rows:
        (item,) = readers.truthfulqa([row])
        yield {
            "question": row.get("Question", row.get("question")),
            "best_answer": item.answers[0],
            "correct_answers": list(item.answers),
            "incorrect_answers": item.extra["incorrect"],
        }


def _longbench_rows(rows: Sequence[Row]) -> Iterable[Row]:
    for row in rows:
        row = readers.in_longbench_fields(row)
        yield {
            "context": row["context"],
            "question": row.get("input") or row.get("question") or "",
            "answers": list(row["answers"]),
            "id": str(row.get("id") or row.get("_id") or ""),
        }


def _meetings(meetings: Sequence[Row], queries: Sequence[Row]) -> Iterable[Row]:
    return _longbench_rows(readers.joined_meetings(meetings, queries))


def _ruler_rows(rows: Sequence[Row]) -> Iterable[Row]:
    for row in rows:
        yield {
            "input": row["input"],
            "outputs": list(row["outputs"]),
            "gen_prefix": str(row.get("answer_prefix") or row.get("gen_prefix") or "").strip(),
            "max_length": 4096,
        }


def _after_context(row: Row, prompt: str) -> int:
    context: str = row["context"]
    return prompt.index(context) + len(context)


def _before_last_line(row: Row, prompt: str) -> int:
    del row
    return prompt.rindex("\n")


def _longbench(
    summary: str, name: str, *, file: str = "", files: tuple[str, ...] = (), rows: RowsOf = _longbench_rows, **rest: Any
) -> Benchmark:
    files = files or (file or f"longbench_{name}.jsonl",)
    rest.setdefault("context_end", _after_context)
    return Benchmark(summary, f"longbench/longbench_{name}", "score", files, rows, **rest)


def _ruler(summary: str, name: str, task: str = "") -> Benchmark:
    files = (f"ruler4k_{name}.jsonl",)
    base = f"ruler/{task or f'ruler_{name}'}"
    return Benchmark(summary, base, "4096", files, _ruler_rows, context_end=_before_last_line)


def _passes(doc: Row, results: Sequence[str]) -> dict[str, float]:
    from refreekv.evaluation.tasks.scoring import passes_tests

    return {"pass@1": passes_tests(doc["prompt"], results[0], doc["test"], doc["entry_point"])}


_HUMANEVAL = {
    # lm-eval's own cannot be loaded without the hub, whose code_eval runs answers without isolation.
    "dataset_path": "openai/openai_humaneval",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{canonical_solution}}",
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 512,
        "do_sample": False,
    },
    "process_results": _passes,
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
}

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        "GSM8K: grade school mathematics, eight solved examples; exact match of the number",
        "gsm8k/gsm8k_cot",
        "exact_match,flexible-extract",
        ("gsm8k.jsonl",),
        chat=False,
    ),
    "gpqa": Benchmark(
        "GPQA main: graduate science, multiple choice by likelihood (in two stages)",
        "gpqa/gpqa_main_zeroshot",
        "acc",
        ("gpqa.jsonl",),
        split="train",
        chat=False,
    ),
    "truthfulqa": Benchmark(
        "TruthfulQA: BLEU against the nearest true answer",
        "truthfulqa/truthfulqa_gen",
        "bleu_max",
        ("truthfulqa.jsonl",),
        _truthfulqa,
        split="validation",
        scale=0.01,
        chat=False,
        config={"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False}},
    ),
    "coqa": Benchmark(
        "CoQA: questions in a conversation about a story; F1",
        "",
        "f1",
        ("coqa.jsonl",),
        split="validation",
        chat=False,
        config=coqa.CONFIG,
    ),
    "narrativeqa": _longbench("LongBench NarrativeQA: questions about stories; F1", "narrativeqa"),
    "qasper": _longbench("LongBench Qasper: questions about papers; F1", "qasper"),
    "qasper-e": _longbench("LongBench-E Qasper; F1", "qasper_e", file="longbench_e_qasper.jsonl"),
    "2wikimqa": _longbench("LongBench 2WikiMQA: questions over several passages; F1", "2wikimqa"),
    "2wikimqa-e": _longbench("LongBench-E 2WikiMQA; F1", "2wikimqa_e", file="longbench_e_2wikimqa.jsonl"),
    "musique": _longbench("LongBench MuSiQue: questions over several passages; F1", "musique"),
    "musique-original": _longbench(
        "MuSiQue as published (not LongBench's rows), in LongBench's prompt; F1",
        "musique",
        file="musique_original.jsonl",
        hub=False,
    ),
    "hotpotqa-original": _longbench(
        "HotpotQA as published (not LongBench's rows), in LongBench's prompt; F1",
        "hotpotqa",
        file="hotpotqa_original.jsonl",
        hub=False,
    ),
    "qmsum": _longbench("LongBench QMSum: queries about meetings; ROUGE-L", "qmsum"),
    "qmsum-meetings": _longbench(
        "QMSum as published: whole meetings, in LongBench's prompt; ROUGE-L",
        "qmsum",
        rows=_meetings,
        files=("qmsum_meetings.jsonl", "qmsum_queries.jsonl"),
        hub=False,
    ),
    "multi-news": _longbench("LongBench MultiNews: a summary of several articles; ROUGE-L", "multi_news"),
    "triviaqa": _longbench("LongBench TriviaQA, few-shot; F1", "triviaqa", chat=False, context_end=None),
    "lcc": _longbench("LongBench LCC: the next line of code; edit similarity", "lcc", chat=False, context_end=None),
    "math500": Benchmark(
        "MATH-500: competition mathematics, four solved examples; equivalence of the result",
        "minerva_math/minerva_math500",
        "math_verify",
        ("math500.jsonl",),
        chat=False,
    ),
    "humaneval": Benchmark(
        "HumanEval: a function from its docstring; tests pass in a sandbox (only if asked to run code)",
        "",
        "pass@1",
        ("humaneval.jsonl",),
        config=_HUMANEVAL,
        chat=False,
        executes_code=True,
    ),
    "ifeval": Benchmark(
        "IFEval: instructions that a program can check; all of a prompt's followed",
        "ifeval/ifeval",
        "prompt_level_strict_acc",
        ("ifeval.jsonl",),
        split="train",
        requires=PUNKT,
    ),
    "ruler-vt": _ruler("RULER at 4k: variable tracking", "vt"),
    "ruler-cwe": _ruler("RULER at 4k: the ten most common words", "cwe"),
    "ruler-fwe": _ruler("RULER at 4k: the three most frequent coded words", "fwe"),
    **{
        f"ruler-{name.replace('_', '-')}": _ruler(f"RULER at 4k: needles, {what}", name, name)
        for name, what in {
            "niah_single_1": "one, in a repeated sentence",
            "niah_single_2": "one, in essays",
            "niah_single_3": "one UUID, in essays",
            "niah_multikey_1": "one of four keys",
            "niah_multikey_2": "one of very many keys",
            "niah_multikey_3": "one of very many UUIDs",
            "niah_multivalue": "four values of a key",
            "niah_multiquery": "four keys asked for",
        }.items()
    },
    "ruler-qa-squad": _ruler("RULER at 4k: questions of SQuAD among many passages", "qa_squad"),
    "ruler-qa-hotpot": _ruler("RULER at 4k: questions of HotpotQA among many passages", "qa_hotpot"),
}

PAPER = (
    *("gsm8k", "gpqa", "theoremqa", "truthfulqa", "coqa", "narrativeqa", "qasper", "2wikimqa", "musique"),
    *("qmsum", "multi-news", "triviaqa", "lcc"),
)
"""The tasks of arXiv 2502.16886, table 2, in its order."""
