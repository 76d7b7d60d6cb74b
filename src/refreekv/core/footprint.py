"""What keys and values take while a prompt is read and once it is: the arithmetic of plans and of forecasts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from refreekv.core.configuration import head_size, largest
from refreekv.core.packed_lines import PackedFormat
from refreekv.core.quantisation import FLUSH, SINKS, Count, KVDtype, Ladder
from refreekv.core.slices import unpacked_weights

LayerKind = Literal["full", "window", "latent", "state"]
PLAIN_BYTES = 2
"""Bytes of an element in bfloat16 or float16, the precision that K/V is computed in."""


@dataclass(frozen=True)
class Mix:
    """Entries in several number formats, such a share of the coded ones in each.

    Attributes
    ----------
    ladder : Ladder
        The formats.
    shares : tuple of float
        Of each, from 0 to 1; 1 in all.

    Raises
    ------
    ValueError
        Shares that are not one for each format, or are not 1 in all.
    """

    ladder: Ladder
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.ladder.rungs) or abs(sum(self.shares) - 1) > 1e-3:
            raise ValueError(f"expected a share for each of {self.ladder}, 1 in all, got {self.shares}")

    def __str__(self) -> str:
        return str(self.ladder)

    @property
    def recent(self) -> int:
        """The newest entries that stay as they are."""
        return self.ladder.recent

    def at_most(self, number: KVDtype | None) -> "Mix":
        """The same with a format in place of wider ones, if it is one of them: what a prompt is that was read in it."""
        if number not in self.ladder.rungs:
            return self
        at = self.ladder.rungs.index(number)
        return Mix(self.ladder, (*self.shares[:at], sum(self.shares[at:]), *[0.0] * (len(self.shares) - at - 1)))

    def form(self, sizes: Sequence[int]) -> PackedFormat:
        """The lines of the widest format; see `KVDtype.form`."""
        return self.ladder.rungs[-1].form(sizes)

    def coded(self, entries: Count) -> Count:
        """How many of a KV head's entries are coded."""
        return self.ladder.coded(entries)

    def entry_bytes(self, sizes: Sequence[int]) -> float:
        """Bytes of a coded entry on average, and the two bits that say which format it is in."""
        each = zip(self.ladder.rungs, self.shares, strict=True)
        return sum(rung.entry_bytes(sizes) * share for rung, share in each) + 0.25 * (len(self.shares) > 1)


@dataclass(frozen=True)
class LayerKV:
    """What one layer stores."""

    # ``"full"``: all tokens, and what may be pruned. ``"window"``: the last ``window`` tokens. ``"latent"``: a
    # compressed vector for each token (MLA). ``"state"``: a fixed number of bytes.
    kind: LayerKind
    # KV heads, and elements of a key and of a value in each
    heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None  # tokens that a window layer holds
    state_bytes: int = 0  # bytes whatever the length
    itemsize: int = PLAIN_BYTES  # bytes of an element in the precision of the model

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.heads * (self.key_size + self.value_size)

    def bytes(self, tokens: float) -> float:
        """Bytes of ``tokens`` tokens in the precision of the model."""
        held = min(tokens, self.window) if self.window is not None else tokens
        return held * self.elements * self.itemsize + self.state_bytes

    def takes(self, number: "KVDtype | Mix") -> bool:
        """Whether entries of these sizes can be stored in a number format."""
        try:
            number.form((self.key_size, self.value_size))
        except ValueError:
            return False
        return True

    def line_bytes(self, number: "KVDtype | Mix") -> float:
        """Bytes of one token stored in a number format, scales included."""
        return self.heads * number.entry_bytes((self.key_size, self.value_size))

    def stored_bytes(self, entries: float, number: "KVDtype | Mix | None") -> float:
        """Bytes of so many tokens in a number format, which leaves the first and the newest as they are."""
        if number is None:
            return self.bytes(entries)
        coded = number.coded(entries)
        # And each head's mean in float32, as it is and rotated.
        return self.bytes(entries - coded) + coded * self.line_bytes(number) + 8 * self.elements

    def unfinished_lines(self, prompt: int, number: KVDtype | None) -> float:
        """Bytes of the codes of a prompt that is read in chunks; they are allocated when the first ones are written."""
        if number is None or self.kind != "full" or not self.takes(number) or prompt < number.recent + FLUSH:
            return 0
        return (prompt - number.recent) * self.line_bytes(number)

    def unfinished_bytes(self, prompt: int, number: KVDtype | None) -> float:
        """Bytes of a prompt that is read in chunks and held in a number format, when all but its last chunk is read.

        The newest entries stay as they are, and others until they are worth coding together; the sinks are there twice.
        """
        lines = self.unfinished_lines(prompt, number)
        if number is None or not lines:
            return self.bytes(prompt)
        return lines + self.bytes(number.recent + FLUSH + SINKS) + 8 * self.elements


def reading_bytes(
    layers: Sequence[LayerKV], prompt: int, number: KVDtype | None, kept: float, *, hosted: int = 0
) -> float:
    """K/V bytes at the worst moment of reading a prompt in chunks, the chunk itself not among them.

    One layer at a time is there in full precision beside what is coded: while a chunk attends to it, and at the
    prompt's end until what is kept of it has moved, which is before the next layer is decoded.

    Parameters
    ----------
    layers : sequence of LayerKV
        Those of the model.
    prompt : int
        Its tokens.
    number : KVDtype or None
        How what was read is held until the end; None: in the model's precision.
    kept : float
        Bytes of all layers once the policy has decided.
    hosted : int
        Layers whose codes are in host memory.
    """
    counts = Counter(layers)
    coded = sum(count * layer.unfinished_bytes(prompt, number) for layer, count in counts.items())
    if coded >= sum(count * layer.bytes(prompt) for layer, count in counts.items()):
        return coded
    full = sum(count for layer, count in counts.items() if layer.kind == "full")
    hosted = min(hosted, full)
    lines = max(layer.unfinished_lines(prompt, number) for layer in counts)
    coded -= hosted * lines
    kept -= kept * hosted / max(full, 1)
    # Two layers' codes pass through the device; and once more those of one whose entries move.
    staged = (min(hosted, 2) + min(hosted, 1)) * lines
    widest = max((layer.bytes(prompt) for layer in layers if layer.kind == "full"), default=0)
    # Layer by layer the one becomes the other.
    return max(coded, kept) + staged + widest


def least_hosted(fits: Callable[[int], bool], most: int) -> int:
    """The fewest layers whose codes have to be in host memory so that something fits; ``most`` if none do.

    Beyond the first one each further layer there makes it fit better.
    """
    if most <= 0 or fits(0):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def activation_elements(text: Any) -> int:
    """Elements that one token takes at the widest point of reading a prompt: a layer's feed-forward part.

    Four times the hidden size (residual, normed input, output, and one copy) and three times
    the intermediate size (gate, up, product). For a Llama-3-8B shape this gives 232, 928 and
    3,712 MiB at 2k, 8k and 32k tokens; `benchmarks/overhead.py` measured 233, 932 and 3,728
    beside the K/V on an H100 (README).
    """
    hidden = int(text.hidden_size)
    inner = largest(text, "intermediate_size") or largest(text, "ffn_dim") or 4 * hidden
    experts = getattr(text, "num_experts_per_tok", None) or 0
    of_expert = getattr(text, "moe_intermediate_size", None) or inner
    return 4 * hidden + 3 * max(inner, int(experts) * int(of_expert))


MASK_BYTES = 3
"""Of a query of a chunk and an entry that it may see: a boolean, and the 16-bit number that sdpa makes of it.

One call has no mask; a chunk behind others has."""


@dataclass(frozen=True)
class Reader:
    """What a model takes beside its K/V to read a prompt.

    Elements are in the model's precision.
    """

    activation: int  # elements that a token takes at the widest point, see `activation_elements`
    attention: int = 0  # elements that it takes while attention runs: residual, queries, output, and one copy
    product: int = 0  # elements that it takes while its widest product is computed: residual, input, and two results
    # elements of an entry's keys and values, copied for each query head that shares them: behind a mask sdpa does so
    repeated: int = 0
    # of matrices that are unpacked to be multiplied with, all or some rows at a time: rows and columns, none twice
    matrices: tuple[tuple[int, int], ...] = ()
    fixed: int = 0  # the most weights that are unpacked at a time of others, whatever is asked
    is_sliced: bool = False  # whether matrices are unpacked some rows at a time

    @classmethod
    def of(cls, text: Any, matrices: tuple[tuple[int, int], ...] = (), fixed: int = 0) -> "Reader":
        """Of a language model's configuration, and of its packed matrices."""
        hidden, widest = int(text.hidden_size), activation_elements(text)
        heads = largest(text, "num_attention_heads") or 1
        shared = (largest(text, "num_key_value_heads") or heads) < heads
        inner = (widest - 4 * hidden) // 3
        repeated = 2 * heads * head_size(text) if shared else 0
        return cls(widest, 4 * hidden, 2 * hidden + 2 * inner, repeated, matrices, fixed)

    @property
    def ways(self) -> "tuple[Reader, ...]":
        """As it is, and with matrices in slices if there are any: what takes less memory is later, and slower."""
        return (self, replace(self, is_sliced=True)) if self.matrices else (self,)

    def behind(self, tokens: int, itemsize: int) -> int:
        """Bytes of so many tokens in the feed-forward part: its three results, or two and what is unpacked."""
        if self.is_sliced:
            unpacked = unpacked_weights(self.matrices, tokens)
        else:
            unpacked = max((count * size for count, size in self.matrices), default=0)
        three, unpacked = tokens * self.activation, max(unpacked, self.fixed)
        return itemsize * (max(three, tokens * self.product + unpacked) if unpacked else three)


def called_bytes(reader: Reader, itemsize: int, tokens: int, prompt: int) -> int:
    """Bytes beside the K/V of a full cache while ``tokens`` more of a prompt are read, the last of ``prompt`` ones.

    Behind others they have a mask, and sdpa copies a layer's keys and values for all query heads.
    """
    behind = reader.behind(tokens, itemsize)
    if tokens >= prompt:
        return behind
    within = tokens * (itemsize * reader.attention + MASK_BYTES * prompt) + itemsize * reader.repeated * prompt
    return max(within, behind + tokens * prompt)


def chunked_bytes(
    layers: Sequence[LayerKV],
    prompt: int,
    chunk: int,
    number: KVDtype,
    kept: float,
    reader: Reader,
    *,
    hosted: int = 0,
    queries: int = 0,
) -> float:
    """Bytes of K/V and of all else at the worst moment of reading a prompt that is coded chunk by chunk.

    The worst of three: while a layer attends to its copy in full precision, KV head by KV head, so that nothing is
    repeated for query heads; in the feed-forward part behind it; and at the prompt's end, when what is kept of a layer
    is made while its codes are there. ``queries`` are those that each layer holds for its policy. Parameters beside the
    chunk's tokens and the reader are those of `reading_bytes`.
    """
    itemsize = max((layer.itemsize for layer in layers), default=PLAIN_BYTES)
    within = chunk * (itemsize * reader.attention + MASK_BYTES * prompt)
    behind = reader.behind(chunk, itemsize) + chunk * prompt
    full = sum(layer.kind == "full" for layer in layers)
    held = full * itemsize * queries * reader.attention / 4
    lines = max((layer.unfinished_lines(prompt, number) for layer in layers), default=0.0)
    moving = min(kept / max(full, 1), lines) + chunk * (itemsize * reader.attention + prompt)
    return reading_bytes(layers, prompt, number, kept, hosted=hosted) + held + max(within, behind, moving)
