"""What a layer of a cache holds, in bytes, and what its part of the report says."""

from dataclasses import replace

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from refreekv.engines.transformers.layer import ReFreeKVLayer
from refreekv.report import LayerReport, Remembered
from refreekv.storage.past import Past


def layer_report(index: int, kind: str, layer: CacheLayerMixin) -> LayerReport:
    """The report's part on a layer, which may be one that is never pruned."""
    if not isinstance(layer, ReFreeKVLayer):
        held = sum(_storage_bytes(tensor) for tensor in (layer.keys, layer.values))
        return LayerReport(index, kind, (), bytes_before=held, bytes_after=held)
    full = layer.get_seq_length() * entry_bytes(layer)
    rows = tuple(
        replace(row, bytes_before=full, bytes_after=held)
        for row, held in zip(layer.reports, _row_bytes(layer), strict=False)
    )
    return LayerReport(index, kind, rows, layer.batch * full, _held_bytes(layer), _formats(layer), _host_bytes(layer))


def entry_bytes(layer: ReFreeKVLayer) -> int:
    """K/V bytes of one token of one row, over all KV heads, in the precision of the model."""
    if layer.get_seq_length() == 0:
        return 0
    return layer.kv_heads * sum(size * kind.itemsize for size, kind in zip(layer.sizes, layer.types, strict=True))


def padded_bytes(layer: ReFreeKVLayer) -> int:
    """Bytes that attention copies for the length of a call, to give KV heads of different length one length."""
    if layer.ragged is None or layer.ragged.tables:
        return 0
    uneven = [max(lengths) for lengths in layer.ragged.lengths if len(set(lengths)) > 1]
    return sum(uneven) * entry_bytes(layer)


def index_bytes(layer: ReFreeKVLayer) -> int:
    """Bytes of what says which columns were kept and which are padding, and of the arena's table."""
    tensors = (part for columns in layer.kept_columns for part in (*columns.heads, columns.bits) if part is not None)
    storages = (part.untyped_storage() for part in tensors)
    arenas = () if layer.ragged is None else layer.ragged.tables
    table = sum(arena.table.nbytes for arena in arenas)
    if layer.reading is not None:
        table += layer.reading.prompt.index_bytes
    # Rows copied for beam search share one index.
    return layer.padding_bytes + table + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def remembered(past: Past | None) -> Remembered | None:
    """The report's part on what is kept beside the cache."""
    if past is None:
        return None
    return Remembered(past.length or 0, past.parked_bytes, past.file_bytes, past.restored, past.lost)


def _formats(layer: ReFreeKVLayer) -> dict[str, int]:
    """Number formats to the entries that are stored in them; empty where nothing is coded."""
    if layer.ragged is None or layer.ragged.coding is None or layer.ladder is None:
        return {}
    names = ["exact", *(rung.kind for rung in layer.ladder.rungs)]
    return {name: sum(map(sum, arena.lengths)) for name, arena in zip(names, layer.ragged.tables, strict=True)}


def _row_bytes(layer: ReFreeKVLayer) -> list[int]:
    """K/V bytes held for each row."""
    coded = 0 if layer.reading is None else layer.reading.nbytes // max(layer.batch, 1)
    if layer.ragged is not None:
        return [layer.ragged.row_nbytes(row) + coded for row in range(layer.batch)]
    if layer.reading is not None:
        return [coded] * layer.batch
    return [layer.get_seq_length() * entry_bytes(layer)] * layer.batch


def _held_bytes(layer: ReFreeKVLayer) -> int:
    """K/V bytes that the layer's storages really hold on to."""
    coded = 0 if layer.reading is None else layer.reading.nbytes
    if layer.ragged is not None:
        return layer.ragged.nbytes + coded
    return coded + sum(_storage_bytes(tensor) for tensor in (layer.keys, layer.values))


def _host_bytes(layer: ReFreeKVLayer) -> int:
    """Bytes of them that are in host memory beside the device."""
    coded = 0 if layer.reading is None else layer.reading.prompt.host_nbytes
    return coded + (0 if layer.ragged is None else layer.ragged.host_nbytes)


def _storage_bytes(tensor: Tensor | None) -> int:
    """What a tensor really holds on to: its whole storage, not only the part it views."""
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
