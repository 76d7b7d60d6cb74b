"""Families as lm-eval tasks, so that generated and public tasks go one way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import mean
    from lm_eval.api.task import Task
    from lm_eval.config.task import TaskConfig
except ImportError as error:
    raise ImportError(f"lm-eval tasks need lm-eval ({error}); run: pip install 'refreekv[eval]'") from error

from refreekv.evaluation.data.encoding import MARK
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.tasks.scoring import score

ANSWER_TOKENS = 128


class SampleTask(Task):
    """Samples of one family, each with an answer of its own length, stops and chat use.

    A question that comes after the text was compressed is set apart by a mark, which
    `CompressedLM` knows.

    Parameters
    ----------
    samples : sequence of Sample
        From `families.load`; all have a metric.
    """

    VERSION = 0
    OUTPUT_TYPE = "generate_until"

    def __init__(self, samples: Sequence[Sample]):
        self._samples = list(samples)
        super().__init__()
        self._config = TaskConfig(task=samples[0].family, generation_kwargs={"until": []}, num_fewshot=0)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the samples are there, all of them for testing."""

    has_training_docs = has_validation_docs = staticmethod(lambda: False)
    has_test_docs = staticmethod(lambda: True)

    def test_docs(self) -> list[Sample]:
        """The samples."""
        return self._samples

    def doc_to_text(self, doc: Sample) -> str:
        """The prompt, and the later question behind a mark."""
        return f"{doc.prompt}{MARK}\n\n{doc.question}" if doc.question else doc.prompt

    def doc_to_target(self, doc: Sample) -> str:
        """The first answer."""
        return doc.answers[0] if doc.answers else ""

    def fewshot_context(
        self,
        doc: Sample,
        num_fewshot: int = 0,
        *,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **_: Any,
    ) -> str:
        """The whole prompt: in the chat template where the sample wants it, and with what the answer begins with."""
        text, start = self.doc_to_text(doc), str(doc.extra.get("answer_prefix", ""))
        if apply_chat_template and chat_template is not None and doc.chat:
            system = [{"role": "system", "content": doc.system}] if doc.system else []
            return str(chat_template([*system, {"role": "user", "content": text}], add_generation_prompt=True)) + start
        text = f"{doc.system}\n\n{text}" if doc.system else text
        return f"{text}\n{start}" if doc.question else text + start

    def construct_requests(self, doc: Sample, ctx: str, *, metadata: Any, **_: Any) -> Instance:
        """One greedy answer."""
        options = {
            "until": list(doc.extra.get("stop", ())),
            "max_gen_toks": int(doc.extra.get("max_new_tokens", ANSWER_TOKENS)),
            "do_sample": False,
        }
        return Instance("generate_until", doc=doc, arguments=(ctx, options), idx=0, metadata=metadata)

    def process_results(self, doc: Sample, results: Sequence[str]) -> Mapping[str, float]:
        """What `scoring.score` says."""
        return score(doc, results[0])

    def aggregation(self) -> dict[str, Any]:
        """Means."""
        return {"score": mean}

    def higher_is_better(self) -> dict[str, bool]:
        """It is."""
        return {"score": True}
