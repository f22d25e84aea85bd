"""Add measurements to a compressed checkpoint: to its config.json, and to its card."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..zoo.inference.checkpoint import native_config, read_config, recorded
from ..zoo.models.config import Config, kv_bytes
from ..zoo.utils.jsonl import MEASURED, read_rows
from ..zoo.utils.records import EvaluationRow, Measurements, TimedRow
from ..zoo.utils.replace import replacing
from .card import FIGURES, card
from .links import check_links


def add(folder: Path, files: Sequence[Path]) -> str:
    """Write measurements into a checkpoint's config.json, and its card again; returns the card.

    files: what `eigenzoo evaluate --json` printed, of the checkpoint or of its original, and
    bench.jsonl as `eigenzoo bench --out` wrote it, whose plots are copied. Earlier measurements of
    the same kind are replaced. Raises ValueError for a file of anything else, for a folder that is
    no compressed checkpoint, for an evaluation of another model, and for links out of a folder.
    """
    check_links(folder)
    raw = read_config(folder)
    compression = recorded(raw, folder)
    plots = [plot for file in files if file.suffix == ".jsonl" for plot in _plots(file.parent)]
    config = native_config(raw)
    measured = _measured(files, plots)
    _check_model(folder, config, measured.get("evaluations", []))
    compression["measured"] = {**compression.get("measured", {}), **measured}
    text = card(config, compression)
    for plot in plots:
        (folder / FIGURES).mkdir(exist_ok=True)
        with replacing(folder / FIGURES / plot.name) as part:
            shutil.copyfile(plot, part)
    contents = {"config.json": json.dumps(raw, indent=2) + "\n", "README.md": text}
    for name, content in contents.items():
        with replacing(folder / name) as part:
            part.write_text(content)
    return text


def _check_model(folder: Path, config: Config, rows: Sequence[EvaluationRow]) -> None:
    """Raise ValueError for an evaluation whose uncompressed cache is not that of the checkpoint."""
    dense = kv_bytes(config)["kv_bytes_per_token_dense"]
    for row in rows:
        if row["kv_bytes_per_token_dense"] != dense:
            raise ValueError(
                f"{row['model']} has {row['kv_bytes_per_token_dense']} KV bytes per token before "
                f"compression, and {folder} has {dense}: evaluate the same model, or do it again "
                "with this version"
            )


def _plots(folder: Path) -> list[Path]:
    """The plots beside a file, to be copied. Raises ValueError for one that lies elsewhere."""
    check_links(folder, "*.png")
    plots = (path for path in folder.glob("*.png") if not path.name.startswith("."))
    return sorted(path for path in plots if path.is_file())


def _measured(files: Sequence[Path], plots: Sequence[Path]) -> Measurements:
    """The kinds of measurement that there are in the files."""
    evaluations: list[EvaluationRow] = []
    speed: list[TimedRow] = []
    for file in files:
        rows = read_rows(file, MEASURED)
        if not rows:
            raise ValueError(f"{file} has no whole row: expected {MEASURED.expected}")
        evaluated = [row for row in rows if "kv_share" in row]
        if any("perplexity" in row and not {"text", "tokens"} <= row.keys() for row in evaluated):
            raise ValueError(f"{file} has a perplexity without text or tokens: evaluate again")
        if any("sliding_window" in row for row in evaluated):
            raise ValueError(
                f"{file} was measured with --sliding-window: expected a cache that keeps all tokens"
            )
        evaluations += evaluated
        speed += [row for row in rows if "kv_share" not in row and "failed" not in row]
    measured: Measurements = {}
    if evaluations:
        measured["evaluations"] = evaluations
    if speed:
        measured["speed"] = speed
    if plots:
        measured["figures"] = [plot.name for plot in plots]
    return measured
