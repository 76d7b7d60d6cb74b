"""Finding a model's configuration, and what its checkpoint says about itself, without its weights."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
T = TypeVar("T")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelError(ValueError):
    """A model that cannot be found or planned for; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """A model known by its configuration."""

    name: str  # what to call it
    config: "PreTrainedConfig"  # the whole configuration; of a multimodal model, with its parts
    checkpoint_bytes: int | None = None  # bytes of the tensors in its checkpoint, if an index or headers were at hand
    checkpoint_source: str | None = None  # where that is from
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> Any:
        """The configuration of the language model."""
        return self.config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """The longest context the model is made for, if its configuration says."""
        limit = getattr(self.text, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def once_for_each(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of a configuration, called once for all that say the same: building a model takes most of a second."""
    known: dict[tuple[type, str], T] = {}

    @functools.wraps(function)
    def call(config: Any) -> T:
        key = type(config), config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = function(config)
        return known[key]

    return call


def find(text: str) -> Model:
    """A folder, a configuration file, or a model id of the hub, of which only small files are read.

    Raises
    ------
    ModelError
        Nothing there, or nothing that can be read.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"the folder {text} has no {CONFIG}")
        size, source = _local_checkpoint(path)
        return _model(path.resolve().name, path / CONFIG, size, source)
    if path.is_file():
        if path.suffix != ".json":
            raise ModelError(f"{text} is not a configuration: give a config.json, a model's folder or a hub id")
        name = path.resolve().parent.name if path.name == CONFIG else path.stem
        size, source = _local_checkpoint(path.parent) if path.name == CONFIG else (None, None)
        return _model(name, path, size, source)
    if not _HUB_ID.fullmatch(text) or text.startswith(".") or text.endswith((".json", ".gguf", ".safetensors")):
        raise ModelError(f"no such file or folder: {text!r}")
    return _from_hub(text)


def _from_hub(model_id: str) -> Model:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        config = hf_hub_download(model_id, CONFIG)
    except GatedRepoError as error:
        raise ModelError(
            f"{model_id} asks for permission: accept its terms on the hub and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {model_id!r}, or it is private") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"cannot read the configuration of {model_id} from the hub (offline, and not in the local cache): "
            "give its folder or config.json instead"
        ) from error
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {model_id} from the hub: {_first_line(error)}") from error
    size, source = _hub_checkpoint(model_id)
    return _model(model_id, Path(config), size, source)


def _hub_checkpoint(model_id: str) -> tuple[int | None, str | None]:
    """The index alone; for a single file, its header."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        return _index_size(Path(hf_hub_download(model_id, INDEX))), INDEX
    except Exception:  # no index, or no network: the configuration says enough
        try:
            files = get_safetensors_metadata(model_id).files_metadata
            ends = [tensor.data_offsets[1] for file in files.values() for tensor in file.tensors.values()]
            starts = [tensor.data_offsets[0] for file in files.values() for tensor in file.tensors.values()]
            return sum(ends) - sum(starts), "the checkpoint's header"
        except Exception:
            return None, None


def _local_checkpoint(folder: Path) -> tuple[int | None, str | None]:
    if (folder / INDEX).is_file():
        return _index_size(folder / INDEX), INDEX
    files = sorted(folder.glob("*.safetensors"))
    try:
        return (sum(_header_size(file) for file in files), "the checkpoint's headers") if files else (None, None)
    except (ValueError, OSError, KeyError):
        return None, None


def _index_size(path: Path) -> int | None:
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return int(size) if isinstance(size, int | float) and size > 0 else None


def _header_size(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: its header is a length and a JSON table."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is damaged")
        header = json.loads(file.read(length))
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return sum(stop - start for start, stop in spans)


def _model(name: str, path: Path, size: int | None, source: str | None) -> Model:
    from transformers import CONFIG_MAPPING

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not a JSON configuration: {_first_line(error)}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path} names no model_type, so it is not a model's configuration")
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        more = ", and its own code is not run" if raw.get("auto_map") else ""
        raise ModelError(f"{name} is of the type {kind!r}, which the installed transformers does not know{more}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:
        raise ModelError(f"transformers cannot read the configuration of {name}: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} ({kind}) is an encoder-decoder model; refreekv is for decoder-only models")
    return Model(name, config, size, source, raw)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
