"""Several processes that share a model answer what the native model answers."""

from weakref import ref

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: pip install 'eigenzoo[vllm]'")

import torch
from exported import of_kind
from served import native, prompts, served, serving, write

from eigenzoo.serving import parallel
from eigenzoo.serving.parallel import Share, allocate, native_weights, new_part
from eigenzoo.zoo.inference.weights import fill

PACKED = {"k_segments": ("2x8+4x4",) * 3, "v_segments": ("", "4x8+4x4", "3x8"), "centered": True}
ONE = {"k_heads_per_latent": 4, "v_heads_per_latent": 4, "v_ranks": (20, 8, 3), "key_mean": True}
JOINT = {
    "joint_kv": True,
    "k_ranks": (12, 6, 9),
    "v_ranks": (0,) * 3,
    "k_heads_per_latent": 8,
    "v_heads_per_latent": 8,
}
CASES = {  # kind, changes of the config, processes
    "anchored keys, packed": ("anchored keys", PACKED, 2),
    "anchored keys, one latent": ("anchored keys", ONE, 2),
    "anchored keys, one latent, packed": ("anchored keys", PACKED | {"k_heads_per_latent": 4}, 4),
    "rebuilt keys, one latent, more processes than kv heads": ("rebuilt keys", ONE, 8),
    "pairs, one latent": ("pairs", {"k_heads_per_latent": 4}, 2),
    "full keys, one kv head": ("full keys", {"num_key_value_heads": 1}, 2),
    "windows, odd vocabulary": ("windows", {"vocab_size": 321}, 2),
    "norms": ("normed, anchored keys", {}, 2),
    "norms, one latent": ("normed, rebuilt keys", ONE, 2),
    "scaled embeddings": ("two rotations, anchored keys", {}, 2),
    "experts": ("experts", {}, 2),
    "OPT": ("learned positions", PACKED, 4),
    "OPT, one joint latent": ("learned positions", JOINT, 2),
    "MPT": ("ALiBi", {}, 2),
}
EVERYWHERE = ("norm", "positions", "o_proj.bias", "down_proj.bias")
TWO = {"distributed_executor_backend": "mp", "worker_extension_cls": "sizes.Sizes"}


def parts_of(whole, count: int) -> list:
    """A native model's parts, with their weights."""
    parts = []
    for i in range(count):
        share = Share(whole.config, i, count)
        part = allocate(new_part(share)).requires_grad_(False)
        fill(whole.config, native_weights(part), whole.state_dict().items(), share.of)
        parts.append(part)
    return parts


@pytest.mark.parametrize("case", CASES)
def test_what_parts_of_a_model_return_adds_up(case, monkeypatch):
    monkeypatch.setattr(parallel, "tensor_model_parallel_all_reduce", lambda x: x)
    kind, changes, count = CASES[case]
    whole = of_kind(kind, **changes).model
    models = [whole, *parts_of(whole, count)]
    caches = [model.new_cache(1, 24) for model in models]
    for new in (torch.arange(18), torch.arange(18, 19)):  # a prompt, then one token
        ids, x = torch.randint(2, 320, (1, len(new))), torch.randn(1, len(new), 64)
        begun = [m.begin(ids, new, cache) for m, cache in zip(models, caches, strict=True)]
        adds_up([m.embed(ids) for m in models])
        torch.testing.assert_close(
            torch.cat([m.head(x) for m in models[1:]], -1)[..., : whole.config.vocab_size],
            whole.head(x),
        )
        for i in range(3):
            adds_up(
                [
                    m.layers[i].attn(x, pos, metadata, cache.layer(i))
                    for m, cache, (_, pos, metadata) in zip(models, caches, begun, strict=True)
                ]
            )
            results = [m.layers[i].mlp(x) for m in models]
            adds_up(results[:2] if kind == "experts" else results)  # which are whole in each part


def adds_up(results: list[torch.Tensor]) -> None:
    """The first is the sum of the others."""
    torch.testing.assert_close(sum(results[1:]), results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["anchored keys, packed", "OPT"])
def test_each_process_holds_its_share_of_latents_and_matrices(case):
    kind, changes, count = CASES[case]
    whole = of_kind(kind, **changes).model
    for part in parts_of(whole, count):
        for name, x in native_weights(part).items():
            everywhere = any(word in name for word in EVERYWHERE)
            held = x.untyped_storage().nbytes() * (1 if everywhere else count)
            assert held == whole.get_parameter(name).nbytes


def test_no_process_holds_a_whole_model_while_it_loads():
    whole = of_kind("anchored keys").model
    share, read = Share(whole.config, 0, 2), []

    def weights():
        for name, x in whole.state_dict().items():
            assert sum(ref() is not None for ref in read) <= 1  # the last one
            copy = x.clone()
            read.append(ref(copy))
            yield name, copy
            del copy

    part = new_part(share)
    assert all(x.is_meta for x in part.parameters())
    allocate(part).requires_grad_(False)
    fill(whole.config, native_weights(part), weights(), share.of)
    assert len(read) > 20


@pytest.mark.parametrize(
    ("kind", "changes", "count", "message"),
    [
        ("anchored keys", {}, 4, "layer 0 has 8 heads, 2 latents of keys and 4 of values, which 4"),
        ("rebuilt keys", ONE, 3, "layer 0 has 8 heads, 1 latents of keys and 1 of values, which 3"),
        ("full keys", {"intermediate_size": 97}, 2, "gate_proj.weight has 97 numbers in 2 parts"),
    ],
)
def test_what_cannot_be_split_evenly_is_named(kind, changes, count, message):
    config = of_kind(kind, **changes).model.config
    with pytest.raises(ValueError, match=message):
        new_part(Share(config, 0, count))


TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
TENSOR = {"tensor_parallel_size": 2}
LAYERS = {"pipeline_parallel_size": 2} | TRACED  # on a CPU vLLM cannot do it in eager mode
ANSWERS = {  # kind, changes of the config, options, how much of each layer's cache a process holds
    "several latents": ("anchored keys", PACKED, TENSOR, [(0.5,) * 3] * 2),
    "one latent": ("anchored keys", ONE, TENSOR, [(1,) * 3] * 2),
    "OPT, traced": ("learned positions", PACKED, TENSOR | TRACED, [(0.5,) * 3] * 2),
    "layers of Llama": ("rebuilt keys", PACKED, LAYERS, [(1, 1, 0), (0, 0, 1)]),
    "layers of MPT": ("ALiBi", PACKED, LAYERS, [(1, 1, 0), (0, 0, 1)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ANSWERS)
def test_two_processes_answer_as_the_native_model(case, tmp_path):
    kind, changes, options, held = ANSWERS[case]
    exported = of_kind(kind, **changes)
    model, texts = exported.model, prompts([1, 17, 50])
    with serving(write(exported, tmp_path), **TWO, **options) as llm:
        assert served(llm, texts, 10) == native(model, texts, 10)
        rows, weights = zip(*llm.collective_rpc("sizes"), strict=True)
    layers = [sum(x.nbytes(torch.float32) for x in model.config.latents(i)) for i in range(3)]
    assert [*rows] == [sum(x * y for x, y in zip(layers, part, strict=True)) for part in held]
    assert max(weights) < 0.75 * sum(x.nbytes for x in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size 4: layer 0 has 8 heads, 2 latents"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size 4: pass at most 3"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size 2 and --enforce-eager on a CPU"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_loading(options, message, tmp_path):
    folder = write(of_kind("anchored keys"), tmp_path)
    with pytest.raises(ValueError, match=message), serving(folder, **TWO, **options):
        pass
