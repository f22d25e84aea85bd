"""Rows of sweeps as tables: methods down, shares of the KV bytes across."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..compression.settings import Settings
from ..utils.jsonl import RUN, Row

DEFAULTS = json.loads(json.dumps(Settings._field_defaults))  # as rows have them


class Section(NamedTuple):
    """Rows that can be compared: of one model, dtype and evaluation."""

    dense: Row
    table: dict[str, dict[float, Row]]  # by label and keep
    refused: dict[str, str]  # the reason by cell
    constant: dict[str, Any]  # settings that all rows share and that are not the default

    @property
    def keeps(self) -> list[float]:
        """Shares that were asked for, falling."""
        return sorted({keep for cells in self.table.values() for keep in cells}, reverse=True)

    @property
    def slots(self) -> int | None:
        """Of the cache at whose end decoding was timed, if it was."""
        return next((row["decode"]["slots"] for row in self.rows if "decode" in row), None)

    @property
    def rows(self) -> list[Row]:
        """All that were measured."""
        return [self.dense, *(row for cells in self.table.values() for row in cells.values())]

    def best(self, keep: float) -> tuple[str, Row]:
        """Label and row of the lowest perplexity at a share."""
        found = {label: cells[keep] for label, cells in self.table.items() if keep in cells}
        label = min(found, key=lambda name: found[name]["perplexity"])
        return label, found[label]


def sections(rows: Sequence[Row]) -> list[Section]:
    """The rows by what they can be compared with. Raises ValueError without a dense model's row."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(str([row[name] for name in RUN]), []).append(row)
    if not rows:
        raise ValueError("there are no rows yet: expected the file of a sweep that has begun")
    return [_section(group) for group in runs.values()]


def _section(rows: Sequence[Row]) -> Section:
    dense = [row for row in rows if row["settings"] is None]
    if not dense:
        raise ValueError(f"no row is of the uncompressed {rows[0]['model']}: sweep it again")
    low = [row for row in rows if row["settings"]]
    several = len({str(row["calibration"]) for row in low}) > 1
    constant = _constant(low)
    table: dict[str, dict[float, Row]] = {}
    refused = {}
    for row in low:
        name, keep = label(row, several, constant), row["settings"]["keep"]
        if "refused" in row:
            refused[f"{name}, keep {keep}"] = row["refused"]
        elif table.setdefault(name, {}).setdefault(keep, row)["calibration"] != row["calibration"]:
            raise ValueError(f"two texts are called {row['calibration']['source']}: rename one")
        else:
            table[name][keep] = row
    slots = {row["decode"]["slots"] for row in low if "decode" in row}
    if len(slots) > 1:
        told = " and ".join(map(str, sorted(slots)))
        raise ValueError(f"there are rows that decode at {told} slots: report their files apart")
    return Section(dense[-1], table, refused, constant)


def _constant(rows: Sequence[Row]) -> dict[str, Any]:
    told = [_told(row["settings"]) for row in rows]
    return {k: v for k, v in (told or [{}])[0].items() if all(t.get(k) == v for t in told)}


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not the default, beside those that every table shows."""
    shown = {k: v for k, v in settings.items() if k not in ("method", "keep")}
    return {k: v for k, v in shown.items() if v != DEFAULTS.get(k)}


def label(row: Row, calibration: bool = False, known: Collection[str] = ()) -> str:
    """The method of a row, and its settings that are not the default, nor `known`."""
    told = {k: v for k, v in _told(row["settings"]).items() if k not in known}
    parts = [row["settings"]["method"], *_listed(told)]
    if calibration:
        c = row["calibration"]
        parts.append(f"on {c['source']} ({c['samples']} x {c['seq_len']}, seed {c['seed']})")
    return ", ".join(parts)


def _listed(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_value(value)}" for name, value in settings.items()]


def _value(value: Any) -> str:
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def line(row: Row) -> str:
    """A row in one line."""
    name = "dense"
    if row["settings"]:
        name = f"{label(row)}, keep {row['settings']['keep']}, on {row['calibration']['source']}"
    if "refused" in row:
        return f"{name}: refused, {row['refused']}"
    speed = f"{_speed(row)} at decoding" if "decode" in row else ""
    kept = f"{row['kv_bytes_per_token']} KV bytes per token"
    return f"{name}: perplexity {_measured(row)}, {kept}{speed}"


def increase(row: Row) -> float:
    """Of the perplexity over the uncompressed model's, as a share of it."""
    return row["perplexity"] / row["dense_perplexity"] - 1


def _measured(row: Row) -> str:
    if "dense_perplexity" not in row:
        return f"{row['perplexity']:.2f}"
    return f"{row['perplexity']:.2f} ({100 * increase(row):+.1f} %)"


def _speed(row: Row) -> str:
    """Of decoding, if it was timed, to put behind the other numbers."""
    return f", {row['decode']['speedup']:.2f}x" if "decode" in row else ""


def cells(section: Section) -> list[list[str]]:
    """The table as text, its head first: perplexity, share of bytes realised, speed if timed."""
    head = ["method", *(f"keep {keep:g}" for keep in section.keeps)]
    body = []
    for name, found in section.table.items():
        measured = [
            f"{_measured(row)} at {row['kv_share']:.3f}{_speed(row)}" if row else ""
            for row in map(found.get, section.keeps)
        ]
        body.append([name, *measured])
    return [head, *body]


def caption(section: Section) -> str:
    """What was measured, and on what."""
    dense, tested = section.dense, section.dense["evaluation"]
    bases = {
        f"{row['sequences']} x {row['calibration']['seq_len']} tokens of "
        f"{row['calibration']['source']}"
        for row in section.rows
        if row["calibration"]
    }
    speed = (
        f"Last the speed of decoding one sequence at the end of {section.slots} slots, against the "
        "uncompressed model's in the same run, neither compiled. "
    )
    return (
        f"{dense['model']}, {dense['dtype']}: perplexity on {dense['tokens']} tokens of "
        f"{tested['text']} in windows of {tested['window']}, its increase over the uncompressed "
        f"model's {dense['perplexity']:.2f}, and the share of its "
        f"{dense['kv_bytes_per_token']} KV bytes per token that is kept. "
        + (speed if section.slots else "")
        + f"Calibrated on {' and on '.join(sorted(bases)) or 'nothing yet'}."
        + (f" All with {', '.join(_listed(section.constant))}." if section.constant else "")
    )


def markdown(found: Sequence[Section], figures: Mapping[str, str]) -> str:
    """The report: tables, figures (file by title), what was refused, and how it was made."""
    parts = ["# KV caches compressed: quality at equal bytes"]
    for section in found:
        rows = cells(section)
        for keep, column in zip(section.keeps, range(1, len(rows[0])), strict=True):
            best = list(section.table).index(section.best(keep)[0]) + 1
            rows[best][column] = f"**{rows[best][column]}**"
        rows.insert(1, ["---"] * len(rows[0]))
        parts += [caption(section), "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        parts += [f"Refused: {name}: {reason}" for name, reason in section.refused.items()]
    parts += [f"![{title}]({file})" for title, file in figures.items()]
    rows_of_all = [row for section in found for row in section.rows]
    commands = dict.fromkeys(row["command"] for row in rows_of_all)
    parts.append("\n".join(["```bash", *commands, "```"]))
    parts.append(f"({'; '.join(_provenance(rows_of_all))})")
    return "\n\n".join(parts) + "\n"


def _provenance(rows: Sequence[Row]) -> list[str]:
    versions = [", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows]
    about = ([row["device"] for row in rows], versions, [row["date"] for row in rows])
    return [" and ".join(sorted(set(values))) for values in about]


def as_json(section: Section) -> dict[str, Any]:
    """The table as JSON knows it."""
    names = ("perplexity", "kv_share", "kv_bytes_per_token")
    return {
        **{name: section.dense[name] for name in (*RUN, *names)},
        "table": [
            {"label": label, "keep": keep, **{name: row[name] for name in names}}
            | {"increase": increase(row), "decode": row.get("decode")}
            for label, found in section.table.items()
            for keep, row in found.items()
        ],
        "refused": section.refused,
    }
