"""Keys, values and queries have a type each: every kernel that takes addresses takes them so, or writes nothing."""

import pytest
import torch

from kernels.test_segment_kernels import Segments, run
from kernels.test_surrogate_kernels import a_layer
from refreekv.core import reductions
from refreekv.core.probes import attention_rows
from refreekv.core.reductions import Probes
from refreekv.core.surrogates import make, put
from refreekv.kernels import append, gather, move, ragged_decode, reference
from refreekv.kernels.decode import launch_ragged_decode
from refreekv.kernels.probe_launch import launch_probe_reductions
from refreekv.kernels.reference import decode_segment
from refreekv.kernels.storage import launch_append, launch_gather
from refreekv.kernels.surrogates import launch_put, launch_surrogates

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
ON_GPU = torch.cuda.is_available()
# The interpreter keeps bfloat16 as integers and multiplies those in tl.dot: it cannot be the judge.
TYPES = [(F32, F16), (F16, F32), (F32, F32)] + ([(F32, BF16), (BF16, F32), (BF16, F16)] if ON_GPU else [])
QUERIES = [F16, F32] + ([BF16] if ON_GPU else [])
WHICH = pytest.mark.parametrize("which", ["kernel", "reference"])
LENGTHS = [0, 1, 31, 200, 64, 65]


def check(got, want, query):
    assert got.dtype == query.dtype
    error = (got.double().cpu() - want).norm() / want.norm()
    assert error < 1e-2 if BF16 in (got.dtype,) else error < 4e-3, float(error)


@WHICH
@pytest.mark.parametrize("asked", QUERIES, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_decode(types, asked, which, device):
    segments = Segments(LENGTHS, (64, 32), types, device, growth=5).fill()
    query = torch.randn(3, 8, 1, 64, device=device).to(asked)
    arguments = (query, segments.table, segments.form, 0.2, None, None)
    got = run(which, device, launch_ragged_decode, reference.ragged_decode, *arguments)
    want = torch.zeros(3, 1, 8, 32, dtype=torch.float64)
    for segment, length in enumerate(LENGTHS):
        row, head = divmod(segment, 2)
        mine = slice(head * 4, head * 4 + 4)
        held = (part[segment][:length].double().cpu() for part in (segments.keys, segments.values))
        want[row, 0, mine] = decode_segment(query[row, mine, 0].double().cpu(), *held, 0.2, None, None)
    check(got, want, query)


@WHICH
@pytest.mark.parametrize("brought", [(F32, F16), (F16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_append_widens_and_touches_nothing_else(tokens, brought, which, device):
    segments = Segments([3, 0, 7, 0], (80, 64), (F32, F32), device, capacities=[24, 24, 30, 0]).fill()
    before = [[part.clone() for part in side] for side in (segments.keys, segments.values)]
    keys = torch.randn(2, 2, tokens, 80, device=device).to(brought[0])
    values = torch.randn(2, 2, tokens, 64, device=device).to(brought[1])
    run(which, device, launch_append, reference.append, keys, values, segments.table, segments.form)
    for segment, length in enumerate(segments.lengths):
        row, head = divmod(segment, 2)
        for side, new in enumerate((keys, values)):
            stored, want = (segments.keys, segments.values)[side][segment], before[side][segment]
            if segment != 3:
                want[length : length + tokens] = new[row, head].to(F32)
            torch.testing.assert_close(stored, want, rtol=0, atol=0, equal_nan=True)


@WHICH
def test_append_and_gather_keep_types_apart(which, device):
    """Four bytes an element on one side and two on the other."""
    keys, values = torch.randn(1, 2, 40, 64, device=device), torch.randn(1, 2, 40, 64, device=device).half()
    segments = Segments([32, 40], (64, 64), (F32, F16), device, growth=2)
    spans = torch.tensor([(0, 4, 8), (0, 40, 0)], device=device)
    extra = (40,) if which == "kernel" else ()
    arguments = (keys, values, segments.table, spans, 40, *extra, segments.form)
    run(which, device, launch_gather, reference.gather, *arguments)
    new = keys[:, :, :1], values[:, :, :1]
    run(which, device, launch_append, reference.append, *new, segments.table, segments.form)
    for head, index in enumerate(([*range(4), *range(12, 40), 0], [*range(40), 0])):
        for stored, source in ((segments.keys, keys), (segments.values, values)):
            assert torch.equal(stored[head][: len(index)], source[0, head, index])
            assert stored[head][len(index) :].isnan().all()


# -- what is refused, before anything is read or written ----------------------------------------------


def bad_entries(device):
    half = {"dtype": F16, "device": device}
    keys, values = torch.ones(2, 2, 3, 64, **half), torch.ones(2, 2, 3, 32, **half)
    return {
        "wider keys": (keys.float(), values),
        "wider values": (keys, values.float()),
        "as wide, but other": (keys, values.bfloat16()),
        "integers": (keys.to(torch.int16), values),
        "larger keys": (torch.ones(2, 2, 3, 80, **half), values),
        "larger values": (keys, torch.ones(2, 2, 3, 64, **half)),
        "more rows": (torch.ones(3, 2, 3, 64, **half), torch.ones(3, 2, 3, 32, **half)),
        "fewer values": (keys, values[:, :, :2]),
        "no heads": (keys[0], values[0]),
    }


@WHICH
@pytest.mark.parametrize("name", bad_entries("cpu"))
def test_entries_that_do_not_fit_are_refused(name, which, device):
    segments = Segments([1, 2, 0, 5], (64, 32), F16, device, growth=30).fill()
    before = [part.clone() for part in (*segments.keys, *segments.values)]
    keys, values = bad_entries(device)[name]
    spans = torch.zeros(4, 3, dtype=torch.int64, device=device)
    extra = (3,) if which == "kernel" else ()
    with pytest.raises((ValueError, TypeError)):
        run(which, device, launch_append, reference.append, keys, values, segments.table, segments.form)
    arguments = (keys, values, segments.table, spans, 0, *extra, segments.form)
    with pytest.raises((ValueError, TypeError)):
        run(which, device, launch_gather, reference.gather, *arguments)
    for stored, old in zip((*segments.keys, *segments.values), before, strict=True):
        torch.testing.assert_close(stored, old, rtol=0, atol=0, equal_nan=True)
    assert segments.table[:, 2].tolist() == [1, 2, 0, 5]


def test_types_are_named():
    segments = Segments([1, 2], (64, 32), (F32, F16), "cpu", growth=3)
    with pytest.raises(TypeError, match=r"float32 keys and float32 values.*float32 of 64 and float16 of 32"):
        append(torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 32), segments.table, segments.form)
    assert all(part.isnan().all() for part in (*segments.keys, *segments.values))


@pytest.mark.parametrize("heads", [3, 8])
@pytest.mark.parametrize("size", [64, 32])
def test_queries_that_do_not_fit_are_refused(heads, size, device):
    segments = Segments([1, 2, 0, 5], (64, 32), F16, device, growth=30).fill()
    query = torch.ones(2, heads, 1, size, dtype=F16, device=device)
    if (heads, size) == (8, 64):
        assert ragged_decode(query, segments.table, segments.form).shape == (2, 1, 8, 32)
        for bad in (query.int(), query.expand(-1, -1, 2, -1), query[:0], query[0]):
            with pytest.raises((ValueError, TypeError)):
                ragged_decode(bad, segments.table, segments.form)
        with pytest.raises(ValueError, match="sink logit"):
            ragged_decode(query, segments.table, segments.form, sinks=query[0, :4, 0, 0])
    else:
        for decode in (launch_ragged_decode, reference.ragged_decode):
            with pytest.raises(ValueError, match="quer"):
                decode(query, segments.table, segments.form, 0.1, None, None)


def test_tables_that_are_none_are_refused(device):
    segments = Segments([1, 2], (64, 64), F16, device, growth=3).fill()
    entry, form = torch.ones(1, 2, 1, 64, dtype=F16, device=device), segments.form
    for table in (segments.table.int(), segments.table[:, :3], segments.table.T.contiguous().T, segments.table[0]):
        with pytest.raises(ValueError, match=r"table"):
            append(entry, entry, table, form)
        with pytest.raises(ValueError, match=r"table"):
            ragged_decode(entry, table, form)
        with pytest.raises(ValueError, match=r"table"):
            move(table, table, key_bytes=128, value_bytes=128, longest=1)
    with pytest.raises(ValueError, match="cannot be moved"):
        move(segments.table, segments.table[:1], key_bytes=128, value_bytes=128, longest=1)
    with pytest.raises(ValueError, match="8 bytes"):
        move(segments.table, segments.table, key_bytes=14, value_bytes=128, longest=1)
    spans = torch.zeros(2, 3, dtype=torch.int64, device=device)
    for where, end in ((spans.int(), 0), (spans[:1], 0), (spans, 2)):
        with pytest.raises(ValueError, match=r"spans|end"):
            gather(entry, entry, segments.table, where, form, end=end, longest=1)


# -- what looks at keys and values, and writes to neither or to both -----------------------------------


@pytest.mark.parametrize("asked", QUERIES, ids=str)
@pytest.mark.parametrize("stored", QUERIES, ids=str)
def test_probe_reductions(stored, asked, device):
    query, key = torch.randn(1, 4, 5, 64, device=device).to(asked), torch.randn(1, 2, 90, 64, device=device).to(stored)
    at = torch.arange(85, 90, device=device)[None]
    got = launch_probe_reductions(query, key, Probes(at, scaling=0.125))
    wide = (query.cpu().double(), key.cpu().double())
    want = reductions.probe_reductions(*wide, Probes(at.cpu(), scaling=0.125))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), other, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(attention_rows(query, key), attention_rows(query.float(), key.float()))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_stand_ins(types, device):
    queries, keys, values, keep, count = a_layer(device, F32)
    keys, values = keys.to(types[0]), values.to(types[1])
    got = launch_surrogates(queries, keys, values, keep, count)
    want = make(queries, keys, values, ~keep, count=count)
    assert (got.keys.dtype, got.values.dtype) == (want.keys.dtype, want.values.dtype) == types
    assert (got.columns == want.columns).float().mean() > 0.9
    torch.testing.assert_close(got.values.float(), want.values.float(), atol=3e-2, rtol=3e-2)
    stored = [part.clone() for part in (keys, values)]
    launch_put(want, keys, values, keep)
    put(want, *stored)
    assert torch.equal(keys, stored[0])
    assert torch.equal(values, stored[1])
