"""Texts and measurements of a compression, and the record of it in config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..inference.checkpoint import Checkpoint
from ..inference.data import calibration_tokens, encode, hold_out, read_text
from ..inference.perplexity import Perplexity, perplexity
from ..models.config import Config, kv_bytes
from ..models.model import Model
from ..utils.provenance import versions
from ..utils.records import CompressionOrigin, QualityRecord, SettingsRecord, TextRecord
from .methods import METHODS
from .settings import Settings


def texts(
    original: Checkpoint,
    settings: Settings,
    calibration: str,
    samples: int,
    seq_len: int | None,
    text: Path | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) to calibrate on, and those held out to measure on if there is no `text`."""
    model = original.model
    seq_len = seq_len or min(1024, model.config.max_position_embeddings)
    needed = METHODS[settings.method].data
    tokens = held_out = torch.empty(0, seq_len, dtype=torch.long, device=model.device)
    if needed or text is None:
        samples = samples if needed else max(2, samples // 8)  # as many as would be held out
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
) -> CompressionOrigin:
    """The part of a record that says how a model was compressed."""
    return {
        "base_model": original.name,
        "base_license": original.license,
        **settings_record(settings),
        "share": kv_bytes(low, torch.bfloat16)["kv_share"],  # as keep counts, for any dtype
        "calibration": calibrated_on(calibration, tokens) if len(tokens) else None,
        "seed": seed,
        "versions": versions(),
    }


def settings_record(settings: Settings) -> SettingsRecord:
    """Settings as rows and records hold them."""
    return cast(SettingsRecord, settings._asdict())


def calibrated_on(calibration: str, tokens: Tensor) -> TextRecord:
    """The part of a record about tokens (N, T) of calibration text."""
    sequences, length = tokens.shape
    source = _name(calibration)
    return {"source": source, "sequences": sequences, "seq_len": length, "tokens": tokens.numel()}


def evaluation(
    models: Mapping[str, Model],
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    held_out: Tensor,
    calibration: str,
) -> QualityRecord:
    """The part of a record about perplexity: on a file, or else on held-out sequences (N, T)."""
    longest = next(iter(models.values())).config.max_position_embeddings
    words, rows = windows(tokenizer, text, held_out, calibration, longest)
    perplexities = {
        name: perplexity(model, rows.flatten(), rows.size(1)) for name, model in models.items()
    }
    return measured(words, rows, perplexities)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    held_out: Tensor,
    calibration: str,
    longest: int,
) -> tuple[str, Tensor]:
    """The text to measure on: its name, and windows of its tokens (M, W).

    longest: tokens that the model can read. Other arguments as in `evaluation`.
    """
    if text is None:
        return f"held-out {_name(calibration)} text", held_out
    test = encode(tokenizer, read_text(text)).to(held_out.device)
    window = min(2048, longest, len(test))
    return text.name, test[: len(test) // window * window].view(-1, window)


def measured(words: str, rows: Tensor, perplexities: Mapping[str, Perplexity]) -> QualityRecord:
    """The part of a record about perplexities, by the name of the model, on windows."""
    about = {
        "text": words,
        "window": rows.size(1),
        "tokens": next(iter(perplexities.values())).tokens,
    }
    numbers = {name: x.perplexity for name, x in perplexities.items()}
    return cast(QualityRecord, about | numbers)


def _name(calibration: str) -> str:
    """The name of a source of calibration text, without its folder."""
    return calibration if calibration.startswith(("self", "hub:")) else Path(calibration).name
