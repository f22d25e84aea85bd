"""Write the tables of result pages from rows: `python docs/tables.py [--check] [FOLDER]`.

A page in FOLDER, or the README two folders above it, has a table wherever it has the markers
`<!-- table: NAME -->` and `<!-- end -->`. NAME is a section of FOLDER/tables.toml, see `Spec`;
FOLDER/*.jsonl hold the rows. Below each table stand the model, texts, device, versions and date of
its rows, and the commands that measured them. --check writes nothing: it shows what is stale as a
diff, and exits with status 1.

Formats are like those of `str.format`: `{settings.keep:.1f}` is the field `keep` of a row's
`settings`. A part in square brackets is left out if the row lacks one of its fields. Numbers have
the digits of the row unless the format rounds them.
"""

import argparse
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import unified_diff
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIELD = re.compile(r"{([\w.]+)(?::([^}]*))?}")
OPTIONAL = re.compile(r"\[([^\]]*)\]")
PROVENANCE = (
    "{model}",
    "[{dtype}]",
    "[measured on {evaluation.text}][, {evaluation.windows} x {evaluation.window} tokens]",
    "[uncompressed perplexity {dense_perplexity}]",
    "[calibrated on {calibration.source}, {calibration.samples} x {calibration.seq_len} tokens]",
    "{device}",
    "{versions}",
    "{date}",
    "[note: {notes}]",
    "[origin: {origin}]",
)
Row = dict[str, Any]  # nested fields have joined names, such as `settings.keep`
Grid = list[list[Row | None]]  # the rows behind the cells, line by line


class Spec(NamedTuple):
    """How a table is built.

    lines: titles and formats of the first columns; rows that agree in them share a line. by: a
    format that tells the rows of a line apart. columns: by title a value of `by` and the format of
    a cell; by default a column for each value of `by`, with the format `cell`. table: of the rows,
    if it is not the name of this one. where: the value, or values, that a field must have. best:
    what is bold, such as `least perplexity of a line`, or `greatest speedup of a column`, or `...
    of the table`: the best of at least two compressed models.
    """

    lines: dict[str, str]
    by: str = ""
    cell: str = ""
    columns: Mapping[str, Sequence[str]] = {}
    table: str | None = None
    where: Mapping[str, Any] = {}
    best: Sequence[str] = ()


def read_rows(folder: Path) -> list[Row]:
    """The rows of all files, in order; numbers keep their digits."""
    lines = (x for file in sorted(folder.glob("*.jsonl")) for x in file.read_text().splitlines())
    return [flat(json.loads(line, parse_float=Decimal)) for line in lines]


def read_specs(folder: Path) -> dict[str, Spec]:
    """The tables by name. Raises TypeError for a key that is no field of `Spec`."""
    return {k: Spec(**v) for k, v in tomllib.loads((folder / "tables.toml").read_text()).items()}


def flat(fields: Mapping[str, Any], prefix: str = "") -> Row:
    """The fields, and those within them under joined names."""
    row: Row = {}
    for name, value in fields.items():
        row[prefix + name] = value
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
    return row


def fill(template: str, row: Row) -> str:
    """The format with the row's values. Raises ValueError for a field that the row lacks."""

    def value(match: re.Match[str]) -> str:
        x = row.get(match[1])
        if x is None:
            raise ValueError(f"a row of {row['table']} has no {match[1]}: expected by {template!r}")
        if isinstance(x, dict):
            return ", ".join(f"{k} {v}" for k, v in x.items())
        return ",".join(map(str, x)) or "none" if isinstance(x, list) else format(x, match[2] or "")

    def optional(match: re.Match[str]) -> str:
        return match[1] if all(row.get(f[1]) is not None for f in FIELD.finditer(match[1])) else ""

    return FIELD.sub(value, OPTIONAL.sub(optional, template))


def distinct(values: Iterable[Any]) -> list[Any]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(values))


def build(name: str, spec: Spec, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """A table and its rows. Raises ValueError if there are no rows, or two for a cell."""
    places: dict[tuple[Sequence[str], str], Row] = {}
    for row in (r for r in rows if _wanted(r, spec, name)):
        place = tuple(fill(line, row) for line in spec.lines.values()), fill(spec.by, row)
        if place in places:
            raise ValueError(f"table {name}: two rows for {place}: make `lines` or `by` finer")
        places[place] = row
    if not places:
        raise ValueError(f"table {name}: no row is selected: look at `table` and `where`")
    columns = spec.columns or {by: (by, spec.cell) for by in distinct(by for _, by in places)}
    lines = distinct(line for line, _ in places)
    grid: Grid = [[places.get((line, by)) for by, _ in columns.values()] for line in lines]
    forms = [form for _, form in columns.values()]
    bold = {place for wish in spec.best for place in _best(wish, grid, forms)}
    table = [[*spec.lines, *columns], ["---"] * (len(spec.lines) + len(columns))]
    for y, line in enumerate(lines):
        texts = [fill(f, r) if r else "" for f, r in zip(forms, grid[y], strict=True)]
        marked = (f"**{t}**" if (y, x) in bold else t or "-" for x, t in enumerate(texts))
        table.append([*(title or "-" for title in line), *marked])
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    used = [row for row in places.values() if any(row is x for line in grid for x in line)]
    return f"\n{text}\n\n{provenance(used)}\n\n{commands(used)}\n\n", used


def _wanted(row: Row, spec: Spec, name: str) -> bool:
    values = {k: v if isinstance(v, list) else [v] for k, v in spec.where.items()}
    values["table"] = [spec.table or name]
    return all(str(row.get(k)) in map(str, v) for k, v in values.items())


def _best(wish: str, grid: Grid, forms: Sequence[str]) -> set[tuple[int, int]]:
    """Lines and columns of what is asked for in `Spec.best`."""
    order, field, *_, scope = wish.split()
    groups: dict[int, dict[tuple[int, int], tuple[Decimal, bool]]] = {}
    for y, line in enumerate(grid):
        for x, (row, form) in enumerate(zip(line, forms, strict=True)):
            if row and field in row and row["settings"] is not None and f"{{{field}" in form:
                exact = Decimal(row[field])  # -0.0 is a decrease, less than 0.0
                group = {"line": y, "column": x, "table": 0}[scope]
                groups.setdefault(group, {})[y, x] = exact, not exact.is_signed()
    pick = {"least": min, "greatest": max}[order]
    rivals = [group for group in groups.values() if len(group) > 1]
    return {place for g in rivals for place, value in g.items() if value == pick(g.values())}


def provenance(rows: Sequence[Row]) -> str:
    """Of what, on what, where and when the rows were measured, in one line."""
    told = (distinct(filter(None, (fill(f, row) for row in rows))) for f in PROVENANCE)
    return f"({'; '.join(' and '.join(values) for values in told if values)}.)"


def commands(rows: Sequence[Row]) -> str:
    """The commands that measured the rows, each once; long ones go on before an option."""
    folded = []
    for command in distinct(line for row in rows for line in row["command"].splitlines()):
        first, *options = command.split(" --")
        parts = [first]
        for option in options:
            parts += ["   "] if len(parts[-1]) + len(option) > 90 else []
            parts[-1] += f" --{option}"
        folded.append(" \\\n".join(parts))
    return "\n".join(["```bash", *folded, "```"])


def pages(folder: Path) -> dict[Path, str]:
    """What the pages and the README should hold. Raises ValueError for an unknown table."""
    rows, specs = read_rows(folder), read_specs(folder)

    def table(match: re.Match[str]) -> str:
        if match[2] not in specs:
            raise ValueError(f"a page has a table {match[2]}: expected a section of tables.toml")
        return match[1] + build(match[2], specs[match[2]], rows)[0] + match[3]

    paths = [*sorted(folder.glob("*.md")), *folder.absolute().parents[1].glob("README.md")]
    return {path: BLOCK.sub(table, path.read_text()) for path in paths}


def main() -> int:
    """Write the pages, or compare them: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if one is stale")
    args = parser.parse_args()
    stale = {path: text for path, text in pages(args.folder).items() if text != path.read_text()}
    for path, text in stale.items():
        if args.check:
            old, new = path.read_text().splitlines(), text.splitlines()
            print(*unified_diff(old, new, str(path), "from rows", lineterm=""), sep="\n")
        else:
            path.write_text(text)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
