"""A prompt that is still being read: coded chunk by chunk, all columns of all heads, until its end decides what stays.

Nothing was evicted yet, so that all rows and KV heads have the same columns, padding included: entries are dense
``[B, H_kv, n, D]`` as those of a dynamic cache, but for how they are kept. Attention of the next chunk, and the policy
at the end, get a decoded copy of one layer at a time.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from refreekv import kernels
from refreekv.core.key_codes import KeyCodes
from refreekv.core.packed_lines import FACTOR_BYTES
from refreekv.core.packed_maps import PackedMaps
from refreekv.core.quantisation import CODED_TYPES, FLUSH, SINKS, KVDtype, centre_of
from refreekv.kernels.device_guard import stream_of
from refreekv.kernels.table import KEY, LENGTH, VALUE
from refreekv.storage.arena import KVArena, on_device
from refreekv.storage.coding import Pair, maps_of
from refreekv.storage.hosted import HostedPrompts, pinned
from refreekv.storage.runs import flat, runs, spread, starts_of
from refreekv.storage.staging import Lines

MOVED = 16384
"""Lines that are moved at a time."""
MEANS = ("key_mean", "value_mean", "key_offset", "value_offset")
"""Names of what depends on the means that are taken out; older files have the first two."""
LINES = ("lines", "factors")
"""Names of the two parts of what is coded."""


class UnfinishedKV:
    """Keys and values of one layer's unfinished prompt: exact sinks, coded entries, exact newest ones.

    Entries are coded once, when the chunk that brought them has been attended to and they are no longer among the
    newest. The means that are taken out are those of all that a row held when its first entry was coded.

    Attributes
    ----------
    number : KVDtype
        The format of coded entries.
    length : int
        Columns held.
    coded : int
        How many of them are coded: the first ones, the sinks among them beside their exact copies.
    """

    def __init__(
        self,
        number: KVDtype,
        like: Pair,
        columns: int,
        *,
        sinks: bool,
        codes: KeyCodes | None = None,
        host: tuple[HostedPrompts, int] | None = None,
    ):
        """For up to about ``columns`` columns of entries like ``[B, H_kv, q, D]``.

        ``sinks``: whether the first entries are the first of a sequence, and stay exact. ``codes`` are the model's own
        for keys. ``host``: what brings lines from host memory, and the number of the layer there; None: lines are on
        the device.
        """
        keys, values = like
        self.number, self._codes, self._host = number, codes, host
        self.form = number.form((keys.shape[-1], values.shape[-1]), sorted_keys=codes is not None)
        self._columns, self._wants_sinks = columns, sinks
        self._tail = keys[:, :, :0], values[:, :, :0]
        self.coded = 0
        self._maps: PackedMaps | None = None
        self._lines: Pair | None = None
        self._table: Tensor | None = None
        # [B, H_kv, SINKS, D], and their columns [B, SINKS], -1 where there is none yet; None: the first ones.
        self._sinks: Pair | None = None
        self._sink_columns: Tensor | None = None
        # [B]: real entries among those coded, by row; None: all are.
        self._real_coded: Tensor | None = None
        self._goes_on = True
        # [B, H_kv, capacity]: whether a line is no longer what is at its place.
        self._stale: Tensor | None = None

    @staticmethod
    def takes(keys: Tensor, values: Tensor) -> bool:
        """Whether entries like these can be coded."""
        return all(part.dtype in CODED_TYPES and part.shape[-1] % 16 == 0 for part in (keys, values))

    # -- what it holds ------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Columns held."""
        return self.coded + self._tail[0].shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and KV heads."""
        return self._tail[0].shape[0], self._tail[0].shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """Head sizes of keys and values."""
        return self._tail[0].shape[-1], self._tail[1].shape[-1]

    @property
    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """Types of keys and values as they came."""
        return self._tail[0].dtype, self._tail[1].dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._tail[0].device

    @property
    def index_bytes(self) -> int:
        """Bytes of what says where lines and sinks are."""
        numbers = self._table, self._sink_columns, self._real_coded
        return sum(part.nbytes for part in numbers if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors really hold on to, the rows' means included."""
        means: list[Tensor] = []
        if self._maps is not None:
            maps = self._maps
            means = [maps.key_mean, maps.value_mean, maps.key_offset, maps.value_offset]
        held = [*self._tail, *(self._lines or ()), *(self._sinks or ()), *means]
        # What came back shares memory.
        return sum({part.data_ptr(): part.nbytes() for part in map(Tensor.untyped_storage, held)}.values())

    @property
    def host_nbytes(self) -> int:
        """Bytes of them that are in host memory."""
        return 0 if self._host is None else sum(part.nbytes for part in self._lines or ())

    def dense(self, new: Pair | None = None, earlier: Pair | None = None) -> Pair:
        """All entries in full precision ``[B, H_kv, n, D]``, between ``earlier`` and ``new`` ones: a copy."""
        sides = []
        for side, tail in enumerate(self._tail):
            parts = [tail, *([] if new is None else [new[side]])]
            before = 0 if earlier is None else earlier[side].shape[2]
            total = before + self.coded + sum(part.shape[2] for part in parts)
            kind = tail.dtype if new is None else torch.promote_types(tail.dtype, new[side].dtype)
            out = tail.new_empty(*tail.shape[:2], total, tail.shape[3], dtype=kind)
            if earlier is not None:
                out[:, :, :before] = earlier[side]
            at = before + self.coded
            for part in parts:
                out[:, :, at : at + part.shape[2]] = part
                at += part.shape[2]
            sides.append((out, out[:, :, before : before + self.coded]))
        (keys, coded_keys), (values, coded_values) = sides
        if self.coded:
            self._decode(coded_keys, coded_values)
        return keys, values

    def _decode(self, keys: Tensor, values: Tensor) -> None:
        assert self._table is not None
        assert self._maps is not None
        spans = _from_the_first(len(self._table), keys.device, stream_of(keys.device))
        table = self._table if self._host is None else self._host[0].table(self._host[1])
        kernels.unpack_lines(keys, values, table, self.form, self._maps, spans, end=self.coded, longest=self.coded)
        for out, sinks in zip((keys, values), self._sinks or (), strict=False):
            if self._sink_columns is None:
                out[:, :, : sinks.shape[2]] = sinks
                continue
            for at, sink in zip(self._sink_columns.T, sinks.unbind(2), strict=True):  # [B], [B, H_kv, D]
                index = at.clamp_min(0)[:, None, None, None].expand(-1, out.shape[1], 1, out.shape[3])
                there = (at >= 0)[:, None, None, None]
                out.scatter_(2, index, torch.where(there, sink[:, :, None].to(out), out.gather(2, index)))

    # -- growing ------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None, *, code: bool = True) -> None:
        """Take in ``[B, H_kv, q, D]`` new entries, and ``code`` what is no longer among the newest.

        ``real`` is boolean ``[B, length + q]``, False at padding; None: there is none.
        """
        # The copy that is cut off below is the only thing that is left of a chunk.
        joined = [torch.cat(pair, 2) for pair in zip(self._tail, (keys, values), strict=True)]
        self._tail = joined[0], joined[1]
        if code:
            self.code_due(real)

    def code_due(self, real: Tensor | None = None) -> None:
        """Code what is no longer among the newest; ``real`` is boolean ``[B, length]``."""
        if self._due >= FLUSH:
            self._code(self._due, real)

    @property
    def _due(self) -> int:
        """Exact entries that are no longer among the newest."""
        return self._tail[0].shape[2] - self.number.recent

    def _code(self, count: int, real: Tensor | None) -> None:
        """Code the first ``count`` exact entries."""
        stop = self.coded + count
        if real is not None and self._real_coded is None and bool(real.all()):
            real = None
        self._fix_means(real)
        self._keep_sinks(count, real)
        if real is not None:
            self._real_coded = real[:, :stop].sum(1)
        self._make_room(stop)
        assert self._table is not None
        assert self._maps is not None
        keys, values = self._tail
        kind = torch.promote_types(*self.types)
        device, segments = keys.device, len(self._table)
        maps = self._maps.of_type(kind)
        table, before = self._table, self.coded
        if self._host is not None:
            # Kernels write to the host in whole words, and not byte by byte as they code.
            new = self._allocated(count, device)
            table, before = _table_of(new, count, device), 0
        starts = _starting_at(before, segments, device, stream_of(device)) if before else None
        spans = _from_the_first(segments, device, stream_of(device))
        kernels.pack_lines(
            keys.to(kind), values.to(kind), table, self.form, maps, spans, end=keys.shape[2], longest=count,
            starts=starts,
        )  # fmt: skip
        if self._host is not None:
            there = self._table.clone()
            there[:, KEY] += self.coded * self.form.line_bytes
            there[:, VALUE] += self.coded * FACTOR_BYTES
            there[:, LENGTH] = count
            kernels.move(table, there, key_bytes=self.form.line_bytes, value_bytes=FACTOR_BYTES, longest=count)
        self.coded = stop
        self._tail = keys[:, :, count:], values[:, :, count:]
        if self._goes_on:  # nothing holds on to a chunk
            self._tail = self._tail[0].clone(), self._tail[1].clone()

    def _fix_means(self, real: Tensor | None) -> None:
        """Means of all that is exact, for rows of which no entry was coded yet."""
        begun = self._real_coded
        if self._maps is not None and (begun is None or bool((begun > 0).all())):
            return
        exact = None if real is None else real[:, None, self.coded :]
        means = [centre_of(part, exact) for part in self._tail] if real is not None else kernels.centres(*self._tail)
        if self._maps is not None and begun is not None:
            maps = self._maps
            fixed = (begun > 0)[:, None, None]
            means = [
                torch.where(fixed, old, new.float())
                for old, new in zip((maps.key_mean, maps.value_mean), means, strict=True)
            ]
        self._maps = maps_of((means[0], means[1]), torch.promote_types(*self.types), self._codes)

    def _keep_sinks(self, count: int, real: Tensor | None) -> None:
        """Keep exact copies of the first real entries of each row, as far as they are among those coded now."""
        if not self._wants_sinks:
            return
        keys, values = self._tail
        if real is None:
            if self.coded == 0:
                self._sinks = keys[:, :, : min(SINKS, count)], values[:, :, : min(SINKS, count)]
                if self._goes_on:
                    self._sinks = self._sinks[0].clone(), self._sinks[1].clone()
            return
        if self._sink_columns is None:
            # Until a turn of a batch is the first with padding, sinks are the first columns, if any were coded.
            known = (keys[:, :, :0], values[:, :, :0]) if self._sinks is None else self._sinks
            firsts = known[0].shape[2]
            with torch.inference_mode(False), torch.no_grad():
                places = torch.arange(SINKS, device=real.device)
                self._sink_columns = torch.where(places < firsts, places, -1).repeat(len(real), 1)
                more = (0, 0, 0, SINKS - firsts)
                self._sinks = (
                    torch.nn.functional.pad(known[0].to(keys), more),
                    torch.nn.functional.pad(known[1].to(values), more),
                )
        assert self._sinks is not None
        stop = self.coded + count
        rank = real[:, :stop].cumsum(1) * real[:, :stop]
        for place in range(SINKS):
            hit = rank[:, self.coded :] == place + 1  # [B, count]
            there, index = hit.any(1), hit.long().argmax(1)
            self._sink_columns[:, place] = torch.where(there, self.coded + index, self._sink_columns[:, place])
            for sinks, tail in zip(self._sinks, self._tail, strict=True):
                chosen = tail.gather(2, index[:, None, None, None].expand(-1, tail.shape[1], 1, tail.shape[3]))
                sinks[:, :, place] = torch.where(there[:, None, None], chosen[:, :, 0], sinks[:, :, place])

    def _make_room(self, stop: int) -> None:
        """Allocate lines for ``stop`` columns; at once for as many as the prompt is going to have."""
        if self._lines is not None and self._lines[0].shape[2] >= stop:
            assert self._table is not None
            self._table[:, LENGTH] = stop
            return
        capacity, device = max(stop, self._columns - self.number.recent), self._tail[0].device
        lines, factors = self._allocated(capacity, device, hosted=self._host is not None)
        self._wait()
        for old, new in zip(self._lines or (), (lines, factors), strict=False):
            new[:, :, : self.coded] = old[:, :, : self.coded]
        self._hold(lines, factors, stop)

    def _allocated(self, capacity: int, device: torch.device, *, hosted: bool = False) -> Pair:
        """Lines and factors ``[B, H_kv, capacity, ...]``, which are still to be written."""
        shape = *self.shape, capacity
        with torch.inference_mode(False):
            like = (
                torch.empty(0, self.form.line_bytes, dtype=torch.uint8, device=device),
                torch.empty(0, FACTOR_BYTES // 2, dtype=torch.float16, device=device),
            )
            if hosted:
                parts = [pinned([(math.prod(shape),)], part, device) for part in like]
            else:
                parts = [part.new_empty(math.prod(shape), part.shape[1]) for part in like]
        return parts[0].view(*shape, -1), parts[1].view(*shape, -1)

    def _hold(self, lines: Tensor, factors: Tensor, length: int | None = None) -> None:
        """Go on with these lines, and a table of them, of ``length`` entries or of those that are coded."""
        self._lines, length = (lines, factors), self.coded if length is None else length
        with torch.inference_mode(False):
            self._table = _table_of(self._lines, length, self._tail[0].device)
        if self._host is not None:
            capacities = [lines.shape[2]] * len(self._table)
            self._host[0].hold(self._host[1], Lines(self._table, capacities, self.form.line_bytes, FACTOR_BYTES))

    # -- leaving the device, and coming back ------------------------------------------------------

    @classmethod
    def of(
        cls,
        number: KVDtype,
        keys: Tensor,
        values: Tensor,
        real: Tensor | None = None,
        codes: KeyCodes | None = None,
        maps: PackedMaps | None = None,
    ) -> "UnfinishedKV":
        """A whole prompt ``[B, H_kv, n, D]`` that was read in one piece; ``real`` as for `append`.

        ``maps`` are those that take its means out, if they are known. Of what is not coded there are views, as it is
        going to be kept elsewhere and nothing is appended to it here.
        """
        whole = cls(number, (keys, values), keys.shape[2], sinks=True, codes=codes)
        whole._maps, whole._goes_on = maps, False
        whole._tail = keys, values
        if whole._due >= FLUSH:
            whole._code(whole._due, real)
        return whole

    def end(self) -> None:
        """Say that nothing more comes: what is not coded is going to be kept elsewhere, and need not be a copy."""
        self._goes_on = False

    @property
    def codes(self) -> KeyCodes | None:
        """The model's own codes for keys; None: keys are rotated."""
        return self._codes

    def lines(self, start: int) -> dict[str, Tensor]:
        """What is coded from column ``start`` on, as views ``[B, H_kv, c, bytes]`` that do not change any more."""
        if self._lines is None or start >= self.coded:
            return {}
        return {name: part[:, :, start : self.coded] for name, part in zip(LINES, self._lines, strict=True)}

    def rest(self) -> dict[str, Tensor]:
        """All else that it holds, by name: the newest entries, sinks, means."""
        parts: dict[str, Tensor | None] = {"tail_keys": self._tail[0], "tail_values": self._tail[1]}
        if self._maps is not None:
            parts |= {name: getattr(self._maps, name) for name in MEANS}
        if self._sinks is not None:
            parts |= {"sink_keys": self._sinks[0], "sink_values": self._sinks[1], "sink_columns": self._sink_columns}
        parts["real_coded"] = self._real_coded
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def back(
        cls,
        number: KVDtype,
        codes: KeyCodes | None,
        columns: int,
        coded: int,
        lines: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
    ) -> "UnfinishedKV":
        """What `lines` and `rest` tell of, for up to about ``columns`` columns.

        ``lines`` have room for more than the ``coded`` ones; `rest` may be that of a longer one, of which only
        ``columns`` were left.
        """
        tail = rest["tail_keys"], rest["tail_values"]
        whole = cls(number, tail, columns, sinks=True, codes=codes)
        whole._tail, whole.coded = tail, coded
        if "key_mean" in rest:
            # In memory of their own: what is left of a conversation goes on with them.
            means = _copies([rest[name] for name in MEANS if name in rest])
            offsets = (means[2], means[3]) if len(means) == len(MEANS) else None
            whole._maps = maps_of((means[0], means[1]), torch.promote_types(*whole.types), codes, offsets)
        if "sink_keys" in rest:
            whole._sinks, whole._sink_columns = (rest["sink_keys"], rest["sink_values"]), rest.get("sink_columns")
            if whole._sink_columns is None:
                whole._sinks = rest["sink_keys"][:, :, :coded], rest["sink_values"][:, :, :coded]
            else:
                whole._sink_columns = whole._sink_columns.where(whole._sink_columns < coded, -1)
        whole._real_coded = rest.get("real_coded")
        if lines:
            whole._hold(lines[LINES[0]], lines[LINES[1]])
        return whole

    # -- lines that stay as they are --------------------------------------------------------------

    @property
    def maps(self) -> PackedMaps:
        """What takes its means out; only where something is coded."""
        assert self._maps is not None
        return self._maps

    def forget_lines(self, columns: Tensor, real: Tensor) -> None:
        """Say that others stand in for the entries ``[B, H_kv, c]`` that were decoded, as far as they are ``real``."""
        assert self._lines is not None
        count = torch.zeros(self._lines[0].shape[:3], dtype=torch.uint8, device=columns.device)
        last = count.shape[2] - 1
        there = real & (columns <= last)
        self._stale = count.scatter_add(2, columns.long().clamp(max=last), there.to(torch.uint8)) > 0

    def move_lines(self, columns: Tensor, counts: Sequence[Sequence[int]], arena: KVArena) -> None:
        """Put lines of chosen columns, so many of each row's KV heads, in place of those in an arena.

        Only of columns that are coded; others stay as they are.
        """
        assert self._lines is not None
        capacity = self._lines[0].shape[2]
        segment = spread(range(len(flat(counts))), flat(counts), columns.device)
        at = segment * capacity + columns.long().clamp(max=capacity - 1)
        places = runs(starts_of(flat(arena.capacities)), flat(counts), columns.device)
        there = columns < self.coded
        if self._stale is not None:
            there = there & ~self._stale.flatten()[at]
        for lines, into in zip(self._lines, (arena.keys, arena.values), strict=True):
            lines = lines.to(into.device, non_blocking=True).flatten(0, 2)
            # Two copies of all lines would be more than a layer's entries in full precision.
            for start in range(0, len(at), MOVED):
                some = slice(start, start + MOVED)
                to = places[some]
                into[to] = torch.where(there[some, None], lines[at[some]], into[to])

    # -- copies: addresses do not travel --------------------------------------------------------

    def _wait(self) -> None:
        """Wait until kernels have written what is in host memory, as who copies it there does not wait for them."""
        if self._host is not None and self._tail[0].is_cuda and self.coded:
            torch.cuda.current_stream(self._tail[0].device).synchronize()

    def __getstate__(self) -> dict[str, object]:
        self._wait()
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._table = None
        if self._lines is not None:
            lines, factors = self._lines
            if self._host is not None and self._tail[0].is_cuda:  # copies of tensors are not pinned
                lines, factors = lines.pin_memory(), factors.pin_memory()
            self._hold(lines, factors)


def _table_of(lines: Pair, length: int, device: torch.device) -> Tensor:
    """A table of segments in lines and factors ``[B, H_kv, capacity, ...]``, each of so many entries."""
    segments, capacity = lines[0].shape[0] * lines[0].shape[1], lines[0].shape[2]
    steps = [capacity * part.shape[3] * part.element_size() for part in lines]
    firsts = [part.data_ptr() for part in lines]
    return on_device(
        [[first + number * step for first, step in zip(firsts, steps, strict=True)] + [length, capacity]
         for number in range(segments)], device,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _from_the_first(segments: int, device: torch.device, stream: int) -> Tensor:
    """Spans of entries from each segment's first one on, ``[segments, 3]``, not to be written to."""
    with torch.inference_mode(False):
        return torch.zeros(segments, 3, dtype=torch.int64, device=device)


def _copies(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one type, in one launch and one storage."""
    whole = torch.cat([part.flatten() for part in parts]).split([part.numel() for part in parts])
    return [copied.view(part.shape) for copied, part in zip(whole, parts, strict=True)]


@lru_cache(maxsize=8)
def _starting_at(number: int, segments: int, device: torch.device, stream: int) -> Tensor:
    """The same number for each segment, not to be written to."""
    with torch.inference_mode(False):
        return torch.full((segments,), number, dtype=torch.int64, device=device)
