"""From a checkpoint to a compressed checkpoint on disk, with what was measured on the way."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..zoo.compression.allocate import kv_bytes
from ..zoo.compression.basis import METHODS
from ..zoo.compression.compress import Settings, compress
from ..zoo.inference.checkpoint import Checkpoint
from ..zoo.inference.data import calibration_tokens, encode, hold_out, read_text
from ..zoo.measure.evaluate import Perplexity, perplexity
from ..zoo.models.model import Config, Model
from .export import export
from .plain import check_plain, export_plain


def compress_checkpoint(
    original: Checkpoint,
    out: Path,
    settings: Settings,
    calibration: str = "self",
    samples: int = 32,
    seq_len: int | None = None,
    text: Path | None = None,
    seed: int = 0,
    force: bool = False,
    shard_size: str = "5GB",
    plain: bool = False,
) -> dict[str, Any]:
    """Compress `original` into the folder `out`; return what its config.json says about it.

    calibration, samples, seq_len: see `data.calibration_tokens`; sequences are 1024 tokens long,
    or as long as the model can read, if not told. text: a file to measure
    perplexity on, before and after; by default an eighth of the calibration sequences is held out
    for that. For a method without data only what is measured on is read or sampled.
    plain: write an ordinary grouped-query checkpoint, see `plain.py`; raises ValueError where
    there is none.
    """
    model, tokenizer = original.model, original.tokenizer
    settings = settings.fit(model.config, model.device.type)  # before text is sampled or read
    if plain:
        check_plain(model.config, settings.method)
        if settings.rounded:
            raise ValueError("an ordinary checkpoint has no bits of its own: leave kv bits out")
    tokens, held_out = texts(original, settings, calibration, samples, seq_len, text, seed)
    result = compress(model, tokens, settings)
    models = {"dense": model, "compressed": result.model}
    record = {
        **about(original, result.settings, result.model.config, calibration, tokens, seed),
        "evaluation": evaluation(models, tokenizer, text, held_out, calibration),
        "layers": result.layers,
    }
    write = export_plain if plain else export
    write(out, result.model, original, record, force, shard_size)
    return record


def texts(
    original: Checkpoint,
    settings: Settings,
    calibration: str,
    samples: int,
    seq_len: int | None,
    text: Path | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) to calibrate on, and those held out to measure on, if there is no `text`."""
    model = original.model
    seq_len = seq_len or min(1024, model.config.max_position_embeddings)
    needed = METHODS[settings.method].data
    tokens = held_out = torch.empty(0, seq_len, dtype=torch.long, device=model.device)
    if needed or text is None:
        samples = samples if needed else max(2, samples // 8)  # no more than is measured on
        tokens = calibration_tokens(calibration, model, original.tokenizer, samples, seq_len, seed)
    if text is None:
        tokens, held_out = hold_out(tokens) if needed else (tokens[:0], tokens)
    return tokens, held_out


def about(
    original: Checkpoint,
    settings: Settings,
    low: Config,
    calibration: str,
    tokens: Tensor,
    seed: int,
) -> dict[str, Any]:
    """What a record says of how it was compressed."""
    return {
        "base_model": original.name,
        "base_license": original.licence,
        **settings._asdict(),
        "share": kv_bytes(low, torch.bfloat16)["kv_share"],  # as keep counts, whatever the dtype
        "calibration": calibrated_on(calibration, tokens) if len(tokens) else None,
        "seed": seed,
        "versions": {name: version(name) for name in ("eigenzoo", "torch", "transformers")},
    }


def calibrated_on(calibration: str, tokens: Tensor) -> dict[str, Any]:
    """What a record says of tokens (N, T) from a source."""
    sequences, length = tokens.shape
    source = _name(calibration)
    return {"source": source, "sequences": sequences, "seq_len": length, "tokens": tokens.numel()}


def evaluation(
    models: Mapping[str, Model],
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    held_out: Tensor,
    calibration: str,
) -> dict[str, Any]:
    """What a record says of perplexity: on a file, or else on sequences held out (N, T)."""
    longest = next(iter(models.values())).config.max_position_embeddings
    words, rows = windows(tokenizer, text, held_out, calibration, longest)
    found = {
        name: perplexity(model, rows.flatten(), rows.size(1)) for name, model in models.items()
    }
    return measured(words, rows, found)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    held_out: Tensor,
    calibration: str,
    longest: int,
) -> tuple[str, Tensor]:
    """What is measured on, in words and as windows of tokens (M, W). Arguments as in `evaluation`.

    longest: what the model can read.
    """
    if text is None:
        return f"held-out {_name(calibration)} text", held_out
    test = encode(tokenizer, read_text(text)).to(held_out.device)
    window = min(2048, longest, len(test))
    return text.name, test[: len(test) // window * window].view(-1, window)


def measured(words: str, rows: Tensor, found: Mapping[str, Perplexity]) -> dict[str, Any]:
    """What a record says of perplexities on windows."""
    tokens = next(iter(found.values())).tokens
    perplexities = {name: x.perplexity for name, x in found.items()}
    return {"text": words, "window": rows.size(1), "tokens": tokens, **perplexities}


def _name(calibration: str) -> str:
    """A source of calibration text without the folder that it lies in."""
    return calibration if calibration.startswith(("self", "hub:")) else Path(calibration).name
