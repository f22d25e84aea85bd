"""Load checkpoints: Hugging Face folders, Hub ids, GGUF files and compressed checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from ..models.config import Config, check_sizes, kv_bytes
from ..models.families import FAMILIES
from ..models.model import Model
from ..utils.escape import told
from ..utils.jsonl import COMPRESSION
from ..utils.records import CompressionRecord
from .files import read_json
from .gguf import gguf_config, gguf_tensors
from .gguf_file import first_part, model_name, open_gguf, parts
from .hub import FAILURES, card_license, failure_reason, parse_hub_id
from .quantized import dequantizer, quantization, read_by_transformers, unquantized
from .tensor_files import lazy_safetensors, read_folder, safetensors_files
from .tokenizer import read_gguf_tokenizer, read_tokenizer
from .weights import LayerFiles, Tensors, build

MODEL_TYPE = "eigen"  # `model_type` in config.json of a compressed checkpoint
# newest format of compressed checkpoints; 0: no `format_version` and no code hashes; 1: no segments
FORMAT = 2
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt", "README.md"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
# optional fields of config.json, which were added after format 0
LATER = {"anchor", "pairs", "k_bits", "v_bits", "k_segments", "v_segments", "centered"}
PICKLED = ["pytorch_model*.bin*"]  # downloaded only if there are no safetensors


class Checkpoint(NamedTuple):
    """What `load` returns."""

    model: Model
    """In plain PyTorch, ready for inference: `model(tokens)` gives logits (B, T, vocabulary)."""
    tokenizer: PreTrainedTokenizerBase
    """Of transformers."""
    config: dict[str, Any]
    """config.json as it was read, without the quantization of its weights."""
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
    - dtype: None keeps that of the checkpoint, float32 for a GGUF file; for quantized weights, that
      of config.json or bfloat16.
    - device: where the weights go.
    - revision: branch, tag or commit of a Hub id.
    - trust_remote_code: let the tokenizer run code that comes with the checkpoint.

    Raises ValueError if the source does not exist or cannot be downloaded, its architecture or a
    field of its config is not supported, or weights are damaged, missing or not finite.
    """
    path = locate(source, revision)
    raw = read_config(path)
    config = native_config(raw)  # raises for unsupported models before weights are read
    beside = _beside(source, path, raw, config, trust_remote_code)
    if path.suffix == ".gguf":
        lazy = gguf_tensors(open_gguf(path), raw, dtype)
        tensors: Tensors = ((key, tensor.read()) for key, tensor in lazy)
    elif plain := dequantizer(quantization(raw)):
        tensors = plain(read_folder(path))
    else:
        tensors = read_by_transformers(path, raw)
    dtype = dtype or _dequantized_dtype(raw)
    model = build(config, tensors, dtype, device, native=raw["model_type"] == MODEL_TYPE)
    return Checkpoint(model, *beside)


def open_layers(
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Checkpoint, "LayerFiles"]:
    """As `load` for a dense model whose layers stay on disk, to be read one at a time.

    The returned model holds the weights outside layers; its layers are on meta. Raises ValueError
    also if the weights are neither in safetensors nor in GGUF.
    """
    path = locate(source, revision)
    raw = read_config(path)
    config, plain = native_config(raw), dequantizer(quantization(raw))
    if plain is None:
        raise ValueError(
            f"{source} is quantized in a format that cannot be read layer by layer: omit --stream, "
            "and use a machine with more memory if it needs that"
        )
    if path.suffix == ".gguf":
        paths, stored = parts(path), gguf_tensors(open_gguf(path), raw, dtype)
    else:
        paths = safetensors_files(path)
        stored = lazy_safetensors(paths)
    files = LayerFiles(paths, stored, config, dtype or _dequantized_dtype(raw), device, plain)
    beside = _beside(source, path, raw, config, trust_remote_code)
    return Checkpoint(files.model(), *beside), files


def _dequantized_dtype(raw: dict[str, Any]) -> torch.dtype | None:
    """The dtype of weights that were quantized; None if they were not, and have their own."""
    return (config_dtype(raw) or torch.bfloat16) if quantization(raw) else None


def _beside(
    source: str, path: Path, raw: dict[str, Any], config: Config, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, dict[str, Any], GenerationConfig, str, str | None]:
    """What a checkpoint has beside its model."""
    gguf = path.suffix == ".gguf"
    tokenizer = _tokenizer(path, raw, config, trust_remote_code)
    generation = _generation(None if gguf else path, raw)
    local = model_name(path) if gguf else path.name  # cards show it, so not the user's whole path
    name = local if Path(source).expanduser().exists() else parse_hub_id(source)[0]
    license = card_license(path.parent if gguf else path)
    return tokenizer, unquantized(raw), generation, name, license


def _tokenizer(
    path: Path, raw: dict[str, Any], config: Config, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    if path.suffix == ".gguf":
        return read_gguf_tokenizer(path, config.foreign)
    # transformers chooses the tokenizer's class by the config, and may not accept this config
    foreign = config.foreign or raw["model_type"] == MODEL_TYPE
    like: dict[str, Any] = {"config": CONFIG_MAPPING[config.family]()} if foreign else {}
    return read_tokenizer(path, trust_remote_code, **like)


def vocabulary(
    source: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, dict[str, int]]:
    """How many tokens a model knows, and the ids of its tokenizer's. No weights are read.

    Arguments and errors as of `load`.
    """
    path = locate(source, revision)
    raw = read_config(path)
    config = native_config(raw)
    return config.vocab_size, _tokenizer(path, raw, config, trust_remote_code).get_vocab()


def stop_tokens(checkpoint: Checkpoint) -> list[int]:
    """The end-of-text tokens of the generation config and of the tokenizer, sorted."""
    ends = checkpoint.generation.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({e for e in (*listed, checkpoint.tokenizer.eos_token_id) if e is not None})


def recorded(config: Mapping[str, Any], folder: Path | str) -> CompressionRecord:
    """The record of a compression in config.json.

    folder: of the checkpoint, for the error. Raises ValueError if there is no such record.
    """
    if config.get("model_type") != MODEL_TYPE or not config.get("compression"):
        raise ValueError(f"{folder} was not written by eigenzoo compress: expected such a folder")
    if problem := COMPRESSION.problem(config["compression"]):
        raise ValueError(
            f"the compression in config.json of {folder} {problem}: expected {COMPRESSION.expected}"
        )
    return cast(CompressionRecord, config["compression"])


def inspect(source: str, revision: str | None = None) -> dict[str, Any]:
    """What config.json of a checkpoint records: sizes, ranks, cache bytes and provenance."""
    raw = read_config(locate(source, revision, ["config.json"]))
    c = native_config(raw)
    dtype = config_dtype(raw) or torch.float32
    return {
        "model": source,
        "family": c.family,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        **kv_bytes(c),
        "windows": list(getattr(c, "windows", ())),
        "joint_kv": c.joint_kv,
        "k_heads_per_latent": c.k_heads_per_latent,
        "v_heads_per_latent": c.v_heads_per_latent,
        "k_ranks": list(c.k_ranks),
        "v_ranks": list(c.v_ranks),
        "k_bits": list(c.k_bits),
        "v_bits": list(c.v_bits),
        "k_segments": list(c.k_segments),
        "v_segments": list(c.v_segments),
        "format_version": raw.get("format_version", 0) if raw["model_type"] == MODEL_TYPE else None,
        "code": raw.get("code"),
        "compression": _record(raw, source),
    }


def _record(raw: dict[str, Any], source: str) -> CompressionRecord | None:
    """The record of a compression, which a plain checkpoint has too; None without one."""
    record = raw.get("compression")
    if raw["model_type"] == MODEL_TYPE and record:
        return recorded(raw, source)
    return None if COMPRESSION.problem(record) else cast(CompressionRecord, record)


def locate(source: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder or GGUF file of `source`, downloaded if it is a Hub id.

    A Hub id may include a revision: org/name@revision. files: patterns of the files to download.
    Raises ValueError if the source does not exist or cannot be downloaded.
    """
    try:
        path = Path(source).expanduser()
        known = path.exists() or path.is_symlink()
    except (OSError, RuntimeError) as error:  # a name that is too long, or of an unknown user
        raise ValueError(f"{source} cannot be read: {error}") from error
    if path.is_dir():
        return path if (path / "config.json").exists() else _lone_gguf(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return first_part(path)
    if known:
        raise ValueError(f"{source} is no folder: expected a folder, a .gguf file or a Hub id")
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
    file = path / "config.json"
    if not file.is_symlink() and not file.exists():
        raise ValueError(f"{path} has no config.json: expected a model folder")
    return read_json(file)


def native_config(raw: dict[str, Any]) -> Config:
    """The native config for a config.json. Raises ValueError naming an unsupported field."""
    kind = raw.get("model_type")
    family = raw.get("family") if kind == MODEL_TYPE else kind
    if not isinstance(family, str) or family not in FAMILIES:
        text = raw.get("text_config")
        inner = text.get("model_type") if isinstance(text, dict) else None
        advice = f"; save its text part, a {inner}, on its own" if inner in [*FAMILIES] else ""
        raise ValueError(
            f"architecture {family!r} is not supported: expected a checkpoint whose config.json "
            f"has a model_type among {', '.join(FAMILIES)}, or '{MODEL_TYPE}'{advice}"
        )
    check_sizes(raw)
    config_dtype(raw)
    config = FAMILIES[family].config
    if kind == MODEL_TYPE:
        version = raw.get("format_version", 0)
        if type(version) is not int or not 0 <= version <= FORMAT:
            raise ValueError(
                f"the checkpoint has format {version!r}, but this eigenzoo reads formats up to "
                f"{FORMAT}: upgrade eigenzoo"
            )
        names = {f.name for f in fields(config)}
        missing = names - raw.keys() - LATER
        if missing:
            raise ValueError(f"config.json lacks {', '.join(sorted(missing))}: export it again")
        return config(**{name: raw[name] for name in names & raw.keys()})
    quantization(raw)
    raw = unquantized(raw)
    known = CONFIG_MAPPING[family]
    try:
        if config.foreign:
            return config.from_hf(known().to_dict() | raw)
        return config.from_hf(raw | known.from_dict(raw).to_dict())
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"config.json does not fit transformers' {family}: {told(error)}"
        ) from error


def config_dtype(raw: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names, if it does. Raises ValueError if it is not a float's."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype in config.json is {name!r}: expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _generation(folder: Path | None, raw: dict[str, Any]) -> GenerationConfig:
    """The folder's generation config, or one with the token ids of config.json."""
    path, names = (folder or Path()) / "generation_config.json", ("bos", "eos", "pad")
    ids = {f"{name}_token_id": raw.get(f"{name}_token_id") for name in names}
    values = read_json(path) if folder and (path.exists() or path.is_symlink()) else ids
    for name in ids:
        given = values.get(name)
        listed = given if isinstance(given, list) else [given]
        if not all(token is None or type(token) is int for token in listed):
            raise ValueError(f"{name} is {given!r}: expected the number of a token")
    values.pop("max_new_tokens", None)  # it would override the caller's max_length
    try:
        return GenerationConfig.from_dict(values)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit transformers: {told(error)}") from error
