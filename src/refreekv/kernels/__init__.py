"""Triton kernels, each beside a plain torch version that CPUs use and tests compare with.

The functions here pick by device: CUDA tensors go to Triton, others to the reference. On machines
without Triton the references serve CUDA tensors, too.

All that take tables raise ValueError or TypeError for shapes, devices or types that do not go with each other, before
anything is read or written: what is done with addresses nobody can check any more.
"""

from refreekv.core.needs import Needs
from refreekv.core.reductions import ProbeReductions, Probes
from refreekv.kernels.dispatch import available
from refreekv.kernels.packed import (
    centres,
    code_oldest,
    mapped_means,
    pack_lines,
    pack_rungs,
    packed_attention,
    recode_lines,
    unpack_lines,
)
from refreekv.kernels.packed_calls import Moved, Oldest, Transfer
from refreekv.kernels.probing import asked, both_reductions, probe_reductions
from refreekv.kernels.segments import append, fetch, gather, move, ragged_decode, take_out
from refreekv.kernels.selecting import kept_first, leveled, make_surrogates, needed, put_surrogates, uni_metric_cut
from refreekv.kernels.table import Format
from refreekv.kernels.weight_blocks import block_linear, block_rows

__all__ = [
    "Format",
    "Moved",
    "Needs",
    "Oldest",
    "ProbeReductions",
    "Probes",
    "Transfer",
    "append",
    "asked",
    "available",
    "block_linear",
    "block_rows",
    "both_reductions",
    "centres",
    "code_oldest",
    "fetch",
    "gather",
    "kept_first",
    "leveled",
    "make_surrogates",
    "mapped_means",
    "move",
    "needed",
    "pack_lines",
    "pack_rungs",
    "packed_attention",
    "probe_reductions",
    "put_surrogates",
    "ragged_decode",
    "recode_lines",
    "take_out",
    "uni_metric_cut",
    "unpack_lines",
]
