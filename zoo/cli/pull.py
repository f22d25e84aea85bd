"""eigenzoo pull."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Force, Revision


def pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hub id: org/name, or org/name@revision.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    revision: Revision = None,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Fetch a checkpoint from the Hub.

    After a broken download the same command continues.
    """
    from ...hub_export.hub import pull as fetch

    commit = fetch(source, out, revision, force)
    if as_json:
        print(json.dumps({"out": str(out), "commit": commit}))
    else:
        print(f"wrote {out}, commit {commit}; next: eigenzoo generate {out} --prompt '...'")
