"""Texts and measurements of a compression, and the record of it in config.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..inference.checkpoint import Checkpoint
from ..inference.data import CalibrationRows, calibration_text, read_tokens
from ..inference.domains import (
    Domain,
    all_rows,
    by_domain,
    check_apart,
    digest,
    domain,
    domains_record,
    python_domains,
)
from ..inference.perplexity import cut, mean_perplexity, window_losses
from ..inference.source_texts import known_texts
from ..inference.texts import Text, read_text
from ..models.config import Config, kv_bytes
from ..models.model import Model
from ..utils.provenance import versions
from ..utils.records import CompressionOrigin, QualityRecord, SettingsRecord, TextRecord
from .methods import METHODS
from .settings import Settings

WINDOW, TOKENS = 1024, 2048  # of each of Python's own texts: seconds beside the calibration


class Windows(NamedTuple):
    """What perplexity is measured on: one text or several, as windows of one length."""

    domains: list[Domain]

    @property
    def name(self) -> str:
        """The names of the texts."""
        return " and ".join(x.name for x in self.domains)

    @property
    def rows(self) -> Tensor:
        """The windows (M, W) of all texts."""
        return all_rows(self.domains)


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

    Measured on is what `windows` says. Raises ValueError also if both are one text.
    """
    model = original.model
    seq_len = seq_len or min(1024, model.config.max_position_embeddings)
    needed = METHODS[settings.method].data
    test = windows(original.tokenizer, model, text)  # fails before the long work
    nothing = torch.empty(0, seq_len, dtype=torch.long, device=model.device)
    rows = CalibrationRows(calibration, nothing, ())
    if needed:
        check_apart(measured_on(text), [calibration])
        rows = calibration_text(calibration, model, original.tokenizer, samples, seq_len, seed)
    return rows.tokens, test, rows.told(len(rows.tokens))


def about(
    original: Checkpoint,
    settings: Settings,
    low: Config,
    calibration: str,
    tokens: Tensor,
    told: str,
    seed: int,
) -> CompressionOrigin:
    """The part of a record that says how a model was compressed.

    calibration, tokens, told: the text to calibrate on, and what records tell of it; see `texts`.
    """
    return {
        "base_model": original.name,
        "base_license": original.license,
        **settings_record(settings),
        "share": kv_bytes(low)["kv_share"],
        "calibration": calibrated_on(told, tokens) if len(tokens) else None,
        "calibration_digests": digests(original.tokenizer, [calibration]) if len(tokens) else [],
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


def digests(tokenizer: PreTrainedTokenizerBase, calibration: Sequence[str]) -> list[str]:
    """Digests of the texts of calibration that are known, see `domains.digest`."""
    return [digest(text, tokenizer) for given in calibration for text in known_texts(given)]


def measured_on(text: Path | None) -> list[Text]:
    """The text of a file to measure on; None: those of several domains. Errors as of `windows`."""
    return python_domains() if text is None else [read_text(text)]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    text: Path | None,
) -> Windows:
    """A file to measure on; None: texts of several domains that every Python brings along.

    Raises ValueError if the file cannot be read, or has no token that can be predicted.
    """
    longest, (words, *more) = model.config.max_position_embeddings, measured_on(text)
    if text is None:
        window = min(WINDOW, longest)
        size = window, TOKENS // window
        return Windows([domain(x, tokenizer, model, *size) for x in (words, *more)])
    tokens = read_tokens(tokenizer, words, model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens: expected at least 2")
    rows = cut(tokens, min(2048, longest, len(tokens)), begun=model.config.begun)
    return Windows([Domain(words.name, digest(words, tokenizer), rows.to(model.device))])


def evaluation(models: Mapping[str, Model], test: Windows) -> QualityRecord:
    """The part of a record about perplexity."""
    rows = test.rows
    return measured(test, {name: window_losses(model, rows) for name, model in models.items()})


def measured(test: Windows, losses: Mapping[str, Tensor]) -> QualityRecord:
    """The part of a record about perplexity.

    losses: on the windows, in nats (M, W - 1), by the name of the model: dense, compressed.
    """
    about = {
        "text": test.name,
        "window": test.rows.size(1),
        "tokens": losses["dense"].numel(),
        **{name: mean_perplexity(x).perplexity for name, x in losses.items()},
    }
    if len(test.domains) > 1:
        dense = [x.perplexity for x in by_domain(test.domains, losses["dense"])]
        about["domains"] = domains_record(test.domains, losses["compressed"], dense)
    return cast(QualityRecord, about)
