"""Tables as text, with every figure whole however little room there is."""

from __future__ import annotations

import io
import os
import sys

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.protocol import rich_cast
from rich.table import Column, Table

WIDTH = 140
"""Characters in a line where no terminal tells how many it has."""
NAME = 8
"""Characters that a column of words keeps at least."""


def stdout() -> Console:
    """A console for standard output: as wide as COLUMNS says or the terminal is; a file or pipe has `WIDTH`."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)


def render(renderable: RenderableType, width: int = WIDTH) -> str:
    """What `print` shows of a rich object: plain text, whatever the terminal."""
    out = io.StringIO()
    show(renderable, Console(file=out, width=width, color_system=None))
    return out.getvalue().rstrip()


def show(renderable: RenderableType, console: Console) -> None:
    """Print a table, or what has one, with every figure whole.

    Figures are the columns aligned to the right. Where there is little room the words of the others fold, and what is
    still too wide for the console is printed as wide as it is.
    """
    table = rich_cast(renderable)
    if not isinstance(table, Table):
        console.print(table)
        return
    figures = [column for column in table.columns if column.justify == "right"]
    words = [column for column in table.columns if column.justify != "right"]
    for column in figures:
        column.no_wrap = True
    for column in words:
        column.overflow = "fold"
    if _width(table, console) > console.width:
        table.box, table.pad_edge = box.SIMPLE_HEAD, False
        for column in figures:
            column.header = str(column.header).replace(" ", "\n")
        table.padding = (0, 1, 0, 0)
        if _least(table, words, console) > console.width:
            table.padding = (0, 0, 0, 0)
            table.width = max(_least(table, words, console), console.width)
    console.print(table, crop=False)


def _width(table: Table, console: Console) -> int:
    """Characters that a table takes if nothing folds."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def _least(table: Table, words: list[Column], console: Console) -> int:
    """Characters that a table takes if words fold as far as they may."""
    for column in words:
        column.max_width = NAME
    width = _width(table, console)
    for column in words:
        column.max_width = None
    return width
