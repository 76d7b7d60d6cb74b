"""The typer application that the commands join, and how it fails."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import refreekv

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn when transformers imports torchao, of what has nothing to do with the command."""


class UserError(Exception):
    """Something about the input; shown as one line, with exit code 2 and no traceback."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn a `UserError` into its line and exit code."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"refreekv: error: {one_line(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="refreekv",
    cls=_Group,
    help="Threshold-free KV cache compression for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # their locals may hold whole tensors
)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refusals() -> Iterator[None]:
    """Within, what the library refuses (ValueError, TypeError) is the user's error.

    For calls that only check their input. Around a computation it would hide bugs.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error


def grow_segments() -> None:
    """Have PyTorch's allocator grow its segments, unless the user has settings for it; before torch is imported.

    Else what a cache gives back layer by layer leaves gaps that nothing larger fits in, and a GPU that is nearly full
    runs out of memory.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"refreekv {refreekv.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version  # its callback did it
    if context.invoked_subcommand != "serve":  # which may start vLLM, that has an allocator's settings of its own
        grow_segments()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
