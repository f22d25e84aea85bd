"""Rows of a sweep: of the dense model, of settings, and of settings that do not fit the model."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, final

from .records import KvBytes, LayerRecord, SettingsRecord, Versions


class PerplexityRecord(TypedDict):
    """`inference.perplexity.Perplexity`: over `tokens` predicted tokens."""

    perplexity: float
    tokens: int


class CalibrationText(TypedDict):
    """What a sweep calibrates on: `measure.calibrator.Calibration`, a file by name and digest."""

    source: str
    samples: int
    seq_len: int
    seed: int
    digest: str | None


class EvaluationText(TypedDict):
    """What a sweep measures perplexity on: `measure.evaluate.Evaluation`, with a digest."""

    text: str
    window: int
    windows: int
    digest: str


class SweepRun(TypedDict):
    """What all rows of one file of a sweep have in common; only such rows can be compared."""

    model: str
    weights: str  # a fingerprint
    dtype: str
    evaluation: EvaluationText


RUN = tuple(SweepRun.__annotations__)


class SweepOrigin(SweepRun):
    """Where a row comes from."""

    versions: Versions
    command: str
    device: str
    date: str  # ISO 8601


class Seconds(TypedDict, total=False):
    """Seconds that the steps of a row took: of each step that it needed."""

    text: float
    calibrate: float
    compress: float
    evaluate: float
    decode: float


class DecodeRecord(TypedDict):
    """Decoding one sequence at the end of a cache of `slots`; speedup: over the dense model."""

    slots: int
    seconds_per_step: float
    speedup: float


class Curve(TypedDict):
    """left[layer][i]: the share of a layer's error that `ranks[i]` leaves."""

    ranks: list[int]
    left: list[list[float]]


class Curves(TypedDict):
    """Of keys and of values; `k` alone where they share a latent."""

    k: Curve
    v: NotRequired[Curve]


class DenseResult(PerplexityRecord, KvBytes):
    """What a sweep measures of a model. full_ranks: of keys and of values."""

    k_ranks: Sequence[int]
    v_ranks: Sequence[int]
    full_ranks: Sequence[int]
    seconds: Seconds


class CompressedResult(DenseResult):
    """What a sweep measures of a compressed model. fitted: the settings with choices filled in."""

    decode: NotRequired[DecodeRecord]
    dense_perplexity: float
    sequences: int
    fitted: SettingsRecord
    layers: list[LayerRecord]
    curves: Curves


class Refusal(TypedDict):
    """Why settings do not fit the model."""

    refused: str


@final
class DenseRow(SweepOrigin, DenseResult):
    """The row of the uncompressed model."""

    settings: None
    calibration: None


@final
class CompressedRow(SweepOrigin, CompressedResult):
    """The row of settings on a calibration."""

    settings: SettingsRecord
    calibration: CalibrationText


@final
class RefusedRow(SweepOrigin, Refusal):
    """The row of settings that do not fit the model."""

    settings: SettingsRecord
    calibration: CalibrationText


SweepRow = DenseRow | CompressedRow | RefusedRow
