"""eigenzoo report."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Force, say


def report(
    files: Annotated[list[Path], typer.Argument(help="Files that eigenzoo sweep wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and its figures.")],
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Turn the rows of sweeps into a table and plots."""
    from ...hub_export.export import check_free, new_folder
    from ..measure import tables as terminal
    from ..measure.summary import as_json as table
    from ..measure.summary import markdown, sections
    from ..utils.jsonl import read_rows

    try:
        from ..measure.plots import figures
    except ModuleNotFoundError:
        raise ValueError("plots need matplotlib: pip install 'eigenzoo[plot]'") from None
    check_free(out, force)
    found = sections([row for file in files for row in read_rows(file)])
    drawn = figures(found)
    names = {title: f"{_plain(title)}.png" for title in drawn}
    with new_folder(out, force) as folder:
        for title, name in names.items():
            drawn[title].savefig(folder / name)
        (folder / "report.md").write_text(markdown(found, names), encoding="utf-8")
    if as_json:
        print(json.dumps([table(section) for section in found]))
        return
    for section in found:
        terminal.sweep(section)
    say(f"wrote {out}/report.md and {len(names)} figures")


def _plain(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^\w.=+-]+", "-", title).strip("-")
