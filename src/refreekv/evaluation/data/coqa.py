"""CoQA as a configuration for lm-eval, whose own imports what transformers 5 no longer has.

The prompt is the story and the conversation so far; the answer's first line counts. With
several references each is left out in turn, as in CoQA's own evaluation, so that people
and models are measured alike (arXiv 1808.07042, section 5.1).
"""

from collections.abc import Sequence
from typing import Any

from refreekv.evaluation.data.readers import Row


def prompt(doc: Row) -> str:
    """The story and the conversation up to the last question."""
    questions, answers = doc["questions"]["input_text"], doc["answers"]["input_text"]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions[:-1], answers, strict=False)]
    return f"{doc['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def references(doc: Row) -> list[str]:
    """All answers to the last question, the first one in front."""
    turn = len(doc["questions"]["input_text"]) - 1
    others = [more["input_text"][turn] for more in (doc.get("additional_answers") or {}).values() if more]
    found: dict[str, str] = {}
    for answer in (doc["answers"]["input_text"][turn], *others):
        found.setdefault(answer.lower(), answer)
    return list(found.values())


def results(doc: Row, responses: Sequence[str]) -> dict[str, float]:
    """Mean F1 over the ways to leave one reference out."""
    from lm_eval.tasks.longbench.metrics import qa_f1_score  # SQuAD's normalisation and F1

    said = responses[0].strip().partition("\n")[0]
    gold = references(doc)
    turns = [gold[:index] + gold[index + 1 :] for index in range(len(gold))] if len(gold) > 1 else [gold]
    return {"f1": sum(max(float(qa_f1_score(said, one)) for one in kept) for kept in turns) / len(turns)}


CONFIG: dict[str, Any] = {
    "dataset_path": "EleutherAI/coqa",
    "validation_split": "validation",
    "output_type": "generate_until",
    "doc_to_text": prompt,
    "doc_to_target": references,
    "process_results": results,
    "generation_kwargs": {"until": ["\nQ:"], "max_gen_toks": 48, "do_sample": False},
    "metric_list": [{"metric": "f1", "aggregation": "mean", "higher_is_better": True}],
}
