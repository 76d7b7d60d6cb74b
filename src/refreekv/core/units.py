"""Sizes and token counts as people write them; anything doubtful is refused."""

import re

_BYTES = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_NUMBER = r"(\d+(?:\.\d+)?)"


def parse_bytes(text: str, what: str = "size") -> int:
    """``"24GB"`` (24 · 10⁹ bytes), ``"24GiB"`` (24 · 2³⁰), ``"80 GiB"``; a unit is required.

    Raises
    ------
    ValueError
        No number, no unit or another one, or nothing left after rounding to bytes.
    """
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*", text)
    unit = match[2] if match else ""
    known = {name.lower(): name for name in _BYTES}
    if match and not unit:
        raise ValueError(f"{what} {text!r} has no unit: write {match[1]}GB (10⁹ bytes) or {match[1]}GiB (2³⁰ bytes)")
    if not match or unit.lower() not in known:
        raise ValueError(f"{what} {text!r} is not a size such as 24GB (10⁹ bytes) or 24GiB (2³⁰ bytes)")
    size = int(float(match[1]) * _BYTES[known[unit.lower()]])
    if size < 1:
        raise ValueError(f"{what} {text!r} is nothing; it must be more than 0 bytes")
    return size


def parse_tokens(text: str, what: str = "token count") -> int:
    """``"8192"``, ``"32k"`` (32 · 1024, as context lengths are named), ``"1M"`` (1024 · 1024).

    Raises
    ------
    ValueError
        Not a positive whole number of tokens.
    """
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([kKmM]?)\s*", text)
    scale = {"": 1, "k": 1024, "m": 1024**2}
    count = float(match[1]) * scale[match[2].lower()] if match else 0.0
    if count < 1 or count != int(count):
        raise ValueError(f"{what} {text!r} is not a number of tokens such as 8192, 32k or 1M")
    return int(count)


def format_size(count: float) -> str:
    """Bytes in binary units, the digits that matter."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 or size == int(size) else f"{size:.2f} {units[0]}"
