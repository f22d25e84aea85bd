"""From a checkpoint to a compressed checkpoint on disk, with what was measured on the way."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zoo.basis import METHODS
from ..zoo.checkpoint import Checkpoint
from ..zoo.compress import Settings, compress
from ..zoo.data import calibration_tokens, encode, read_text
from ..zoo.evaluate import perplexity
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
    longest = model.config.max_position_embeddings
    seq_len = seq_len or min(1024, longest)
    source = calibration if calibration.startswith(("self", "hub:")) else Path(calibration).name
    needed = METHODS[settings.method].data
    if text is None:
        samples = samples if needed else max(2, samples // 8)  # no more than is measured on
        tokens = calibration_tokens(calibration, model, tokenizer, samples, seq_len, seed)
        held = (len(tokens) // 8 or 1) if needed else len(tokens)
        tokens, held_out = tokens.tensor_split([len(tokens) - held])
        words, window, test = f"held-out {source} text", tokens.size(1), held_out.flatten()
    else:
        tokens = torch.empty(0, seq_len, dtype=torch.long, device=model.device)
        if needed:
            tokens = calibration_tokens(calibration, model, tokenizer, samples, seq_len, seed)
        test = encode(tokenizer, read_text(text)).to(tokens.device)
        words, window = text.name, min(2048, longest, len(test))
    result = compress(model, tokens, settings)
    before, after = (perplexity(m, test, window) for m in (model, result.model))
    config = result.model.config
    record = {
        "base_model": original.name,
        **result.settings._asdict(),
        "share": config.kv_width / model.config.kv_width,
        "calibration": _calibration(source, tokens) if needed else None,
        "seed": seed,
        "versions": {name: version(name) for name in ("eigenzoo", "torch", "transformers")},
        "evaluation": {
            "text": words,
            "window": window,
            "tokens": before.tokens,
            "dense": before.perplexity,
            "compressed": after.perplexity,
        },
        "layers": result.layers,
    }
    write = export_plain if plain else export
    write(out, result.model, original, record, force, shard_size)
    return record


def _calibration(source: str, tokens: Tensor) -> Mapping[str, Any]:
    sequences, length = tokens.shape
    return {"source": source, "sequences": sequences, "seq_len": length, "tokens": tokens.numel()}
