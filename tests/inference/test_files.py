"""Configs and files of every wrong kind end in one error that names file, field and value."""

import contextlib
import json
import os

import pytest
import tiny
from damage import change_config

from eigenzoo.zoo.inference.checkpoint import inspect, load

BAD_FIELDS = [
    ("model_type", ["llama"], r"architecture \['llama'\]"),
    ("num_hidden_layers", 10_000_000, "from 1 to 1000"),
    ("num_hidden_layers", 0, "from 1 to 1000"),
    ("hidden_size", -64, "hidden_size is -64"),
    ("hidden_size", 64.0, "hidden_size is 64.0"),
    ("vocab_size", 10**30, "vocab_size is 10000"),
    ("num_attention_heads", True, "num_attention_heads is True"),
    ("num_attention_heads", 7, "multiple of|kv heads|expected"),
    ("num_key_value_heads", 0, "num_key_value_heads is 0"),
    ("max_position_embeddings", "256", "max_position_embeddings is '256'"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is nan: expected a finite number"),
    ("rms_norm_eps", -1.0, "rms_norm_eps is -1.0"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps"),
    ("tie_word_embeddings", "no", "tie_word_embeddings"),
    ("dtype", "float33", "dtype in config.json is 'float33'"),
    ("dtype", ["float32"], r"dtype in config.json is \['float32'\]"),
    ("dtype", "int8", "dtype in config.json is 'int8'"),
    ("hidden_act", None, "hidden_act"),
    ("attention_bias", 3, "attention_bias|_bias is 3"),
    ("eos_token_id", "two", "eos_token_id.*'two'"),
    ("rope_parameters", [1], "config.json"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "factor"),
    ("rope_parameters", {"rope_type": ["yarn"], "rope_theta": 1e4}, "rope_type|config.json"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}, "factor"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
    (
        "rope_parameters",
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0],
            "long_factor": [1.0],
        },
        "short_factor",
    ),
]


@pytest.mark.parametrize(("field", "value", "named"), BAD_FIELDS)
def test_a_value_that_does_not_fit_is_named_by_load_and_inspect(folder, field, value, named):
    change_config(folder, **{field: value})
    with pytest.raises(ValueError, match=named):
        load(str(folder))
    if field != "eos_token_id":
        with pytest.raises(ValueError, match=named):
            inspect(str(folder))


@pytest.mark.parametrize("family", ["opt", "mpt", "qwen2"])
@pytest.mark.parametrize("value", [[1], {"a": 1}, "x", -1, 1e30, None, True])
def test_fields_of_every_family_may_hold_anything_without_a_traceback(tmp_path, family, value):
    original = tiny.hf(family).config.to_dict()
    for field in original:
        (tmp_path / "config.json").write_text(json.dumps(original | {field: value}))
        with contextlib.suppress(ValueError):
            inspect(str(tmp_path))


CONFIGS = {
    "[1]": "is not a JSON object: it holds",
    "null": "is not a JSON object: it holds null",
    '"llama"': "is not a JSON object",
    "{": "is not a JSON object",
    "": "is not a JSON object",
    "[" * 100_000: "is not a JSON object",
    '{"model_type": "llama", "model_type": "opt"}': "gives model_type twice",
    "{}": "architecture None",
}


@pytest.mark.parametrize("content", CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_of_another_kind_is_named(folder, name, content):
    (folder / name).write_text(content)
    named = CONFIGS[content] if content != "{}" or name == "config.json" else None
    if content.startswith('{"') and name != "config.json":
        named = "twice"
    if named is None:
        load(str(folder))
        return
    with pytest.raises(ValueError, match=named):
        load(str(folder))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "latin-1"])
def test_a_file_of_another_kind_is_named(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif name != "README.md":  # only its license would be missing
        path.write_bytes(b'{"\xe9": 1}')
    if name == "README.md" and kind in ("loop", "latin-1"):
        load(str(folder))
        return
    with pytest.raises(ValueError, match=name.split(".")[0]):
        load(str(folder))
