"""eigenzoo card."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson


def card(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, as eigenzoo compress wrote.")],
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What `evaluate --json` printed, of FOLDER or of its original, and bench.jsonl of "
            "`bench --out`, with its plots."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the README.md of FOLDER again, with measurements in it."""
    from huggingface_hub import ModelCard

    from ...hub_export.measurements import add

    text = add(folder, measured or [])
    if as_json:
        print(json.dumps({"metadata": ModelCard(text).data.to_dict(), "card": text}))
    else:
        print(text)
