"""Weights that are damaged, of other dtypes or not the model's end in one error that names them."""

import json
import shutil

import pytest
import tiny
import torch
from damage import change_weights
from safetensors.torch import load_file, save_file

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load, open_layers

INDICES = [
    ([1], "is not a JSON object"),
    ({}, "has no weight_map"),
    ({"weight_map": []}, "has no weight_map"),
    ({"weight_map": {}}, "has no weight_map"),
    ({"weight_map": {"a": 3}}, "3 for a: expected a file in the same folder"),
    ({"weight_map": {"a": ["x"]}}, "expected a file in the same folder"),
    ({"weight_map": {"a": "../outside.safetensors"}}, "expected a file in the same folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "expected a file in the same folder"),
    ({"weight_map": {"a": ".."}}, "expected a file in the same folder"),
    ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors"),
]


@pytest.mark.parametrize(("index", "named"), INDICES)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_lists_files_of_its_folder_only(folder, index, named, kind):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=named):
        load(str(folder))


@pytest.mark.parametrize("number", [-1, 8])
def test_pairs_that_name_no_frequency_are_refused(dense, tmp_path, number):
    settings = Settings(keep=0.5, keys="pairs", kv_bits=(16,))
    compress_checkpoint(dense, tmp_path / "out", settings, samples=4, seq_len=32)

    def change(weights):
        next(x for key, x in weights.items() if key.endswith("k_pairs"))[0, 0] = number

    change_weights(tmp_path / "out", change)
    with pytest.raises(ValueError, match="k_pairs is damaged: expected numbers from 0 to 7"):
        load(str(tmp_path / "out"))


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop(EXPERT.format(5)), r"lacks 1 .* first layers\.1\..*\.up_proj\[5\]"),
        (
            lambda w: w.update({EXPERT.format(8): w[EXPERT.format(5)] + 1}),
            "experts.8.w3.weight .* no such",
        ),
        (
            lambda w: w.update({EXPERT.format(5): torch.ones(2, 2)}),
            r"experts.5.w3.weight has shape \(2",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
@pytest.mark.parametrize("read", [load, open_layers])
def test_weights_of_one_expert_are_checked(tmp_path, read, change, named):
    tiny.save(tmp_path, "mixtral")
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=named):
        read(str(tmp_path))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors here, and no header either")


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def long_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def twice(folder):
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_vocabulary(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')


def poison(folder):
    change_weights(folder, lambda w: w["model.norm.weight"].fill_(torch.nan))


def drop(folder):
    change_weights(folder, lambda w: w.pop("model.norm.weight"))


def unlink(folder):
    (folder / "model.safetensors").unlink()


def no_words(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_json(folder):
    (folder / "config.json").write_text("{")


def no_object(folder):
    (folder / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (long_header, "model.safetensors is damaged"),
        (empty, "model.safetensors is damaged"),
        (twice, "is given twice"),
        (no_vocabulary, "has no tokenizer: add its files, or replace them"),
        (truncate, "model.safetensors is damaged"),
        (garble, "model.safetensors is damaged"),
        (poison, "model.norm.weight is not finite"),
        (drop, "lacks 1 weights, first norm.weight"),
        (unlink, "lacks model.safetensors"),
        (no_words, "has no tokenizer"),
        (no_json, "config.json is not a JSON object"),
        (no_object, "config.json is not a JSON object"),
    ],
)
def test_a_damaged_checkpoint_raises_an_error_that_names_the_damage(folder, damage, named):
    damage(folder)
    with pytest.raises(ValueError, match=named):
        load(str(folder))


def cast_some(folder, dtype, names):
    def change(weights):
        for key in weights:
            if any(name in key for name in names):
                weights[key] = weights[key].to(dtype)

    change_weights(folder, change)


@pytest.mark.parametrize(
    "dtype", ["int8", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]
)
def test_weights_that_are_no_floats_are_named(folder, dtype):
    cast_some(folder, getattr(torch, dtype), ["layers.1.mlp.up_proj"])
    with pytest.raises(ValueError, match=rf"layers.1.mlp.up_proj.weight is {dtype}: expected"):
        load(str(folder))


@pytest.mark.parametrize("stream", [False, True])
def test_weights_of_several_dtypes_get_that_of_most_numbers(folder, stream):
    cast_some(folder, torch.bfloat16, ["layers"])
    read = (lambda: open_layers(str(folder))[0]) if stream else (lambda: load(str(folder)))
    model = read().model
    assert model.embed.weight.dtype == model.head.weight.dtype == torch.bfloat16
    if not stream:
        assert model(tiny.tokens(1, 8)).isfinite().all()


def test_weights_of_float64_are_used_as_they_are(folder):
    cast_some(folder, torch.float64, [""])
    assert load(str(folder)).model(tiny.tokens(1, 8)).dtype == torch.float64


def test_weights_that_exceed_a_dtype_are_named(folder):
    change_weights(folder, lambda w: w["model.norm.weight"].fill_(1e5))
    with pytest.raises(ValueError, match=r"norm.weight exceeds float16"):
        load(str(folder), torch.float16)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tiny.save(tmp_path, "opt")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="embedding and the head have different weights"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "content", [[1], {"state": {"a": torch.ones(1)}}, {"a": 1}, {3: torch.ones(1)}, torch.ones(1)]
)
def test_a_bin_file_without_tensors_by_name_is_refused(tmp_path, content):
    tiny.save(tmp_path, "opt")
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds .*: expected tensors by name"):
        load(str(tmp_path))
