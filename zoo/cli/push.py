"""eigenzoo push."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .values import say, show


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that eigenzoo compress wrote.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub id, org/name; created if missing.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; created if missing.", show_default="main")
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            "--message",
            "-m",
            help="First line of the commit message.",
            show_default="Upload FOLDER with eigenzoo",
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Send nothing: show the files that would change, and the card."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a checkpoint on the Hub.

    Log in with `hf auth login`, or set HF_TOKEN. Only changed files are sent.
    After a broken upload the same command continues.
    """
    from ...hub_export import hub
    from ..inference.hub import parse_hub_id
    from ..measure import tables as report

    parse_hub_id(repo_id)
    if dry_run:
        hub.check_folder(folder)
        done = hub.Pushed(hub.changes(folder, repo_id, revision), None)
    else:
        done = hub.push(folder, repo_id, private, revision, message, create_pr)
    changes = [change._asdict() for change in done.changes]
    if as_json:
        print(json.dumps({"repo": repo_id, "url": done.url, "changes": changes}))
        return
    report.changes(changes)
    if dry_run:
        show(f"\nREADME.md:\n\n{(folder / 'README.md').read_text()}")
        say("nothing was sent")
    elif done.url is None:
        say("nothing has changed: no commit was made")
    else:
        print(done.url)
