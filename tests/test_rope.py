import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eigenzoo.zoo.rope import frequencies, rotate

ORIGINAL = {"original_max_position_embeddings": 64}
FACTORS = {
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "yarn-mscale": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1, **ORIGINAL},
    "yarn-betas": {"factor": 4.0, "beta_fast": 8, "beta_slow": 2, "truncate": False, **ORIGINAL},
    "longrope": {"factor": 4.0, **FACTORS, **ORIGINAL},
    "longrope-scaled": {"attention_factor": 1.3, **FACTORS, **ORIGINAL},
}


def rope_parameters(name: str) -> dict:
    return {"rope_type": name.split("-")[0], "rope_theta": 5000.0, **ROPES[name]}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [40, 100])  # longrope turns to its long factors after 64
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
def test_unknown_types_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=kind):
        frequencies({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}, 16, 64)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16)
    angle = torch.arange(50)[:, None] * frequencies({"rope_theta": 1e4}, 16, 64)[0][0]
    turned = [rotate(x.expand(50, 16), angle.cos(), angle.sin()) for x in (q, k)]
    scores = turned[0] @ turned[1].T
    torch.testing.assert_close(scores.diagonal(7), scores[0, 7].expand(43))
