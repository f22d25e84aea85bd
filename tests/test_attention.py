import pytest
import torch

from eigenzoo.zoo.attention import (
    Causal,
    causal_mask,
    latent_attention,
    latent_decode,
    lift,
    lift_heads,
    one_token,
)

torch.manual_seed(0)


@pytest.mark.parametrize(
    ("key_heads", "latents"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 2), (6, 3), (6, 6)]
)
@pytest.mark.parametrize("width", [5, 8])
def test_one_token_reads_what_a_prompt_reads(key_heads, latents, width):
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, key_heads, 9, 8)
    v = torch.randn(2, latents, 9, width)
    prompt = latent_attention(q, k, v, Causal(), 0.3)
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


def test_padding_is_seen_by_nobody_but_itself():
    valid = torch.tensor([[False, False, True, True]])
    mask = causal_mask(torch.arange(4), 4, valid)[0, 0]
    want = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(mask, want)


@pytest.mark.parametrize("new", [2, 5])
def test_a_few_tokens_see_as_far_as_themselves(new):
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 2, 9, 5)
    few = latent_decode(q[:, :, -new:], k, v, torch.tensor([[0, 9]]), 0.3)
    torch.testing.assert_close(few, latent_attention(q, k, v, Causal(), 0.3)[:, :, -new:])


def test_one_token_begins_behind_padding_and_skips_it_between():
    visible = torch.tensor([[True] * 6, [False, False, True, False, True, True]])
    seen = one_token(torch.tensor([4]), visible)
    assert seen.span.tolist() == [[0, 5], [2, 5]]
    assert seen.bias.isinf().tolist() == (~visible).tolist()
    assert one_token(torch.tensor([4])).span.tolist() == [[0, 5]]


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
