import pytest
import tiny
import torch

from eigenzoo.zoo.bench import SHAPES, bench, random_model, shaped, uniform, weight_bytes
from eigenzoo.zoo.compress import Settings
from eigenzoo.zoo.families import new_model
from eigenzoo.zoo.keys import KEYS

BILLIONS = {
    "opt-125m": 0.125,
    "opt-1.3b": 1.3,
    "opt-6.7b": 6.7,
    "mpt-7b": 6.65,
    "mpt-30b": 30.0,
    "llama-2-7b": 6.74,
    "llama-3.1-8b": 8.03,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = new_model(SHAPES[name])
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(1e9 * BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", ["opt-1.3b", "mpt-7b", "llama-3.1-8b"])
@pytest.mark.parametrize("shared", [1, 4])
def test_uniform_ranks_keep_what_was_asked(name, shared):
    config = shaped(name, 4, 8192)
    low = uniform(config, Settings(heads_per_latent=(shared, shared)).fit(config))
    assert 0.49 < low.kv_width / low.dense_kv_width <= 0.6
    assert low.max_position_embeddings >= 8192


@pytest.mark.parametrize("keys", KEYS)
def test_random_models_decode_whatever_the_keys(keys):
    config = tiny.native(head_dim=16).config
    low = uniform(config, Settings(keep=0.7, keys=keys, rank_multiple=3).fit(config))
    assert 0.6 < low.kv_width / low.dense_kv_width <= 0.7
    model = random_model(low, torch.float32, torch.device("cpu"))
    rows = bench({"low": model}, [20], steps=3, rounds=1, compile=False)
    assert rows[0]["kv_bytes_read"] == 20 * 4 * low.kv_width
    assert model(tiny.tokens(1, 20)).isfinite().all()


def test_whole_keys_are_more_than_half_of_the_bytes():
    config = tiny.native().config
    with pytest.raises(ValueError, match=r"keep is 0.5: keys that stay full"):
        uniform(config, Settings(keep=0.5, keys="full").fit(config))


def test_a_step_reads_all_weights_but_the_tables_it_looks_up():
    model = tiny.native("opt")
    tables = model.positions.weight.numel()  # the embedding is the head: it is read
    assert weight_bytes(model) == 4 * (sum(p.numel() for p in model.parameters()) - tables)
    untied = tiny.native()
    assert weight_bytes(untied) == 4 * sum(
        p.numel() for name, p in untied.named_parameters() if name != "embed.weight"
    )


def test_rows_hold_ratios_of_one_run():
    config = tiny.native("opt").config
    settings = Settings(keep=0.5, heads_per_latent=(2, 2), rank_multiple=1)
    low = uniform(config, settings.fit(config))
    kind = torch.float32, torch.device("cpu")
    models = {"dense": random_model(config, *kind), "compressed": random_model(low, *kind)}
    dense, small = bench(models, [64], batch=2, steps=3, rounds=2, compile=False)
    assert dense["speedup"] == dense["speedup_of_bytes"] == 1
    assert small["speedup"] == pytest.approx(dense["seconds_per_step"] / small["seconds_per_step"])
    assert dense["kv_bytes_read"] == 2 * 64 * 4 * config.kv_width == 2 * small["kv_bytes_read"]
    read = small["weight_bytes_read"] + small["kv_bytes_read"]
    assert small["floor_seconds"] == pytest.approx(read / small["bandwidth"])
    assert small["kv_read_share"] == small["kv_bytes_read"] / read
