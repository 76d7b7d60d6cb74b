"""From names of tasks to tasks of lm-eval, with data from local files or from the hub."""

import contextlib
import io
import logging
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreekv.core import spelling
from refreekv.core.spelling import suggestion
from refreekv.evaluation.data import families
from refreekv.evaluation.data.catalogue import DATASETS
from refreekv.evaluation.data.datasets import PUNKT, DataMissing, LmEval, local_rows
from refreekv.evaluation.data.encoding import MARK
from refreekv.evaluation.tasks.scoring import MetricUnavailable

FEWSHOT_SEED = 1234
"""lm-eval's own default."""

LM_EVAL = "pip install 'refreekv[eval]'"


@dataclass(frozen=True)
class BenchTask:
    """A task that is ready to be asked."""

    name: str  # its name in results
    task: Any  # has the prompts and the metrics
    metric: str = ""  # the one that tables show; empty: the first that the task gives
    scale: float = 1.0  # factor that brings it to 0 … 1
    chat: bool = True  # whether its prompts suit a chat template
    indices: list[int] | None = None  # documents to ask; None: all


def load(
    wanted: Iterable[str],
    tokenizer: Any,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    execute_code: bool = False,
) -> tuple[list[BenchTask], dict[str, str]]:
    """Load tasks.

    Parameters
    ----------
    wanted : iterable of str
        Names of `families.task_names`, with parameters as families take them (``niah:tokens=4000``), or with
        ``after`` where the question is to come after its text was compressed (``qasper:after``);
        or any name that lm-eval knows.
    tokenizer : PreTrainedTokenizerBase
        Measures the lengths of tasks that lm-eval generates.
    data_dir : Path, optional
        Folder with datasets as JSONL, in place of the hub.
    limit : int, optional
        Documents of each task at most, chosen at random but in the dataset's order.
    seed : int
        Decides which ones, and what is generated.
    execute_code : bool
        Whether code that a model wrote may be run, in a sandbox.

    Returns
    -------
    list of BenchTask
        What can be run.
    dict
        What cannot, and why: data, a package or a permission is missing.

    Raises
    ------
    ValueError
        Unknown task or parameter, or a file with other data.
    """
    _import_lm_eval()
    found: list[BenchTask] = []
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="refreekv-tokenizer-") as folder, quiet_lm_eval():
        catalogue = _LmEvalTasks(tokenizer, Path(folder))
        for name in dict.fromkeys(wanted):
            try:
                found += _load(name, catalogue, data_dir, limit, seed, execute_code)
            except (DataMissing, MetricUnavailable) as error:
                missing[name] = " ".join(str(error).split())
    return found, missing


def _import_lm_eval() -> None:
    try:
        import lm_eval.tasks  # noqa: F401 - optional, and slow to import
    except ImportError as error:
        raise MetricUnavailable(f"tasks run through lm-eval ({error}); run: {LM_EVAL}") from error


class _LmEvalTasks:
    """lm-eval's tasks, folder by folder: looking through all of them takes many seconds."""

    def __init__(self, tokenizer: Any, folder: Path):
        # RULER's generators load the tokenizer by name; this one may have none.
        tokenizer.save_pretrained(folder)
        self._metadata: dict[str, Any] = {"tokenizer": str(folder)}
        self._managers: dict[str, Any] = {}

    @property
    def manager(self) -> Any:
        """Of all tasks."""
        return self._of("")

    def _of(self, place: str) -> Any:
        if place not in self._managers:
            import lm_eval.tasks

            path = str(Path(lm_eval.tasks.__file__).parent / place)
            self._managers[place] = lm_eval.tasks.TaskManager(
                include_path=path, include_defaults=False, metadata=self._metadata
            )
        return self._managers[place]

    def task(self, base: str, changes: dict[str, Any]) -> Any:
        """A task of lm-eval, named ``folder/task``, with another configuration."""
        place, _, name = base.partition("/")
        loaded = self._of(place).load({"group": "refreekv", "task": [{"task": name, **changes}]})
        (task,) = loaded["tasks"].values()
        return task


def _load(
    name: str, catalogue: _LmEvalTasks, data_dir: Path | None, limit: int | None, seed: int, execute_code: bool
) -> list[BenchTask]:
    plain, items = spelling.parts(name)
    plain = plain.lower().replace("_", "-")
    dataset = DATASETS.get(plain)
    if dataset is not None and dataset.task is not None:
        task = dataset.task
        for parameter in (f"{key}={value}" if value is not None else key for key, value in items):
            if parameter != families.AFTER or task.context_end is None:
                has = f"it has: {families.AFTER}" if task.context_end else "it has none"
                raise ValueError(f"task {plain!r} has no parameter {parameter!r}; {has}")
        if task.executes_code:
            _check_execution(execute_code)
        made = _of_catalogue(task, task.files or dataset.files, catalogue, data_dir, seed)
        if items:
            _ask_after(made, task)
        label = spelling.spell(plain, {}, [families.AFTER] if items else [])
        return [BenchTask(label, made, task.metric, task.scale, task.chat, _choose(made, limit, f"{plain}/{seed}"))]
    if plain in families.names():
        return [_family(name, data_dir, limit, seed)]
    if name in catalogue.manager.all_tasks:
        return _of_lm_eval(name, catalogue, limit, seed)
    hint = suggestion(plain, [*families.task_names(), *catalogue.manager.all_tasks])
    raise ValueError(f"no task is named {name!r}{hint}; see: refreekv eval --list, and lm-eval ls tasks")


def _of_catalogue(task: LmEval, files: Sequence[str], catalogue: _LmEvalTasks, data_dir: Path | None, seed: int) -> Any:
    hint, changes = f"give --data-dir with {' and '.join(files)}", dict(task.config)
    if data_dir is not None:
        from datasets import Dataset

        rows = Dataset.from_list([dict(row) for row in local_rows(data_dir, files, task.rows)])
        changes["custom_dataset"] = lambda **_: {task.split: rows}
    elif not task.hub:
        raise DataMissing(f"this dataset is not on the hub in this form: {hint}")
    if task.requires == PUNKT:
        _check_punkt()  # may take a download, so only for what is there
    return _constructed(task.base, changes, catalogue, seed, hint)


def _constructed(base: str, changes: dict[str, Any], catalogue: _LmEvalTasks, seed: int, hint: str) -> Any:
    random.seed(seed)  # some tasks shuffle their choices with it
    try:
        if base:
            return catalogue.task(base, changes)
        from lm_eval.api.task import ConfigurableTask

        return ConfigurableTask(config={"task": "refreekv", **changes})
    except (ImportError, AssertionError) as error:  # asserts are how some check versions of packages
        raise MetricUnavailable(
            f"lm-eval's {base} needs a package that is not there ({error}); run: {LM_EVAL}"
        ) from error
    except Exception as error:  # the hub's many ways to be out of reach
        if "custom_dataset" in changes:
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataMissing(f"its data could not be had ({type(error).__name__}: {reason}); {hint}") from error


def _check_execution(allowed: bool) -> None:
    if not allowed:
        raise MetricUnavailable("it runs code that the model wrote; allow that, in a sandbox, with --execute-code")
    from refreekv.evaluation.tasks import sandbox

    try:
        sandbox.check()
    except sandbox.NoIsolation as error:
        raise MetricUnavailable(str(error)) from error


def _check_punkt() -> None:
    """Fail with one line now, rather than in the middle of a run."""
    try:
        import nltk
    except ImportError as error:
        raise MetricUnavailable(f"its checks need nltk; run: {LM_EVAL}") from error
    package = PUNKT.rpartition("/")[2]
    for attempt in range(2):
        try:
            nltk.data.find(PUNKT)
            return
        except LookupError as error:
            if attempt:
                raise DataMissing(
                    f"its checks need nltk's {package}, which could not be downloaded; "
                    f"run where there is a network: python -m nltk.downloader {package}"
                ) from error
            nltk.download(package, quiet=True)


def _ask_after(task: Any, way: LmEval) -> None:
    """Mark in each prompt where the text ends, so that what follows comes after its compression."""
    template, end = task.config.doc_to_text, way.context_end
    assert end is not None

    def marked(doc: Any) -> str:
        prompt = task.doc_to_text(doc, template)
        at = end(doc, prompt)
        return f"{prompt[:at]}{MARK}{prompt[at:]}"

    task.config.doc_to_text = marked


def _choose(task: Any, limit: int | None, seed: str) -> list[int] | None:
    count = len(task.eval_docs)
    if limit is None or limit >= count:
        return None
    return sorted(random.Random(seed).sample(range(count), limit))


def _family(name: str, data_dir: Path | None, limit: int | None, seed: int) -> BenchTask:
    from refreekv.evaluation.tasks.sample_task import SampleTask
    from refreekv.evaluation.tasks.scoring import score

    samples = families.load(name, data_dir=data_dir, limit=limit, seed=seed)
    if not samples[0].metric:
        raise ValueError(f"{name} has no score; measure its fidelity with: refreekv eval --families {name}")
    score(samples[0], "")  # is its library there?
    return BenchTask(samples[0].family, SampleTask(samples), "score")


def _of_lm_eval(name: str, catalogue: _LmEvalTasks, limit: int | None, seed: int) -> list[BenchTask]:
    random.seed(seed)
    try:
        loaded = catalogue.manager.load(name)["tasks"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataMissing(f"lm-eval could not load it ({type(error).__name__}: {reason})") from error
    found = []
    for one, task in loaded.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise MetricUnavailable(
                f"{one} asks for rolling log-likelihoods, which run in one pass where compression never acts"
            )
        found.append(BenchTask(one, task, chat=False, indices=_choose(task, limit, f"{one}/{seed}")))
    return found


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Within, lm-eval and what it loads print nothing and log errors only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
