"""Text of the tables that `verify` and `explain` return."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def render(renderable: RenderableType, width: int = 140) -> str:
    """What `print` shows of a rich object: plain text, whatever the terminal."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue().rstrip()
