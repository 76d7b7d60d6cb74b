"""Coding what is kept of a prompt into its private blocks, all layers' entries out of the ordinary blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refreekv.engines.vllm.gpu.held import begins
from refreekv.engines.vllm.gpu.kept import KeptPrompt
from refreekv.kernels.paged import Coded, Pool, upload
from refreekv.kernels.paged_coding import Chosen, Source, centres_in_blocks, code_to_pages

AT_ONCE = 1 << 20
"""Entries of layers and heads that are coded together: their lists and codes are beside the pool for a while."""


def code_prompt(
    pool: Pool,
    caches: Sequence[Tensor],
    coded: Coded,
    kept: KeptPrompt,
    slot: int,
    blocks: Tensor,
    counts: Tensor,
    starts: list[int],
    pages: Tensor,
) -> None:
    """Code a prompt's entries, and tell the table where they are. The host waits for nothing.

    Parameters
    ----------
    pool, caches : Pool, sequence of Tensor
        The cache, and that of each layer.
    coded : Coded
        What is known of coded entries.
    kept, slot : KeptPrompt, int
        What stays of the prompt, and its slot.
    blocks, pages : Tensor
        int32 ``[.]``: its ordinary blocks and its private ones.
    counts : Tensor
        int64 ``[L, H_kv, R]``, in host memory: entries of each rung.
    starts : list of int
        The first page of each rung.
    """
    firsts = torch.stack([begins(own) for own in counts.unbind(-1)], -1)
    for rung, (start, form) in enumerate(zip(starts, coded.forms, strict=True)):
        firsts[..., rung] += start * pool.coded_lines(form)
    used = blocks[: -(-kept.prompt // pool.tokens)]
    means = centres_in_blocks(pool, used, kept.prompt)
    coded.key_means[:, slot], coded.value_means[:, slot] = means
    maps = coded.maps.around(*means)
    there = None
    if kept.lines is None and pool.has_lines:
        there = Source.in_blocks(pool, used, kept.prompt)
    # A copy of the entries themselves is some times larger than all else.
    each = 1 if there is None else max(1, AT_ONCE // (pool.heads * kept.prompt))
    for start in range(0, pool.layers, each):
        some = slice(start, start + each)
        if there is None:
            copy = _copy(caches[start], kept, used, start)  # lives as long as this
            source = Source.copied(copy)
        else:
            source = there.of_layers(some)
        chosen = Chosen.of(source.lines[kept.coded_lists(some)], counts[some], coded.forms)
        code_to_pages(pool, coded.forms, maps.of_span(some), source, chosen, firsts[start, 0].tolist(), pages)
    coded.segments[:, slot] = upload(torch.stack([firsts, counts], -1), pool.cache.device)


def _copy(cache: Tensor, kept: KeptPrompt, blocks: Tensor, layer: int) -> Tensor:
    """A layer's entries ``[H_kv, n, 2 * D]``, surrogates in their places."""
    # [blocks, N, H_kv, 2 * D] to [H_kv, n, 2 * D]
    entries = cache.transpose(1, 2)[blocks].flatten(0, 1)[: kept.prompt].transpose(0, 1)
    return kept.with_surrogates(entries, layer).contiguous()
