"""eigenzoo card."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, as eigenzoo compress wrote.")],
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What `evaluate --json` printed, of FOLDER or of its original, and bench.jsonl of "
            "`bench --out`, with its plots."
        ),
    ] = None,
) -> None:
    """Write the README.md of FOLDER anew, with measurements in it."""
    from ...hub_export.card import add

    print(add(folder, measured or []))
