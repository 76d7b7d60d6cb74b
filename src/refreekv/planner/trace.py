"""A load: when requests come, and how long their prompts and answers are."""

import json
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("arrival", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Request:
    """One request of a load."""

    arrival: float  # seconds from the start
    # tokens
    prompt: int
    output: int


def read(path: Path) -> list[Request]:
    """Requests by arrival, from a file with one JSON object a line.

    Each has ``arrival`` (seconds), ``prompt_tokens`` and ``output_tokens``; other keys are ignored.

    Raises
    ------
    ValueError
        A line that is no such object, or no line at all.
    OSError
        The file cannot be read.
    """
    requests = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            requests.append(_request(line, f"{path}, line {number}"))
    if not requests:
        raise ValueError(
            f'{path} holds no request; a line is {{"arrival": 0.5, "prompt_tokens": 900, "output_tokens": 200}}'
        )
    return sorted(requests, key=lambda request: request.arrival)


def _request(line: str, where: str) -> Request:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON") from error
    missing = [name for name in FIELDS if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"{where}: {' and '.join(missing)} missing; a request has {', '.join(FIELDS)}")
    arrival, prompt, output = (entry[name] for name in FIELDS)
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < float("inf"):
        raise ValueError(f"{where}: arrival must be seconds from the start, got {arrival!r}")
    for name, value in zip(FIELDS[1:], (prompt, output), strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a whole number of at least 1, got {value!r}")
    return Request(float(arrival), prompt, output)
