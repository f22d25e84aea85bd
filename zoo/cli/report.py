"""eigenzoo report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Force
from .values import say


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="Files that eigenzoo sweep or evaluate --domains --json wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Make tables and plots of sweeps, and of several domains.

    The folder gets report.md and figures, which need the extra `plot`.
    """
    from ..measure import tables
    from ..measure.report import groups_json, read_groups, write_report
    from ..utils.output import check_folder, new_folder

    check_folder(out, force, files)
    groups = read_groups(files)
    with new_folder(out, force) as folder:
        figures = write_report(folder, groups)
    if as_json:
        print(json.dumps(groups_json(groups)))
        return
    for section in groups.sections:
        tables.sweep(section)
    for table in groups.tables:
        tables.models_by_domain(table)
    say(f"wrote {out}/report.md and {figures} figures")
