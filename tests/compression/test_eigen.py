"""Each statement of Eigen Attention (arXiv 2408.05646), checked by direct linear algebra."""

import pytest
import tiny
import torch
from observe import outputs

from eigenzoo.zoo.compression.allocate import Ranks, threshold_rank
from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.fold import fold
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.search import ErrorBudget
from eigenzoo.zoo.models.model import Model
from eigenzoo.zoo.models.rope import rotate

MODELS = {
    "opt": lambda: tiny.native("opt"),
    "mpt": lambda: tiny.native("mpt"),
    "mpt grouped": lambda: tiny.FoundryMPT(
        {"attn_type": "grouped_query_attention", "kv_n_heads": 4}, no_bias=False
    ).native(),
    "llama": lambda: tiny.native(attention_bias=True),
}
ABSORBED = ["opt", "mpt", "mpt grouped"]


def heads(model: Model, x: torch.Tensor, name: str) -> torch.Tensor:
    """Output of a projection of layer 1, bias included, before any rotation: (heads, N, 8)."""
    return outputs(model, x, name).unflatten(-1, (-1, 8)).transpose(0, 1)


def solved(model: Model, x: torch.Tensor):
    return METHODS["eigen"].bases(model, calibrate(model, x, queries=True))


def check(basis, latent: int, rows: torch.Tensor, tokens: int) -> None:
    """The basis is that of rows (N, 8): singular vectors up to sign, uncentered, and values."""
    _, values, vt = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(basis.spectrum[latent], values**2 / tokens, atol=1e-4, rtol=1e-4)
    for r in (1, 3, 6):
        u, want = basis.encoder[latent, :, :r], vt[:r].T @ vt[:r]
        torch.testing.assert_close(u @ u.T, want, atol=1e-4, rtol=0)
        assert torch.equal(u, basis.decoder[latent, :, :r])
    for threshold in torch.linspace(0.98, 0.02, 49).tolist():  # a share of values, not of squares
        share = values.cumsum(0) / values.sum()
        smallest = int((share < threshold).sum()) + 1
        assert threshold_rank(basis.spectrum[[latent]], threshold) == smallest
    assert not basis.mean.any()


@pytest.mark.parametrize("name", ABSORBED)
def test_keys_and_queries_of_a_head_are_stacked(name):
    model, x = MODELS[name](), tiny.tokens(6, 64)
    k, q = heads(model, x, "k_proj"), heads(model, x, "q_proj")
    basis = solved(model, x)[1].k
    for i, own in enumerate(q.unflatten(0, (len(k), -1))):  # the queries of kv head i
        check(basis, i, torch.cat((k[i], *own)), k.size(1))


def test_with_a_rotation_one_basis_a_layer_holds_the_keys_before_it_and_no_queries():
    model, x = MODELS["llama"](), tiny.tokens(6, 64)
    k, basis = heads(model, x, "k_proj"), solved(model, x)[1].k
    for i in range(4):
        check(basis, i, k.flatten(0, 1), k.size(1))


@pytest.mark.parametrize("name", MODELS)
def test_values_have_a_basis_a_kv_head(name):
    model, x = MODELS[name](), tiny.tokens(6, 64)
    v, basis = heads(model, x, "v_proj"), solved(model, x)[1].v
    for i, rows in enumerate(v):
        check(basis, i, rows, v.size(1))


@pytest.mark.parametrize("name", MODELS)
def test_attention_runs_in_the_folded_basis_with_the_scale_of_whole_heads(name):
    model, x = MODELS[name](), tiny.tokens(1, 40)
    bases = solved(model, tiny.tokens(6, 64))
    low = fold(model, bases, Ranks((5,) * 3, (6,) * 3))
    q, k, v = (heads(model, x, f"{p}_proj") for p in "qkv")
    k_kept, v_kept = (
        b.decoder[..., :r] @ b.encoder[..., :r].mT for b, r in zip(bases[1], (5, 6), strict=True)
    )
    k, v = (
        (z @ kept).repeat_interleave(len(q) // len(k), dim=0)
        for z, kept in ((k, k_kept), (v, v_kept))
    )
    if name == "llama":
        pos = torch.arange(40)
        q, k = (rotate(z, *(a[0, 0].double() for a in model.rope(pos[None], pos))) for z in (q, k))
    scores = q @ k.mT * 8**-0.5
    distance = torch.arange(40) - torch.arange(40)[:, None]
    if name.startswith("mpt"):  # ALiBi: slopes 1/2, 1/4, ...
        scores = scores + 2.0 ** -torch.arange(1, 9)[:, None, None] * distance
    y = scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ v
    o = model.layers[1].attn.o_proj
    want = y.transpose(0, 1).flatten(1) @ o.weight.double().T
    if o.bias is not None:
        want = want + o.bias
    seen, pos, attn_metadata = model.begin(x)
    seen = model.layers[0](seen, pos, attn_metadata, None)
    got = low.layers[1].attn(model.layers[1].attn_norm(seen), pos, attn_metadata, None)
    torch.testing.assert_close(got[0].double(), want, atol=1e-4, rtol=0)
    assert low.new_cache(1, 1).nbytes == 3 * (5 + 6) * model.config.num_key_value_heads * 4


@pytest.mark.parametrize("name", MODELS)
def test_one_threshold_gives_the_ranks_of_keys_and_values_of_a_layer(name):
    model, x = MODELS[name](), tiny.tokens(4, 64)
    bases = solved(model, x)
    search = ErrorBudget(model, bases, x, multiple=1)
    for basis, chosen in zip(bases, search.choose(0.05), strict=True):
        assert 0 < chosen.threshold < 1
        assert chosen.k_rank == threshold_rank(basis.k.spectrum, chosen.threshold)
        assert chosen.v_rank == threshold_rank(basis.v.spectrum, chosen.threshold)
