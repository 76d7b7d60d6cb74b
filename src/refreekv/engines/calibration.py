"""Calibrations: a constant with a stated risk, in a small file that every engine takes."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from refreekv.core import risk as bounds
from refreekv.policies import Policy, parse
from refreekv.policies.base import AUTO, ladder_for

FORMAT = "refreekv-calibration"
VERSION = 3
"""Of the format, and of the defaults that steps leave unsaid: another number is another format, or other defaults."""

FULL = "full"
"""The policy that loses nothing: the first step of every calibration."""


@dataclass(frozen=True)
class Calibration:
    """The loosest constant of a policy that keeps a risk, with everything that says so.

    *The expected share of prompts with more damage than ``damage`` is at most ``risk``*, for prompts that are
    exchangeable with those it was measured on: prompts like these, of the same model. Damage is the mean over the
    answer's tokens of KL(full cache || compressed), in nats.

    Attributes
    ----------
    model : dict
        Which model it was made for (`engines.transformers.identity`).
    steps : tuple of str
        Policies from strict to loose, the first of which keeps everything as it is.
    kv_dtype : str or None
        How all steps but the first store what they keep: ``"auto"``, as their policy has it; a format; None: as the
        model computes it.
    losses : tuple of tuple of float
        ``[n, steps]``: damage of each prompt, as it was measured.
    shares : tuple of float
        By step, K/V bytes held as a share of the full cache's.
    risk, damage : float
        What was asked for.
    continuation : int
        Tokens of each answer that were compared, at most.
    refreekv, dtype, device : str
        What it was measured with.

    Raises
    ------
    ValueError
        Numbers out of range, or losses that do not go with the steps.
    """

    model: Mapping[str, Any]
    steps: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    risk: float
    damage: float
    kv_dtype: str | None = AUTO
    continuation: int = 0
    refreekv: str = ""
    dtype: str = ""
    device: str = ""

    def __post_init__(self) -> None:
        check_asked(self.risk, self.damage)
        if not self.steps or self.steps[0] != FULL:
            raise ValueError(f"the first step has to be {FULL!r}, which loses nothing")
        if len(self.shares) != len(self.steps) or any(len(row) != len(self.steps) for row in self.losses):
            raise ValueError("each prompt needs a loss, and each step a share, for every step")
        check_enough(len(self.losses), self.risk)

    @property
    def prompts(self) -> int:
        """How many prompts were measured."""
        return len(self.losses)

    @property
    def damaged(self) -> list[list[float]]:
        """By prompt and step, 1 where the damage is more than is allowed; the first step, the full cache, does none."""
        return [[0.0, *(float(not loss <= self.damage) for loss in row[1:])] for row in self.losses]

    @property
    def noisy(self) -> int:
        """Prompts on which the full cache, run a second time, differs from itself by more than the damage."""
        return sum(not row[0] <= self.damage for row in self.losses)

    @property
    def bounds(self) -> list[float]:
        """By step, what has to be at most the risk: the share of prompts damaged, with the finite-sample correction."""
        return bounds.corrected_risks(self.damaged)

    @property
    def step(self) -> int:
        """Number of the step that is chosen."""
        return bounds.loosest(self.damaged, self.risk)

    def policy(self) -> Policy:
        """The policy of the step that is chosen."""
        return parse(self.steps[self.step])

    def stored(self) -> str | None:
        """How it is stored, as `compress` takes it."""
        return self.kv_dtype if self.step else None

    def __str__(self) -> str:
        name = self.steps[self.step] + (f", {self.kv_dtype or 16}" if self.step and self.kv_dtype != AUTO else "")
        said = (
            f"{name}: {self.shares[self.step]:.0%} of the bytes; on prompts like these {self.prompts}, at most "
            f"{self.risk:.1%} are expected to have more than {self.damage:g} nats of damage"
        )
        return said if self.step else f"{said}: nothing looser keeps that risk"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file."""
        found = {"format": FORMAT, "version": VERSION, **asdict(self)}
        # For readers; computed anew when the file is read.
        found["chosen"] = self.steps[self.step]
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: "str | os.PathLike[str] | Calibration") -> "Calibration":
        """Read what `save` wrote; a calibration is returned as it is.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            Another file, a damaged one, or one of another version.
        """
        if isinstance(path, Calibration):
            return path
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # text that is none is one, too
            raise ValueError(f"{file} is no calibration, or was cut off: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{file} is no calibration; `refreekv calibrate` writes one")
        if found.get("version") != VERSION:
            raise ValueError(
                f"{file} is of version {found.get('version')} of its format and this refreekv reads version {VERSION}; "
                "calibrate anew"
            )
        try:
            return cls._of(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    @classmethod
    def _of(cls, found: Mapping[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in found.items() if name in known}
        given["model"] = {name: found["model"][name] for name in ("name", "shape", "weights")}
        given["steps"] = tuple(map(str, found["steps"]))
        given["shares"] = tuple(map(float, found["shares"]))
        given["losses"] = tuple(tuple(map(float, row)) for row in found["losses"])
        made = cls(**given)
        ladder_for(made.policy(), made.kv_dtype)
        if found["chosen"] != made.steps[made.step]:
            raise ValueError(f"it says {found['chosen']!r} and its losses say {made.steps[made.step]!r}")
        return made


def check_asked(risk: float, damage: float) -> None:
    """Raise ValueError unless a risk and a damage are what they can be."""
    if not 0.0 < risk < 1.0:
        raise ValueError(f"risk is a share of prompts and must lie between 0 and 1, got {risk:g}")
    if not 0.0 < damage < float("inf"):
        raise ValueError(f"damage is a divergence in nats and must be above 0, got {damage:g}")


def check_enough(prompts: int, risk: float) -> None:
    """Raise ValueError if no number of undamaged prompts so small says anything about such a risk."""
    needed = bounds.prompts_needed(risk)
    if prompts < needed:
        raise ValueError(
            f"a risk of {risk:g} needs {needed} prompts, and several times as many to allow for any damage; there are "
            f"{prompts}"
        )
