"""The most bytes that tensors hold at a time, on any device: what a caching allocator counts on CUDA."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within, bytes of the storages that operators made and somebody still holds.

    What an operator takes for its own length is not seen, and the operators of refreekv count as one each.

    Attributes
    ----------
    live, peak : int
        Bytes now, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        for part in tree_leaves(found):
            if not isinstance(part, Tensor):
                continue
            storage = part.untyped_storage()
            if storage._cdata in given or storage._cdata in self._known:
                continue
            self._known[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.live)
        return found
