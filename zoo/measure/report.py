"""The report of sweeps and of several domains: report.md with their tables, and its figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.escape import code_block
from ..utils.escape import markdown as escaped
from ..utils.jsonl import REPORTED, read_rows
from ..utils.records import EvaluationRow
from .domains import DomainTable, of_evaluations, of_section, table_caption, table_cells, table_json
from .plots import figures
from .sweep_table import Section, as_json, caption, cells, sections


class Groups(NamedTuple):
    """What a report shows: rows of sweeps, and of checkpoints that were evaluated on domains."""

    sections: list[Section]
    evaluations: list[EvaluationRow]
    tables: list[DomainTable]  # over domains, of both


def read_groups(files: Sequence[Path]) -> Groups:
    """The rows of files, in groups that can be compared.

    Raises ValueError for a file of anything else, for a sweep without the row of the dense model
    and for an evaluation without domains.
    """
    rows = [row for file in files for row in read_rows(file, REPORTED)]
    evaluations = [row for row in rows if "settings" not in row]
    swept = [row for row in rows if "settings" in row]
    groups = sections(swept) if swept or not evaluations else []
    tables = [table for section in groups if (table := of_section(section))]
    return Groups(groups, evaluations, [*tables, *of_evaluations(evaluations)])


def write_report(folder: Path, groups: Groups) -> int:
    """Write report.md and its figures into the folder; returns how many figures there are."""
    drawn = figures(groups.sections, groups.tables)
    files = {title: f"{_file_name(title)}.png" for title in drawn}
    for title, name in files.items():
        drawn[title].savefig(folder / name)
    (folder / "report.md").write_text(markdown(groups, files), encoding="utf-8")
    return len(files)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", title).strip("-")


def markdown(groups: Groups, figures: Mapping[str, str]) -> str:
    """The report: tables, figures (file by title), what was refused, and how it was made."""
    parts = ["# KV caches compressed: quality at equal bytes"]
    for section in groups.sections:
        rows = _escaped(cells(section))
        for keep, column in zip(section.keeps, range(1, len(rows[0])), strict=True):
            best = list(section.table).index(section.best(keep)[0]) + 1
            rows[best][column] = f"**{rows[best][column]}**"
        parts += [escaped(caption(section)), _table(rows)]
        parts += [escaped(f"Refused: {name}: {why}") for name, why in section.refused.items()]
    for table in groups.tables:
        parts += [escaped(table_caption(table)), _table(_escaped(table_cells(table)))]
    parts += [f"![{escaped(title)}]({file})" for title, file in figures.items()]
    swept = [row for section in groups.sections for row in section.rows]
    measured: list[Mapping[str, Any]] = [*swept, *groups.evaluations]
    parts.append(code_block(dict.fromkeys(row["command"] for row in measured)))
    parts.append(f"({escaped('; '.join(_origin(measured)))})")
    return "\n\n".join(parts) + "\n"


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[escaped(cell) for cell in row] for row in rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _origin(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Devices, versions and dates of the rows; evaluations have no date."""
    versions = [", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows]
    devices = [row["device"] if "device" in row else row["processor"] for row in rows]
    about = (devices, versions, [row["date"] for row in rows if "date" in row])
    return [" and ".join(sorted(set(values))) for values in about if values]


def groups_json(groups: Groups) -> list[dict[str, Any]]:
    """The tables, ready for JSON: those of sweeps, then those over domains."""
    return [*map(as_json, groups.sections), *map(table_json, groups.tables)]
