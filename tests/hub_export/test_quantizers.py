"""Quantizers and adapters of others find every linear layer of a compressed checkpoint.

Those that are not installed here are skipped; `test_linear.py` states what they all need.
"""

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from eigenzoo.hub_export import register
from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load

assert register  # its import registers the classes, so none come from checkpoints
IDS = torch.arange(2, 42).view(2, 20)
MODELS = {  # sizes of which bitsandbytes can make blocks
    "llama": {"tie_word_embeddings": True, "hidden_size": 128, "intermediate_size": 128},
    "mpt": {"attn_config": {"clip_qkv": 0.4}},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    tiny.save(place / "dense", request.param, **MODELS[request.param])
    dense, settings = (
        load(str(place / "dense")),
        Settings(keep=0.6, rank_multiple=16, kv_bits=(16,)),
    )
    compress_checkpoint(dense, place / "low", settings, samples=4, seq_len=32)
    return place / "low"


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, ops="reference", **options)


NOT_NEEDED = "this quantizer is not installed: eigenzoo does not depend on it"


def four_bits(folder):
    pytest.importorskip("bitsandbytes", reason=NOT_NEEDED)
    return loaded(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def eight_bits(folder):
    pytest.importorskip("bitsandbytes", reason=NOT_NEEDED)
    return loaded(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def torchao(folder):
    quantization = pytest.importorskip("torchao.quantization", reason=NOT_NEEDED)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return loaded(folder, quantization_config=config)


def torchao_later(folder):
    quantization, model = (
        pytest.importorskip("torchao.quantization", reason=NOT_NEEDED),
        loaded(folder),
    )
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(folder):
    pytest.importorskip("optimum.quanto", reason=NOT_NEEDED)
    return loaded(folder, quantization_config=QuantoConfig(weights="int8"))


def dynamic(folder):
    return torch.ao.quantization.quantize_dynamic(loaded(folder), {nn.Linear})


WAYS = {  # how, largest error of the logits, as a share
    "bitsandbytes 4 bits": (four_bits, 0.5),
    "bitsandbytes 8 bits": (eight_bits, 0.1),
    "torchao": (torchao, 0.1),
    "torchao after loading": (torchao_later, 0.1),
    "quanto": (quanto, 0.1),
    "torch's dynamic": (dynamic, 0.3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_a_quantizer_replaces_every_layer_but_the_head_and_the_model_still_decodes(folder, way):
    quantize, error = WAYS[way]
    model, original = quantize(folder), loaded(folder)
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear and _dense(m.weight)]
    assert set(left) <= {"model.head"}
    want, got = original(IDS).logits, model(IDS).logits.float()
    assert 0 < (got - want).std() / want.std() < error
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert model.generate(IDS, **greedy).shape == (2, 26)  # one token at a time, by their layers
    cached = model(IDS[:, -1:], cache=model(IDS[:, :-1]).to_tuple()[-1]).logits[:, -1]
    # dynamic activations have scales of their own in each call
    torch.testing.assert_close(cached.float(), got[:, -1], atol=error, rtol=0.1)


def _dense(weight) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def test_an_adapter_counts_when_one_token_is_decoded(folder):
    model, x = loaded(folder), IDS[:, :1]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    for module in model.modules():  # as the fused ops are installed
        if hasattr(module, "linear_decode"):
            module.linear_decode = _product
    with torch.no_grad():
        got = adapted(x).logits
        merged = adapted.merge_and_unload()
        assert not [m for m in merged.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        # merging rounds the sum of both weights to fp32
        torch.testing.assert_close(got, merged(x).logits, atol=1e-4, rtol=1e-4)


def _product(x, weight, scale, bias):
    return nn.functional.linear(x, weight, bias)
