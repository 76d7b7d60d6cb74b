"""What was measured of a model, kept on disk for the next process that loads the same weights.

One small file a model in the user's cache folder, named by a digest of everything that the measurements depend
on: all weights as they are in memory, the configuration, and the versions of the code. A model that was trained,
edited or converted has another digest, wherever it was loaded from; models with adapters, under training, or that
came from no file are not kept at all. A file that cannot be read is no file.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from refreekv.engines.transformers import fingerprint

FORMAT = "1"
"""Of the files; another one's are not read."""

VOLATILE = ("_name_or_path", "_attn_implementation", "transformers_version", "architectures")
"""Of a configuration: what says nothing about what the model computes."""

_log = logging.getLogger("refreekv")


def folder() -> Path | None:
    """Where the files are: ``refreekv`` in the user's cache folder; None where there is no such folder."""
    try:
        if os.environ.get("XDG_CACHE_HOME"):
            base = Path(os.environ["XDG_CACHE_HOME"])
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return base / "refreekv" / "models"


@torch.no_grad()
def key_of(model: nn.Module) -> str | None:
    """Digest a model's weights, buffers and configuration.

    Weights are read once, each row as a sum of its 64-bit words: a few percent of the time of one short forward
    pass.

    Returns
    -------
    str or None
        64 hexadecimal digits; None for a model whose constants are not for the disk: it came from no file, has
        adapters or gradients, or has weights that are elsewhere.
    """
    config: Any = getattr(model, "config", None)
    of_a_file = bool(getattr(config, "_name_or_path", ""))
    if not of_a_file or any(fingerprint.ADAPTERS[0] in vars(module) for module in model.modules()):
        return None
    described: list[object] = [FORMAT, _library(), transformers.__version__, type(model).__qualname__]
    described.append(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=lambda value: type(value).__name__))
    sums: list[Tensor] = []
    computed = {f"{path}.{name}" for path, part in model.named_modules() for name in part._non_persistent_buffers_set}
    held = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] not in computed)]
    for path, module in model.named_modules():
        held += [(f"{path}.SCB", part) for part in fingerprint.scales(vars(module))]
    for name, tensor in held:
        if tensor.grad is not None or hasattr(tensor, "device_mesh"):
            return None
        for part in fingerprint.parts(tensor):
            if part.device.type == "meta":
                return None
            described.append((name, str(part.dtype), tuple(part.shape)))
            sums.append(_row_sums(part))
    digest = hashlib.blake2b(repr(described).encode(), digest_size=32)
    # One transfer a device, not one a weight.
    for place in sorted({str(part.device) for part in sums}):
        together = torch.cat([part for part in sums if str(part.device) == place])
        digest.update(together.cpu().numpy().tobytes())
    return digest.hexdigest()


def load(key: str) -> dict[str, Tensor]:
    """What is kept under a key, by name; nothing where there is no file, or none that can be read."""
    place = _file(key)
    try:
        return {} if place is None else _read(place, key)
    except (OSError, ValueError, SafetensorError) as error:
        _log.warning("%s is ignored and will be written anew: %s", place, error)
        return {}


def store(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors under a key, beside those of other names that are kept there; without a folder, do nothing."""
    place = _file(key)
    if place is None:
        return
    there: dict[str, Tensor] = {}
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        there = _read(place, key)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in {**there, **tensors}.items()}
    written: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".", delete=False) as file:
            written = Path(file.name)
            file.write(save(kept, _about(key, kept)))
        # Whoever reads meanwhile sees the old file or the new one.
        written.replace(place)
    except OSError as error:
        _log.info("what was measured of the model is not kept in %s: %s", place.parent, error)
        if written is not None:
            with contextlib.suppress(OSError):
                written.unlink()


def _read(place: Path, key: str) -> dict[str, Tensor]:
    if not place.is_file():
        return {}
    with safe_open(place, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if file.metadata() != _about(key, tensors):
            raise ValueError("its contents are not those that were written")
    return tensors


def _about(key: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says of itself: whose it is, and a digest of what is in it."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"format": FORMAT, "key": key, "digest": digest.hexdigest()}


def _library() -> str:
    try:
        return version("refreekv")
    except PackageNotFoundError:  # a source tree that nobody installed
        return ""


def _lasting(value: Any) -> Any:
    """A configuration without what is `VOLATILE`, in those of its parts, too."""
    if not isinstance(value, dict):
        return value
    return {str(name): _lasting(part) for name, part in value.items() if name not in VOLATILE}


def _file(key: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{key}.safetensors"


LEAST = 256
"""Bytes of a row from which on it has a sum of its own."""
ROW = 4096
"""Bytes of a row where those of a tensor are shorter: packed weights may be stored as columns of bytes."""


def _row_sums(tensor: Tensor) -> Tensor:
    """One int64 a row of the tensor's bytes: the sum of their words, widest that fit, modulo 2^64."""
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=tensor.device)
    data = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous().view(torch.uint8)
    if data.shape[1] < LEAST and data.numel() > ROW:
        data = data.reshape(-1)
        whole = len(data) // ROW * ROW
        return torch.cat([_word_sums(part) for part in (data[:whole].view(-1, ROW), data[whole:][None])])
    return _word_sums(data)


def _word_sums(data: Tensor) -> Tensor:
    """The sums of rows of bytes, ``[rows, bytes]`` and contiguous."""
    for word in (torch.int64, torch.int32, torch.int16):
        if data.shape[1] % word.itemsize == 0:
            return data.view(word).sum(1, dtype=torch.int64)
    return data.sum(1, dtype=torch.int64)
