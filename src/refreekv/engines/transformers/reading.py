"""A layer's prompt while it comes in chunks: what was read is coded, and decoded for the length of each call."""

from torch import Tensor

from refreekv.core.key_codes import KeyCodes
from refreekv.core.quantisation import PROMPT_DTYPE, KVDtype
from refreekv.policies.base import AUTO
from refreekv.storage.base import KVStorage
from refreekv.storage.coding import Pair
from refreekv.storage.hosted import HostedPrompts
from refreekv.storage.unfinished import UnfinishedKV

LEAST_CHUNK = 64
"""Tokens of a chunk with which a prompt begins to be coded as it is read, where nobody has asked for it."""


class Reading:
    """What a layer holds of an unfinished prompt, and what it held before.

    Attributes
    ----------
    start : int
        Logical length at which it began.
    earlier : KVStorage, pair of Tensor or None
        What earlier prompts and answers left, as it is: nothing of it is coded here.
    prompt : UnfinishedKV
        The prompt's chunks.
    comes_back : bool
        Whether its first ones are a conversation's earlier turns, which are kept elsewhere, too.
    returned : int
        How many of these were coded when they came back.
    is_whole : bool
        Whether its last one is held with the others, not coded yet.
    """

    def __init__(
        self,
        number: KVDtype,
        start: int,
        end: int,
        earlier: KVStorage | Pair | None,
        like: Pair,
        codes: KeyCodes | None = None,
        host: tuple[HostedPrompts, int] | None = None,
    ):
        self.start, self.earlier = start, earlier
        self.prompt = UnfinishedKV(number, like, end - start, sinks=start == 0, codes=codes, host=host)
        self.comes_back = self.is_whole = False
        self.returned = 0
        self._chunk: Pair | None = None

    @classmethod
    def of(cls, prompt: UnfinishedKV) -> "Reading":
        """That of a conversation's next turn, of which everything before came back."""
        reading = cls.__new__(cls)
        reading.start, reading.earlier, reading.prompt = 0, None, prompt
        reading.comes_back, reading.is_whole, reading._chunk = True, False, None
        reading.returned = prompt.coded
        return reading

    @staticmethod
    def form_for(wanted: KVDtype | str | None, like: Pair, auto: KVDtype = PROMPT_DTYPE) -> KVDtype | None:
        """The format that entries are coded in, ``auto`` if nobody has asked for one; None: they stay as they are.

        Raises
        ------
        ValueError
            A format was asked for and the entries do not go into it.
        """
        if wanted is None or UnfinishedKV.takes(*like):
            return auto if isinstance(wanted, str) else wanted
        if isinstance(wanted, str):
            return None
        raise ValueError(
            f"prompt_dtype {wanted} packs heads of a multiple of 16 elements in float16, bfloat16 or float32, and this "
            f"model's keys have {like[0].shape[-1]} in {like[0].dtype} and its values {like[1].shape[-1]} in "
            f"{like[1].dtype}; leave prompt_dtype out"
        )

    @staticmethod
    def codes_anyway(earlier: KVStorage | None, number: KVDtype) -> bool:
        """Whether a storage codes what is appended to it, and no coarser than a format does."""
        if earlier is None or earlier.coding is None:
            return False
        own = earlier.coding.forms[earlier.coding.generated]
        return own.entry_bytes >= number.entry_bytes(earlier.sizes)

    def whole_with(self, keys: Tensor, values: Tensor, *, last: bool, ends: bool = False) -> KVStorage | Pair:
        """Everything in full precision, a new chunk at its end: a copy, which is the layer's own after the ``last``.

        ``ends``: whether the prompt ends with the last of these.
        """
        if ends and self.comes_back:
            # Taken in before it is attended to, and coded behind that.
            self.prompt.append(keys, values, code=False)
            self.is_whole = True
            return self.prompt.dense()
        self._chunk = keys, values
        if isinstance(self.earlier, KVStorage):
            new = self.prompt.dense(self._chunk)
            return self.earlier.append(*new) if last else self.earlier.full().append(*new)
        if self.earlier is None and not self.prompt.length:
            return keys, values
        return self.prompt.dense(self._chunk, self.earlier)

    def means_serve(self, codes: KeyCodes | None, length: int) -> bool:
        """Whether means of earlier turns, which came back coded with these codes for keys, serve for ``length``.

        Not where more is new than came back: what was said first may be short, and unlike what follows.
        """
        return self.prompt.coded > 0 and 2 * self.returned >= length and self.prompt.codes is codes

    def put_away(self, real: Tensor | None, *, code: bool = True) -> KVStorage | None:
        """Take the chunk in after its attention; what the layer holds beside the prompt, if that is a storage.

        ``real`` is boolean ``[B, columns since start]``, False at padding; None: there is none.
        """
        if self._chunk is not None:
            self.prompt.append(*self._chunk, real, code=code)
            self._chunk = None
        return self.earlier if isinstance(self.earlier, KVStorage) else None

    def whole(self) -> KVStorage | Pair:
        """Everything in full precision, which is the layer's own from now on."""
        if self._chunk is not None:
            self.put_away(None, code=False)
        if isinstance(self.earlier, KVStorage):
            return self.earlier.append(*self.prompt.dense())
        return self.prompt.dense(None, self.earlier)

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt's entries, and of dense ones before them."""
        earlier = () if self.earlier is None or isinstance(self.earlier, KVStorage) else self.earlier
        return self.prompt.nbytes + sum(part.untyped_storage().nbytes() for part in earlier)


def parse_prompt_dtype(value: str | KVDtype | None) -> KVDtype | str | None:
    """What ``prompt_dtype`` says: a format, "auto", or None.

    Raises
    ------
    ValueError
        An unknown format.
    """
    if value == AUTO:
        return AUTO
    try:
        return KVDtype.parse(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{str(error).replace('kv_dtype', 'prompt_dtype')}; or auto") from None
