"""What eigenzoo writes as JSON and reads again: rows of results, and records of checkpoints.

A field is `NotRequired` where it depends on the options of the command, or where files of earlier
versions lack it. What is read back has lists for sequences.
"""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, final

Versions = dict[str, str]  # by package
TaskRow = dict[str, Any]  # lm-evaluation-harness names the metrics: METRIC,FILTER


class KvBytes(TypedDict):
    """Size of the cache beside 16 bits, as `models.config.kv_bytes` counts it."""

    kv_bytes_per_token: int
    kv_bytes_per_token_dense: int
    kv_share: float


class SettingsRecord(TypedDict):
    """`compression.settings.Settings`."""

    method: str
    keep: float
    error_budget: float | None
    heads_per_latent: Sequence[int] | None
    rank_multiple: int
    latent: str
    keys: NotRequired[str]
    anchor_block: NotRequired[int | None]
    keys_reason: NotRequired[str | None]
    budget: NotRequired[str]
    damping: NotRequired[float | None]
    refit: NotRequired[Sequence[str] | None]
    rank_pairs: NotRequired[int | None]
    kv_bits: NotRequired[Sequence[int]]


class LayerRecord(TypedDict):
    """Ranks of one layer, and the share of the method's own error that they leave.

    Segments are those of the latents, as `bits.parse_segments` reads them; empty: 16 bits. The
    shares are of what is dropped, and do not count rounding.
    v_error is missing where keys and values share a latent. threshold, output_error: only where
    the ranks were searched for.
    """

    k_rank: int
    v_rank: int
    k_error: float
    v_error: NotRequired[float]
    k_bits: NotRequired[int]
    v_bits: NotRequired[int]
    k_segments: NotRequired[str]
    v_segments: NotRequired[str]
    threshold: NotRequired[float]
    output_error: NotRequired[float]


class BenchCell(TypedDict):
    """Which model decoded, and under what circumstances."""

    model: str
    context: int
    batch: int
    slots: int
    dtype: str
    threads: int
    device: str  # cpu or cuda


class BenchExtra(TypedDict, total=False):
    """What only llama.cpp's rows have. tool: which program, of which version."""

    prompt_tokens_per_second: float  # of a prompt that fills the cache up to the steps
    cache_type: str  # of ggml
    tool: str


class BenchFigures(BenchExtra):
    """What `measure.bench.bench` measures; speedup and bound need a first model that decoded."""

    tokens_per_second: float
    seconds_per_step: float
    floor_seconds: float
    weight_bytes_read: int
    kv_bytes_read: int
    kv_read_share: float
    bandwidth: float  # bytes per second
    peak_memory: int  # bytes
    start_seconds: float
    speedup: NotRequired[float]
    bound: NotRequired[float]


class BenchOrigin(TypedDict):
    """How the rows of one `eigenzoo bench` were made. contestants, code: fingerprints."""

    ops: str
    compiled: bool
    command: str
    weights: NotRequired[str]
    processor: NotRequired[str]
    versions: NotRequired[Versions]
    contestants: NotRequired[str]
    code: NotRequired[str]


@final
class Timed(BenchCell, BenchFigures):
    """A model that decoded."""


@final
class Failed(BenchCell):
    """A model that did not, and why."""

    failed: str


@final
class TimedRow(BenchCell, BenchFigures, BenchOrigin):
    """The row of a model that decoded."""


@final
class FailedRow(BenchCell, BenchOrigin):
    """The row of a model that did not decode, and why."""

    failed: str


BenchResult = Timed | Failed
BenchRow = TimedRow | FailedRow


class PositionRecord(TypedDict):
    """`measure.probe.Bucket`."""

    start: int
    stop: int
    tokens: int
    loss: float
    perplexity: float


class RetrievalRecord(TypedDict):
    """`measure.probe.Retrieval`."""

    length: int
    depth: float
    facts: int
    right: float
    loglikelihood: float


class RulerScore(TypedDict):
    """Mean share of the expected strings that answers name; no error of a single sample."""

    recall: float
    standard_error: float | None


class RulerRecord(TypedDict):
    """What `measure.ruler` measures at one length, of every task and of their mean.

    samples: questions of each task. chat: whether they were put into a chat template.
    """

    length: int
    samples: int
    chat: bool
    tasks: dict[str, RulerScore]
    mean: RulerScore


class TaskSettings(TypedDict):
    """How `eigenzoo evaluate --tasks` ran: what its options changed."""

    num_fewshot: int | None
    apply_chat_template: bool
    gen_kwargs: dict[str, Any] | None
    limit: int | None


class PerplexityRecord(TypedDict):
    """`inference.perplexity.Perplexity`: over `tokens` predicted tokens."""

    perplexity: float
    tokens: int


class DomainRecord(PerplexityRecord):
    """Perplexity on one of several texts. increase: over the dense model's, as a share of it."""

    text: str
    digest: str
    dense_perplexity: NotRequired[float]
    increase: NotRequired[float]


class MeanWorst(TypedDict):
    """Of a number that is lower for better models, over several texts."""

    mean: float
    worst: float


class DomainsRecord(TypedDict):
    """Perplexity on several texts; its increase where the uncompressed model was measured too."""

    texts: list[DomainRecord]
    perplexity: MeanWorst
    increase: NotRequired[MeanWorst]


class ComparedDomain(PerplexityRecord):
    """`DomainRecord` where the uncompressed model was measured too."""

    text: str
    digest: str
    dense_perplexity: float
    increase: float


class ComparedDomains(TypedDict):
    """`DomainsRecord` where the uncompressed model was measured too."""

    texts: list[ComparedDomain]
    perplexity: MeanWorst
    increase: MeanWorst


class EvaluationResult(KvBytes):
    """What `eigenzoo evaluate` measures: only what its options ask for.

    original: the uncompressed model that `domains` compares with. sliding_window: how many of the
    last tokens, and of the first, the cache kept, if not all. keep_tokens: the most tokens of a
    prompt that retrieval and ruler kept in the cache, if not all.
    """

    model: str
    original: NotRequired[str]
    sliding_window: NotRequired[list[int]]
    text: NotRequired[str]
    window: NotRequired[int]
    perplexity: NotRequired[float]
    tokens: NotRequired[int]
    domains: NotRequired[DomainsRecord]
    by_position: NotRequired[list[PositionRecord]]
    keep_tokens: NotRequired[int]
    retrieval: NotRequired[list[RetrievalRecord]]
    ruler: NotRequired[list[RulerRecord]]
    tasks: NotRequired[dict[str, TaskRow]]
    task_settings: NotRequired[TaskSettings]


@final
class EvaluationRow(EvaluationResult):
    """What `eigenzoo evaluate --json` prints."""

    processor: str
    versions: Versions
    command: str


class TextRecord(TypedDict):
    """The text that a checkpoint was calibrated on, or refined with."""

    source: str
    sequences: int
    seq_len: int
    tokens: int


class QualityRecord(TypedDict):
    """Perplexity before and after, over the tokens of all texts.

    before: of the model that a refinement began with. domains: where there are several texts.
    """

    text: str
    window: int
    tokens: int
    dense: float
    compressed: float
    before: NotRequired[float]
    domains: NotRequired[ComparedDomains]


class RefineStep(TypedDict):
    """A measurement of a refinement. kl: None before the first step; held_out: on other text."""

    step: int
    kl: float | None  # nats per token
    held_out: float  # nats per token


class RefineRecord(TypedDict):
    """One refinement: `compression.schedule.RefineSettings`, and what came of it."""

    steps: int
    batch: int
    lr: float
    warmup: float
    weight_decay: float
    clip: float
    every: int
    patience: int
    minutes: float | None
    precision: str
    recompute: bool
    seed: int
    calibration: TextRecord
    kl_before: float
    kl_after: float
    perplexity_before: float
    perplexity_after: float
    best_step: int
    stopped: str
    history: list[RefineStep]


class Measurements(TypedDict, total=False):
    """What `eigenzoo card` has added. figures: names of files."""

    evaluations: list[EvaluationRow]
    speed: list[TimedRow]
    figures: list[str]


class CompressionOrigin(SettingsRecord):
    """What a checkpoint was made from, and how."""

    base_model: str
    base_license: NotRequired[str | None]
    share: float  # of the KV bytes of a 16-bit cache
    calibration: TextRecord | None
    calibration_digests: NotRequired[Sequence[str]]  # of files: nothing is measured on them
    seed: int
    versions: Versions


class CompressionRecord(CompressionOrigin):
    """All that the config.json of a checkpoint says of its compression."""

    evaluation: QualityRecord
    layers: list[LayerRecord]
    refined: NotRequired[list[RefineRecord]]
    measured: NotRequired[Measurements]


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
    """Where a row comes from. tokenizer, code: fingerprints; place: cpu or cuda."""

    versions: Versions
    tokenizer: NotRequired[str]
    code: NotRequired[str]
    place: NotRequired[str]
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
    ops: NotRequired[str]
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
    """What a sweep measures of a model, its perplexity over the tokens of all texts.

    full_ranks: of keys and of values. domains: where there are several texts.
    """

    k_ranks: Sequence[int]
    v_ranks: Sequence[int]
    full_ranks: Sequence[int]
    seconds: Seconds
    domains: NotRequired[DomainsRecord]


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
