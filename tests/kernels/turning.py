"""Prints which kernels the turns of conversations would have compiled; nothing is compiled, and plain versions compute.

A process of its own: tests run Triton in its interpreter. Each function of `kernels` is called twice, as on CUDA with
launches that only say what they are, and as on a CPU.
"""

import functools
import inspect
import json
import sys
from collections import Counter
from unittest import mock

import torch
import triton
from compiling import LIMITS, Driver
from triton.runtime.jit import JITFunction

from helpers.models import build
from refreekv import ReFreeKVCache, kernels
from refreekv.engines.transformers import layer, ragged_attention
from refreekv.kernels import dispatch, shared_memory
from refreekv.kernels.decode import launch_ragged_decode
from refreekv.kernels.packed_calls import PackedKV
from refreekv.kernels.packed_launch import launch_packed_attention
from refreekv.policies.adaptive import Adaptive
from refreekv.storage.token_rows import MOST

EVICTING = {
    "min_length": 16, "copying": 2.0, "constant": 0.05, "evict_unit": 1.0, "follow": 2, "hit": 0.3, "lost_mass": 0.6,
    "spread_factor": 50.0,
}  # fmt: skip
"""Parameters of `adaptive` under which heads of a random model keep different numbers of entries."""
TURNS = {1000: (32, 33, 20, 300, 57, 48), 2037: (31, 16, 17, 129), 4100: (20, 64), 9000: (100, 128)}
"""Tokens of turns behind prompts of so many."""


def attend(query, exact, tables, forms, maps, **kwargs):
    numbers = [number for form in forms for number in form.numbers]
    packed = PackedKV.of(exact, tables, numbers, maps.tensors)
    launch_packed_attention(query, packed, 1.0, None, None, assembly=True)


def decode(query, table, form, **kwargs):
    launch_ragged_decode(query, table, form, 1.0, None, None)


OPERATORS = {"packed_attention": attend, "ragged_decode": decode}
"""PyTorch picks for these, by what they are given."""


def said_twice(name, plain):
    launching = OPERATORS.get(name, plain)

    @functools.wraps(plain)
    def both(*args, **kwargs):
        with mock.patch.object(dispatch, "on_triton", return_value=True):
            launching(*args, **kwargs)
        return plain(*args, **kwargs)

    return both


def feed(model, cache, tokens):
    with torch.inference_mode(), cache.prompt_until(cache.get_seq_length() + tokens):
        model(torch.randint(2, 90, (1, tokens)), past_key_values=cache, logits_to_keep=1)
    cache.state.finish()


def main():
    found, launches, run = set(), Counter(), JITFunction.run

    def launch(kernel, *args, warmup, **options):
        launches[kernel.__name__] += 1
        return run(kernel, *args, warmup=True, **options)

    JITFunction.run = launch
    JITFunction._do_compile = lambda kernel, key, *args, **kwargs: found.add(f"{kernel.__name__} {key}")
    shared_memory.bytes_of = lambda device: LIMITS[90]
    triton.runtime.driver.set_active(Driver(90))
    layer.is_late = lambda device: True
    plain = {name: function for name in kernels.__all__ if inspect.isfunction(function := getattr(kernels, name))}
    twice = {function: said_twice(name, function) for name, function in plain.items()}
    for module in [own for name, own in sys.modules.items() if name.startswith("refreekv")]:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in twice:
                setattr(module, name, twice[value])
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 2**14}
    model = build("llama", attention="sdpa", initializer_range=0.12, **shape).bfloat16()
    ragged_attention.reads_many = lambda device: True
    said = {}
    for kind, keep in (("waiting", None), ("kept", None), ("everything", "host")):
        told = said[kind] = []
        Adaptive.waits = lambda policy, new, settled, waits=kind == "waiting": waits
        for length, turns in TURNS.items():
            cache = ReFreeKVCache(model, "adaptive", **EVICTING, keep_evicted=keep)
            cache.state.arena = True
            # Longer ones that nothing is asked about do nothing that others do not.
            for tokens in (length, *(n for n in turns if kind != "waiting" or n <= MOST)):
                found.clear()
                launches.clear()
                feed(model, cache, tokens)
                held = cache.pruned_layers[0].ragged.lengths[0]
                told.append(
                    {"turn": tokens != length, "launches": launches.copy(), "compiled": sorted(found), "held": held}
                )
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
