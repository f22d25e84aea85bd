import pytest
import torch

from eigenzoo.zoo.models.bits import LEVELS, parse_segments, segments_text
from eigenzoo.zoo.models.packing import Latent, Packed, pack, scale_of

SEGMENTS = (
    "48x16",
    "48x8",
    "33x8",
    "48x4",
    "48x3",
    "48x2",
    "16x16+16x8+16x4+16x2",
    "16x8+24x3+8x2",
)


def latent(text, heads=3):
    segments = parse_segments(text)
    return Latent(heads, sum(s.width for s in segments), segments)


@pytest.mark.parametrize("text", SEGMENTS)
def test_a_row_is_as_long_as_its_latent_says(text):
    kept = latent(text)
    packed = pack(torch.randn(2, 3, 5, kept.width), kept)
    assert packed.rows.shape == (2, 5, kept.nbytes(torch.float32))
    assert packed.rows.size(-1) % 8 == 0
    bits = sum(s.width * s.bits for s in kept.segments)
    scales = sum(s.bits < 16 for s in kept.segments)
    assert 0 <= packed.rows.size(-1) - 3 * (bits / 8 + scales) < 8


@pytest.mark.parametrize("text", SEGMENTS)
def test_numbers_on_the_levels_of_a_scale_come_back_exactly(text):
    kept = latent(text)
    parts = []
    for width, bits in kept.segments:
        code = torch.randint(0, 1 << min(bits, 8), (2, 3, 5, width)).float()
        if bits == 16:
            parts.append(code)
            continue
        code[..., :2] = torch.tensor([0, (1 << bits) - 1.0])
        middle = 127.0 if bits == 8 else LEVELS[bits]
        scale = scale_of(torch.randint(100, 180, (2, 3, 5, 1)))
        parts.append((code - middle).clamp(min=-LEVELS[bits]).clamp(max=LEVELS[bits]) * scale)
    x = torch.cat(parts, -1)
    torch.testing.assert_close(pack(x, kept).unpack(torch.float32), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("bits", "most"), [(16, 3e-6), (8, 6e-5), (4, 0.0125), (3, 0.04), (2, 0.12)]
)
def test_rounding_normal_numbers_loses_no_more_than_a_uniform_quantizer_can(bits, most):
    """The errors of uniform levels under the best fixed scale, of Max (1960)."""
    x = torch.randn(1, 1, 4000, 96)
    y = pack(x, Latent(1, 96).rounded(bits) if bits < 16 else latent("96x16", heads=1)).unpack(
        x.dtype
    )
    assert (x - y).square().mean() < most


def test_a_long_vector_with_one_outlier_keeps_the_outlier_at_8_and_4_bits():
    x = torch.randn(1, 1, 50, 64)
    x[..., 7] = 300.0
    for bits in (8, 4):
        y = pack(x, Latent(1, 64).rounded(bits)).unpack(x.dtype)
        assert (y[..., 7] - 300).abs().max() < 300 / (1 << bits)


@pytest.mark.parametrize("text", SEGMENTS)
def test_vectors_of_zeros_come_back_as_nearly_nothing(text):
    kept = latent(text)
    assert pack(torch.zeros(1, 3, 4, kept.width), kept).unpack(torch.float32).abs().max() < 1e-5


def test_rows_hold_codes_then_scales_then_zeros():
    kept = latent("8x8+8x4", heads=2)
    row = pack(torch.ones(1, 2, 1, 16), kept).rows[0, 0]
    assert len(row) == 32  # 2 * (8 + 4) codes, 2 * 2 scales, 4 zeros
    assert row[:8].all()
    assert row[12:20].all()
    one = torch.tensor([row[24].item(), row[26].item()])
    torch.testing.assert_close(
        scale_of(one) * row[0].view(torch.int8), torch.ones(2), rtol=0.07, atol=0
    )
    assert not row[28:].any()


def test_the_layout_is_a_text_and_back():
    kept = latent("16x8+32x4", heads=5)
    assert kept.layout == "5:16x8+32x4"
    assert Latent.of_layout(kept.layout) == kept
    assert segments_text(kept.segments) == "16x8+32x4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16", "no widths and bits"),
        ("16x5", "bits is 5"),
        ("16x4+16x8", "of falling bits"),
        ("16x8+16x8", "of falling bits"),
        ("1x16+1x8+2x4+8x3+4x2", "at most 4"),
        ("6x2", "multiples of 4"),
        ("0x8", "an empty one"),
        ("2x16+1x8", "odd number of bytes"),
    ],
)
def test_segments_that_cannot_be_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_segments(text)


def test_packing_compiles_to_the_same_bytes():
    kept = latent("16x16+16x8+16x4+16x2")
    x = torch.randn(2, 3, 4, 64)

    def rows(x):
        return pack(x, kept).rows

    def numbers(rows):
        return Packed(rows, kept.layout).unpack(torch.float32)

    got = torch.compile(rows, fullgraph=True)(x)
    assert torch.equal(got, rows(x))
    assert torch.equal(torch.compile(numbers, fullgraph=True)(got), numbers(got))
