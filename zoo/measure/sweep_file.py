"""The file that the rows of a sweep go to, and the rows that it holds already."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..compression.settings import Settings
from ..utils.jsonl import SWEEP, append, read_rows, resume
from ..utils.records import RUN, CalibrationText, SettingsRecord, SweepRow, SweepRun


class SweepFile:
    """Rows of one run by settings and calibration."""

    def __init__(self, path: Path, run: SweepRun, decode: int | None = None, force: bool = False):
        """Read the rows that are in the file already, if there is one.

        decode: the slots at which decoding is timed; rows without that timing count as missing,
        and if it is None no row does. force: start the file again. Raises ValueError, and leaves
        the file alone, where its rows are of another run, or decode at other slots.
        """
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} does not exist: make it, or choose another file")
        self.path, self.decode = path, decode
        if force and path.is_file():
            path.unlink()
        rows = read_rows(path, SWEEP) if path.exists() else []
        for row in rows:
            self._check(row, run)
        self._rows = {
            _identity(row["settings"], row["calibration"]): row
            for row in rows
            if self._has_decoding(row)
        }
        resume(path, SWEEP)

    def __len__(self) -> int:
        """How many rows need not be made."""
        return len(self._rows)

    def row(
        self, settings: SettingsRecord | None, calibration: CalibrationText | None
    ) -> SweepRow | None:
        """The row of this cell, None if it is still to be made."""
        return self._rows.get(_identity(settings, calibration))

    def add(self, row: SweepRow) -> SweepRow:
        """Append the row to the file; returns it as JSON has it."""
        row = append(self.path, row)
        self._rows[_identity(row["settings"], row["calibration"])] = row
        return row

    def _check(self, row: Mapping[str, object], run: Mapping[str, object]) -> None:
        for name in RUN:
            if row[name] != run[name]:
                raise ValueError(
                    f"{self.path} holds rows with {name} {row[name]}, this run has {run[name]}: "
                    "choose another file, or pass --force to start it again"
                )

    def _has_decoding(self, row: SweepRow) -> bool:
        """Whether the row has the decoding asked for. Raises ValueError if it has another."""
        if self.decode is None or row["settings"] is None or "refused" in row:
            return True
        slots = row["decode"]["slots"] if "decode" in row else self.decode
        if slots != self.decode:
            raise ValueError(
                f"{self.path} holds rows that decode at {slots} slots, this run at {self.decode}: "
                "choose another file, or pass --force to start it again"
            )
        return "decode" in row


def _identity(settings: SettingsRecord | None, calibration: CalibrationText | None) -> str:
    """A name for the cell of a row. Settings that an older row lacks have the default."""
    full = None if settings is None else {**Settings._field_defaults, **settings}
    return json.dumps([full, calibration], sort_keys=True)
