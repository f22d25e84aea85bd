"""Each fused op compared with its definition on the device, in small shapes."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...zoo.models import attention
from ...zoo.models.bits import parse_segments
from ...zoo.models.cache import Buffer
from ...zoo.models.packing import Latent, Packed, pack
from .setup import Budget, Row, Setup, reason

# of outputs in bf16, from values of variance 1: queries, keys and weights are rounded to 8 bits
TOLERANCE = 4e-2
SLOTS, RANK, D, HEADS, LATENTS, BLOCK = 150, 80, 64, 8, 2, 16
MIXED = "16x16+16x8+32x4+16x2"
KEPT = ("", "80x8", "80x4", "80x3", "80x2", MIXED)  # segments of keys and of values
OPS = ("latent_decode", "anchored_decode", "rotary_decode")


class Check(NamedTuple):
    """An op, new tokens, and segments: "" for 16 bits."""

    op: str
    tokens: int
    segments: str

    @property
    def name(self) -> str:
        """As the report has it."""
        return f"{self.op} {self.segments or '16 bits'}, T {self.tokens}"


# one token matters most, and the bits that are used most
CHECKS = [Check(op, tokens, kept) for tokens in (1, 4) for kept in KEPT for op in OPS]


def checks(setup: Setup, budget: Budget, cases: list[Check] = CHECKS) -> Iterator[Row]:
    """A row a case: the largest error, and whether it is within the tolerance."""
    longest = 0.0
    for case in cases:
        if not budget.allows(f"check of {case.name}", longest):
            continue
        row: Row = {"case": case.name, "tolerance": TOLERANCE}
        start = time.monotonic()
        try:
            row["error"] = error_of(setup, case)
            row["passed"] = row["error"] <= TOLERANCE  # false for NaN
        except Exception as error:
            row |= {"passed": False, "failed": reason(error)}
        longest = max(longest, time.monotonic() - start)
        if not row["passed"]:
            budget.say(f"FAILED {case.name}: {row.get('failed', row.get('error'))}")
        yield row


@torch.inference_mode()
def error_of(setup: Setup, case: Check) -> float:
    """The largest difference of an op in bf16 from its definition in fp32 of the same numbers.

    Two sequences read slots of their own; all others hold NaN, or 255 in all bytes.
    """
    random = torch.Generator(setup.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=random, device=setup.device)
        return x.to(torch.bfloat16)

    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(1, *shape, D // 2, generator=random, device=setup.device)
        return x.cos(), x.sin()

    kept = [normal(2, LATENTS, SLOTS, RANK) for _ in "kv"]
    latent = Latent(LATENTS, RANK, parse_segments(case.segments))
    buffers: list[Buffer] = [pack(x, latent) if case.segments else x for x in kept]
    span = torch.tensor([[SLOTS // 3, SLOTS], [2, SLOTS - 9]], device=setup.device)
    up, mean = RANK**-0.5 * normal(LATENTS, RANK, 2 * D), normal(2 * LATENTS, 1, D)
    rest: list[Any]
    if case.op == "latent_decode":
        q, rest = normal(2, HEADS, case.tokens, RANK), [RANK**-0.5]
    else:
        anchored = case.op == "anchored_decode"
        turned = angles(case.tokens, -(-SLOTS // BLOCK)) if anchored else angles(1, SLOTS)
        q = normal(2, HEADS, case.tokens, D)
        rest = [D**-0.5, *turned, up, mean, *([BLOCK] if anchored else [])]
    wide = [x.float() if isinstance(x, Tensor) else x for x in rest]
    whole = [x if isinstance(x, Packed) else x.float() for x in buffers]
    want = getattr(attention, case.op)(q.float(), *whole, span, *wide)
    slot = torch.arange(SLOTS, device=setup.device)
    outside = (slot < span[:, :1]) | (slot >= span[:, 1:])
    for x in buffers:
        if isinstance(x, Packed):
            x.rows[outside] = 255
        else:
            x.transpose(1, 2)[outside] = torch.nan
    got = setup.ops[case.op](q, *buffers, span, *rest)
    return float((got.float() - want).abs().max())
