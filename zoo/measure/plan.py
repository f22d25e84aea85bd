"""What a model needs, told from its config: bytes, sequences that fit, and hours to compress."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from ..compression.settings import Settings
from ..inference.checkpoint import locate, native_config, read_config
from ..inference.quantized import quantization
from ..models.config import Config, kept_slots, kv_bytes
from ..models.experts import ExpertsConfig
from ..models.families import new_model
from .shapes import SHAPES, shaped

SAMPLES, LENGTH = 32, 1024  # that `compress` reads by default
# Seconds that `compress --stream` takes for each parameter of the layers and each token to
# calibrate on, in bfloat16 on 2 cores of an AMD EPYC with AVX-512. Measured in two shapes of
# Llama, see docs/results/large-models.md; they differ by less than 1 %.
STREAM_SECONDS = 5.0e-11
TIMED = f"""\
hours: an estimate for `compress --stream` in bfloat16 on 2 cores of an AMD EPYC
with AVX-512, with {SAMPLES} x {LENGTH} tokens: {STREAM_SECONDS:.1e} seconds times tokens times the
parameters of the layers, as measured in the shapes of Llama-2-7b (8 x 512 tokens)
and Llama-3.1-70b (4 x 512) with latents of 16 bits. On GPUs: not estimated."""
UNTIMED = """\
not estimated: mixtures of experts, and checkpoints that are compressed, quantized or
in GGUF files. None of them was timed."""


class CachePlan(TypedDict):
    """A cache. keep: its share of the KV bytes; None: uncompressed.

    sequences: by context how many fit beside the weights; None where the weights do not fit, or
    the model has fewer positions.
    """

    keep: float | None
    kv_bytes_per_token: int
    sequences: dict[str, int | None]


class Plan(TypedDict):
    """What `plan` tells of a model. Bytes are of weights and cache in `dtype`, and of memory.

    windows: whether layers have such, so that they keep fewer slots than a long text has.
    compress_hours: see `STREAM_SECONDS`; None: not estimated.
    """

    model: str
    dtype: str
    parameters: int
    weight_bytes: int
    memory_bytes: int
    max_position_embeddings: int
    windows: bool
    caches: list[CachePlan]
    compress_hours: float | None


def plans(
    names: Iterable[str],
    memory: int,
    contexts: Sequence[int],
    keeps: Sequence[float],
    dtype: torch.dtype,
    revision: str | None = None,
) -> list[Plan]:
    """What models need. No weights are read.

    - names: of published shapes in `SHAPES`, in any case, or of checkpoints, see `locate`.
    - memory: bytes for weights and caches together.
    - contexts: tokens of a sequence.
    - keeps: shares of the KV bytes of an uncompressed cache of 16 bits a number. A checkpoint that
      is compressed has its own instead.
    - dtype: of the weights, and of an uncompressed cache.

    Raises ValueError for names and shares that are none, and if the weights of no model fit.
    """
    for keep in keeps:
        Settings(keep=keep).check()
    made = [_plan(name, memory, contexts, keeps, dtype, revision) for name in names]
    if not any(fits(plan) for plan in made):
        needs = " and ".join(f"{x['model']} {_gb(x['weight_bytes'])}" for x in made)
        raise ValueError(
            f"memory is {_gb(memory)}, and in {made[0]['dtype']} the weights alone take: {needs}. "
            "Give --memory more than that, such as that of several devices together"
        )
    return made


def fits(plan: Plan) -> bool:
    """Whether the weights fit the memory."""
    return plan["weight_bytes"] <= plan["memory_bytes"]


def hours(config: Config, tokens: int) -> float | None:
    """An estimate of the hours that `compress --stream` takes; None: there is no basis for one."""
    if isinstance(config, ExpertsConfig) or not config.uncompressed:
        return None
    return _parameters(config)[1] * tokens * STREAM_SECONDS / 3600


def _plan(
    name: str,
    memory: int,
    contexts: Sequence[int],
    keeps: Sequence[float],
    dtype: torch.dtype,
    revision: str | None,
) -> Plan:
    config, streamed = _read(name, revision)
    parameters, _ = _parameters(config)
    weights, longest = parameters * dtype.itemsize, config.learned_positions
    made: Plan = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters,
        "weight_bytes": weights,
        "memory_bytes": memory,
        "max_position_embeddings": config.max_position_embeddings,
        "windows": any(getattr(config, "windows", ())),
        "caches": [],
        "compress_hours": None,
    }
    slots = {n: sum(kept_slots(config, n)) / config.num_hidden_layers for n in contexts}
    for keep, size in _caches(config, keeps, dtype):
        counts = {  # rings hold fewer slots than the context
            str(context): int((memory - weights) // (size * slots[context]))
            if fits(made) and not 0 < longest < context
            else None
            for context in contexts
        }
        made["caches"].append({"keep": keep, "kv_bytes_per_token": size, "sequences": counts})
    if streamed:
        made["compress_hours"] = hours(config, SAMPLES * min(LENGTH, longest or LENGTH))
    return made


def _read(name: str, revision: str | None) -> tuple[Config, bool]:
    """The config of a shape or a checkpoint, and whether `--stream` was timed for such files."""
    shape = name.lower()
    if shape in SHAPES and not Path(name).exists():
        return native_config(shaped(shape).to_dict()), True
    try:
        path = locate(name, revision, ["config.json"])
    except ValueError as error:
        if "/" in name:
            raise
        raise ValueError(f"{error}, or one of the shapes {', '.join(SHAPES)}") from error
    raw = read_config(path)
    return native_config(raw), path.suffix != ".gguf" and not quantization(raw)


def _parameters(config: Config) -> tuple[int, int]:
    """The number of parameters, tied ones once, and of those in layers."""
    with torch.device("meta"):
        model = new_model(config)
    inside = sum(p.numel() for layer in model.layers for p in layer.parameters())
    return sum(p.numel() for p in model.parameters()), inside


def _caches(
    config: Config, keeps: Sequence[float], dtype: torch.dtype
) -> list[tuple[float | None, int]]:
    """The share of each cache, and its bytes per token."""
    pairs = (config.latents(layer) for layer in range(config.num_hidden_layers))
    own, facts = sum(x.nbytes(dtype) for pair in pairs for x in pair), kv_bytes(config)
    if not config.uncompressed:
        return [(facts["kv_share"], own)]
    return [(None, own), *((k, int(k * facts["kv_bytes_per_token_dense"])) for k in keeps)]


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def plan_cells(made: Sequence[Plan]) -> list[list[str]]:
    """The table of plans: its head, and a line for each cache of each model."""
    contexts = made[0]["caches"][0]["sequences"]
    table = [["model", "GB", "keep", "KV bytes/token", *(f"x {n}" for n in contexts), "hours"]]
    for plan in made:
        expected = plan["compress_hours"]
        first = [plan["model"], f"{plan['weight_bytes'] / 1e9:.2f}"]
        last = "not estimated" if expected is None else f"{expected:.2g}"
        for cache in plan["caches"]:
            keep = "dense" if cache["keep"] is None else f"{cache['keep']:.3g}"
            counts = [_count(plan, *item) for item in cache["sequences"].items()]
            table.append([*first, keep, f"{cache['kv_bytes_per_token']:,}", *counts, last])
            first, last = ["", ""], ""
    return table


def _count(plan: Plan, context: str, count: int | None) -> str:
    """A number of sequences, with a star where the model was not made for such long ones."""
    if count is None:
        return "-"
    return f"{count:,}{'*' * (int(context) > plan['max_position_embeddings'])}"


def plan_caption(made: Sequence[Plan]) -> list[str]:
    """What the table of plans means, and what does not fit, line by line."""
    context = next(iter(made[0]["caches"][0]["sequences"]))
    lines = [
        f"GB: weights of the model as it is. x {context}: how many sequences of so many tokens fit",
        f"{_gb(made[0]['memory_bytes'])} beside the weights, with nothing else in memory.",
    ]
    if any(plan["windows"] for plan in made):
        lines.append("Layers with windows keep little more than these: KV bytes/token counts all.")
    if any(cell.endswith("*") for line in plan_cells(made) for cell in line[4:]):
        lines.append("*: longer than the positions in the config of the model.")
    for plan in made:
        if not fits(plan):
            lines.append(f"-: the weights of {plan['model']} do not fit.")
        elif None in plan["caches"][0]["sequences"].values():
            most = plan["max_position_embeddings"]
            lines.append(f"-: {plan['model']} has learned positions for {most} tokens.")
    lines += TIMED.splitlines()
    untimed = any(plan["compress_hours"] is None for plan in made)
    return [*lines, *UNTIMED.splitlines()] if untimed else lines
