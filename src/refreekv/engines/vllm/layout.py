"""Reading keys and values back out of vLLM's paged cache.

Each attention kernel stores a block in an order of its own (transposed keys, packed pairs
…). The order is not documented, so it is measured: a block is written through the kernel's own
update, with numbers that say which token and dimension they are, and read back raw. A
second block of random numbers proves the result, or the plugin refuses to start.
"""

from typing import Any

import torch
from torch import Tensor

_DIGIT = 256  # integers up to 256 are exact in every floating-point type of a KV cache


class PagedLayout:
    """Where each token's key and value lie inside a block.

    Parameters
    ----------
    impl, layer
        vLLM's attention implementation and the layer it belongs to.
    cache : Tensor
        The layer's cache, ``[blocks, H_kv, block, 2 * D]`` in vLLM's logical order. Block 0, the
        null block, is written to and left zero.

    Raises
    ------
    ValueError
        If the kernel's order is not the same fixed permutation for every block and head.
    """

    def __init__(self, impl: Any, layer: Any, cache: Tensor):
        _, self._heads, self.block, width = cache.shape
        self._dim = width // 2
        self._impl, self._layer, self._cache = impl, layer, cache
        self._keys, self._values = self._measure()
        self._prove()
        cache[0].zero_()

    def read(self, cache: Tensor, blocks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens.

        Parameters
        ----------
        cache : Tensor
            Of any layer with this layout.
        blocks, offsets : Tensor
            Integer ``[t]``: each token's block and its place in the block.

        Returns
        -------
        tuple of Tensor
            ``[t, H_kv, D]`` each.
        """
        flat = cache.flatten(2)
        columns = torch.arange(self._heads, device=cache.device)[None, :, None]
        at = blocks[:, None, None], columns
        return flat[(*at, self._keys[offsets][:, None])], flat[(*at, self._values[offsets][:, None])]

    def read_blocks(self, cache: Tensor, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``tokens`` tokens of a table row; ``[t, H_kv, D]`` each."""
        flat = cache.flatten(2)[blocks]

        def of(order: Tensor) -> Tensor:
            picked: Tensor = flat[:, :, order.flatten()].unflatten(2, (self.block, self._dim))
            return picked.transpose(1, 2).flatten(0, 1)[:tokens]

        return of(self._keys), of(self._values)

    def write(self, layer: Any, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write ``[t, H_kv, D]`` to slots (block · size + place), through the kernel's own update."""
        layer.impl.do_kv_cache_update(layer, keys.contiguous(), values.contiguous(), cache, slots)

    def _write_null(self, keys: Tensor, values: Tensor) -> Tensor:
        slots = torch.arange(self.block, device=self._cache.device)
        self.write(self._layer, self._cache, keys, values, slots)
        written: Tensor = self._cache[0].flatten(1)
        return written  # [H_kv, block * 2D]

    def _measure(self) -> tuple[Tensor, Tensor]:
        """For keys and values, the raw index of each (token, dimension): ``[block, D]`` each."""
        size = self.block * self._dim
        label = torch.arange(2 * size, device=self._cache.device)
        raw = torch.zeros(2 * size, dtype=torch.long, device=self._cache.device)
        for power in range(4):
            digit = (label // _DIGIT**power % _DIGIT).to(self._cache.dtype)
            keys, values = (
                part.view(self.block, 1, self._dim).expand(-1, self._heads, -1) for part in digit.split(size)
            )
            raw += self._write_null(keys, values)[0].long() * _DIGIT**power
        if not torch.equal(raw.sort().values, label):
            raise ValueError("the attention kernel does not store keys and values as they are; refreekv cannot read it")
        place = raw.argsort()
        return place[:size].view(self.block, self._dim), place[size:].view(self.block, self._dim)

    def _prove(self) -> None:
        shape = (self.block, self._heads, self._dim)
        generator = torch.Generator().manual_seed(0)
        keys, values = (
            torch.randn(shape, generator=generator).to(self._cache.device, self._cache.dtype) for _ in range(2)
        )
        self._write_null(keys, values)
        offsets = torch.arange(self.block, device=self._cache.device)
        got = self.read(self._cache, torch.zeros_like(offsets), offsets)
        whole = self.read_blocks(self._cache, torch.zeros_like(offsets[:1]), self.block)
        for read in (got, whole):
            if not (torch.equal(read[0], keys) and torch.equal(read[1], values)):
                raise ValueError(
                    "what refreekv reads from the KV cache is not what the attention kernel wrote; it cannot serve "
                    "this attention backend"
                )
