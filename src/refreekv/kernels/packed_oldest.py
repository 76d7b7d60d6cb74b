"""Coding what waited in full precision, in Triton: the oldest exact entries of all layers at once, in one launch.

A program has one segment of one layer. It codes the entries that are told, as `packed_storage` codes those of a prompt,
behind the lines that are there; then the entries behind them move up, and both tables say so.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from refreekv.core.quantisation import FLUSH
from refreekv.kernels.device_guard import on_its_device
from refreekv.kernels.packed_calls import Oldest
from refreekv.kernels.packed_storage import BLOCK_IN, _pack_entries, block_of, tables_of
from refreekv.kernels.storage import TYPES, _close_up

ADDRESSES = tl.constexpr(8)
"""Of a layer, before what is told of its segments."""


@triton.jit(do_not_specialize=["segments", "kv_heads", "row_of_means", "row_of_maps"])
def _code_oldest_kernel(
    told, lines, key_grid, value_grid, key_places, value_places, segments, kv_heads, row_of_means, row_of_maps,
    key_rest, value_rest, TYPE: tl.constexpr, BYTES: tl.constexpr, LANE: tl.constexpr,
    HEAD: tl.constexpr, VALUE: tl.constexpr, KEY_TILES: tl.constexpr, KEY_TILE: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_TILES: tl.constexpr, VALUE_TILE: tl.constexpr, VALUE_WORDS: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    own = told + tl.program_id(1) * (ADDRESSES + 3 * segments)
    first, count = tl.load(own + ADDRESSES + segment), tl.load(own + ADDRESSES + segments + segment)
    start = tl.load(own + ADDRESSES + 2 * segments + segment)
    if count > 0:
        row, head = (segment // kv_heads).to(tl.int64), segment % kv_heads
        exact = tl.load(own).to(tl.pointer_type(tl.int64)) + segment * 4
        table = tl.load(own + 1).to(tl.pointer_type(tl.int64)) + segment * 4
        for begin in tl.range(0, count, BLOCK_T, disable_licm=True):
            t = begin + tl.arange(0, BLOCK_T)
            # Looked up for each block: kept in between, they take registers that coding needs.
            key_from = tl.multiple_of(tl.load(exact).to(tl.pointer_type(TYPE)), 16)
            value_from = tl.multiple_of(tl.load(exact + 1).to(tl.pointer_type(TYPE)), 16)
            key_offset = tl.load(own + 2).to(tl.pointer_type(tl.float32))
            key_matrix = tl.multiple_of(tl.load(own + 3).to(tl.pointer_type(TYPE)), 16)
            key_worth = tl.load(own + 4).to(tl.pointer_type(tl.float32))
            value_offset = tl.load(own + 5).to(tl.pointer_type(tl.float32))
            value_matrix = tl.multiple_of(tl.load(own + 6).to(tl.pointer_type(TYPE)), 16)
            _pack_entries(
                key_from, value_from, HEAD, VALUE, first + t, t < count, table, (start + t).to(tl.int32), 0,
                row * row_of_means + head, row * row_of_maps + head, lines, key_grid, value_grid, key_places,
                value_places, key_offset, key_matrix, key_worth, value_offset, value_matrix, key_rest, value_rest,
                HEAD, VALUE, KEY_TILES, KEY_TILE, KEY_WORDS, VALUE_TILES, VALUE_TILE, VALUE_WORDS, BLOCK_W, BLOCK_IN,
                BLOCK_T, EXACT,
            )  # fmt: skip
        # All are read by then.
        tl.debug_barrier()
        key_at, value_at, length = tl.load(exact), tl.load(exact + 1), tl.load(exact + 2)
        _close_up(key_at, first, count, length, HEAD * BYTES, LANE)
        _close_up(value_at, first, count, length, VALUE * BYTES, LANE)
        tl.debug_barrier()
        tl.store(exact + 2, length - count)
        tl.store(table + 2, start + count)


def code_alike(layers: Sequence[Oldest]) -> None:
    """`kernels.code_oldest`, in one launch for all layers that are alike."""
    alike: dict[object, list[Oldest]] = {}
    for layer in layers:
        layer.check()
        alike.setdefault(layer.alike, []).append(layer)
    for some in alike.values():
        launch_code_oldest(some[0].exact, some)


@on_its_device
def launch_code_oldest(exact: torch.Tensor, layers: Sequence[Oldest]) -> None:
    """For layers that are alike; the table says on what device they are."""
    one = layers[0]
    form, maps, told = one.form, one.maps, tables_of((one.form,), exact.device)
    kind = one.keys.dtype
    addresses, numbers = torch.tensor([layer.addresses for layer in layers]), torch.stack([own.told for own in layers])
    numbers = torch.cat([addresses, numbers.flatten(1)], 1)  # [L, 8], [L, 3, S] -> [L, 8 + 3 S]
    if exact.is_cuda:
        numbers = numbers.pin_memory().to(exact.device, non_blocking=True)
    segments, block = len(exact), block_of(kind)
    if max(form.key_size, form.value_size) > 128:  # more would not fit the registers
        block = min(block, FLUSH)
    _code_oldest_kernel[(segments, len(layers))](
        numbers, *told, segments, one.kv_heads,
        0 if maps.key_mean.shape[0] == 1 else one.kv_heads, 0 if maps.key_matrix.shape[0] == 1 else one.kv_heads,
        maps.key_sum.stride(0), maps.value_sum.stride(0), TYPE=TYPES[kind], BYTES=kind.itemsize, LANE=1024,
        HEAD=form.key_size, VALUE=form.value_size, **told.side("key"), **told.side("value"), BLOCK_W=told.block,
        BLOCK_IN=BLOCK_IN, BLOCK_T=block, EXACT=kind.itemsize > 2, num_warps=4, num_stages=2,
    )  # fmt: skip
