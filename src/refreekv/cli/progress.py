"""What a command says on stderr while it works."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def stderr_console() -> Console:
    """A console on the present stderr; it stays there when `sys.stderr` is redirected."""
    return Console(file=sys.stderr, highlight=False)


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show that ``what`` is going on, for work of unknown length."""
    if not console.is_terminal:
        console.print(f"{what} …", markup=False, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def counting(console: Console, what: str, first: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar over ``total`` tokens, samples or answers; yields what to call at each one, or with how many.

    Until the first one the bar says ``first`` (the prefill) instead of counting.
    """
    if not console.is_terminal:
        console.print(f"{what} …", markup=False, soft_wrap=True)
        yield lambda count=1: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{what}: {first}", total=total)
        yield lambda count=1: progress.update(task, advance=count, description=what)
