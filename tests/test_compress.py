import pytest
import tiny
import torch

from eigenzoo.zoo.compress import Settings, compress
from eigenzoo.zoo.llama import LlamaConfig


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (3, 3), (4, 4), (5, 1), (8, 4), (32, 4)])
def test_up_to_four_heads_share_a_latent_unless_told(heads, shared):
    sizes = (
        tiny.ROTARY | {"head_dim": 8} | {"num_attention_heads": heads, "num_key_value_heads": heads}
    )
    config = LlamaConfig(**sizes)
    assert Settings().fit(config).heads_per_latent == (shared, shared)
    assert Settings("eigen").fit(config).heads_per_latent == (1, 1)


@pytest.mark.parametrize("method", ["fisher", "attention", "eigen"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_every_method_meets_the_bytes_asked_for(method, keep):
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    low = compress(dense, x, Settings(method, keep)).model
    kept = low.new_cache(1, 7).nbytes / dense.new_cache(1, 7).nbytes
    assert keep - 0.1 < kept <= keep


def test_the_same_tokens_give_the_same_model():
    x = tiny.tokens(4, 64)
    one, two = (compress(tiny.native(), x).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_dense_model_is_left_as_it_was():
    dense, x = tiny.native(attention_bias=True), tiny.tokens(4, 64)
    before = {name: w.clone() for name, w in dense.state_dict().items()}
    compress(dense, x)
    assert all(torch.equal(w, before[name]) for name, w in dense.state_dict().items())
