"""Self-contained HTML pages: one template, one style, one script, no request.

A page opens offline, loads nothing, and its content security policy forbids everything but
its own script. Texts are untrusted and reach the page escaped: Jinja2's autoescaping, and JSON
whose ``<``, ``>`` and ``&`` are escaped; the scripts write text nodes, never markup.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any


def write_page(
    path: Path,
    template: str,
    *,
    scripts: Sequence[str],
    styles: Sequence[str],
    data: Any,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **shown: Any,
) -> None:
    """Render a template of this package to a single self-contained HTML file.

    Parameters
    ----------
    path : Path
        The file to write; its folder is made if it is missing.
    template : str
        Name of the template. It is given ``style``, ``script``, ``script_hash`` (for its content
        security policy), ``data`` (JSON to put into the page as it is) and ``shown``.
    scripts, styles : sequence of str
        Files of the package's templates, joined in this order; the scripts share one scope.
    data : object
        What the script draws, as plain types; numbers that are not finite become null.
    filters : mapping, optional
        Filters of the template.
    **shown
        What else the template shows.

    Raises
    ------
    ImportError
        If Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("an HTML report needs Jinja2: pip install 'refreekv[report]'") from error
    parts = "\n".join(_file(name) for name in scripts)
    script = f'(() => {{\n"use strict";\n{parts}\n}})();'
    # As plain types and finite numbers first: JSON knows no NaN.
    text = json.dumps(plain(data), separators=(",", ":"))
    environment = Environment(
        loader=PackageLoader("refreekv.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(filters or {})
    page = environment.get_template(template).render(
        data=text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        style="\n".join(_file(name) for name in styles),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **shown,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates, which broken tokens may hold, have no UTF-8 form.
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def encode_positions(ranges: Iterable[Sequence[int]], length: int) -> list[int] | str:
    """Half-open ranges as runs (skip, keep, skip, keep, …) or as a bit set in base64, whichever is shorter.

    ``decode`` of ``templates/dom.js`` is the way back.
    """
    ranges = list(ranges)
    kept = bytearray(b"0" * length)
    for start, stop in ranges:
        first, last = max(0, start), min(stop, length)
        kept[first:last] = b"1" * max(0, last - first)
    bits = int(kept[::-1] or b"0", 2)
    packed = base64.b64encode(bits.to_bytes((length + 7) // 8, "little")).decode()
    if 4 * len(ranges) > len(packed):
        return packed  # a range takes four characters at least
    runs = [len(list(run)) for _, run in groupby(b"0" + kept)]
    runs[0] -= 1  # the position put in front, so that the first run is one that is not kept
    return runs if len(json.dumps(runs)) <= len(packed) else packed


def plain(value: Any) -> Any:
    """For JSON: floats to six digits, what is no finite number as null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def _file(name: str) -> str:
    return (resources.files("refreekv.evaluation") / "templates" / name).read_text(encoding="utf-8")
