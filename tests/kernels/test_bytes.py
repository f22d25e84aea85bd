"""What the C++ ops lose in bfloat16, where some processors multiply codes byte by byte."""

import pytest
import torch

from eigenzoo.kernels import cpu, ops
from eigenzoo.zoo.models import attention
from eigenzoo.zoo.models.packing import Latent, pack

pytestmark = pytest.mark.slow  # the first test builds the ops, in half a minute
SEGMENTS = ["64x8", "64x4", "64x3", "64x2", "16x16+16x8+32x4+16x2", "10x8+24x3+12x2"]


@pytest.mark.parametrize("loud", [False, True], ids=["diffuse", "one loud slot"])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("slots", [33, 3000])
def test_attention_over_codes_loses_little_more_than_rounding_its_output(segments, loud, slots):
    # A loud slot takes half of the attention, and thousands of quiet ones share the other half: one
    # byte, or a scale for all slots together, would lose these
    cpu.load()
    torch.manual_seed(0)
    kept = Latent.of_layout(f"1:{segments}")
    k, v = (pack(torch.randn(1, 1, slots, kept.width), kept) for _ in range(2))
    q, span = torch.randn(1, 5, 1, kept.width).bfloat16(), torch.tensor([[0, slots]])
    bias = torch.zeros(1, slots)
    bias[:, slots // 2] = loud * torch.tensor(float(slots)).log()
    rest = span, kept.width**-0.5, bias
    want = attention.latent_decode(
        q.double(), k.unpack(torch.float64), v.unpack(torch.float64), *rest
    )
    lost = [x.double() - want for x in (ops.latent_decode(q, k, v, *rest), want.bfloat16())]
    ours, least = (x.square().mean().sqrt() for x in lost)
    assert ours < 1.15 * least
