"""Every scheme of caching rotated keys decodes exactly what its definition computes."""

import functools
from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from observe import made, outputs
from repeats import but
from ropes import rope_parameters

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo.compression import metric
from eigenzoo.zoo.compression.allocate import Ranks
from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.fold import fold
from eigenzoo.zoo.compression.keys import KEYS, choose_keys
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.compression.solve import solve_pairs
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.models.attention import anchored_decode, latent_decode, lift
from eigenzoo.zoo.models.model import Model
from eigenzoo.zoo.models.rope import rotate

CONTEXT = 32  # of all models here; texts are longer, so that rotated keys need more than one block
MODELS = {
    "llama": lambda: tiny.native(max_position_embeddings=CONTEXT),
    "biases": lambda: tiny.native(max_position_embeddings=CONTEXT, attention_bias=True),
    "yarn": lambda: tiny.native(
        max_position_embeddings=CONTEXT, rope_parameters=rope_parameters("yarn-mscale"), head_dim=16
    ),
    "norms": lambda: normed(),
    "two rotations": lambda: tiny.native(  # scores are made smaller as in `normed`
        "gemma3_text", max_position_embeddings=CONTEXT, head_dim=8, query_pre_attn_scalar=2048
    ),
    "windows": lambda: tiny.native(
        "qwen2",
        max_position_embeddings=CONTEXT,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
}


def normed() -> Model:
    """A Qwen3 whose scores are as large as those of the other models: norms give longer vectors."""
    model = tiny.native("qwen3", max_position_embeddings=CONTEXT)
    for layer in model.layers:
        layer.attn.q_norm.weight *= 0.25
    return model


SCHEMES = {
    "rebuild": Settings(keep=0.6, keys="rebuild", kv_bits=(16,)),
    "anchored 3": Settings(keep=0.6, keys="anchored", anchor_block=3, kv_bits=(16,)),
    "anchored 16": Settings(keep=0.6, keys="anchored", anchor_block=16, kv_bits=(16,)),
    "rotated": Settings(keep=0.6, keys="rotated", kv_bits=(16,)),
    "pairs": Settings(keep=0.6, keys="pairs", kv_bits=(16,)),
    "full": Settings(keep=0.6, keys="full", kv_bits=(16,)),
}


CARDS = {
    "rebuild": "lifted and rotated when they are read",
    "anchored 3": "one query reads each block of 3",
    "anchored 16": "one query reads each block of 16",
    "rotated": f"one query reads each block of {CONTEXT}",
    "pairs": "cached rotated",
    "full": "Keys are whole",
}


@functools.cache
def held(name: str, scheme: str, shared: tuple[int, int] = (4, 2), method: str = "fisher") -> Model:
    """A model with about 0.6 of its ranks, which caches keys by `scheme`."""
    model = MODELS[name]()
    settings = SCHEMES[scheme]._replace(method=method, heads_per_latent=shared).fit(model.config)
    bases = solved(model, settings)
    k, v = (int(0.6 * s * model.config.head_dim) // 2 * 2 for s in settings.heads_per_latent)
    k = model.config.head_dim if scheme == "full" else k
    return fold(model, bases, Ranks((k, max(2, k - 2), k), (v,) * 3), settings.anchor(model.config))


def solved(model: Model, settings: Settings):
    """Bases of the model for settings that were fitted to it."""
    options = {"pairs": True} if settings.keys == "pairs" else {}
    statistics = gather(model, tiny.tokens(8, 64), settings)
    return METHODS[settings.method].bases(model, statistics, **options)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


SHARED = (1, 1), (4, 2), (2, 4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "shared"),
    but([*product(["biases"], SHARED), *product(MODELS, SHARED[1:2])], product(MODELS, SHARED)),
)
def test_decoding_equals_recomputing_far_beyond_a_block(name, scheme, shared):
    low, x = held(name, scheme, shared), tiny.tokens(2, 70)
    assert any(any(low.config.compressed(i)) for i in range(3))
    cache = low.new_cache(2, 77)  # no multiple of a block
    parts = torch.arange(70).split([9, 3, *[1] * 20, 30, *[1] * 8])
    close(torch.cat([low(x[:, p], p, cache) for p in parts], 1), low(x))


# the slots of padding in five prompts of 28 slots: none, on the left by one, by a block and by more
# with a hole behind, and on the right, where new tokens take the slots after it
PADDING = (), range(1), range(16), (*range(19), 22, 23), range(20, 28)


def padded():
    """Five texts of 41 slots and what is no padding in them."""
    valid = torch.ones(5, 41, dtype=torch.bool)
    for row, slots in zip(valid, PADDING, strict=True):
        row[list(slots)] = False
    return tiny.tokens(5, 41), valid


def decoded(low: Model, x, prompt: int, valid=None, bits: int = 16):
    """Logits of x, of which `prompt` tokens enter a cache at once, the others one by one."""
    cache = low.new_cache(*x.shape, bits=bits)
    parts = torch.arange(x.size(1)).split([prompt, *[1] * (x.size(1) - prompt)])
    return torch.cat([low(x[:, p], p, cache, valid) for p in parts], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name, scheme):
    low, (x, valid) = held(name, scheme), padded()
    whole, steps = low(x, valid=valid), decoded(low, x, 28, valid)
    for row, real in enumerate(valid):
        want = low(x[row, real][None])[0]
        close(whole[row, real], want)
        close(steps[row, real], want)


@pytest.mark.parametrize("scheme", ["anchored 3", "anchored 16", "rotated"])
@pytest.mark.parametrize("bits", [8, 4])
def test_padding_changes_nothing_of_a_packed_cache(scheme, bits):
    # in float32, another order of sums may change a code by one
    low, (x, valid) = deepcopy(held("biases", scheme, (4, 4))).double(), padded()
    steps = decoded(low, x, 28, valid, bits)
    for row, real in enumerate(valid):
        close(steps[row, real], decoded(low, x[row, real][None], real[:28].sum(), bits=bits)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_positions_that_start_again_begin_new_blocks(name, scheme):
    low, x, pos = held(name, scheme), tiny.tokens(1, 33), torch.arange(33)
    position = torch.cat((torch.arange(13), torch.arange(20)))[None]
    mask = torch.block_diag(torch.ones(13, 13), torch.ones(20, 20)).tril().bool()[None, None]
    y, metadata = low.start(x, position), low.attention_metadata(position, pos, mask)
    for layer in low.layers:
        y = layer(y, pos, metadata, None)
    close(low.head(low.finish(y)), torch.cat((low(x[:, :13]), low(x[:, 13:])), 1))


@pytest.mark.parametrize(
    ("scheme", "compiled"),
    [("anchored 3", False), ("anchored 16", False), ("rotated", False), ("anchored 3", True)],
)
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_prompts_of_different_lengths_are_answered_as_each_alone(scheme, compiled, backend):
    low = held("llama", scheme)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (1, 12, 20, 5)]
    batch = Generator(low, 4, 40, compile=compiled, compile_prefill=False).stream(prompts, 20)
    one = Generator(low, 1, 40, compile=False)
    alone = [torch.cat(list(one.stream([p], 20))) for p in prompts]
    assert torch.equal(torch.stack(list(batch), 1), torch.stack(alone))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "method"),
    but(
        [*product(MODELS, ["fisher"]), ("biases", "attention")],
        product(MODELS, ["fisher", "attention"]),
    ),
)
def test_full_rank_is_the_dense_model(name, scheme, method):
    model, x = MODELS[name](), tiny.tokens(2, 60)
    settings = SCHEMES[scheme]._replace(method=method, heads_per_latent=(4, 4)).fit(model.config)
    full = tuple(s * model.config.head_dim for s in settings.heads_per_latent)
    ranks = Ranks((full[0],) * 3, (full[1],) * 3)
    low = fold(model, solved(model, settings), ranks, settings.anchor(model.config))
    close(low(x), model(x))
    assert low.new_cache(1, 9).nbytes == model.new_cache(1, 9).nbytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("full", "pairs")])
def test_nearly_full_rank_is_nearly_the_dense_model(name, scheme):
    model, x = MODELS[name](), tiny.tokens(2, 60)
    settings = SCHEMES[scheme]._replace(heads_per_latent=(4, 4)).fit(model.config)
    wide = 4 * model.config.head_dim
    ranks = Ranks((wide - 1,) * 3, (wide,) * 3)
    low = fold(model, solved(model, settings), ranks, settings.anchor(model.config))
    assert all(layer.attn.k_up is not None for layer in low.layers)
    want = model(x)
    assert (low(x) - want).std() < 0.03 * want.std()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["fisher", "attention"])
def test_pairs_lose_nothing_where_heads_are_turned_and_scaled_copies(name, method):
    """Heads 1 and 3 are rotated, scaled copies of heads 0 and 2: half of the pairs are enough."""
    model, x = MODELS[name](), tiny.tokens(2, 60)
    d = model.config.head_dim
    angle = torch.linspace(0.3, 2.9, d // 2)
    for layer in model.layers:
        for p in layer.attn.k_proj.parameters():  # weight and bias
            heads = p.unflatten(0, (4, d))
            turned = rotate(heads[::2].transpose(1, -1), angle.cos(), angle.sin()).transpose(1, -1)
            heads[1::2] = 1.7 * turned
        if name in (
            "norms",
            "two rotations",
        ):  # only with equal weights for both numbers of a pair it can be turned
            layer.attn.k_norm.weight[d // 2 :] = layer.attn.k_norm.weight[: d // 2]
    settings = Settings(method, keep=0.6, keys="pairs", heads_per_latent=(4, 4), kv_bits=(16,)).fit(
        model.config
    )
    low = fold(model, solved(model, settings), Ranks((2 * d,) * 3, (4 * d,) * 3))
    close(low(x), model(x))
    assert 4 * low.config.kv_width == 3 * model.config.kv_width
    less = fold(model, solved(model, settings), Ranks((2 * d - 2,) * 3, (4 * d,) * 3))
    assert (less(x) - model(x)).abs().max() > 1e-3


def gram(latents: int, n: int, seed: int) -> torch.Tensor:
    x = torch.randn(latents, 3 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    return x.mT @ x / (3 * n)


def turn(angle: torch.Tensor, heads: int) -> torch.Tensor:
    """The matrix that rotates `heads` heads by one angle per frequency: (n, n)."""
    one = torch.block_diag(*[torch.eye(2 * len(angle), dtype=torch.float64)] * heads)
    return rotate(one.unflatten(1, (heads, -1)), angle.cos(), angle.sin()).flatten(1).mT


def test_pairs_let_the_rotation_pass_at_every_rank():
    b = solve_pairs(gram(2, 24, 0), gram(2, 24, 1), head_dim=8, damping=0.1)
    r = turn(torch.tensor([0.3, 1.1, 2.0, 4.0], dtype=torch.float64), heads=3)
    for rank in range(0, 25, 2):
        p = b.decoder[..., :rank] @ b.encoder[..., :rank].mT
        torch.testing.assert_close(p @ r, r @ p)
    torch.testing.assert_close(p, torch.eye(24, dtype=torch.float64).expand(2, 24, 24))


def test_the_spectrum_of_pairs_is_the_error_averaged_over_phases_at_every_rank():
    c, f = gram(2, 24, 0), gram(2, 24, 1)
    b = solve_pairs(c, f, head_dim=8, damping=0)
    quarters = torch.arange(4, dtype=torch.float64) * torch.pi / 2
    turns = torch.stack([turn(a, heads=3) for a in torch.cartesian_prod(*[quarters] * 4)])
    c, f = (torch.einsum("nij,ljk,nmk->lim", turns, x, turns) / len(turns) for x in (c, f))
    assert (b.spectrum.diff() <= 0).all()
    for rank in range(0, 25, 4):
        lost = torch.eye(24) - b.decoder[..., :rank] @ b.encoder[..., :rank].mT
        error = (f @ lost @ c @ lost.mT).diagonal(dim1=1, dim2=2).sum()
        torch.testing.assert_close(error, b.errors()[rank])


def test_columns_of_pairs_belong_to_the_frequencies_that_are_named():
    b = solve_pairs(gram(2, 24, 0), gram(2, 24, 1), head_dim=8, damping=0.1)
    assert b.pairs.shape == (2, 12)
    touched = b.encoder.unflatten(1, (3, 2, 4)).abs().sum((1, 2))  # (L, D / 2, n)
    named = torch.nn.functional.one_hot(b.pairs.repeat_interleave(2, 1), 4).mT
    assert torch.equal(touched > 0, named > 0)
    assert [sorted(row.tolist()) for row in b.pairs] == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 2
    assert not torch.equal(b.pairs[0], b.pairs[1])


def test_pairs_are_read_as_they_are_cached():
    longest = {
        scheme: max(shape.numel() for shape in made(held("llama", scheme), 37) if 37 in shape)
        for scheme in ("pairs", "rebuild")
    }
    assert longest["pairs"] == 37 * 8 < longest["rebuild"]  # scores of 8 heads


def test_pairs_are_cached_as_turned_as_keys_are():
    low, x = held("biases", "pairs"), tiny.tokens(1, 50)
    attn, cache = low.layers[0].attn, low.new_cache(1, 50)
    low(x, torch.arange(50), cache)
    k = attn.k_proj(low.layers[0].attn_norm(low.embed(x)))[:, None]  # before the rotation
    a, b = k.chunk(2, dim=-1)
    angle = torch.arange(50)[:, None] * low.inv_freq[0][attn.k_pairs[0]]
    want = torch.polar(torch.ones(()), angle) * torch.complex(a, b)
    close(cache.keys[0], torch.cat((want.real, want.imag), -1))


def test_rotated_is_anchored_in_one_block():
    model, x = MODELS["llama"](), tiny.tokens(8, 64)
    one = compress(
        model, x, Settings(keep=0.6, keys="rotated", rank_multiple=2, kv_bits=(16,))
    ).model
    two = compress(
        model,
        x,
        Settings(keep=0.6, keys="anchored", anchor_block=CONTEXT, rank_multiple=2, kv_bits=(16,)),
    ).model
    assert one.config == two.config
    weights = two.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in one.state_dict().items())


def test_a_block_far_longer_than_the_cache_costs_no_more_than_the_cache():
    low = compress(
        tiny.native(max_position_embeddings=4096),
        tiny.tokens(8, 64),
        Settings(keys="rotated", rank_multiple=2, keep=0.4, kv_bits=(16,)),
    ).model
    assert low.layers[0].attn.k_down is not None
    assert max(max(shape, default=0) for shape in made(low, 37)) < 4096


def test_anchored_with_blocks_of_one_is_rebuild():
    low, slots = held("biases", "rebuild", (2, 2)), 20
    attn, position = low.layers[0].attn, torch.arange(slots)[None]
    torch.manual_seed(0)
    q, z, v = torch.randn(1, 8, 1, 8), torch.randn(1, 2, slots, 8), torch.randn(1, 4, slots, 8)
    newest = torch.tensor([[slots - 1]])
    k = rotate(lift(z, attn.k_up, 8) + attn.k_mean, *low.rope(position, newest))
    span = torch.tensor([[0, slots]])
    want = latent_decode(rotate(q, *low.rope(newest, newest)), k, v, span, 0.3)
    ahead = low.rope(newest - position, newest)
    close(anchored_decode(q, z, v, span, 0.3, *ahead, attn.k_up, attn.k_mean, block=1), want)


def test_statistics_are_of_keys_turned_within_their_blocks():
    model, x = tiny.native(), tiny.tokens(2, 12)
    unturned, turned = (calibrate(model, x, (1, 1), anchor=a)[0].k for a in (1, 4))
    traces = [m.second.diagonal(dim1=1, dim2=2).sum(1) for m in (unturned, turned)]
    torch.testing.assert_close(*traces)  # a rotation keeps lengths
    assert not torch.allclose(unturned.second, turned.second, rtol=1e-2)
    one = calibrate(model, x[:1, :1], (1, 1), anchor=4)[0].k.second[0]
    key = model.layers[0].attn.k_proj(model.layers[0].attn_norm(model.embed(x[0, 0])))[:8]
    angle = -2 * model.inv_freq[0]  # the first slot of four lies two before the center
    a, b = key.chunk(2)
    phi = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
    torch.testing.assert_close(one.float(), phi[:, None] * phi, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("method", ["fisher", "attention"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_bytes_asked_for_are_met_whatever_the_keys(keys, method, multiple):
    dense, x = tiny.native(head_dim=16), tiny.tokens(4, 64)
    settings = Settings(method, 0.7, keys=keys, rank_multiple=multiple, kv_bits=(16,))
    done = compress(dense, x, settings)
    kept = done.model.new_cache(1, 7).nbytes / dense.new_cache(1, 7).nbytes
    assert 0.6 < kept <= 0.7
    assert kept == done.model.config.kv_width / dense.config.kv_width
    if keys == "full":
        assert all(k.shape == (1, 4, 7, 16) for k in done.model.new_cache(1, 7).keys)
        assert all(layer["k_error"] == 0 < layer["v_error"] for layer in done.layers)


@pytest.mark.parametrize("family", ["opt", "mpt"])
def test_full_keys_and_auto_need_no_rotation(family):
    dense, x = tiny.native(family), tiny.tokens(8, 64)
    low = compress(dense, x, Settings(keep=0.8, keys="full", rank_multiple=2, kv_bits=(16,))).model
    assert low.config.k_ranks == (8, 8, 8)
    assert low.config.kv_width <= 0.8 * dense.config.kv_width
    y, cache = tiny.tokens(2, 30), low.new_cache(2, 33)
    steps = [low(y[:, p], p, cache) for p in torch.arange(30).split([11, *[1] * 19])]
    close(torch.cat(steps, 1), low(y))
    auto, rebuild = (
        compress(dense, x, Settings(keep=0.6, keys=k, kv_bits=(16,))).model
        for k in ("auto", "rebuild")
    )
    assert torch.equal(auto(y), rebuild(y))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_checkpoint_runs_in_transformers_with_every_cache(tmp_path, scheme):
    tiny.save(tmp_path / "dense", attention_bias=True, max_position_embeddings=CONTEXT)
    settings = SCHEMES[scheme]._replace(keep=0.55, rank_multiple=1)
    original = load(str(tmp_path / "dense"))
    compress_checkpoint(original, tmp_path / "low", settings, samples=4, seq_len=CONTEXT)
    assert CARDS[scheme] in (tmp_path / "low" / "README.md").read_text()
    native = load(str(tmp_path / "low")).model
    theirs = EigenForCausalLM.from_pretrained(tmp_path / "low")
    x = tiny.tokens(1, 20)
    close(theirs(x).logits, native(x))
    want = list(Generator(native, 1, 40, compile=False).stream(x.tolist(), 20))
    padded, mask = tiny.tokens(2, 25, seed=3), torch.ones(2, 25, dtype=torch.long)
    padded[0, 5:], mask[0, :5] = x[0], 0
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for kind in ({}, {"cache_implementation": "static"}):
        options |= {"max_new_tokens": 20, "output_logits": True, **kind}
        alone = theirs.generate(x, **options)
        batch = theirs.generate(padded, attention_mask=mask, **options)
        assert alone.sequences[0, 20:].tolist() == torch.cat(want).tolist()
        close(torch.stack(batch.logits)[:, 0], torch.stack(alone.logits)[:, 0])


def test_frequencies_of_pairs_survive_every_way_of_casting_and_saving(tmp_path, dense):
    settings = Settings(keep=0.3, keys="pairs", rank_multiple=2, kv_bits=(16,))
    compress_checkpoint(dense, tmp_path / "low", settings, samples=4, seq_len=64)
    native = load(str(tmp_path / "low")).model
    theirs = EigenForCausalLM.from_pretrained(tmp_path / "low")
    theirs.save_pretrained(tmp_path / "again")
    half = EigenForCausalLM.from_pretrained(tmp_path / "low", dtype=torch.bfloat16)
    copies = [
        theirs.model,
        EigenForCausalLM.from_pretrained(tmp_path / "again").model,
        half.model,
        load(str(tmp_path / "low"), torch.bfloat16).model,
        load(str(tmp_path / "low")).model.to(torch.bfloat16),
    ]
    want = [layer.attn.k_pairs for layer in native.layers]
    assert len({tuple(p.flatten().tolist()) for p in want}) > 1
    for model in copies:
        got = [layer.attn.k_pairs for layer in model.layers]
        assert all(
            g.dtype == torch.long and torch.equal(g, w) for g, w in zip(got, want, strict=True)
        )
        assert model.layers[0].attn.k_up.dtype == model.dtype
    x = tiny.tokens(2, 25)
    close(copies[1](x), native(x))
    for model in copies[2:]:
        assert (model(x).float() - native(x)).std() < 0.05 * native(x).std()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("scheme", ["anchored 3", "rotated", "pairs"])
def test_one_graph_serves_every_length(scheme, backend):
    dense = tiny.native(num_hidden_layers=1, max_position_embeddings=CONTEXT)
    settings = SCHEMES[scheme]._replace(rank_multiple=2)
    low = compress(dense, tiny.tokens(8, 64), settings).model
    assert all(layer.attn.k_up is not None for layer in low.layers)
    prompts = [[5, 9, 33, 7, 120], [99, 3, 17, 200, 12, 77, 64, 5, 31]]
    uncompiled = Generator(low, 1, 45, compile=False)
    compiled = Generator(low, 1, 45)
    assert list(compiled.stream(prompts[:1], 20)) == list(uncompiled.stream(prompts[:1], 20))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert list(compiled.stream(prompts[1:], 30)) == list(uncompiled.stream(prompts[1:], 30))


def test_auto_says_what_it_chose_and_why():
    fitted = Settings(keep=0.6, keys="auto", kv_bits=(16,)).fit(tiny.native().config)
    assert (fitted.keys, fitted.anchor_block) == ("anchored", 16)
    assert "lifting every key" in fitted.keys_reason
    assert fitted.fit(tiny.native().config) == fitted
    assert (
        Settings(keep=0.6, keys="auto", anchor_block=64, kv_bits=(16,))
        .fit(tiny.native().config)
        .anchor_block
        == 64
    )
    for settings, model, named in (
        (Settings(keep=0.6, keys="auto", kv_bits=(16,)), tiny.native("opt"), "nothing rotates"),
        (
            Settings("eigen", keep=0.6, keys="auto", kv_bits=(16,)),
            tiny.native(),
            "defined with keys that are rebuilt",
        ),
        (Settings(keep=0.6, keys="auto", kv_bits=(16,)), changing("longrope"), "angles of this"),
        (Settings(keep=0.6, keys="auto", kv_bits=(16,)), changing("dynamic"), "angles of this"),
    ):
        fitted = settings.fit(model.config)
        assert fitted.keys == "rebuild"
        assert named in fitted.keys_reason
    assert (
        Settings(keep=0.6, keys="pairs", kv_bits=(16,)).fit(tiny.native().config).keys_reason
        is None
    )
    assert choose_keys(tiny.native().config).keys in KEYS


def changing(kind: str) -> Model:
    """A model whose angles change with the length of the text."""
    return tiny.native(rope_parameters=rope_parameters(kind), head_dim=16)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(keep=0.6, keys="turned", kv_bits=(16,)), "keys 'turned' is unknown"),
        (Settings(keep=0.6, keys="anchored", anchor_block=1, kv_bits=(16,)), "anchor block is 1"),
        (Settings("eigen", keep=0.6, keys="anchored", kv_bits=(16,)), "eigen rebuilds"),
        (Settings("eigen", keep=0.6, keys="full", kv_bits=(16,)), "eigen rebuilds"),
        (Settings("kv-heads", 0.5, keys="pairs", kv_bits=(16,)), "kv-heads cannot make pairs"),
        (
            Settings(keep=0.6, keys="full", latent="joint-kv", kv_bits=(16,)),
            "keys cannot stay full",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        settings.check()


@pytest.mark.parametrize("keys", ["anchored", "pairs", "rotated"])
def test_what_cannot_be_cached_turned_is_refused_before_the_work(keys):
    with pytest.raises(ValueError, match=f"nothing rotates .* none can be {keys}"):
        Settings(keep=0.6, keys=keys, kv_bits=(16,)).fit(tiny.native("opt").config)
    for kind in ("longrope", "dynamic"):
        with pytest.raises(ValueError, match=f"with {kind} RoPE"):
            Settings(keep=0.6, keys=keys, kv_bits=(16,)).fit(changing(kind).config)


def test_full_keys_leave_too_little_for_values():
    with pytest.raises(ValueError, match=r"beside whole keys: expected at least 0\.6"):
        compress(tiny.native(), tiny.tokens(4, 32), Settings(keep=0.5, keys="full", kv_bits=(16,)))


def test_pairs_of_odd_rank_are_refused():
    with pytest.raises(ValueError, match="even ranks"):
        replace(tiny.native().config, pairs=True, k_ranks=(4, 3, 4))


@pytest.mark.parametrize(
    ("keep", "bits", "block"),
    [(0.25, None, 64), (0.6, (16, 4), 64), (0.24, None, 16), (0.6, (16,), 16)],
)
def test_blocks_are_long_where_the_cache_has_segments_and_is_not_small(keep, bits, block):
    config = tiny.native().config
    assert Settings(keep=keep, kv_bits=bits).fit(config).anchor_block == block
    assert Settings(keep=keep, kv_bits=bits, keys="anchored").anchor(config) == block


def test_statistics_of_keys_in_other_blocks_are_refused():
    model, tokens = tiny.native(), tiny.tokens(2, 16)
    seen = gather(model, tokens, Settings(keep=0.25).fit(model.config))
    with pytest.raises(ValueError, match=r"blocks of 64, .* in blocks of 16: gather"):
        compress(model, tokens, Settings(keep=0.2), seen)
    compress(model, tokens, Settings(keep=0.2, anchor_block=64), seen)


def two_rotations(whole: float, local: float, period: int = 3) -> Model:
    """A Gemma 3 by the bases of its angles; layers are local but for every `period`-th."""
    ropes = {"full_attention": whole, "sliding_attention": local}
    ropes = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in ropes.items()}
    changes = {"rope_parameters": ropes, "sliding_window_pattern": period, "head_dim": 8}
    return tiny.native("gemma3_text", **changes)


@pytest.mark.parametrize(("period", "base"), [(3, 20.0), (2, 5000.0)])  # layer 1 is local or not
def test_statistics_are_of_keys_turned_by_the_angles_of_their_layer(period, base):
    model, x = two_rotations(5000.0, 20.0, period), tiny.tokens(1, 40)
    angle = (torch.arange(40) % 16 - 8)[:, None] / base ** (torch.arange(0, 8, 2) / 8)
    heads = outputs(model, x, "k").unflatten(-1, (4, 8)).transpose(0, 1)
    turned = rotate(heads, angle.cos(), angle.sin())
    got = calibrate(model, x, anchor=16)[1].k.second
    torch.testing.assert_close(got, turned.mT @ turned / 40, atol=1e-4, rtol=1e-4)


def test_metrics_of_keys_are_averaged_over_the_angles_of_their_layer():
    fours = gram(4, 8, 2)
    apart, alike = two_rotations(5000.0, 20.0), two_rotations(20.0, 20.0)
    local, whole = (metric.turned(apart, apart.layers[i].attn, fours) for i in (0, 2))
    torch.testing.assert_close(local, metric.turned(alike, alike.layers[2].attn, fours))
    assert (local - whole).abs().max() > 0.1
