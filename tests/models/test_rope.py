import pytest
import tiny
import torch
from ropes import ROPES, rope_parameters
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eigenzoo.zoo.inference.checkpoint import native_config
from eigenzoo.zoo.models.families import FAMILIES
from eigenzoo.zoo.models.rope import at_length, frequencies, rotate, steady_length


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [40, 100])  # some angles change after 64 tokens
def test_angles_are_those_of_transformers(name, length):
    context = 64 if name == "dynamic" else 256
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters=rope_parameters(name),
    )
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    inv_freq, scale = frequencies(config.rope_parameters, 16, context)
    inv_freq = at_length(inv_freq, config.rope_parameters, context, positions)
    angle = positions[..., None] * inv_freq
    torch.testing.assert_close(angle.cos() * scale, cos[..., :8])
    torch.testing.assert_close(angle.sin() * scale, sin[..., :8])


@pytest.mark.parametrize("kind", ["ntk", "proportional"])
def test_an_unknown_type_raises_an_error_that_names_it(kind):
    with pytest.raises(ValueError, match=kind):
        frequencies({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, 16, 64)


@pytest.mark.parametrize("name", ROPES)
def test_angles_are_the_same_up_to_the_length_where_they_change(name):
    rope = rope_parameters(name)
    inv_freq, steady = frequencies(rope, 16, 256)[0], steady_length(rope, 256)
    one, last, more = (at_length(inv_freq, rope, 256, torch.tensor([x])) for x in (0, 63, 256))
    assert torch.equal(last, one)
    assert torch.equal(more, one) == (steady is None)
    if steady is not None:
        assert torch.equal(at_length(inv_freq, rope, 256, torch.tensor([steady - 1])), one)
        assert not torch.equal(at_length(inv_freq, rope, 256, torch.tensor([steady])), one)


ROTARY = [name for name, x in FAMILIES.items() if x.config.rotary]


@pytest.mark.parametrize("family", [x for x in ROTARY if x != "gemma3_text"])  # has two rotations
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_every_spelling_of_a_rotation_is_read(family, kind):
    raw = tiny.hf(family).config.to_dict()
    rope = rope_parameters(kind)
    scaling = {name: x for name, x in rope.items() if name not in ("rope_type", "rope_theta")}
    del raw["rope_parameters"]
    configs = [
        native_config(raw | spelling)
        for spelling in (
            {"rope_parameters": rope},
            {"rope_theta": 5000.0, "rope_scaling": scaling | {"rope_type": kind}},
            {"rope_theta": 5000.0, "rope_scaling": scaling | {"type": kind}},  # of 2023
        )
    ]
    for config in configs:
        assert config.rope_parameters.items() >= rope.items()


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16)
    angle = torch.arange(50)[:, None] * frequencies({"rope_theta": 1e4}, 16, 64)[0][0]
    turned = [rotate(x.expand(50, 16), angle.cos(), angle.sin()) for x in (q, k)]
    scores = turned[0] @ turned[1].T
    torch.testing.assert_close(scores.diagonal(7), scores[0, 7].expand(43))
