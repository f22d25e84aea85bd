"""eigenzoo report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Force
from .values import say


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Files that eigenzoo sweep wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Make tables and plots of sweeps.

    The folder gets report.md and figures, which need the extra `plot`.
    """
    from ..measure import tables
    from ..measure.report import write_report
    from ..measure.sweep_table import as_json as table
    from ..measure.sweep_table import sections
    from ..utils.jsonl import SWEEP, read_rows
    from ..utils.output import check_folder, new_folder

    check_folder(out, force, files)
    groups = sections([row for file in files for row in read_rows(file, SWEEP)])
    with new_folder(out, force) as folder:
        figures = write_report(folder, groups)
    if as_json:
        print(json.dumps([table(section) for section in groups]))
        return
    for section in groups:
        tables.sweep(section)
    say(f"wrote {out}/report.md and {figures} figures")
