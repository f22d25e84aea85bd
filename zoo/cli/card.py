"""eigenzoo card."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .values import show


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that eigenzoo compress wrote.")
    ],
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Files with what `evaluate --json` printed, for FOLDER or for its original, and "
            "bench.jsonl as `bench --out` wrote it; plots beside it are copied.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write measurements into a model card.

    README.md and config.json of FOLDER are written again. Measurements of the
    same kind are replaced.
    """
    from huggingface_hub import ModelCard

    from ...hub_export.measurements import add

    text = add(folder, measured or [])
    if as_json:
        print(json.dumps({"metadata": ModelCard(text).data.to_dict(), "card": text}))
    else:
        show(text)
