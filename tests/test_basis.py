import pytest
import tiny
import torch
from test_calibrate import outputs

from eigenzoo.zoo.basis import METHODS, solve
from eigenzoo.zoo.calibrate import calibrate


def gram(latents: int, n: int, seed: int) -> torch.Tensor:
    x = torch.randn(latents, 3 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    return x.mT @ x / (3 * n)


def test_full_rank_gives_everything_back():
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
