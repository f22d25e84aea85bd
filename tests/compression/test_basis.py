import pytest
import tiny
import torch
from observe import outputs

from eigenzoo.zoo.compression.allocate import Ranks
from eigenzoo.zoo.compression.basis_published import clover_weights, lorc_weights, palu_weights
from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.fold import fold
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.solve import solve


def gram(latents: int, n: int, seed: int) -> torch.Tensor:
    x = torch.randn(latents, 3 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    return x.mT @ x / (3 * n)


def test_full_rank_reconstructs_exactly():
    b = solve(gram(2, 12, 0), gram(2, 12, 1), torch.zeros(2, 12), damping=0.1)
    eye = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    torch.testing.assert_close(b.decoder @ b.encoder.mT, eye)


def test_spectrum_is_the_error_at_every_rank():
    c, f = gram(2, 12, 0), gram(2, 12, 1)
    b = solve(c, f, torch.zeros(2, 12), damping=0)
    for r in range(13):
        lost = torch.eye(12) - b.decoder[..., :r] @ b.encoder[..., :r].mT
        error = (f @ lost @ c @ lost.mT).diagonal(dim1=1, dim2=2).sum()
        torch.testing.assert_close(error, b.errors()[r])


def test_no_other_latent_of_that_rank_loses_less():
    c, f = gram(1, 10, 0), gram(1, 10, 1)
    b = solve(c, f, torch.zeros(1, 10), damping=0)
    for seed in range(20):
        e = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(seed)).double()
        d = c @ e @ (e.mT @ c @ e).inverse()  # the best decoder for this encoder
        lost = torch.eye(10) - d @ e.mT
        assert (f @ lost @ c @ lost.mT).diagonal(dim1=1, dim2=2).sum() > b.errors()[4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_every_method_sorts_its_columns_and_is_exact_at_full_rank(method, shared):
    model, needs = tiny.native(attention_bias=True), METHODS[method]
    s = calibrate(model, tiny.tokens(4, 64), (shared, shared), needs.gradients, needs.queries)
    for basis in (b for layer in needs.bases(model, s) for b in layer):
        n = basis.spectrum.size(1)
        assert (basis.spectrum.diff() <= 1e-12).all()
        eye = torch.eye(n, dtype=torch.float64).expand(4 // shared, n, n)
        torch.testing.assert_close(basis.decoder @ basis.encoder.mT, eye, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_predicted_tail_error_is_the_measured_one_on_the_calibration_set(name):
    model, x = tiny.native(attention_bias=True), tiny.tokens(6, 64)
    basis = METHODS["eigen"].bases(model, calibrate(model, x))[1]
    b = basis.k if name == "k_proj" else basis.v
    rows = outputs(model, x, name).unflatten(-1, (4, 8)).transpose(0, 1)  # (heads, tokens, 8)
    for r in (1, 3, 6):
        kept = rows @ b.encoder[..., :r] @ b.decoder[..., :r].mT
        measured = (rows - kept).square().sum(-1).mean(1).sum()
        predicted = b.errors()[r]
        if name == "k_proj":  # one spectrum, pooled over the heads, stands for each of them
            predicted = predicted / 4
        torch.testing.assert_close(measured, predicted, atol=1e-4, rtol=1e-4)


def test_predicted_fisher_error_is_the_measured_one_on_the_calibration_set():
    model, x = tiny.native(), tiny.tokens(6, 64)
    s = calibrate(model, x, (4, 4), gradients=True)[1]
    b = solve(s.v.covariance, s.v_grad.second, s.v.mean, damping=0)
    rows = outputs(model, x[:, :-1], "v_proj") - s.v.mean[0]  # the last token is predicted only
    lost = rows - rows @ b.encoder[0, :, :9] @ b.decoder[0, :, :9].T
    # E[(gᵀ lost)²] over gradients and tokens, each with its own distribution
    measured = ((lost @ s.v_grad.second[0]) * lost).sum(-1).mean()
    torch.testing.assert_close(measured, b.errors()[9], atol=0, rtol=1e-4)


def span(basis, latent: int, rank: int) -> torch.Tensor:
    """D Eᵀ at a rank: what the basis keeps of a latent's vector."""
    return basis.decoder[latent, :, :rank] @ basis.encoder[latent, :, :rank].T


def test_pca_loses_least_of_the_vectors_among_subspaces():
    model, x = tiny.native(attention_bias=True), tiny.tokens(6, 64)
    b = METHODS["pca"].bases(model, calibrate(model, x, (4, 4)))[1].k
    rows = outputs(model, x, "k_proj") - b.mean[0]

    def error(projection):
        return (rows - rows @ projection.T).square().sum()

    least = error(span(b, 0, 5))
    for seed in range(20):
        other = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed)).double()
        q = torch.linalg.qr(other).Q
        assert error(q @ q.T) > least
    share = least / rows.square().sum()
    torch.testing.assert_close(share, b.errors()[5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_kv_heads_are_singular_vectors_of_a_group_s_heads_side_by_side(name):
    model, x = tiny.native(attention_bias=True), tiny.tokens(6, 64)
    b = getattr(METHODS["kv-heads"].bases(model, calibrate(model, x, (2, 2)))[1], name[0])
    rows = outputs(model, x, name).unflatten(-1, (2, 16)).transpose(0, 1)
    for group, side_by_side in enumerate(rows):
        vt = torch.linalg.svd(side_by_side, full_matrices=False).Vh[:8]
        torch.testing.assert_close(span(b, group, 8), vt.T @ vt, atol=1e-4, rtol=0)


def inputs(model, x) -> torch.Tensor:
    """Inputs of the projections of layer 1 for tokens x, one row per token, in fp64."""
    seen = []
    hook = model.layers[1].attn.k_proj.register_forward_hook(lambda m, args, out: seen.append(args))
    model(x)
    hook.remove()
    return seen[0][0].flatten(0, 1).double()


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_palu_is_the_truncated_svd_of_the_whitened_weight(family, name):
    model = tiny.native(family, **({"attention_bias": True} if family == "llama" else {}))
    x, heads = tiny.tokens(6, 64), model.config.num_key_value_heads
    bases = METHODS["palu"].bases(model, calibrate(model, x, (4, 4)))
    b, projection = getattr(bases[1], name[0]), getattr(model.layers[1].attn, name)
    rows = inputs(model, x)
    whitening = torch.linalg.cholesky(rows.T @ rows / len(rows))
    for group, w in enumerate(projection.weight.double().unflatten(0, (heads // 4, -1))):
        u, s, vt = torch.linalg.svd(w @ whitening, full_matrices=False)
        best = u[:, :7] @ (s[:7, None] * vt[:7]) @ whitening.inverse()
        torch.testing.assert_close(span(b, group, 7) @ w, best, atol=1e-4, rtol=0)
        torch.testing.assert_close(b.spectrum[group, :7], s[:7].square(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("method", ["palu", "lorc"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_bias_stays_whole_if_the_weight_is_truncated(family, method):
    model = tiny.native(family, **({"attention_bias": True} if family == "llama" else {}))
    s = calibrate(model, tiny.tokens(6, 64), (4, 4))
    bases = METHODS[method].bases(model, s)
    low, cut = fold(model, bases, Ranks((9,) * 3, (9,) * 3)), model
    for layer, basis in zip(cut.layers, bases, strict=True):  # only the weights are truncated
        for b, projection in ((basis.k, layer.attn.k_proj), (basis.v, layer.attn.v_proj)):
            kept = torch.block_diag(*(span(b, i, 9) for i in range(len(b.spectrum))))
            projection.weight.copy_((kept @ projection.weight.double()).float())
    y = tiny.tokens(2, 30)
    torch.testing.assert_close(low(y), cut(y), atol=1e-4, rtol=0)


def test_palu_weighs_a_layer_by_the_gradients_of_its_weights():
    model, x = tiny.native(), tiny.tokens(4, 32)
    before = palu_weights(model, calibrate(model, x, weights=True))
    scale, layer = 3.0, model.layers[1].attn
    layer.k_proj.weight *= scale  # the same function, with smaller gradients at the key weight
    layer.q_proj.weight /= scale
    after = palu_weights(model, calibrate(model, x, weights=True))
    assert after[1][0] == pytest.approx(before[1][0] / scale, rel=1e-3)
    assert after[1][1] == pytest.approx(before[1][1], rel=1e-3)
    assert after[0] == pytest.approx(before[0], rel=1e-3)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_lorc_is_the_truncated_svd_of_the_weight(name):
    model = tiny.native(attention_bias=True)
    bases = METHODS["lorc"].bases(model, calibrate(model, tiny.tokens(1, 8)[:0], (4, 4)))
    b, w = getattr(bases[1], name[0]), getattr(model.layers[1].attn, name).weight.double()
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    best = u[:, :7] @ (s[:7, None] * vt[:7])
    torch.testing.assert_close(span(b, 0, 7) @ w, best, atol=1e-6, rtol=0)
    torch.testing.assert_close(b.spectrum[0], s.square(), atol=1e-8, rtol=0)


def test_lorc_ranks_fall_in_a_straight_line_over_the_log_of_cumulative_condition_numbers():
    model = tiny.native()
    condition = [
        torch.linalg.cond(b.attn.k_proj.weight.double())
        * torch.linalg.cond(b.attn.v_proj.weight.double())
        for b in model.layers
    ]
    first, second, third = lorc_weights(model, [])
    assert first == (1.0, 1.0)
    assert third == (0.5, 0.5)
    cumulative = torch.stack((condition[0] * condition[1] * condition[2], *condition[1:])).log()
    cumulative[1] += condition[2].log()
    line = (cumulative[1] - cumulative[2]) / (cumulative[0] - cumulative[2])
    assert second[0] == pytest.approx(0.5 + 0.5 * float(line), rel=1e-6)


def test_a_weight_without_full_rank_has_a_condition_number():
    model = tiny.native()
    model.layers[1].attn.k_proj.weight[3] = model.layers[1].attn.k_proj.weight[5]
    assert all(0.5 <= w <= 1 for pair in lorc_weights(model, []) for w in pair)


@pytest.mark.parametrize("shared", [1, 4])
def test_kq_svd_loses_least_of_the_scores_and_pca_more(shared):
    model, x = tiny.native("opt"), tiny.tokens(6, 64)
    s = calibrate(model, x, (shared, shared), queries=True)
    q, k = (
        outputs(model, x, name).unflatten(-1, (8, 8)).transpose(0, 1)
        for name in ("q_proj", "k_proj")
    )  # (heads, tokens, 8)
    groups = k.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2)  # (latents, tokens, n)

    def lost(basis, rank: int) -> torch.Tensor:
        """‖Q Kᵀ - Q K'ᵀ‖² over all heads."""
        kept = torch.stack([span(basis, i, rank) for i in range(len(groups))])
        rebuilt = (groups @ kept.mT).unflatten(-1, (shared, 8)).transpose(1, 2).flatten(0, 1)
        return (q @ (k - rebuilt).mT).square().sum()

    best, pca = (METHODS[m].bases(model, s)[1].k for m in ("kq-svd", "pca"))
    whole = (q @ k.mT).square().sum()
    for rank in (1, 3, 6):
        torch.testing.assert_close(
            lost(best, rank) / whole, best.errors()[rank], atol=1e-5, rtol=1e-3
        )
        assert lost(best, rank) < lost(pca, rank)
        if shared == 1:  # Eckart-Young: the tail of the singular values of every Q Kᵀ
            tail = torch.linalg.svdvals(q @ k.mT)[:, rank:].square().sum()
            torch.testing.assert_close(lost(best, rank) / whole, tail / whole, atol=1e-5, rtol=1e-3)


def test_kq_svd_loses_least_of_what_the_output_projection_reads():
    model, x = tiny.native(), tiny.tokens(6, 64)  # two query heads a kv head
    s = calibrate(model, x, queries=True)
    basis = METHODS["kq-svd"].bases(model, s)[1].v
    v = outputs(model, x, "v_proj").unflatten(-1, (4, 8)).transpose(0, 1)
    w_o = model.layers[1].attn.o_proj.weight.double().unflatten(1, (4, 2, 8))
    for head in range(4):
        product = v[head] @ w_o[:, head].permute(2, 1, 0).flatten(1)  # (tokens, 2 * hidden)
        kept = v[head] @ span(basis, head, 3).T @ w_o[:, head].permute(2, 1, 0).flatten(1)
        tail = torch.linalg.svdvals(product)[3:].square().sum()
        torch.testing.assert_close((product - kept).square().sum(), tail, atol=0, rtol=1e-3)


def with_bias(projection) -> torch.Tensor:
    """A weight with its bias as one more column, in fp64."""
    columns = [projection.weight]
    if projection.bias is not None:
        columns.append(projection.bias[:, None])
    return torch.cat(columns, 1).double()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_clover_keeps_the_nearest_product_of_the_weights_of_a_head(family):
    model = tiny.native(family, **({"attention_bias": True} if family == "llama" else {}))
    empty = calibrate(model, tiny.tokens(1, 8)[:0])
    attn, basis = model.layers[1].attn, METHODS["clover"].bases(model, empty)[1]
    g, d = model.config.num_key_value_heads, model.config.head_dim
    q, o = attn.q_proj, attn.o_proj.weight.double().unflatten(1, (g, -1, d))
    read = with_bias(q).unflatten(0, (g, -1, d)), o.permute(1, 2, 3, 0)  # (g, heads, d, ...)
    written = with_bias(attn.k_proj), with_bias(attn.v_proj)
    for b, reader, w in zip(basis, read, written, strict=True):
        if b is basis.k and model.config.rotary:
            continue
        for head, rows in enumerate(w.unflatten(0, (g, d))):
            product = reader[head].transpose(0, 1).flatten(1).T @ rows
            u, s, vt = torch.linalg.svd(product, full_matrices=False)
            best = u[:, :3] @ (s[:3, None] * vt[:3])
            kept = reader[head].transpose(0, 1).flatten(1).T @ span(b, head, 3) @ rows
            torch.testing.assert_close(kept, best, atol=1e-6, rtol=0)
            torch.testing.assert_close(b.spectrum[head], s[:d].square(), atol=0, rtol=1e-4)


def test_clover_weighs_rotated_keys_by_queries_at_all_distances():
    model = tiny.native()
    plain = METHODS["clover"].bases(model, calibrate(model, tiny.tokens(1, 8)[:0]))[1].k
    model.inv_freq.zero_()  # nothing turns: the metric of the queries' weights themselves
    still = METHODS["clover"].bases(model, calibrate(model, tiny.tokens(1, 8)[:0]))[1].k
    w = model.layers[1].attn.k_proj.weight.double().unflatten(0, (4, 8))
    queries = model.layers[1].attn.q_proj.weight.double().unflatten(0, (4, 2, 8))
    product = queries[0].transpose(0, 1).flatten(1).T @ w[0]
    tail = torch.linalg.svdvals(product)[3:].square().sum()
    assert float(still.spectrum[0, 3:].sum()) == pytest.approx(float(tail), rel=1e-4)
    assert not torch.allclose(plain.spectrum, still.spectrum)


def test_clover_gives_all_layers_the_same_ranks():
    model = tiny.native()
    assert clover_weights(model, []) == [(1.0, 1.0)] * 3
