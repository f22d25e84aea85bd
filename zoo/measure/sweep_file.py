"""The file that the rows of a sweep go to, and the rows that it holds already."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.jsonl import SWEEP, append, read_rows, resume
from ..utils.records import RUN, CalibrationText, SettingsRecord, SweepRow
from ..utils.resume import check_same

ELSE = "choose another file, or pass --force to start it again"


class SweepFile:
    """Rows of one run by settings and calibration."""

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any],
        decode: Mapping[str, Any] | None = None,
        force: bool = False,
    ):
        """Read the rows that are in the file already, if there is one.

        facts: what all rows depend on, see `provenance.work`. decode: how decoding is
        timed, the `slots` and `ops` of a row's `decode`; rows without that timing count as
        missing, and if it is None no row does. force: start the file again. Raises ValueError, and
        leaves the file alone, where its rows are damaged, depend on other facts, or decode
        otherwise.
        """
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} does not exist: make it, or choose another file")
        self.path, self.decode = path, decode
        if force and path.is_file():
            path.unlink()
        self._rows: dict[str, SweepRow] = {}
        for row in read_rows(path, SWEEP) if path.exists() else []:
            check_same(path, facts, _facts(row), ELSE)
            self._has_decoding(row)  # raises for another
            self._place(row)
        resume(path, SWEEP)

    def __len__(self) -> int:
        """How many rows need not be made."""
        return sum(self._has_decoding(row) for row in self._rows.values())

    def row(
        self, settings: SettingsRecord | None, calibration: CalibrationText | None
    ) -> SweepRow | None:
        """The row of this cell, None if it is still to be made."""
        row = self._rows.get(_identity(settings, calibration))
        return row if row and self._has_decoding(row) else None

    def add(self, row: SweepRow) -> SweepRow:
        """Append the row to the file; returns it as JSON has it."""
        row = append(self.path, row)
        self._place(row)
        return row

    def _place(self, row: SweepRow) -> None:
        """Note the row. Raises ValueError if there is one, unless only this one has decoding."""
        cell = _identity(row["settings"], row["calibration"])
        before = self._rows.get(cell)
        if before and not ("decode" in row and "decode" not in before):
            raise ValueError(
                f"{self.path} holds two rows of {cell}: delete the lines of one, {ELSE}"
            )
        self._rows[cell] = row

    def _has_decoding(self, row: SweepRow) -> bool:
        """Whether the row has the decoding asked for. Raises ValueError if it has another."""
        if self.decode is None or row["settings"] is None or "refused" in row:
            return True
        if "decode" not in row:
            return False
        timed: Mapping[str, Any] = row["decode"]
        check_same(self.path, self.decode, {name: timed.get(name) for name in self.decode}, ELSE)
        return True


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row depends on, as `provenance.work` returns it."""
    given = {name: row.get(name) for name in (*RUN, "tokenizer", "code")}
    return {**given, "device": row.get("place"), **row["versions"]}


def _identity(settings: SettingsRecord | None, calibration: CalibrationText | None) -> str:
    """A name for the cell of a row."""
    return json.dumps([settings, calibration], sort_keys=True)
