import pytest
import torch
from ropes import ROPES, rope_parameters
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eigenzoo.zoo.models.rope import frequencies, rotate


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [40, 100])  # longrope uses its long factors from length 64 on
def test_angles_are_those_of_transformers(name, length):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=rope_parameters(name),
    )
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    inv_freq, scale = frequencies(config.rope_parameters, 16, 256)
    angle = positions[..., None] * inv_freq[-1 if length > 64 else 0]
    torch.testing.assert_close(angle.cos() * scale, cos[..., :8])
    torch.testing.assert_close(angle.sin() * scale, sin[..., :8])


@pytest.mark.parametrize("kind", ["dynamic", "proportional"])
def test_an_unknown_type_raises_an_error_that_names_it(kind):
    with pytest.raises(ValueError, match=kind):
        frequencies({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, 16, 64)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16)
    angle = torch.arange(50)[:, None] * frequencies({"rope_theta": 1e4}, 16, 64)[0][0]
    turned = [rotate(x.expand(50, 16), angle.cos(), angle.sin()) for x in (q, k)]
    scores = turned[0] @ turned[1].T
    torch.testing.assert_close(scores.diagonal(7), scores[0, 7].expand(43))
