"""Which share of a list is a program's, in Triton: neighbouring ones go to programs of one multiprocessor.

A kernel that reads several number formats has a loop for each, and where a multiprocessor keeps instructions there is
room for one or two of them. In a list that has one format after the other neighbours are in the same loop.
"""

import triton
import triton.language as tl


@triton.jit
def none_claimed(claimed, MULTIPROCESSORS: tl.constexpr):
    """Write what `share_of` begins with; in a kernel before."""
    number = tl.arange(0, triton.next_power_of_2(MULTIPROCESSORS))
    tl.store(claimed + number, 0, number < MULTIPROCESSORS)


@triton.jit
def share_of(claimed, shares, place, MULTIPROCESSORS: tl.constexpr):
    """The number of this program's share: each share is one program's, wherever programs run.

    Parameters
    ----------
    claimed : pointer to int32
        ``MULTIPROCESSORS`` zeros, which are written to.
    shares : int64
        Of the list. Fewer than programs: theirs are the first programs', so that they are spread out.
    place : int32
        The multiprocessor that this program runs on.
    MULTIPROCESSORS : int
        Of the device; programs are a multiple of them. 0: programs take shares in turn.
    """
    share = tl.program_id(0)
    if MULTIPROCESSORS:  # noqa: SIM102, the outer one is decided when this is compiled
        if shares == tl.num_programs(0):
            each = tl.num_programs(0) // MULTIPROCESSORS
            at = place % MULTIPROCESSORS
            number = tl.atomic_add(claimed + at, 1, sem="relaxed")
            # A multiprocessor that has more programs than shares does others' work.
            while number >= each:
                at = (at + 1) % MULTIPROCESSORS
                number = tl.atomic_add(claimed + at, 1, sem="relaxed")
            share = at * each + number
    return share
