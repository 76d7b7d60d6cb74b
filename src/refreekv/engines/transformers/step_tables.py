"""What stands for a cache in a captured forward: places that stay, where tables say what is read and written."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import FACTOR_BYTES, PackedFormat
from refreekv.core.packed_maps import PackedMaps
from refreekv.engines.transformers.handout import hand_out
from refreekv.kernels import Format
from refreekv.pruning.calls import AttentionCall
from refreekv.storage.base import KVStorage
from refreekv.storage.coding import maps_of
from refreekv.storage.staging import Lines, Staging


class Form(NamedTuple):
    """What the entries of a layer are: exact ones, and those in the packed lines of each rung, where there are any.

    Codes of the model's own are one object for all caches that have the same. ``hosted``: lines are in host memory.
    """

    exact: Format
    packed: tuple[PackedFormat, ...] = ()
    codes: KeyCodes | None = None
    hosted: bool = False

    @classmethod
    def of(cls, storage: KVStorage) -> "Form":
        """That of a storage with tables."""
        exact, coding = storage.tables[0].form, storage.coding
        return cls(exact) if coding is None else cls(exact, coding.forms, coding.codes, storage.in_host_memory)


class Reads(NamedTuple):
    """Where a captured layer finds its entries, in places that stay."""

    form: Form
    tables: tuple[Tensor, ...]
    maps: PackedMaps | None

    @classmethod
    def nothing(cls, form: Form, batch: int, segments: int, device: torch.device) -> "Reads":
        """Tables without entries and room, and means that are zero."""
        tables = torch.zeros(1 + len(form.packed), segments, 4, dtype=torch.long, device=device).unbind()
        if not form.packed:
            return cls(form, tables, None)
        keys, values = (torch.zeros(batch, segments // batch, size, device=device) for size in form.exact.sizes)
        return cls(form, tables, maps_of((keys, values), form.exact.key_type, form.codes))

    def adopt(self, storage: KVStorage) -> None:
        """Read and write a storage from now on: its tables move here, and its means are copied."""
        for arena, table in zip(storage.tables, self.tables, strict=True):
            arena.lend_table(table)
        if self.maps is not None and storage.coding is not None:
            # All else that the maps have is the same for all.
            self.maps.key_mean.copy_(storage.coding.maps.key_mean)
            self.maps.value_mean.copy_(storage.coding.maps.value_mean)

    @property
    def lines(self) -> list[Lines]:
        """The lines behind the tables, of which there are none yet."""
        segments = [0] * len(self.tables[0])
        return [
            Lines(table, segments, form.line_bytes, FACTOR_BYTES)
            for table, form in zip(self.tables[1:], self.form.packed, strict=True)
        ]


class TableLayer(DynamicLayer):
    """What stands for a cache layer during a capture: it knows tables and nothing else.

    ``brought``: lets what is launched from then on find the lines of a layer in host memory; None: they are where the
    tables say.
    """

    def __init__(self, reads: Reads, brought: Callable[[], tuple[Tensor, ...]] | None = None):
        super().__init__()
        self.reads, self._brought = reads, brought

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new entries to wherever the table says."""
        kernels.append(key_states, value_states, self.reads.tables[0], self.reads.form.exact)
        hand_out(self, key_states, value_states)
        return key_states, value_states

    def attend(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """Attend to wherever the tables say."""
        form, (exact, *lines), maps = self.reads
        query = call.query
        settings: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sinks": call.sink_logits}
        if self._brought is not None:
            lines = list(self._brought())
        if maps is None:
            return kernels.ragged_decode(query, exact, form.exact, **settings)
        stored = form.exact.key_type
        if torch.promote_types(query.dtype, stored) != stored:
            raise TypeError(f"queries are {query.dtype} and the exact entries beside coded ones {stored}")
        return kernels.packed_attention(query.to(stored), exact, lines, form.packed, maps, **settings).to(query.dtype)

    def get_seq_length(self) -> int:
        """No length: masks, which would depend on it, are not used."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask that nobody reads."""
        return query_length, 0


class TableCache(Cache):
    """The cache that the captured forward sees."""

    def __init__(self, reads: Sequence[Reads], staging: Staging | None = None):
        places = itertools.count()
        super().__init__(
            layers=[
                TableLayer(layer, functools.partial(staging.use, next(places)))
                if layer.form.hosted and staging is not None
                else TableLayer(layer)
                for layer in reads
            ]
        )
        self.length = 0
        self.length_asked = False

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """No offset: masks, which would depend on it, are not used."""
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """A length that means nothing, as it is another one at each step; that it was asked for is noted."""
        self.length_asked = True
        return self.length
