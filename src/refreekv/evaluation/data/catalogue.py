"""The catalogue: every public dataset by name, for fidelity (``read``), as a scored task (``task``), or both."""

from collections.abc import Sequence
from typing import Any

from refreekv.evaluation.data import coqa, readers
from refreekv.evaluation.data.datasets import PUNKT, Dataset, LmEval
from refreekv.evaluation.data.readers import Reader, Row


def _after_context(row: Row, prompt: str) -> int:
    context: str = row["context"]
    return prompt.index(context) + len(context)


def _before_last_line(row: Row, prompt: str) -> int:
    return prompt.rindex("\n")


def _scored_by_longbench(name: str, **changes: Any) -> LmEval:
    options = {"rows": readers.longbench_rows, "context_end": _after_context, **changes}
    return LmEval(f"longbench/longbench_{name}", "score", **options)


def _longbench(
    summary: str, name: str, read: Reader, new: int, *, file: str = "", splits: bool = True, **task: Any
) -> Dataset:
    files, hub = (file or f"longbench_{name}.jsonl",), ("Xnhyacinth/LongBench", name, "test")
    return Dataset(f"LongBench{summary}", files, read, hub, new, splits=splits, task=_scored_by_longbench(name, **task))


def _ruler(summary: str, name: str, new: int = 0, *, needle: bool = False) -> Dataset:
    task = LmEval(
        f"ruler/{name if needle else f'ruler_{name}'}", "4096", readers.ruler_rows, context_end=_before_last_line
    )
    read = readers.ruler if new else None
    return Dataset(f"RULER at 4k: {summary}", (f"ruler4k_{name}.jsonl",), read, None, new, splits=True, task=task)


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
_BRIEFLY = {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False}}

_QASPER, _QMSUM = readers.long(readers.ARTICLE, "Article"), readers.long(readers.MEETING, "Transcript", "Query")
_PASSAGES, _STORY = readers.long(readers.PASSAGES, "Passages"), readers.long(readers.STORY, "Story")
_NEWS = readers.long(readers.NEWS, "News", "Summary")
_MUSIQUE, _HOTPOTQA = ("musique_original.jsonl",), ("hotpotqa_original.jsonl",)
_MEETINGS = ("qmsum_meetings.jsonl", "qmsum_queries.jsonl")

DATASETS: dict[str, Dataset] = {
    "gsm8k": Dataset(
        "GSM8K: grade school mathematics; as a task with eight solved examples, exact match of the number",
        ("gsm8k.jsonl",),
        readers.gsm8k,
        ("openai/gsm8k", "main", "test"),
        320,
        task=LmEval("gsm8k/gsm8k_cot", "exact_match,flexible-extract", chat=False),
    ),
    "gpqa": Dataset(
        "GPQA main: graduate science, multiple choice by likelihood (in two stages)",
        ("gpqa.jsonl",),
        task=LmEval("gpqa/gpqa_main_zeroshot", "acc", split="train", chat=False),
    ),
    "theoremqa": Dataset(
        "TheoremQA without the rows that need a picture",
        ("theoremqa.jsonl",),
        readers.theoremqa,
        ("TIGER-Lab/TheoremQA", None, "test"),
        384,
        metric="theoremqa",
    ),
    "truthfulqa": Dataset(
        "TruthfulQA, generation; BLEU against the nearest true answer",
        ("truthfulqa.jsonl",),
        readers.truthfulqa,
        ("truthfulqa/truthful_qa", "generation", "validation"),
        64,
        task=LmEval(
            "truthfulqa/truthfulqa_gen",
            "bleu_max",
            readers.truthfulqa_rows,
            split="validation",
            scale=0.01,
            chat=False,
            config=_BRIEFLY,
        ),
    ),
    "coqa": Dataset(
        "CoQA: questions in a conversation about a story; F1",
        ("coqa.jsonl",),
        task=LmEval("", "f1", split="validation", chat=False, config=coqa.CONFIG),
    ),
    "humaneval": Dataset(
        "HumanEval: a function from its docstring; tests pass in a sandbox (only if asked to run code)",
        ("humaneval.jsonl",),
        readers.humaneval,
        ("openai/openai_humaneval", None, "test"),
        384,
        task=LmEval("", "pass@1", config=_HUMANEVAL, chat=False, executes_code=True),
    ),
    "math500": Dataset(
        "MATH-500: competition mathematics, four solved examples; equivalence of the result",
        ("math500.jsonl",),
        task=LmEval("minerva_math/minerva_math500", "math_verify", chat=False),
    ),
    "ifeval": Dataset(
        "IFEval: instructions that a program can check; all of a prompt's followed",
        ("ifeval.jsonl",),
        task=LmEval("ifeval/ifeval", "prompt_level_strict_acc", split="train", requires=PUNKT),
    ),
    "mt-bench": Dataset(
        "MT-Bench, the second turn after the first was compressed; no score",
        ("mt_bench.jsonl",),
        readers.mt_bench,
        ("HuggingFaceH4/mt_bench_prompts", None, "train"),
        256,
    ),
    "qasper": _longbench(" Qasper: questions about papers; F1", "qasper", _QASPER, 128),
    "qasper-e": _longbench(
        "-E Qasper (local files: up to 4k words); F1", "qasper_e", _QASPER, 128, file="longbench_e_qasper.jsonl"
    ),
    "2wikimqa": _longbench(" 2WikiMQA: questions over several passages; F1", "2wikimqa", _PASSAGES, 32),
    "2wikimqa-e": _longbench(
        "-E 2WikiMQA (local files: up to 4k words); F1", "2wikimqa_e", _PASSAGES, 32, file="longbench_e_2wikimqa.jsonl"
    ),
    "narrativeqa": _longbench(" NarrativeQA: questions about stories; F1", "narrativeqa", _STORY, 64),
    "qmsum": _longbench(" QMSum: queries about meetings; ROUGE-L", "qmsum", _QMSUM, 256),
    "multi-news": _longbench(" MultiNews: a summary of several articles; ROUGE-L", "multi_news", _NEWS, 384),
    "triviaqa": _longbench(" TriviaQA, few-shot; F1", "triviaqa", readers.few_shot, 32, chat=False, context_end=None),
    "lcc": _longbench(
        " LCC: the next line of code; edit similarity",
        "lcc",
        readers.code_context,
        64,
        splits=False,
        chat=False,
        context_end=None,
    ),
    "qmsum-meetings": Dataset(
        "QMSum as published: whole meetings, general and specific queries; ROUGE-L",
        _MEETINGS,
        readers.qmsum_meetings,
        max_new_tokens=256,
        splits=True,
        task=_scored_by_longbench("qmsum", rows=readers.meeting_rows, hub=False),
    ),
    "musique": Dataset(
        "MuSiQue: questions over 20 passages; fidelity on the rows as published, F1 on LongBench's",
        _MUSIQUE,
        readers.musique,
        ("dgslibisey/MuSiQue", None, "validation"),
        32,
        splits=True,
        task=_scored_by_longbench("musique", files=("longbench_musique.jsonl",)),
    ),
    "musique-original": Dataset(
        "MuSiQue as published (not LongBench's rows), in LongBench's prompt; F1",
        _MUSIQUE,
        task=_scored_by_longbench("musique", hub=False),
    ),
    "hotpotqa": Dataset(
        "HotpotQA as published (not LongBench's rows), with distractor passages",
        _HOTPOTQA,
        readers.musique,
        ("hotpotqa/hotpot_qa", "distractor", "validation"),
        32,
        splits=True,
    ),
    "hotpotqa-original": Dataset(
        "HotpotQA as published (not LongBench's rows), in LongBench's prompt; F1",
        _HOTPOTQA,
        task=_scored_by_longbench("hotpotqa", hub=False),
    ),
    "ruler-vt": _ruler("variable tracking", "vt", 48),
    "ruler-cwe": _ruler("the ten most common words", "cwe", 96),
    "ruler-fwe": _ruler("the three most frequent coded words", "fwe", 48),
    "ruler-niah-single-1": _ruler("needles, one, in a repeated sentence", "niah_single_1", needle=True),
    "ruler-niah-single-2": _ruler("needles, one, in essays", "niah_single_2", needle=True),
    "ruler-niah-single-3": _ruler("needles, one UUID, in essays", "niah_single_3", needle=True),
    "ruler-niah-multikey-1": _ruler("needles, one of four keys", "niah_multikey_1", needle=True),
    "ruler-niah-multikey-2": _ruler("needles, one of very many keys", "niah_multikey_2", 32, needle=True),
    "ruler-niah-multikey-3": _ruler("needles, one of very many UUIDs", "niah_multikey_3", 64, needle=True),
    "ruler-niah-multivalue": _ruler("needles, four values of a key", "niah_multivalue", needle=True),
    "ruler-niah-multiquery": _ruler("needles, four keys asked for", "niah_multiquery", needle=True),
    "ruler-qa-squad": _ruler("questions of SQuAD among many passages", "qa_squad"),
    "ruler-qa-hotpot": _ruler("questions of HotpotQA among many passages", "qa_hotpot"),
    **{
        f"kv-retrieval-{pairs}": Dataset(
            f"JSON key-value retrieval among {pairs} pairs of UUIDs",
            (f"kv_retrieval_{pairs}.jsonl",),
            readers.kv_retrieval,
            max_new_tokens=128,  # a sentence around a UUID, of a token a digit
            metric="share_found",
            splits=True,
        )
        for pairs in (75, 140)
    },
    "pg19": Dataset(
        "PG-19: pieces of books and how they go on",
        ("pg19.jsonl",),
        readers.books,
        ("emozilla/pg19-test", None, "test"),
        256,
        parameters={"chars": 16_000, "following": 1_000},
    ),
    "wikitext2": Dataset(
        "WikiText-2 test: starts of articles and how they go on",
        ("wikitext2.jsonl",),
        readers.articles,
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        256,
        parameters={"chars": 12_000, "following": 600},
    ),
}

PAPER = (
    *("gsm8k", "gpqa", "theoremqa", "truthfulqa", "coqa", "narrativeqa", "qasper", "2wikimqa", "musique"),
    *("qmsum", "multi-news", "triviaqa", "lcc"),
)
"""The tasks of arXiv 2502.16886, table 2, in its order."""
