"""Load checkpoints: Hugging Face folders, Hub ids, GGUF files and compressed checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from ..models.config import Config, kv_bytes
from ..models.families import FAMILIES
from ..models.model import Model
from .gguf import gguf_config, gguf_tensors
from .gguf_file import first_part, model_name, open_gguf
from .hub import FAILURES, card_license, failure_reason, parse_hub_id
from .weights import LayerFiles, build, read_folder

MODEL_TYPE = "eigen"  # `model_type` in config.json of a compressed checkpoint
FORMAT = 1  # newest format of compressed checkpoints; 0: no `format_version` and no code hashes
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "README.md"]
LATER = {"anchor", "pairs", "k_bits", "v_bits"}  # optional: added to config.json after format 0
PICKLED = ["pytorch_model*.bin*"]  # downloaded only if there are no safetensors


class Checkpoint(NamedTuple):
    """What `load` returns."""

    model: Model
    """In plain PyTorch, ready for inference: `model(tokens)` gives logits (B, T, vocabulary)."""
    tokenizer: PreTrainedTokenizerBase
    """Of transformers."""
    config: dict[str, Any]
    """config.json as it was read."""
    generation: GenerationConfig
    """Of transformers, with the tokens that end a text."""
    name: str
    """The Hub id, or the last part of a path."""
    license: str | None
    """From the model card, if it has one."""


def load(
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a dense or a compressed checkpoint for inference.

    - source: a folder, a GGUF file or a Hub id, org/name or org/name@revision.
    - dtype: None keeps that of the checkpoint, float32 for a GGUF file.
    - device: where the weights go.
    - revision: branch, tag or commit of a Hub id.
    - trust_remote_code: let the tokenizer run code that comes with the checkpoint.

    Raises ValueError if the source does not exist or cannot be downloaded, its architecture or a
    field of its config is not supported, or weights are damaged, missing or not finite.
    """
    path = locate(source, revision)
    raw = read_config(path)
    config = native_config(raw)  # raises for unsupported models before weights are read
    tensors = gguf_tensors(open_gguf(path), raw) if path.suffix == ".gguf" else read_folder(path)
    model = build(config, tensors, dtype, device, native=raw["model_type"] == MODEL_TYPE)
    return _checkpoint(source, path, raw, model, trust_remote_code)


def open_layers(
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Checkpoint, "LayerFiles"]:
    """As `load` for a dense model whose layers stay on disk, to be read one at a time.

    The returned model holds the weights outside layers; its layers are on meta. Raises ValueError
    also if the weights are not in safetensors.
    """
    path = locate(source, revision)
    raw = read_config(path)
    files = LayerFiles(path, native_config(raw), dtype, device)
    return _checkpoint(source, path, raw, files.model(), trust_remote_code), files


def _checkpoint(
    source: str, path: Path, raw: dict[str, Any], model: Model, trust_remote_code: bool
) -> Checkpoint:
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if gguf else path
    # transformers chooses the tokenizer's class by the config, and may not accept this config
    foreign = model.config.foreign or raw["model_type"] == MODEL_TYPE
    like = {"config": CONFIG_MAPPING[model.config.family]()} if foreign else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **gguf, **like
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} has no tokenizer: add its files ({reason})") from error
    local = model_name(path) if gguf else path.name  # cards show it, so not the user's whole path
    name = local if Path(source).expanduser().exists() else parse_hub_id(source)[0]
    return Checkpoint(model, tokenizer, raw, _generation(folder, raw), name, card_license(folder))


def stop_tokens(checkpoint: Checkpoint) -> list[int]:
    """The end-of-text tokens of the generation config and of the tokenizer, sorted."""
    ends = checkpoint.generation.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({e for e in (*listed, checkpoint.tokenizer.eos_token_id) if e is not None})


def inspect(source: str, revision: str | None = None) -> dict[str, Any]:
    """What config.json of a checkpoint records: sizes, ranks, cache bytes and provenance."""
    raw = read_config(locate(source, revision, ["config.json"]))
    c = native_config(raw)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return {
        "model": source,
        "family": c.family,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "dtype": dtype,
        **kv_bytes(c),
        "joint_kv": c.joint_kv,
        "k_heads_per_latent": c.k_heads_per_latent,
        "v_heads_per_latent": c.v_heads_per_latent,
        "k_ranks": list(c.k_ranks),
        "v_ranks": list(c.v_ranks),
        "k_bits": list(c.k_bits),
        "v_bits": list(c.v_bits),
        "format_version": raw.get("format_version", 0) if raw["model_type"] == MODEL_TYPE else None,
        "code": raw.get("code"),
        "compression": raw.get("compression"),
    }


def locate(source: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder or GGUF file of `source`, downloaded if it is a Hub id.

    A Hub id may include a revision: org/name@revision. files: patterns of the files to download.
    Raises ValueError if the source does not exist or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path if (path / "config.json").exists() else _lone_gguf(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return first_part(path)
    if path.exists():
        raise ValueError(f"{source} is a file: expected a folder, a .gguf file or a Hub id")
    if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") != 1:
        raise ValueError(f"{source} does not exist: expected a folder, a .gguf file or a Hub id")
    name, revision = parse_hub_id(source, revision)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
        if files is FILES and not list(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=PICKLED)
        return folder
    except FAILURES as error:
        raise ValueError(
            f"{source} is not a local folder, and the download failed: {failure_reason(error)}"
        ) from error


def _lone_gguf(folder: Path) -> Path | None:
    """The only GGUF file of a folder, or the first part of the only split one; None without."""
    files = sorted({first_part(path) for path in folder.glob("*.gguf")})
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} holds several models, {names}: give the path of one of them")
    return files[0] if files else None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the same from a GGUF file. Raises ValueError without one."""
    if path.suffix == ".gguf":
        return gguf_config(path, open_gguf(path))
    try:
        return {**json.loads((path / "config.json").read_text())}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} has no config.json: expected a model folder") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}/config.json is not a JSON object: {error}") from error


def native_config(raw: dict[str, Any]) -> Config:
    """The native config for a config.json. Raises ValueError naming an unsupported field."""
    kind = raw.get("model_type")
    family = raw.get("family") if kind == MODEL_TYPE else kind
    if family not in FAMILIES:
        raise ValueError(
            f"architecture {family!r} is not supported: expected a checkpoint whose config.json "
            f"has a model_type among {', '.join(FAMILIES)}, or '{MODEL_TYPE}'"
        )
    config = FAMILIES[family].config
    if kind == MODEL_TYPE:
        if raw.get("format_version", 0) > FORMAT:
            raise ValueError(
                f"the checkpoint has format {raw['format_version']}, but this eigenzoo reads "
                f"formats up to {FORMAT}: upgrade eigenzoo"
            )
        names = {f.name for f in fields(config)}
        missing = names - raw.keys() - LATER
        if missing:
            raise ValueError(f"config.json lacks {', '.join(sorted(missing))}: export it again")
        return config(**{name: raw[name] for name in names & raw.keys()})
    if raw.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config: expected weights that are not quantized; "
            "dequantize the checkpoint first"
        )
    known = CONFIG_MAPPING[family]
    if config.foreign:
        return config.from_hf(known().to_dict() | raw)
    try:
        return config.from_hf(raw | known.from_dict(raw).to_dict())
    except StrictDataclassError as error:
        raise ValueError(f"config.json does not fit transformers' {family}: {error}") from error


def _generation(folder: Path, raw: dict[str, Any]) -> GenerationConfig:
    """The checkpoint's generation config, or one with the token ids of its config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: raw.get(name) for name in names})
    values = json.loads(path.read_text())
    values.pop("max_new_tokens", None)  # it would override the caller's max_length
    return GenerationConfig.from_dict(values)
