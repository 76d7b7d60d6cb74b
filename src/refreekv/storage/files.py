"""Tensors in files that are whole or not there, each with a checksum."""

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class DamagedError(ValueError):
    """Why a file is not what it was written as."""


def checksum(tensor: Tensor) -> int:
    """A checksum of a tensor in host memory: of its type, its shape and its bytes."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, start) if tensor.numel() else start


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of the host to a file, in place of what may be there: beside it first, then renamed.

    Raises
    ------
    OSError
        It cannot be written; what was there is still there, and nothing else.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            save_file(dict(tensors), beside, dict(metadata))
        except SafetensorError as error:  # what it says of a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_summed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`write`, with a checksum of each tensor."""
    write(path, tensors, {"sums": json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})})


class Summed:
    """A file that `write_summed` wrote, opened: it can be read also if it is removed meanwhile.

    Raises
    ------
    DamagedError
        It is no such file, or was cut short.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._sums: dict[str, int] = json.loads((self._file.metadata() or {})["sums"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedError(f"{path} cannot be read: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory of its own; DamagedError if it is not what was written."""
        try:
            found: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{self._path} cannot be read: {error}") from error
        if self._sums.get(name) != checksum(found):
            raise DamagedError(f"the tensor {name} in {self._path} is not what was written")
        return found

    def check(self) -> None:
        """Raise DamagedError unless all is as it was written."""
        for name in self._sums:
            self.tensor(name)
