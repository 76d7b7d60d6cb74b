"""Numbers that launchers need. Triton's own functions for them are parts of its language and take microseconds."""


def blocks_of(count: int, size: int) -> int:
    """Blocks of so many things that hold ``count`` of them."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is not below ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()
