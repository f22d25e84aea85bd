"""Quantized checkpoints are dequantized, exactly as their format says, or refused by name."""

import shutil
from importlib.util import find_spec

import pytest
import tiny
import torch
from damage import change_config, change_weights
from safetensors.torch import load_file

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import inspect, load, open_layers, read_config
from eigenzoo.zoo.inference.tensor_files import stored_bytes

FP8 = torch.float8_e4m3fn
COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
FORMATS = {  # shape of the scale (from that of the weight), its name, dtype, config
    "fp8 blocks": (
        lambda n, m: (-(-n // 24), -(-m // 24)),  # the last blocks are cut
        "weight_scale_inv",
        FP8,
        {"quant_method": "fp8", "weight_block_size": [24, 24]},
    ),
    "fp8 tensor": (lambda n, m: (), "weight_scale_inv", FP8, {"quant_method": "fp8"}),
    "fbgemm": (lambda n, m: (n, 1), "weight_scale", FP8, {"quant_method": "fbgemm_fp8"}),
    "compressed tensor": (
        lambda n, m: (1,),
        "weight_scale",
        FP8,
        COMPRESSED | {"format": "float-quantized"},
    ),
    "compressed rows": (
        lambda n, m: (n, 1),
        "weight_scale",
        torch.int8,
        COMPRESSED | {"format": "int-quantized"},
    ),
    "compressed groups": (
        lambda n, m: (n, m // 32),
        "weight_scale",
        torch.int8,
        COMPRESSED | {"format": "int-quantized"},
    ),
}


def quantize(folder, name):
    """Quantize the projections of a folder; returns the weights that they stand for."""
    shape, kind, dtype, config = FORMATS[name]
    torch.manual_seed(0)
    exact = {}

    def change(weights):
        for key in [key for key in weights if "_proj.weight" in key]:
            n, m = weights[key].shape
            scale = torch.rand(shape(n, m)) * 0.01 + 0.01
            block = config.get("weight_block_size") or [n // (scale.shape or (1,))[0], m]
            if len(scale.shape) == 2 and "weight_block_size" not in config:
                block = [n // scale.size(0), m // scale.size(1)]
            rows, columns = torch.arange(n) // block[0], torch.arange(m) // block[1]
            full = scale[rows[:, None], columns] if scale.dim() == 2 else scale.expand(n, m)
            stored = (weights[key] / full).round() if dtype == torch.int8 else weights[key] / full
            weights[key] = stored.to(dtype)
            exact[key] = weights[key].float() * full
            weights[key.removesuffix("weight") + kind] = scale
            weights[key.removesuffix("weight") + "input_scale"] = torch.ones(1)

    change_weights(folder, change)
    change_config(folder, quantization_config=config, dtype="bfloat16")
    return exact


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_8_bits_are_multiplied_by_their_scales(folder, name, stream):
    exact = quantize(folder, name)
    if stream:
        checkpoint, files = open_layers(str(folder))
        with files.layer(checkpoint.model, 1) as block:
            found = block.mlp.up_proj.weight
    else:
        found = load(str(folder)).model.layers[1].mlp.up_proj.weight
    want = exact["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)


def test_a_compressed_copy_is_quantized_no_more(folder, tmp_path):
    quantize(folder, "fp8 blocks")
    assert inspect(str(folder))["dtype"] == "bfloat16"
    compress_checkpoint(
        load(str(folder)),
        tmp_path / "out",
        Settings(keep=0.5, kv_bits=(16,)),
        samples=4,
        seq_len=32,
    )
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert load(str(tmp_path / "out")).model(tiny.tokens(1, 8)).isfinite().all()


def test_the_size_of_quantized_weights_is_that_in_memory(folder):
    projections = quantize(folder, "fp8 tensor").values()
    rest = sum(x.numel() for x in load(str(folder)).model.parameters())
    rest -= sum(x.numel() for x in projections)
    want = 2 * sum(x.numel() for x in projections) + 4 * rest  # the rest is stored in float32
    assert stored_bytes(folder) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("ending", ["weight_scale_inv", "weight"])
def test_a_scale_or_its_numbers_that_are_missing_are_named(folder, ending):
    quantize(folder, "fp8 blocks")
    change_weights(folder, lambda w: w.pop(f"model.layers.0.mlp.up_proj.{ending}"))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight lacks"):
        load(str(folder))


@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (torch.ones(7, 7), "does not fit"),
        (torch.ones(96), "does not fit"),
        (torch.ones(4, 3, dtype=torch.uint8), "is torch.uint8: expected floats"),
        (torch.full((4, 3), torch.nan), "is not finite"),
    ],
)
def test_a_scale_that_does_not_fit_is_named(folder, scale, named):
    quantize(folder, "fp8 blocks")
    key = "model.layers.0.mlp.up_proj.weight_scale_inv"
    change_weights(folder, lambda w: w.update({key: scale}))
    with pytest.raises(ValueError, match=named):
        load(str(folder))


METHODS = ("gptq", "awq", "hqq", "quanto", "torchao", "mxfp4", "aqlm", "fp9", None, 4, ["fp8"])


@pytest.mark.parametrize("method", METHODS)
def test_quantization_that_cannot_be_undone_is_named_before_weights_are_read(folder, method):
    (folder / "model.safetensors").unlink()
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=r"cannot be undone here: expected .*compressed-tensors"):
        load(str(folder))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install bitsandbytes"),
        ({"load_in_8bit": True}, "pip install bitsandbytes"),
        (COMPRESSED | {"format": "pack-quantized"}, "pip install compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is"),
        ("fp8", "quantization_config is 'fp8': expected an object"),
    ],
)
def test_what_a_quantization_needs_is_named(folder, values, named):
    package = named.removeprefix("pip install ").replace("-", "_")
    if named.startswith("pip") and find_spec(package):
        pytest.skip(f"{package} is installed")
    change_config(folder, quantization_config=values)
    with pytest.raises(ValueError, match=named):
        load(str(folder))
    change_config(folder, quantization_config=None, compression_config=values)
    with pytest.raises(ValueError, match=named):
        load(str(folder))


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_dequantized_by_transformers(folder, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    original = load_file(folder / "model.safetensors")
    low = folder.parent / "low"
    shutil.copytree(folder, low)
    (low / "model.safetensors").unlink()
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(low)
    found = load(str(low)).model.layers[0].mlp.up_proj.weight.float()
    want = original["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (found - want).abs().max() < (0.1 if bits == 4 else 0.01) * want.abs().max() * 2


@pytest.mark.skipif(not find_spec("compressed_tensors"), reason="needs compressed-tensors")
def test_packed_compressed_tensors_are_dequantized_by_transformers(tmp_path):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    tiny.save(tmp_path)
    exact = {}

    def pack(weights):
        for key in [key for key in weights if "_proj.weight" in key]:
            groups = weights.pop(key).unflatten(1, (-1, 32))
            scale = groups.abs().amax(-1) / 7
            whole = (groups / scale[..., None]).round()
            exact[key] = (whole * scale[..., None]).flatten(1)
            stem, whole = key.removesuffix("weight"), whole.flatten(1).to(torch.int8)
            weights[stem + "weight_packed"] = pack_to_int32(whole, 4)
            weights[stem + "weight_scale"] = scale
            weights[stem + "weight_shape"] = torch.tensor(whole.shape)

    change_weights(tmp_path, pack)
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    change_config(
        tmp_path,
        quantization_config=COMPRESSED
        | {
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
        },
    )
    found = load(str(tmp_path), torch.float32).model.layers[0].mlp.up_proj.weight
    want = exact["model.layers.0.mlp.up_proj.weight"]
    # transformers dequantizes to bfloat16, which has 8 bits
    torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-2)
