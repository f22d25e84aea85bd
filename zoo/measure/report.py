"""The report of sweeps: report.md with their tables, and its figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..utils.escape import code_block
from ..utils.escape import markdown as escaped
from ..utils.records import CompressedRow, DenseRow
from .plots import figures
from .sweep_table import Section, caption, cells


def write_report(folder: Path, sections: Sequence[Section]) -> int:
    """Write report.md and its figures into the folder; returns how many figures there are."""
    drawn = figures(sections)
    files = {title: f"{_file_name(title)}.png" for title in drawn}
    for title, name in files.items():
        drawn[title].savefig(folder / name)
    (folder / "report.md").write_text(markdown(sections, files), encoding="utf-8")
    return len(files)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", title).strip("-")


def markdown(sections: Sequence[Section], figures: Mapping[str, str]) -> str:
    """The report: tables, figures (file by title), what was refused, and how it was made."""
    parts = ["# KV caches compressed: quality at equal bytes"]
    for section in sections:
        rows = [[escaped(cell) for cell in row] for row in cells(section)]
        for keep, column in zip(section.keeps, range(1, len(rows[0])), strict=True):
            best = list(section.table).index(section.best(keep)[0]) + 1
            rows[best][column] = f"**{rows[best][column]}**"
        rows.insert(1, ["---"] * len(rows[0]))
        parts += [escaped(caption(section)), "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        parts += [escaped(f"Refused: {name}: {why}") for name, why in section.refused.items()]
    parts += [f"![{escaped(title)}]({file})" for title, file in figures.items()]
    measured = [row for section in sections for row in section.rows]
    commands = dict.fromkeys(row["command"] for row in measured)
    parts.append(code_block(commands))
    parts.append(f"({escaped('; '.join(_origin(measured)))})")
    return "\n\n".join(parts) + "\n"


def _origin(rows: Sequence[DenseRow | CompressedRow]) -> list[str]:
    """Devices, versions and dates of the rows."""
    versions = [", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows]
    about = ([row["device"] for row in rows], versions, [row["date"] for row in rows])
    return [" and ".join(sorted(set(values))) for values in about]
