import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eigenzoo.zoo.models.attention import latent_attention, latent_decode, lift, lift_heads
from eigenzoo.zoo.models.mask import CausalMask, alibi_slopes, causal_matrix, decode_mask

torch.manual_seed(0)


@pytest.mark.parametrize(
    ("key_heads", "latents"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 2), (6, 3), (6, 6)]
)
@pytest.mark.parametrize("width", [5, 8])
def test_one_token_reads_what_a_prompt_reads(key_heads, latents, width):
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, key_heads, 9, 8)
    v = torch.randn(2, latents, 9, width)
    prompt = latent_attention(q, k, v, CausalMask(), 0.3)
    for t in range(9):
        one = latent_decode(q[:, :, t : t + 1], k, v, torch.tensor([[0, t + 1]]), 0.3)
        torch.testing.assert_close(one[:, :, 0], prompt[:, :, t])


def test_attention_is_what_the_formula_says():
    q, k, v = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 2, 3, 5)
    p = (0.5 * torch.einsum("bhtd,bsd->bhts", q, k[:, 0])).softmax(-1)
    got = latent_decode(q, k, v, torch.tensor([[0, 3]]), 0.5)
    torch.testing.assert_close(got, p @ v)


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_lifting_after_attention_equals_lifting_values(latents):
    p = torch.rand(2, 8, 3, 10)  # weights of 8 query heads over 10 slots, 4 kv heads
    z, up = torch.randn(2, latents, 10, 7), torch.randn(latents, 7, 4 // latents * 6)
    read = p @ z.repeat_interleave(8 // latents, 1)
    want = p @ lift(z, up, 6).repeat_interleave(2, 1)
    torch.testing.assert_close(lift_heads(read, up, 6), want)


def test_padding_is_seen_only_by_itself():
    valid = torch.tensor([[False, False, True, True]])
    mask = causal_matrix(torch.arange(4), 4, valid)[0, 0]
    want = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(mask, want)


@pytest.mark.parametrize("new", [2, 5])
def test_a_few_tokens_see_as_far_as_themselves(new):
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 2, 9, 5)
    few = latent_decode(q[:, :, -new:], k, v, torch.tensor([[0, 9]]), 0.3)
    torch.testing.assert_close(few, latent_attention(q, k, v, CausalMask(), 0.3)[:, :, -new:])


def test_one_token_begins_behind_padding_and_skips_it_between():
    visible = torch.tensor([[True] * 6, [False, False, True, False, True, True]])
    seen = decode_mask(torch.tensor([4]), visible)
    assert seen.span.tolist() == [[0, 5], [2, 5]]
    assert seen.bias.isinf().tolist() == (~visible).tolist()
    assert decode_mask(torch.tensor([4])).span.tolist() == [[0, 5]]


def test_slopes_without_a_bias_count_slots():
    q, k, v = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 3)
    span, slopes = torch.tensor([[0, 5]]), torch.tensor([0.5, 0.25])
    bias = torch.arange(7.0)[None] - 4
    want = latent_decode(q, k, v, span, 0.5, bias, slopes)
    torch.testing.assert_close(latent_decode(q, k, v, span, 0.5, None, slopes), want)
    scores = 0.5 * (q @ k.mT)[:, :, 0, :5] + slopes[:, None] * bias[0, :5]
    torch.testing.assert_close(
        want[:, :, 0], (scores.softmax(-1)[:, :, None] @ v[:, :, :5])[:, :, 0]
    )


def prompt(heads=6, new=11, slots=29, dtype=torch.float32, batch=2):
    """Queries, keys and values with different numbers of heads, and values of another width."""
    shapes = (heads, new, 10), (heads // 3, slots, 10), (heads, slots, 13)
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def defined(q, k, v, seen: CausalMask, scale: float):
    """Attention in fp64 with the mask as a matrix."""
    new, slots = q.size(2), k.size(2)
    mask = causal_matrix(torch.arange(slots - new, slots), slots, seen.valid)
    if seen.slopes is not None:
        ahead = seen.position[:, None] - seen.position[:, -new:, None]
        added = seen.slopes[:, None, None].double() * ahead[:, None]
        mask = added.masked_fill(~mask, -torch.inf)
    return latent_attention(q.double(), k.double(), v.double(), mask, scale)


@pytest.mark.parametrize("new", [2, 11, 29])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_part_of_a_prompt_reads_what_its_mask_allows(new, alibi, padded):
    q, k, v = prompt(new=new)
    valid = torch.arange(29) >= torch.tensor([[0], [20]])
    seen = CausalMask(valid if padded else None)
    if alibi:
        seen = CausalMask(seen.valid, (valid.cumsum(1) - 1).clamp(min=0), alibi_slopes(6))
    got, want = latent_attention(q, k, v, seen, 0.3), defined(q, k, v, seen, 0.3)
    real = valid[:, None, -new:, None] if padded else torch.ones(1, dtype=torch.bool)
    torch.testing.assert_close(got.where(real, 0), want.where(real, 0).float())
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "first"), [(6, 0), (33, 57_000), (12, 1 << 20)])
def test_alibi_is_as_exact_far_from_the_first_position(dtype, heads, first):
    q, k, v = prompt(heads, 50, 8192, dtype, batch=1)
    seen = CausalMask(None, torch.arange(8192)[None] + first, alibi_slopes(heads))
    want = defined(q, k, v, seen, 0.3)
    # a few rounding errors of outputs of about 1: the columns' errors do not grow with positions
    atol = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    got = latent_attention(q, k, v, seen, 0.3).double()
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize("new", [64, 96])
def test_a_prompt_makes_no_matrix_of_tokens_and_slots(new):
    q, k, v = prompt(new=new, slots=96)
    position = torch.arange(96)[None].expand(2, -1)
    seen = CausalMask(position > 3, position, alibi_slopes(6))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            made.extend(x.shape for x in (out if isinstance(out, tuple) else (out,)))
            return out

    with Watch():
        latent_attention(q, k, v, seen, 0.3)
    assert made
    assert not [shape for shape in made if shape[-2:] == (new, 96)]


def test_a_later_part_has_the_gradients_of_its_definition():
    inputs = [x.double().requires_grad_() for x in prompt()]
    seen = CausalMask(None, torch.arange(29)[None], alibi_slopes(6).double())
    got = torch.autograd.grad(latent_attention(*inputs, seen, 0.3).square().sum(), inputs)
    want = torch.autograd.grad(defined(*inputs, seen, 0.3).square().sum(), inputs)
    torch.testing.assert_close(got, want)
