"""Pruned caches in files: safetensors, with a description that is checked when they are read.

A file holds what the cache holds, as it is stored (codes stay codes), without spare lines; so it can be
written on one device and read on another. Written first beside its place and then renamed, it is whole or
not there.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from refreekv.core.quantisation import Ladder
from refreekv.engines.transformers import identity
from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.engines.transformers.reading import parse_prompt_dtype
from refreekv.policies import Policy, registry
from refreekv.policies.base import AUTO, ladder_for
from refreekv.report import RowReport
from refreekv.storage import past_written
from refreekv.storage.arena import KVArena
from refreekv.storage.base import KVStorage
from refreekv.storage.columns import Columns, lasting
from refreekv.storage.compaction import takes_arena
from refreekv.storage.files import DamagedError, checksum, write
from refreekv.storage.host import NoRoomError
from refreekv.storage.past import PastLayer, Piece
from refreekv.storage.written import TYPES, Written, read, read_lengths, written

if TYPE_CHECKING:
    from refreekv.engines.transformers.cache import PrunedCache

FORMAT = "refreekv-cache"
PAST = "remembered."
"""What the names of a layer's tensors begin with that `keep_evicted` keeps."""
VERSION = 2
"""Of the format: another number is another format."""


# -- writing ---------------------------------------------------------------------------------------


def save(cache: "PrunedCache", model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a cache to a file, in place of what may be there; see `PrunedCache.save`."""
    description, tensors = _described(cache, model)
    text = json.dumps(description)
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "cache": text, "sums": json.dumps({"": zlib.crc32(text.encode()), **sums})}
    write(Path(path), tensors, metadata)


def _described(cache: "PrunedCache", model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if cache.state.awaiting is not None or len({layer.get_seq_length() for layer in cache.pruned_layers}) > 1:
        raise ValueError(
            "a forward pass with this cache was interrupted, and some layers hold tokens that others do not: call "
            "reset() on it and read the prompt again"
        )
    if cache.state.verification is not None and cache.state.verification.pending:
        raise ValueError(
            "the cache waits for the first tokens of an answer, which verify reads before anything is pruned: save it "
            "after them"
        )
    for pruned in cache.pruned_layers:
        pruned.prune_verified()
    cache.state.finish()
    if cache.is_unused:
        raise ValueError("the cache holds nothing yet: there is nothing to save")
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    past = cache.state.past
    # As it is now: another conversation may need the memory meanwhile.
    layers_of_past = {} if past is None else past.layers
    for index, layer in enumerate(cache.layers):
        kind, own = _layer(index, layer)
        if isinstance(layer, ReFreeKVLayer) and past is not None and layers_of_past:
            form = past_written.written(layers_of_past[layer.ordinal], past.rows)
            kind["remembered"] = form.plain
            own |= {PAST + name: part for name, part in form.tensors.items()}
        layers.append(kind)
        tensors |= {f"{index}.{name}": _on_host(part) for name, part in own.items()}
    description = {
        "version": VERSION,
        "model": identity.described(model),
        "policy": _policy(cache.policy),
        "kv_dtype": None if cache.kv_dtype is None else str(cache.kv_dtype),
        "codes_optional": cache.state.codes_optional,
        "prompt_dtype": None if cache.state.prompt_dtype is None else str(cache.state.prompt_dtype),
        "decode": cache.decode,
        "decode_interval": cache.state.decode_interval,
        "layers": layers,
    }
    return description, tensors


def _on_host(part: Tensor) -> Tensor:
    """A tensor as files take it: in host memory, with a storage that it shares with nobody."""
    host = part.detach().cpu().contiguous()
    small = host.dtype in (torch.int32, torch.bool)  # rows copied for beam search share their columns
    return host.clone() if small or host.untyped_storage().nbytes() != host.nbytes else host


def _layer(index: int, layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's description and tensors."""
    if isinstance(layer, ReFreeKVLayer):
        return _pruned_layer(layer)
    if type(layer) is DynamicSlidingWindowLayer:
        plain: dict[str, Any] = {"kind": "sliding", "length": int(layer.cumulative_length)}
        plain["past"] = layer.record_past
        if not layer.is_initialized or layer.keys is None or layer.values is None:
            return plain, {}
        return plain, {"keys": layer.keys, "values": layer.values}
    if not isinstance(layer, CacheLayerMixin) and getattr(layer, "keys", None) is None and not _states(layer):
        return {"kind": "none"}, {}
    raise ValueError(
        f"layer {index} is a {type(layer).__name__}, which cannot be saved: only caches of full and sliding-window "
        "attention can"
    )


def _states(layer: Any) -> bool:
    return any(isinstance(value, Tensor | list | dict) and len(value) > 0 for value in vars(layer).values())


def _pruned_layer(layer: ReFreeKVLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layer.check_between_calls()
    freed = [] if layer.ragged is None else layer.ragged.freed
    if any(freed):
        raise ValueError(
            f"rows {[row for row, gone in enumerate(freed) if gone]} were freed and hold nothing; "
            "select the others before saving (batch_select_indices)"
        )
    plain: dict[str, Any] = {"kind": "pruned", **layer.marks, "hides": layer.holds_hidden}
    plain["codes"] = layer.ladder is not None
    tensors: dict[str, Tensor] = {}
    if layer.ragged is None:
        plain["storage"] = {"kind": "dense"}
        if layer.get_seq_length():
            tensors["keys"], tensors["values"] = layer.dense
    else:
        form: Written = written(layer.ragged)
        plain["storage"] = form.plain
        tensors |= form.tensors
    said = {"tokens": "prompt_length", "kept": "kept_heads", "cut": "cut", "metric": "metric", "reasons": "reasons"}
    plain["records"] = [{name: getattr(row, field) for name, field in said.items()} for row in layer.reports]
    plain["columns"] = []
    for row, columns in enumerate(layer.kept_columns):
        if columns.bits is not None:
            plain["columns"].append({"counts": list(columns.held)})
            tensors[f"columns.{row}"] = columns.bits.clone()  # rows are parts of one tensor
        else:
            plain["columns"].append(len(columns.heads) if columns.ranges is None else [list(r) for r in columns.ranges])
            tensors |= {f"columns.{row}.{head}": index for head, index in enumerate(columns.heads)}
    if layer.padding is not None:
        tensors["padding"] = layer.padding
    if layer.generated:
        tensors["generated"] = torch.cat(layer.generated, dim=2)
    return plain, tensors


def _policy(policy: Policy) -> dict[str, Any]:
    known = policy.name in registry.available() and registry.get(policy.name) is type(policy)
    given: dict[str, Any] = {}
    for field in fields(policy):  # type: ignore[arg-type]
        if not field.init:
            continue
        value = getattr(policy, field.name)
        known = known and (value is None or isinstance(value, bool | int | float | str))
        given[field.name] = value
    return {"text": str(policy), "name": policy.name, "parameters": given if known else None}


# -- reading ---------------------------------------------------------------------------------------


class Saved:
    """A file that was opened, with what it says of itself.

    Raises
    ------
    ValueError
        No file of this format, one of another version, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"there is no file {self._path}")
        try:
            self._file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._path} is no saved cache, or was cut off: {error}") from error
        metadata = self._file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{self._path} holds tensors, but no cache that PrunedCache.save wrote")
        try:
            text = metadata["cache"]
            self._sums: dict[str, int] = json.loads(metadata["sums"])
            if self._sums[""] != zlib.crc32(text.encode()):
                raise DamagedError("its description is not what was written")
            self.description: dict[str, Any] = json.loads(text)
            version = self.description["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
        if version != VERSION:
            raise ValueError(
                f"{self._path} is of version {version} of its format and this refreekv reads version {VERSION}; make "
                "the cache anew, or load it with the refreekv that wrote it"
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless the cache was made for such a model."""
        with self._reading():
            made = self.description["model"]
            weights = {str(key): [float(number) for number in numbers] for key, numbers in made["weights"].items()}
            parts = {"name": str(made["name"]), "shape": dict(made["shape"]), "weights": weights}
        identity.check_model(parts, model, str(self._path))

    def policy(self, given: Policy | None) -> Policy:
        """The policy that the cache had; ValueError if ``given`` is another one."""
        with self._reading():
            saved = self.description["policy"]
            text, name, parameters = str(saved["text"]), str(saved["name"]), saved["parameters"]
        known = parameters is not None and name in registry.available()
        made = registry.create(name, **{**registry.get(name).before, **parameters}) if known else None
        policy = made if given is None else given
        if policy is None:
            raise ValueError(f"the policy of {self._path}, {text}, cannot be made from its name; pass policy=")
        # Parameters that are newer than the file say what was done without them.
        if str(policy) != (text if made is None else str(made)):
            raise ValueError(f"{self._path} was pruned by {text}; this is {policy}")
        return policy

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `PrunedCache` beside the policy."""
        with self._reading():
            found = {name: self.description[name] for name in ("kv_dtype", "decode", "decode_interval")}
            # Files from before there was a choice have none.
            found["prompt_dtype"] = parse_prompt_dtype(self.description.get("prompt_dtype", AUTO))
            return {**found, "kv_dtype": None if found["kv_dtype"] is None else Ladder.parse(found["kv_dtype"])}

    def asked_kv_dtype(self, policy: Policy) -> Ladder | str | None:
        """The ``kv_dtype`` that the cache was made with: ``"auto"`` where nobody asked for codes by name."""
        stored = self.settings["kv_dtype"]
        own = ladder_for(policy, AUTO)
        with self._reading():
            optional = bool(self.description.get("codes_optional", False))
        return AUTO if optional and stored in (None, own) else stored

    def fill(self, cache: "PrunedCache", model: nn.Module) -> None:
        """Put what the file holds into a cache that was just made for ``model``.

        Raises
        ------
        ValueError
            A damaged file.
        """
        devices = _devices(model)
        with self._reading():
            if self.description["kv_dtype"] is None:
                cache.store_exactly()
            described = self.description["layers"]
            if len(described) != len(cache.layers):
                raise DamagedError(f"it has {len(described)} layers and the cache {len(cache.layers)}")
            batches = set()
            for index, (plain, layer) in enumerate(zip(described, cache.layers, strict=True)):
                tensors = self._tensors(index, devices.get(index, next(model.parameters()).device))
                batches.add(_fill_layer(layer, plain, tensors, cache.state.arena))
            if len(batches - {0}) != 1:
                raise DamagedError("its layers have different numbers of rows")
            if cache.state.past is not None and self.remembers:
                self._fill_past(cache, devices, max(batches))

    @property
    def remembers(self) -> bool:
        """Whether it has all that prompts held, which ``keep_evicted`` keeps."""
        with self._reading():
            return any("remembered" in plain for plain in self.description["layers"])

    def _fill_past(self, cache: "PrunedCache", devices: Mapping[int, torch.device], rows: int) -> None:
        past, read = cache.state.past, []
        assert past is not None
        for layer in cache.pruned_layers:
            tensors = self._tensors(layer.index, torch.device("cpu"), past=True)
            found = past_written.read(self.description["layers"][layer.index]["remembered"], tensors)
            ends = (layer.get_seq_length(), *(() if layer.ragged is None else (layer.marks["pruned"],)))
            if found.batch != rows or found.length > min(ends) or (len(ends) > 1 and found.length != min(ends)):
                raise DamagedError("what was kept of earlier turns is of another conversation")
            read.append((layer.ordinal, found, devices.get(layer.index, torch.device("cpu"))))
        if len({found.length for _, found, _ in read}) > 1:
            raise DamagedError("what was kept of earlier turns is not of all layers")
        try:
            for ordinal, found, device in read:
                pieces: tuple[Piece, ...] = ()
                if found.entries:
                    stored = past.store.put(past, found.entries, device)
                    pieces = (Piece(stored, 0, found.in_pieces),)
                rest = past.store.put(past, found.rest, device)
                own = PastLayer(found.number, found.codes, pieces, rest, found.length, found.batch, device)
                past.adopt(ordinal, own)
        except (NoRoomError, OSError) as error:
            past.drop(str(error))
        past.store.used(past)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Within, what cannot be read is the file's fault."""
        try:
            yield
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error

    def _tensors(self, index: int, device: torch.device, *, past: bool = False) -> dict[str, Tensor]:
        """A layer's tensors, or those that are kept beside it, each compared with its sum."""
        prefix, found = f"{index}.{PAST if past else ''}", {}
        for name in self._file.keys():  # noqa: SIM118 (no dictionary)
            if name.startswith(prefix) and name.startswith(f"{index}.{PAST}") is past:
                tensor = self._file.get_tensor(name)
                if self._sums.get(name) != checksum(tensor):
                    raise DamagedError(f"the tensor {name} is not what was written")
                # A copy: the file may be written over.
                found[name.removeprefix(prefix)] = tensor.to(device, copy=True)
        return found


def _devices(model: nn.Module) -> dict[int, torch.device]:
    """Where each layer's attention runs."""
    found = {}
    for module in model.modules():
        index, first = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and first is not None:
            found[index] = first.device
    return found


def _fill_layer(layer: Any, plain: Mapping[str, Any], tensors: dict[str, Tensor], arena: bool | None) -> int:
    """Make a layer what was written; its rows, 0 if there are none."""
    kind = plain["kind"]
    if kind == "pruned" and isinstance(layer, ReFreeKVLayer):
        return _fill_pruned(layer, plain, tensors, arena)
    if kind == "sliding" and type(layer) is DynamicSlidingWindowLayer:
        if not tensors:
            return 0
        keys, values = tensors["keys"], tensors["values"]
        _check_dense(keys, values)
        DynamicLayer.lazy_initialization(layer, keys, values)
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(keys.device)
        layer.keys, layer.values = keys, values
        layer.cumulative_length = _count(plain["length"], keys.shape[2])
        layer.record_past = bool(plain["past"])
        return len(keys)
    if kind == "none" and not isinstance(layer, CacheLayerMixin):
        return 0
    raise DamagedError(f"a {kind} layer cannot become a {type(layer).__name__}")


def _fill_pruned(layer: ReFreeKVLayer, plain: Mapping[str, Any], tensors: dict[str, Tensor], arena: bool | None) -> int:
    marks = {name: _count(plain[name]) for name in ("length", "pruned", "settled")}
    if not plain.get("codes", True):
        layer.ladder = None
    columns = [_columns(row, given, tensors, marks["pruned"]) for row, given in enumerate(plain["columns"])]
    entries: KVStorage | tuple[Tensor, Tensor]
    if plain["storage"]["kind"] == "dense":
        entries = tensors["keys"], tensors["values"]
        _check_dense(*entries)
        rows, heads = entries[0].shape[:2]
        if entries[0].shape[2] != marks["length"] or columns:
            raise DamagedError("entries and lengths do not agree")
    else:
        entries = storage = read(plain["storage"], tensors)
        rows, heads = len(storage.lengths), storage.kv_heads
        after = marks["length"] - marks["pruned"]
        kept = [tuple(n + after for n in row.for_heads(heads)) for row in columns]
        if after < 0 or kept != storage.lengths:
            raise DamagedError("kept columns and lengths do not agree")
        if storage.coding is None and takes_arena(arena, storage.keys, storage.values):
            entries = KVArena.of(storage.full())
    reports = [_report(given) for given in plain["records"]]
    padding = tensors.get("padding")
    if len(reports) not in (0, rows) or (padding is not None and padding.shape != (rows, padding.shape[-1])):
        raise DamagedError("records are of other rows")
    if padding is not None and (padding.dtype != torch.bool or padding.shape[1] > marks["length"]):
        raise DamagedError("padding is none")
    generated = [tensors["generated"]] if "generated" in tensors else []
    if any(part.dim() != 4 or len(part) != rows or part.shape[1] % heads for part in generated) or any(
        part.dtype not in TYPES.values() for part in generated
    ):
        raise DamagedError("queries are of other rows")
    hides = bool(plain["hides"])
    layer.restore(entries, marks, columns=columns, reports=reports, hides=hides, padding=padding, generated=generated)
    return rows


def _columns(row: int, given: Any, tensors: Mapping[str, Tensor], end: int) -> Columns:
    """What a row keeps, as ascending columns under ``end``."""
    if isinstance(given, list):
        at = 0
        for start, stop in given:
            if not at <= _count(start) < _count(stop) <= end:
                raise DamagedError("kept ranges are not in order")
            at = stop
        return Columns.of_ranges(*((start, stop) for start, stop in given))
    if isinstance(given, dict):
        (held,), bits = read_lengths([given["counts"]]), tensors[f"columns.{row}"]
        if bits.dtype != torch.uint8 or bits.shape != (len(held), -(-end // 8)):
            raise DamagedError("kept columns are none")
        found = Columns(bits=bits, held=held)
        set_bits = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten(1)
        if tuple(set_bits.sum(1).tolist()) != held or bool(set_bits[:, end:].any()):
            raise DamagedError("kept columns and their number do not agree")
        return found
    heads = tuple(tensors[f"columns.{row}.{head}"] for head in range(_count(given)))
    for head in heads:
        if head.dtype != torch.int32 or head.dim() != 1 or (len(head) and not 0 <= int(head[0]) <= int(head[-1]) < end):
            raise DamagedError("kept columns are none")
        if len(head) > 1 and not bool((head.diff() > 0).all()):
            raise DamagedError("kept columns are not in order")
    if not heads:
        raise DamagedError("a row says nothing of what it keeps")
    return lasting([Columns(heads=heads)], end)[0]


def _report(given: Mapping[str, Any]) -> RowReport:
    (kept,) = read_lengths([given["kept"]])
    cut, metric = given["cut"], given["metric"]
    reasons = {str(name): float(share) for name, share in given["reasons"].items()}
    return RowReport(
        _count(given["tokens"]), kept, None if cut is None else _count(cut), None if metric is None else float(metric),
        reasons=reasons,
    )  # fmt: skip


def _check_dense(keys: Tensor, values: Tensor) -> None:
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise DamagedError("keys and values do not go together")
    if any(part.dtype not in TYPES.values() for part in (keys, values)):
        raise DamagedError("keys and values are of no type that is stored")


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise DamagedError(f"{value!r} is not a number of tokens")
    return value
