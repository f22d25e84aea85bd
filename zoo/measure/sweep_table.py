"""Rows of sweeps as a table: a line for each method, a column for each share of the KV bytes."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..compression.settings import Settings
from ..utils.records import RUN, CompressedRow, DenseRow, RefusedRow, SettingsRecord, SweepRow

# as rows have them; a sweep compares ranks alone unless it is asked for bits
DEFAULTS = json.loads(json.dumps(Settings._field_defaults)) | {"kv_bits": [16]}
Cells = dict[float, CompressedRow]  # by the share to keep


class Section(NamedTuple):
    """Rows that can be compared: of one model, dtype and evaluation."""

    dense: DenseRow
    table: dict[str, Cells]  # by label
    refused: dict[str, str]  # the reason by label and share
    constant: dict[str, Any]  # settings that all rows share and that are not the default

    @property
    def keeps(self) -> list[float]:
        """Shares that were asked for, in descending order."""
        return sorted({keep for cells in self.table.values() for keep in cells}, reverse=True)

    @property
    def slots(self) -> int | None:
        """Of the cache at whose end decoding was timed; None if it was not."""
        return next((row["decode"]["slots"] for row in self.compressed if "decode" in row), None)

    @property
    def compressed(self) -> list[CompressedRow]:
        """All rows of the table."""
        return [row for cells in self.table.values() for row in cells.values()]

    @property
    def rows(self) -> list[DenseRow | CompressedRow]:
        """All that were measured."""
        return [self.dense, *self.compressed]

    def best(self, keep: float) -> tuple[str, CompressedRow]:
        """Label and row of the lowest perplexity at a share."""
        column = {label: cells[keep] for label, cells in self.table.items() if keep in cells}
        return min(column.items(), key=lambda item: item[1]["perplexity"])


def sections(rows: Sequence[SweepRow]) -> list[Section]:
    """The rows in groups that can be compared. Raises ValueError without a dense model's row."""
    runs: dict[str, list[SweepRow]] = {}
    for row in rows:
        of_run: Mapping[str, object] = row
        runs.setdefault(str([of_run[name] for name in RUN]), []).append(row)
    if not rows:
        raise ValueError("there are no rows yet: expected the file of a sweep that has begun")
    return [_section(group) for group in runs.values()]


def _section(rows: Sequence[SweepRow]) -> Section:
    dense = [row for row in rows if row["settings"] is None]
    if not dense:
        raise ValueError(f"no row is of the uncompressed {rows[0]['model']}: sweep it again")
    low = [row for row in rows if row["settings"] is not None]
    several = len({str(row["calibration"]) for row in low}) > 1
    constant = _constant([row["settings"] for row in low])
    table: dict[str, Cells] = {}
    refused = {}
    for row in low:
        name, keep = label(row, several, constant), row["settings"]["keep"]
        if "refused" in row:
            refused[f"{name}, keep {keep}"] = row["refused"]
        elif table.setdefault(name, {}).setdefault(keep, row)["calibration"] != row["calibration"]:
            raise ValueError(f"two texts are called {row['calibration']['source']}: rename one")
        else:
            table[name][keep] = row
    timed = [row for row in low if "refused" not in row and "decode" in row]
    slots = {row["decode"]["slots"] for row in timed}
    if len(slots) > 1:
        listed = " and ".join(map(str, sorted(slots)))
        raise ValueError(f"there are rows that decode at {listed} slots: report their files apart")
    return Section(dense[-1], table, refused, constant)


def _constant(settings: Sequence[SettingsRecord]) -> dict[str, Any]:
    """Settings that are not the default and the same in all rows."""
    shown = [_not_default(s) for s in settings]
    return {k: v for k, v in (shown or [{}])[0].items() if all(s.get(k) == v for s in shown)}


def _not_default(settings: SettingsRecord) -> dict[str, Any]:
    """Settings that are not the default, without the two that every table shows."""
    others = {k: v for k, v in settings.items() if k not in ("method", "keep")}
    return {k: v for k, v in others.items() if v != DEFAULTS.get(k)}


def label(
    row: CompressedRow | RefusedRow, calibration: bool = False, known: Collection[str] = ()
) -> str:
    """The method of a row, and its settings that are neither the default nor in `known`."""
    shown = {k: v for k, v in _not_default(row["settings"]).items() if k not in known}
    parts = [row["settings"]["method"], *listed(shown)]
    if calibration:
        c = row["calibration"]
        parts.append(f"on {c['source']} ({c['samples']} x {c['seq_len']}, seed {c['seed']})")
    return ", ".join(parts)


def listed(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words."""
    return [f"{name.replace('_', ' ')} {_value(value)}" for name, value in settings.items()]


def _value(value: Any) -> str:
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def line(row: SweepRow) -> str:
    """A row in one line."""
    if row["settings"] is None:
        return f"dense: perplexity {row['perplexity']:.2f}, {_kept(row)}"
    name = f"{label(row)}, keep {row['settings']['keep']}, on {row['calibration']['source']}"
    if "refused" in row:
        return f"{name}: refused, {row['refused']}"
    speed = f"{_speed(row)} at decoding" if "decode" in row else ""
    return f"{name}: perplexity {_quality(row)}, {_kept(row)}{speed}"


def increase(row: CompressedRow) -> float:
    """Of the perplexity over the uncompressed model's, as a share of it."""
    return row["perplexity"] / row["dense_perplexity"] - 1


def _kept(row: DenseRow | CompressedRow) -> str:
    return f"{row['kv_bytes_per_token']} KV bytes per token"


def _quality(row: CompressedRow) -> str:
    return f"{row['perplexity']:.2f} ({100 * increase(row):+.1f} %)"


def _speed(row: CompressedRow) -> str:
    """Of decoding, to follow the other numbers; empty if it was not timed."""
    return f", {row['decode']['speedup']:.2f}x" if "decode" in row else ""


def cells(section: Section) -> list[list[str]]:
    """The table as text, its head first: perplexity, share of the bytes, speed if it was timed."""
    head = ["method", *(f"keep {keep:g}" for keep in section.keeps)]
    body = []
    for name, by_keep in section.table.items():
        measured = [
            f"{_quality(row)} at {row['kv_share']:.3f}{_speed(row)}" if row else ""
            for row in map(by_keep.get, section.keeps)
        ]
        body.append([name, *measured])
    return [head, *body]


def caption(section: Section) -> str:
    """What was measured, and on what."""
    dense, tested = section.dense, section.dense["evaluation"]
    texts = {
        f"{row['sequences']} x {row['calibration']['seq_len']} tokens of "
        f"{row['calibration']['source']}"
        for row in section.compressed
    }
    speed = (
        f"Last the speed of decoding one sequence at the end of {section.slots} slots, against the "
        "uncompressed model's in the same run, neither compiled. "
    )
    return (
        f"{dense['model']}, {dense['dtype']}: perplexity on {dense['tokens']} tokens of "
        f"{tested['text']} in windows of {tested['window']}, its increase over the uncompressed "
        f"model's {dense['perplexity']:.2f}, and the share of its "
        f"{dense['kv_bytes_per_token']} KV bytes per token, at 16 bits a number, that is kept. "
        + (speed if section.slots else "")
        + f"Calibrated on {' and on '.join(sorted(texts)) or 'nothing yet'}."
        + (f" All with {', '.join(listed(section.constant))}." if section.constant else "")
    )


def as_json(section: Section) -> dict[str, Any]:
    """The table, ready for JSON."""
    names = ("perplexity", "kv_share", "kv_bytes_per_token")
    dense: Mapping[str, object] = section.dense
    body = []
    for label, by_keep in section.table.items():
        for keep, row in by_keep.items():
            numbers: Mapping[str, object] = row
            cell = {"label": label, "keep": keep, **{name: numbers[name] for name in names}}
            body.append(cell | {"increase": increase(row), "decode": row.get("decode")})
    return {
        **{name: dense[name] for name in (*RUN, *names)},
        "table": body,
        "refused": section.refused,
    }
