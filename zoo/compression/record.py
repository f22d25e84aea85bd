"""Texts and measurements of a compression, and the record of it in config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..inference.checkpoint import Checkpoint
from ..inference.data import CalibrationRows, calibration_text, hold_out, read_tokens
from ..inference.perplexity import Perplexity, perplexity
from ..inference.sources import parse, title
from ..inference.texts import read_text
from ..models.config import Config, kv_bytes
from ..models.model import Model
from ..utils.provenance import versions
from ..utils.records import CompressionOrigin, QualityRecord, SettingsRecord, TextRecord
from .methods import METHODS
from .settings import Settings


class Windows(NamedTuple):
    """What perplexity is measured on: the name of the text, and windows of its tokens (M, W)."""

    name: str
    rows: Tensor


def texts(
    original: Checkpoint,
    settings: Settings,
    calibration: str,
    samples: int,
    seq_len: int | None,
    text: Path | None,
    seed: int,
) -> tuple[Tensor, Windows, str]:
    """Tokens (N, T) to calibrate on, what to measure on, and what records tell of the tokens.

    Measured on is `text`, or else held-out sequences.
    """
    model = original.model
    seq_len = seq_len or min(1024, model.config.max_position_embeddings)
    needed = METHODS[settings.method].data
    test = windows(original.tokenizer, model, text)  # fails before the long work
    nothing = torch.empty(0, seq_len, dtype=torch.long, device=model.device)
    rows = CalibrationRows(calibration, nothing, ())
    if needed or text is None:
        if not needed:  # as many as would be held out
            samples = max(2, len(parse(calibration)), samples // 8)
        rows = calibration_text(calibration, model, original.tokenizer, samples, seq_len, seed)
    tokens = rows.tokens
    if test is None:
        tokens, held_out = hold_out(tokens) if needed else (nothing, tokens)
        test = held_out_windows(held_out, calibration)
    return tokens, test, rows.told(len(tokens))


def about(
    original: Checkpoint,
    settings: Settings,
    low: Config,
    calibration: str,
    tokens: Tensor,
    seed: int,
) -> CompressionOrigin:
    """The part of a record that says how a model was compressed.

    calibration, tokens: what records tell of the text to calibrate on, and it; see `texts`.
    """
    return {
        "base_model": original.name,
        "base_license": original.license,
        **settings_record(settings),
        "share": kv_bytes(low)["kv_share"],
        "calibration": calibrated_on(calibration, tokens) if len(tokens) else None,
        "seed": seed,
        "versions": versions(),
    }


def settings_record(settings: Settings) -> SettingsRecord:
    """Settings as rows and records hold them."""
    return cast(SettingsRecord, settings._asdict())


def calibrated_on(sources: str, tokens: Tensor) -> TextRecord:
    """The part of a record about tokens (N, T) of calibration text, of these sources."""
    (sequences, length), size = tokens.shape, tokens.numel()
    return {"source": sources, "sequences": sequences, "seq_len": length, "tokens": size}


def windows(
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    text: Path | None,
) -> Windows | None:
    """A file to measure on; None without one.

    Raises ValueError if the file cannot be read, or has no token that can be predicted.
    """
    if text is None:
        return None
    tokens = read_tokens(tokenizer, read_text(text), model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens: expected at least 2")
    window = min(2048, model.config.max_position_embeddings, len(tokens))
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    return Windows(text.name, rows.to(model.device))


def held_out_windows(held_out: Tensor, calibration: str) -> Windows:
    """Sequences (N, T) of the text to calibrate on, to measure on."""
    return Windows(f"held-out {title(calibration)} text", held_out)


def evaluation(models: Mapping[str, Model], test: Windows) -> QualityRecord:
    """The part of a record about perplexity."""
    rows = test.rows
    perplexities = {
        name: perplexity(model, rows.flatten(), rows.size(1)) for name, model in models.items()
    }
    return measured(test, perplexities)


def measured(test: Windows, perplexities: Mapping[str, Perplexity]) -> QualityRecord:
    """The part of a record about perplexities, by the name of the model."""
    about = {
        "text": test.name,
        "window": test.rows.size(1),
        "tokens": next(iter(perplexities.values())).tokens,
    }
    numbers = {name: x.perplexity for name, x in perplexities.items()}
    return cast(QualityRecord, about | numbers)
