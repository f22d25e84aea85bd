from weakref import WeakSet

import pytest
import tiny
import torch
from observe import outputs

from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.moments import Lengths, Moments


@pytest.fixture(scope="module")
def model():
    return tiny.native(attention_bias=True)


def test_streamed_moments_equal_direct_ones():
    x = torch.randn(3, 50, 2 * 6)
    m = Moments(2, 6, x.device)
    for piece in x:
        m.add(piece[None])
    rows = x.double().flatten(0, 1).unflatten(-1, (2, 6)).transpose(0, 1)
    torch.testing.assert_close(m.mean, rows.mean(1), atol=1e-6, rtol=0)
    want = torch.stack([torch.cov(r.T, correction=0) for r in rows])
    torch.testing.assert_close(m.covariance, want, atol=1e-5, rtol=0)


def test_weighted_moments_count_a_row_as_often_as_its_weight():
    x, often = torch.randn(1, 6, 4), torch.tensor([[3.0, 1, 0, 2, 1, 1]])
    m, repeated = (Moments(1, 4, x.device) for _ in range(2))
    m.add(x[:, :2], often[:, :2])
    m.add(x[:, 2:], often[:, 2:])
    repeated.add(x.repeat_interleave(often[0].long(), dim=1))
    torch.testing.assert_close(m.mean, repeated.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(m.covariance, repeated.covariance, atol=1e-6, rtol=0)


def test_length_of_rows_is_one_on_average_whatever_their_scale():
    x = torch.randn(4000, 2 * 5) @ torch.diag(torch.logspace(-1, 1, 10)) + 1
    m = Moments(2, 5, x.device)
    m.add(x)
    squares = Lengths(m, centered=True, damping=0).of(x).square()
    torch.testing.assert_close(squares.mean(1), torch.ones(2), atol=0.01, rtol=0)


def test_rows_are_weighted_by_the_length_of_their_gradients(model):
    x = tiny.tokens(4, 32)
    s = calibrate(model, x, (4, 4), gradients=True)[1]
    x_plain, g_plain, g = s.v.covariance, s.v_grad.second, s.v_grad_weighted.second
    assert s.v_weighted.count != s.v.count
    assert not torch.allclose(x_plain, s.v_weighted.covariance, rtol=1e-3)
    assert not torch.allclose(g_plain, g, rtol=1e-3)


def test_keys_values_and_queries_are_counted_once(model):
    x = tiny.tokens(3, 20)
    s = calibrate(model, x, (2, 4), queries=True)[1]
    for moments, name in ((s.k, "k_proj"), (s.v, "v_proj"), (s.q, "q_proj")):
        rows = outputs(model, x, name)
        want = rows.unflatten(-1, moments.sum.shape).transpose(0, 1)
        torch.testing.assert_close(moments.second, want.mT @ want / 60, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_summed_loss(model):
    x, bump = tiny.tokens(1, 12), torch.zeros(1, 11, 32, requires_grad=True)
    hook = model.layers[1].attn.v_proj.register_forward_hook(lambda m, a, out: out + bump)
    logits = model(x[:, :-1])
    hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[0], x[0, 1:], reduction="sum")
    (want,) = torch.autograd.grad(loss, bump)
    got = calibrate(model, x, (4, 4), gradients=True)[1].v_grad
    want = want[0].double()
    torch.testing.assert_close(got.second[0] * got.count, want.T @ want, atol=1e-6, rtol=1e-4)


SUMS = {  # options of `calibrate`, and the bytes per number of a sum that its docstring states
    "fisher": ({"unweighted": False}, 32),
    "fisher-plain": ({"weighted": False}, 16),
    "both": ({}, 40),
}


@pytest.fixture
def passes(model, monkeypatch):
    """Lengths of the sequences in each forward and each backward pass; and after each layer of a
    pass, the bytes of all matrices that calibration holds.
    """
    seen = {"forward": [], "backward": [], "bytes": []}
    held = WeakSet()
    for kind in (Moments, Lengths):

        def begin(self, *args, begin=kind.__init__, **kwargs):
            held.add(self)
            begin(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", begin)

    def count(module, args, out):
        seen["forward"].append(out.size(1))
        if out.requires_grad:
            out.register_hook(lambda grad: seen["backward"].append(grad.size(1)))

    def weigh(module, args, out):
        matrices = [x.gram if isinstance(x, Moments) else x.inverse for x in held]
        seen["bytes"].append(sum(x.nbytes for x in matrices))

    hooks = [model.head.register_forward_hook(count)]
    hooks += [layer.register_forward_hook(weigh) for layer in model.layers]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("rows", [2, 9])
def test_memory_is_what_the_docstring_says_and_does_not_grow_with_tokens(model, passes, name, rows):
    asked, size = SUMS[name]
    statistics = calibrate(model, tiny.tokens(rows, 16), (2, 4), gradients=True, **asked)
    numbers = 3 * (2 * 16**2 + 1 * 32**2)  # layers; blocks and widths of keys, and of values
    assert max(passes["bytes"]) == size * numbers
    assert sum(m.gram.nbytes for s in statistics for m in s.moments.values()) <= size * numbers


@pytest.mark.parametrize("name", SUMS)
def test_the_model_reads_each_sequence_once_and_for_weights_every_fourth_twice(model, passes, name):
    asked, _ = SUMS[name]
    calibrate(model, tiny.tokens(8, 16), gradients=True, **asked)
    times = 8 if name == "fisher-plain" else 12
    assert passes["forward"] == passes["backward"] == [15] * times


def test_a_sum_does_not_depend_on_which_others_are_taken(model):
    x = tiny.tokens(5, 16)
    both, unweighted, weighted = (
        calibrate(model, x, (2, 4), gradients=True, **asked)
        for asked in ({}, {"weighted": False}, {"unweighted": False})
    )
    for a, b, c in zip(both, unweighted, weighted, strict=True):
        assert b.k_weighted is b.v_grad_weighted is c.k_grad is c.v_grad is None
        for s in (b, c):
            for name, n in s.moments.items():
                torch.testing.assert_close(a.moments[name].second, n.second)


def test_gradients_of_weights_are_those_of_each_sequence(model):
    x = tiny.tokens(3, 12)
    weight, squares = model.layers[1].attn.k_proj.weight, 0.0
    weight.requires_grad_(True)
    for row in x:
        loss = torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        squares += torch.autograd.grad(loss, weight)[0].square().sum()
    weight.requires_grad_(False)
    got = calibrate(model, x, weights=True)[1].k_weight
    assert got.count == 3 * weight.numel()
    assert float(got.second) * got.count == pytest.approx(float(squares), rel=1e-4)


def test_no_weight_keeps_a_gradient_and_no_hook_stays(model):
    calibrate(model, tiny.tokens(2, 16), gradients=True, weights=True)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_no_sequences_run_no_model(model):
    def refuse(module, args):
        raise AssertionError("the model was run")

    hook = model.layers[0].attn.q_proj.register_forward_pre_hook(refuse)
    statistics = calibrate(model, tiny.tokens(2, 16)[:0], (2, 4))
    hook.remove()
    assert [len(s.k.gram) for s in statistics] == [2, 2, 2]


def test_statistics_that_are_not_finite_are_refused():
    model = tiny.native()
    model.layers[1].attn.k_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="layer 1: the statistics of k are not finite"):
        calibrate(model, tiny.tokens(2, 8))
