"""What all commands share at the terminal: options, one-line errors, progress bars, tables.

Knows rich and typer, what goes to stderr, and the exit codes (0 done, 2 usage or input,
3 no mask keeps the budgets, 130 interrupted). It does not know what any command does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

_debug = False


def show_tracebacks(value: bool) -> None:
    """Let errors through as they are, for whoever mends bkprune itself."""
    global _debug
    _debug = value


@contextmanager
def one_line_errors(on_interrupt: str) -> Iterator[None]:
    """Turn what a user can mend into one line and an exit code (2); Ctrl-C into 130."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if _debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"bkprune: {text}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None
    except KeyboardInterrupt:
        typer.echo(f"bkprune: interrupted; {on_interrupt}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with time left on stderr, or nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def report(done: int, total: int, what: str) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    with bar:
        yield report


MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`emoji` (built in), a diffusers pipeline or U-Net folder, a .safetensors or .ckpt "
        "file in the original layout, or a hub id.",
    ),
]
_PARTS = "Parts that the model lacks"
TOKENIZER = Annotated[
    Path | None, typer.Option("--tokenizer", help="Tokenizer folder.", rich_help_panel=_PARTS)
]
TEXT_ENCODER = Annotated[
    Path | None,
    typer.Option("--text-encoder", help="Text encoder folder.", rich_help_panel=_PARTS),
]
VAE = Annotated[Path | None, typer.Option("--vae", help="VAE folder.", rich_help_panel=_PARTS)]
PREDICTION = Annotated[
    str | None,
    typer.Option(
        "--prediction-type",
        help="epsilon or v_prediction, where the file cannot say it: SD v2 in the original "
        "layout is taken for v2-768, which is v_prediction.",
        rich_help_panel=_PARTS,
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")]


def notice(text: str) -> None:
    """One line beside the data."""
    typer.echo(text, err=True)


def choice(option: str, value: str, choices: tuple[Any, ...]) -> Any:
    """The value, or an error that lists what there is."""
    if value not in choices:
        raise ValueError(f"{option} {value!r}: choose one of {', '.join(choices)}")
    return value


def print_table(table: pd.DataFrame, title: str) -> None:
    """A table for people on stdout, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in table.columns:
        numeric = table[column].dtype.kind in "if"
        view.add_column(str(column), justify="right" if numeric else "left", no_wrap=numeric)
    for row in table.itertuples(index=False):
        view.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row))
    Console(width=width).print(view)
