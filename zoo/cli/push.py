"""eigenzoo push."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, say


def push(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, as eigenzoo compress wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Hub id, org/name; created if missing.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; created if missing.", show_default="main")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="First line of the commit.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only show the files that would change, their sizes, and the card."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the checkpoint FOLDER on the Hugging Face Hub as REPO_ID.

    Log in with `hf auth login`, or set HF_TOKEN. After a broken upload the same command
    continues; unchanged files are not sent.
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
        print(f"\nREADME.md:\n\n{(folder / 'README.md').read_text()}")
        say("nothing was sent")
    elif done.url is None:
        say("nothing has changed: no commit was made")
    else:
        print(done.url)
