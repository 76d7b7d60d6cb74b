"""Parts of `kernels.paged` in Triton that know of entries as the model computed them: where they are, and a softmax."""

import triton
import triton.language as tl

from refreekv.kernels.paged import UNIT
from refreekv.kernels.probe import _capped

_UNIT = tl.constexpr(UNIT)


@triton.jit
def line_at(line, pages, offsets, inside, block_stride, LINES: tl.constexpr, LAYERS: tl.constexpr, WIDTH: tl.constexpr):
    """First elements of lines in private pages, from the pool's beginning."""
    page = line // LINES
    block = tl.load(pages + page // LAYERS, inside, 0).to(tl.int64)
    return tl.load(offsets + page % LAYERS, inside, 0) * _UNIT + block * block_stride + (line % LINES) * WIDTH


@triton.jit
def token_at(position, blocks, own, head, inside, block_stride, token_stride, head_stride, TOKENS: tl.constexpr):
    """First elements of tokens in ordinary blocks."""
    block = tl.load(blocks + position // TOKENS, inside, 0).to(tl.int64)
    return own * _UNIT + block * block_stride + (position % TOKENS) * token_stride + head * head_stride


@triton.jit
def listed_at(
    position, blocks, own, replaced, head, inside, block_stride, token_stride, head_stride,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """First elements of listed entries: tokens, or lines of a tensor beside the pool."""
    there = position >= 0
    token = token_at(
        tl.maximum(position, 0), blocks, own, head, inside & there, block_stride, token_stride, head_stride, TOKENS
    )
    return tl.where(there, token, replaced * _UNIT + (-1 - position) * WIDTH)


@triton.jit
def taken_on(
    q, pool, at, seen, inside, highest, total, result, scaling, softcap,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, PRODUCT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """A softmax taken on over some entries, whose first elements are ``at``."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(pool + at[None, :] + d[:, None], inside[None, :] & (d < HEAD)[:, None], 0.0)
    v = tl.load(pool + HEAD + at[:, None] + d[None, :], inside[:, None] & (d < HEAD)[None, :], 0.0)
    logits = _capped(tl.dot(q, k.to(PRODUCT), input_precision="ieee") * scaling, softcap, HAS_CAP)
    logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    # Nothing was seen yet where this is infinite.
    safe = tl.where(higher > float("-inf"), higher, 0.0)
    p = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink + tl.sum(p, 1)
    result = result * shrink[:, None] + tl.dot(p.to(PRODUCT), v.to(PRODUCT), input_precision="ieee")
    return higher, total, result
