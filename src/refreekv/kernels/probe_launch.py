"""How the kernels of `probe` are launched: for one set of queries, or for two over the same keys at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from refreekv.core.reductions import Probes
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.probe import LOG2E, _denominator_kernel, _join_kernel, _reduce_kernel
from refreekv.kernels.sizes import blocks_of, power_of_2

LEAST_QUERIES = 256
"""Queries that kernels are compiled for at least: a short turn, which has few, asks for no kernel of its own."""


class Tile(NamedTuple):
    """Rows and keys of a block, warps, stages of software pipelining, most registers of a thread."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """How the kernel is compiled and launched."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def tiles_for(query: Tensor, block_d: int, sums: bool) -> tuple[Tile, Tile]:
    """Of the denominators and of the reductions."""
    if query.dtype == torch.float32:
        return Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)
    if block_d > 128:
        return Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)
    # What was fastest on an H100, by a few percent. With 128 registers a thread two blocks that sum fit a
    # multiprocessor, and without a bound one: that is a fifth at 32,768 keys.
    return (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3, 128)) if sums else (Tile(64, 64, 4, 3), Tile(64, 128, 4, 3))


def tile_of_both(query: Tensor, block_d: int) -> Tile:
    """Of two reductions over the same keys: on an H100 a third faster at 8,192 keys than the tile of one of them."""
    wide = query.dtype == torch.float32 or block_d > 128
    return tiles_for(query, block_d, True)[1] if wide else Tile(64, 256, 8, 3)


class Asked(NamedTuple):
    """Queries of a probe, as `_reduce_kernel` is told of them.

    Attributes
    ----------
    query : Tensor
        ``[B, H, k, D]``.
    columns : Tensor
        Integer ``[B, k]``, -1 at padding.
    denominators : Tensor
        float32 logarithms, in ``unit`` of those to base 2.
    steps : tuple of int
        Of the denominators from row to row of the batch, KV head to KV head, query head to query head, and query to
        query.
    """

    query: Tensor
    columns: Tensor
    denominators: Tensor
    unit: float
    steps: tuple[int, int, int, int]
    probes: Probes

    @property
    def number(self) -> int:
        """Queries of a head."""
        return self.query.shape[2]

    @property
    def block(self) -> int:
        """Queries that the kernel is compiled for."""
        return max(LEAST_QUERIES, power_of_2(self.number))

    def outputs(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Room for peaks and means; without sums that of means is empty."""
        peak, mean = (
            torch.empty(shape if wanted else 0, dtype=torch.float32, device=self.query.device)
            for wanted in (True, self.probes.sums)
        )
        return peak, mean


class Common(NamedTuple):
    """What the queries of a probe, or of two over the same keys, share."""

    key: Tensor
    columns: Tensor | None
    valid: Tensor | None
    settings: dict[str, Any]
    scaling: float
    softcap: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, probes: Probes) -> "Common":
        """As one of the probes says it."""
        kv_heads, head_size = key.shape[1], key.shape[3]
        shown = None
        if probes.valid is not None:
            valid = probes.valid[:, None] if probes.valid.dim() == 2 else probes.valid
            shown = valid.expand(key.shape[:3]).contiguous().view(torch.uint8)
        settings = {
            "GROUP": query.shape[1] // kv_heads,
            "HEAD": head_size,
            "BLOCK_D": max(16, power_of_2(head_size)),
            "HAS_VALID": shown is not None,
            "HAS_COLUMNS": probes.columns is not None,
            "HAS_CAP": probes.softcap is not None,
        }
        return cls(
            key if key.stride(-1) == 1 else key.contiguous(),
            None if probes.columns is None else probes.columns.to(torch.int32),
            shown,
            settings,
            head_size**-0.5 if probes.scaling is None else probes.scaling,
            1.0 if probes.softcap is None else probes.softcap,
        )

    def asked(self, query: Tensor, probes: Probes, tile: Tile) -> Asked:
        """Queries with their denominators: those that attention told, or those that two kernels find."""
        if query.stride(-1) != 1:
            query = query.contiguous()
        batch, _, count, _ = query.shape
        # A query at padding stands before every key.
        at = probes.query_columns
        at = at if probes.query_real is None else at.where(probes.query_real, -1)
        at = at.expand(batch, count)
        told, group, kv_heads = probes.logsumexp, self.settings["GROUP"], self.key.shape[1]
        if told is not None:
            steps = told.stride(0), told.stride(1) * group, told.stride(1), told.stride(2)
            return Asked(query, at, told, LOG2E.value, steps, probes)
        whole = self._denominators(query, at, probes.sink_logits, tile)
        return Asked(query, at, whole, 1.0, (kv_heads * group * count, group * count, 1, group), probes)

    @property
    def shown_strides(self) -> tuple[int, int]:
        """Of what says which keys are no padding."""
        return (0, 0) if self.valid is None else (self.valid.stride(0), self.valid.stride(1))

    def _denominators(self, query: Tensor, at: Tensor, sink_logits: Tensor | None, tile: Tile) -> Tensor:
        """Logarithms to base 2 of the rows' softmax denominators, ``[B, H_kv, rows]`` float32."""
        (batch, kv_heads, length, _), group = self.key.shape, self.settings["GROUP"]
        rows = group * query.shape[2]
        blocks = blocks_of(rows, tile.block_m)
        # Enough programs to fill the device several times over, each with enough keys to be worth it.
        # However many rows there are: what is computed of one does not depend on the others beside it.
        splits = max(1, min(blocks_of(1024, kv_heads * blocks), blocks_of(length, 512)))
        split_keys = blocks_of(blocks_of(length, splits), tile.block_n) * tile.block_n
        splits = blocks_of(length, split_keys)
        partial = query.new_empty(batch, kv_heads, splits, rows, dtype=torch.float32)
        _denominator_kernel[(blocks, splits, batch * kv_heads)](
            query, self.key, at, at if self.columns is None else self.columns, at if self.valid is None else self.valid,
            partial, query.shape[2], length, kv_heads, split_keys, rows, self.scaling, self.softcap,
            *query.stride()[:3], *self.key.stride()[:3], *at.stride(), *self.shown_strides,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options, **self.settings,
        )  # fmt: skip
        if splits == 1 and sink_logits is None:
            return partial
        whole = partial.new_empty(batch, kv_heads, rows)
        sinks = partial if sink_logits is None else sink_logits.contiguous()
        _join_kernel[(blocks_of(rows, 128), batch * kv_heads)](
            partial, sinks, whole, splits, rows, group, kv_heads, BLOCK=128, HAS_SINKS=sink_logits is not None
        )
        return whole


@on_its_device
def launch_probe_reductions(
    query: Tensor, key: Tensor, probes: Probes, tiles: tuple[Tile, Tile] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernels; parameters as in `core.reductions.probe_reductions`.

    Without ``sums`` the mean is empty. ``tiles`` is there to be measured.
    """
    (query,), key = _of_one_type((query,), key)
    common = Common.of(query, key, probes)
    one, two = tiles or tiles_for(query, common.settings["BLOCK_D"], probes.sums)
    peak, mean, *_ = _reduced(common, common.asked(query, probes, one), None, two)
    return peak, mean


@on_its_device
def launch_both_reductions(
    query: Tensor, other_query: Tensor, key: Tensor, probes: Probes, other: Probes, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch_probe_reductions` of two sets of queries over the same keys, which are read once: peak, mean, and so on.

    What the probes say of keys and of attention is the same in both. ``tile`` is there to be measured.
    """
    queries, key = _of_one_type((query, other_query), key)
    common = Common.of(query, key, probes)
    sets = []
    for own, given in zip(queries, (probes, other), strict=True):
        sets.append(common.asked(own, given, tiles_for(own, common.settings["BLOCK_D"], given.sums)[0]))
    return _reduced(common, sets[0], sets[1], tile or tile_of_both(query, common.settings["BLOCK_D"]))


def _of_one_type(queries: tuple[Tensor, ...], key: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Queries and keys in the wider of their types, as of a model that was moved to another: products are of one."""
    if queries[0].dtype == key.dtype:
        return queries, key
    widest = torch.promote_types(queries[0].dtype, key.dtype)
    return tuple(query.to(widest) for query in queries), key.to(widest)


def _reduced(common: Common, asked: Asked, other: Asked | None, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaks and means of one set of queries, and of the other."""
    key, at = common.key, asked.columns
    batch, kv_heads, length, _ = key.shape
    shape, group = (batch, kv_heads, length), common.settings["GROUP"]
    more = other or asked
    results = asked.outputs(shape)
    others = results if other is None else other.outputs(shape)
    _reduce_kernel[(blocks_of(length, tile.block_n), batch * kv_heads)](
        asked.query, key, at, at if common.columns is None else common.columns,
        at if common.valid is None else common.valid, asked.denominators, *results,
        more.query, more.columns, more.denominators, *others,
        asked.number, group * asked.number, asked.probes.distance, asked.unit,
        more.number, group * more.number, more.probes.distance, more.unit,
        length, kv_heads, common.scaling, common.softcap,
        *asked.query.stride()[:3], *key.stride()[:3], *at.stride(), *common.shown_strides, *asked.steps,
        *more.query.stride()[:3], *more.columns.stride(), *more.steps,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_P=asked.block, SUMS=asked.probes.sums,
        OTHER_P=0 if other is None else other.block, OTHER_SUMS=more.probes.sums, **tile.options, **common.settings,
    )  # fmt: skip
    return *results, *others
