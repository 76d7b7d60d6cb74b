"""A risk that is stated and kept: the loosest constant that damages few prompts like the ones given."""

from collections.abc import Callable
from typing import Any

import refreekv
from refreekv import policies
from refreekv.engines import DEFAULT_POLICY
from refreekv.engines.calibration import FULL, Calibration, check_asked, check_enough
from refreekv.engines.transformers import identity
from refreekv.engines.transformers.finding import decoder_of
from refreekv.evaluation.checking.check import NothingMeasuredError, as_stored, head_sizes, measurable
from refreekv.evaluation.data.own_prompts import Prompts, as_samples
from refreekv.evaluation.data.samples import Sample
from refreekv.evaluation.fidelity.bench import Bench
from refreekv.evaluation.records import FidelityRecord
from refreekv.policies import Policy
from refreekv.policies.base import AUTO
from refreekv.policies.constants import at_factors

FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Constants that are tried, in units of the policy's own, from strict to loose."""

RISK = 0.05
DAMAGE = 0.02
"""Nats a token. Twice what the full cache differs from itself by on the worst of 166 prompts of the noisiest of three
models (``verdicts``), and five times what nobody can tell on average."""

CONTINUATION = 48
"""Tokens of the full cache's answer that are compared, at most."""


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    *,
    risk: float = RISK,
    damage: float = DAMAGE,
    policy: str | Policy = DEFAULT_POLICY,
    kv_dtype: str | None = AUTO,
    name: str = "",
    on_prompt: Callable[[Sample], None] = lambda _: None,
) -> Calibration:
    """Find the loosest constant with which at most a share ``risk`` of prompts is damaged by more than ``damage``.

    By conformal risk control (`core.risk`): the full cache answers each prompt greedily, every constant's cache reads
    that answer, and a prompt counts as damaged where the mean divergence over the answer is above ``damage``.

    Parameters
    ----------
    model : Module
        A transformers model, or what wraps one.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    prompts : Path, or sequence of str or Sample
        Prompts like those to come, or a file of them (`refreekv.evaluation.data.own_prompts.read_prompts`).
    risk : float
        Share of prompts that may be damaged, in (0, 1).
    damage : float
        Nats a token above which a prompt counts as damaged.
    policy : str or Policy
        One with a constant or a threshold; that of the step in the middle.
    kv_dtype : str or None
        How what is kept is stored, as for `compress`.
    name : str
        What to call the model.
    on_prompt : callable
        Called with each prompt when it was measured.

    Returns
    -------
    Calibration
        To be saved, and handed to ``refreekv.compress(model, calibration=…)``.

    Raises
    ------
    ValueError
        Too few prompts for the risk (with the number that is needed), a policy without a constant, numbers out of
        range, or a model that cannot be pruned.
    """
    check_asked(risk, damage)
    samples = as_samples(prompts)
    check_enough(len(samples), risk)
    steps = at_factors(policies.resolve(policy), FACTORS)
    inner = decoder_of(model)
    asked: dict[str, Policy | None] = {FULL: None}
    asked |= {one.spec: as_stored(one, kv_dtype, head_sizes(inner)) for one in steps}
    bench = Bench(inner, tokenizer, name or getattr(inner.config, "_name_or_path", "") or "model", CONTINUATION)
    jobs, reasons = measurable(bench, samples, asked)
    if reasons:
        # Prompts are not chosen among: those that were left out may be the ones that hurt.
        first, reason = next(iter(reasons.items()))
        raise NothingMeasuredError(
            f"{len(samples) - len(jobs)} of {len(samples)} prompts cannot be measured, and the others are not like "
            f"them: take them out if such prompts will not come ({first}: {reason})"
        )
    records: list[list[FidelityRecord]] = []
    for job, measured in zip(jobs, bench.measure(jobs), strict=True):
        records.append(measured)
        on_prompt(job.sample)
    columns = list(zip(*records, strict=True))
    described = identity.described(inner)
    return Calibration(
        model={**described, "name": name or described["name"]},
        steps=tuple(asked),
        losses=tuple(tuple(float(f"{one.kl_mean:.6g}") for one in row) for row in records),
        shares=tuple(sum(one.bytes_kept for one in rows) / sum(one.bytes_full for one in rows) for rows in columns),
        risk=risk,
        damage=damage,
        kv_dtype=kv_dtype,
        continuation=CONTINUATION,
        refreekv=refreekv.__version__,
        dtype=str(inner.dtype).removeprefix("torch."),
        device=inner.device.type,
    )
