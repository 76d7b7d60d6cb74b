"""Whether a model takes a compressed cache: formats and policies against its own full cache, on a few prompts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

import refreekv
from refreekv import policies
from refreekv.core.configuration import head_size
from refreekv.core.quantisation import Ladder
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.transformers.finding import decoder_of
from refreekv.evaluation.checking import prompts as own
from refreekv.evaluation.checking.verdicts import BREAKS, SURVIVES, VISIBLE, CandidateResult, summed_up, verdict
from refreekv.evaluation.data.encoding import Encoded, encode
from refreekv.evaluation.data.own_prompts import Prompts, as_samples
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench, Job, skip_reason
from refreekv.evaluation.fidelity.formats import MARK, StoredPolicy, parse
from refreekv.evaluation.records import FidelityRecord
from refreekv.evaluation.sweeps import FULL, expand
from refreekv.policies import Policy
from refreekv.policies.base import AUTO, ladder_for
from refreekv.policies.constants import dial, scaled

FORMATS = ("int8", "int4")
"""Number formats that everything is stored in, nothing evicted."""

PAPER = "refreekv"
"""The paper's rule."""

STEP = 4.0
"""How much stricter and looser than the default its neighbours are."""

CONTINUATION = 32
"""Tokens of the full cache's answer that are compared, at most."""

FEW = 6
"""Fewer prompts say little: the advice adds so."""

SECONDS = {"cuda": 60.0, "cpu": 180.0}
"""How long a check goes on to take further prompts by itself, by kind of device."""


class NothingMeasuredError(ValueError):
    """No prompt could be measured; the message says why not."""


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes
    ----------
    model : str
        Name of the model.
    device, dtype : str
        What it ran on, and in.
    default : CandidateResult
        The default policy.
    results : tuple of CandidateResult
        All candidates, the default among them, in the order they were asked for.
    floor : CandidateResult
        The full cache, run a second time: what nothing can be better than.
    records : tuple of FidelityRecord
        One for each prompt and candidate.
    skipped : dict
        Prompts and candidates that were not measured, and why.
    seconds : float
        What it took.
    """

    model: str
    device: str
    dtype: str
    default: CandidateResult
    results: tuple[CandidateResult, ...]
    floor: CandidateResult
    records: tuple[FidelityRecord, ...]
    skipped: dict[str, str]
    seconds: float

    @property
    def breaks(self) -> bool:
        """Whether the default breaks the model."""
        return self.default.verdict == BREAKS

    @property
    def best(self) -> CandidateResult | None:
        """What holds the fewest bytes of what survives; else of what is merely visible; None if all break."""
        for wanted in (SURVIVES, VISIBLE):
            found = [one for one in self.results if one.verdict == wanted]
            if found:
                return min(found, key=lambda one: one.bytes_share)
        return None

    @property
    def advice(self) -> str:
        """Which line of code to use, and what it holds."""
        best = self.best
        if best is None:
            return "Use the full cache: everything that was tried gives other answers on this model."
        held = f"{best.bytes_share:.0%} of the bytes"
        if best.verdict == VISIBLE:
            return f"Nothing survives; the least that is only visible: {code(best.name)}  ({held})"
        few = f"; {self.floor.prompts} of your prompts say little, give more" if self.floor.prompts < FEW else ""
        return f"Use: {code(best.name)}  ({held}{few})"

    @property
    def prompt_lengths(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest prompt."""
        lengths = [record.prompt_tokens for record in self.records]
        return min(lengths), max(lengths)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, ready for JSON."""
        best = self.best
        return {
            "refreekv": refreekv.__version__,
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "breaks": self.breaks,
            "default": self.default.name,
            "best": None if best is None else best.name,
            "use": None if best is None else code(best.name),
            "floor": self.floor.to_dict(),
            "results": [one.to_dict() for one in self.results],
            "skipped": self.skipped,
            "records": [replace(record, kept_heads=None).to_dict() for record in self.records],
        }

    def __str__(self) -> str:
        width = max(len(one.name) for one in (self.floor, *self.results))
        lines = [
            f"{one.name:<{width}}  {one.bytes_share:6.1%} of the bytes  KL {one.kl_mean:.4f}, worst {one.kl_worst:.4f} "
            f"({one.worst_prompt})  {one.verdict or 'noise floor'}"
            for one in (self.floor, *self.results)
        ]
        return "\n".join([*lines, self.advice])


def code(name: str) -> str:
    """The line of Python that makes a candidate."""
    policy, _, kind = name.partition(MARK)
    arguments = ["model"]
    if policy != DEFAULT_POLICY:
        arguments.append(f'"{policy}"')
    if kind:
        arguments.append(f'kv_dtype="{kind}"')
    return f"refreekv.compress({', '.join(arguments)})"


def candidates(model: PreTrainedModel, more: Sequence[str] = ()) -> tuple[dict[str, Policy], dict[str, str]]:
    """What is worth knowing about, by name, and what cannot be tried on this model, with the reason.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    more : sequence of str
        Further policies, as the command line takes them.

    Raises
    ------
    ValueError, TypeError
        Unknown policy, format or parameter.
    """
    default = policies.create(DEFAULT_POLICY)
    found: dict[str, Policy] = {}
    missing: dict[str, str] = {}
    sizes = head_sizes(model)
    for kind in FORMATS:
        name = f"{FULL}{MARK}{kind}"
        try:
            Ladder.parse(kind).forms(sizes)
            found[name] = parse(name)
        except ValueError as error:
            missing[name] = str(error)
    around = [default]
    if dial(default) is not None:
        around = [scaled(default, 1 / STEP), default, scaled(default, STEP)]
    found |= {policy.spec: as_stored(policy, AUTO, sizes) for policy in around}
    found[PAPER] = policies.create(PAPER)
    for spec in (one for listed in more for one in expand(listed)):
        found.setdefault(spec, parse(spec) if MARK in spec else as_stored(policies.parse(spec), AUTO, sizes))
    found.pop(FULL, None)  # measured always
    return found, missing


def head_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Elements of a key and of a value, as the configuration has them."""
    size = head_size(model.config.get_text_config(decoder=True))
    return size, size


def as_stored(policy: Policy, kv_dtype: str | None, sizes: tuple[int, int]) -> Policy:
    """A policy with the number formats that a cache with it would store in, as the bench takes it.

    Formats that a policy brings along (`AUTO`) are left out where heads cannot be coded, as caches do.

    Raises
    ------
    ValueError
        Unknown format, or one that was asked for and heads that cannot be coded.
    """
    ladder = ladder_for(policy, kv_dtype)
    if ladder is None:
        return policy
    try:
        ladder.forms(sizes)
    except ValueError:
        if kv_dtype != AUTO:
            raise
        return policy
    return StoredPolicy(policy, ladder, optional=kv_dtype == AUTO)


def check(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Prompts | None = None,
    more: Sequence[str] = (),
    seconds: float | None = None,
    name: str = "",
    on_prompt: Callable[[Sample], None] = lambda _: None,
) -> Check:
    """Measure what a compressed cache does to a model's answers, and say what to use.

    The full cache answers each prompt greedily; every candidate then reads that answer over what it keeps of the
    prompt, and the predictions are compared token by token (`evaluation.fidelity.bench`).

    Parameters
    ----------
    model : Module
        A transformers model, or what wraps one.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    prompts : Path, or sequence of str or Sample, optional
        Prompts of one's own, or a file of them (`refreekv.evaluation.data.own_prompts.read_prompts`), all of which are
        read. None: those that come with the package, as many as the clock allows and one of each kind at least.
    more : sequence of str
        Further policies to try, such as ``"snapkv:ratio=0.5"`` or ``"adaptive@int8"``.
    seconds : float, optional
        Time after which no further prompts of the package are begun; 0: all are read. None: as `SECONDS` says.
    name : str
        What to call the model.
    on_prompt : callable
        Called with each prompt when it was measured.

    Returns
    -------
    Check
        What was found; ``print`` it.

    Raises
    ------
    ValueError
        A model that cannot be pruned, or (`NothingMeasuredError`) no prompt that fits into its context.
    TypeError
        Not a model.

    Examples
    --------
    >>> found = refreekv.check(model, tokenizer)  # doctest: +SKIP
    >>> print(found.advice)  # doctest: +SKIP
    Use: refreekv.compress(model)  (45% of the bytes)
    """
    begin = time.perf_counter()
    inner = decoder_of(model)
    asked, skipped = candidates(inner, more)
    bench = Bench(inner, tokenizer, name or getattr(inner.config, "_name_or_path", "") or "model", CONTINUATION)
    wanted = own.rounds() if prompts is None else [as_samples(prompts)]
    if prompts is not None:
        limit = None
    elif seconds is None:
        limit = SECONDS.get(inner.device.type, SECONDS["cpu"])
    else:
        limit = seconds or None
    records: list[FidelityRecord] = []
    for jobs in _in_time(_jobs(bench, wanted, {FULL: None, **asked}, skipped), begin, limit, skipped):
        for job, measured in zip(jobs, bench.measure(jobs), strict=True):
            records += measured
            on_prompt(job.sample)
    if not records:
        reasons = "; ".join(f"{prompt}: {reason}" for prompt, reason in list(skipped.items())[:3])
        raise NothingMeasuredError(f"no prompt could be measured ({reasons})")
    floor = summed_up(FULL, [record for record in records if record.policy == FULL])
    results = []
    for candidate in asked:
        one = summed_up(candidate, [record for record in records if record.policy == candidate])
        results.append(replace(one, verdict=verdict(one, floor)))
    return Check(
        model=bench.name,
        device=str(inner.device),
        dtype=str(inner.dtype).removeprefix("torch."),
        default=next(one for one in results if one.name == policies.create(DEFAULT_POLICY).spec),
        results=tuple(results),
        floor=floor,
        records=tuple(records),
        skipped=skipped,
        seconds=time.perf_counter() - begin,
    )


def measurable(
    bench: Bench, samples: Sequence[Sample], asked: dict[str, Policy | None]
) -> tuple[list[Job], dict[str, str]]:
    """What to measure of samples, and by their names why some cannot be."""
    jobs, skipped = [], {}
    for sample in samples:
        encoded: Encoded = encode(bench.tokenizer, sample)
        reason = skip_reason(bench.model, encoded, continuation=bench.continuation, max_tokens=2**31)
        if reason is None:
            jobs.append(Job(sample, encoded, asked))
        else:
            skipped[sample.id] = reason
    return jobs, skipped


def _jobs(
    bench: Bench, rounds: Sequence[Sequence[Sample]], asked: dict[str, Policy | None], skipped: dict[str, str]
) -> Iterator[list[Job]]:
    """What is measured together: prompts of a round on a GPU, one by one elsewhere."""
    for samples in rounds:
        jobs, reasons = measurable(bench, samples, asked)
        skipped |= reasons
        yield from [jobs] if bench.model.device.type == "cuda" and jobs else [[job] for job in jobs]


def _in_time(
    portions: Iterator[list[Job]], begin: float, limit: float | None, skipped: dict[str, str]
) -> Iterator[list[Job]]:
    """Portions while there is time for them, by what the tokens so far took; all of `own.KINDS` once in any case."""
    kinds: set[str] = set()
    tokens, started = 0, time.perf_counter()
    for jobs in portions:
        coming = sum(len(job.encoded.context) for job in jobs)
        new = {job.sample.family for job in jobs} - kinds
        now = time.perf_counter()
        expected = (now - started) / tokens * coming if tokens else 0.0
        if limit is not None and not new and now - begin + expected > limit:
            for job in jobs:
                skipped[job.sample.id] = f"no time left of {limit:.0f} s"
            continue
        yield jobs
        kinds |= new
        tokens += coming
