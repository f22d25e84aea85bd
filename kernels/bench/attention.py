"""Attention of one layer for one new token: fused ops beside SDPA and other libraries.

Every row has the time of a call, and the bandwidth reached: as a share of the bandwidth at which a
sum reads memory. Calls take turns on caches that together exceed the L2 cache several times.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ...zoo.models.cache import Buffer
from ...zoo.models.packing import Latent, pack
from .setup import Budget, Row, Setup, Sizes, reason

BLOCK = 16  # positions in an anchored block, as `compress` takes them
FEW = 1024  # slots that are packed; caches repeat them
BITS = (16, 8, 4, 2)
# Sixteenths of a latent of keys, and of values, by their bits: what `compress --keep 0.25` gives a
# layer of a small trained model (four heads of 64 share a latent), scales included 22 % of it
MIXED = {8: 5, 4: 2, 3: 2, 2: 2}, {8: 5, 4: 1, 3: 2, 2: 2}


class Case(NamedTuple):
    """An implementation at a number of slots and sequences.

    make: a call, of queries for it and of keys and values.
    """

    name: str
    k: Latent
    v: Latent
    query: int  # width of a query
    make: Callable[..., object]

    @property
    def nbytes(self) -> int:
        """Of the keys and values of a token."""
        return self.k.nbytes(torch.bfloat16) + self.v.nbytes(torch.bfloat16)


def mixed(width: int) -> tuple[str, str]:
    """The segments of keys and of values, as texts, for `width` numbers of whole heads."""
    k, v = ("+".join(f"{n * width // 16}x{bits}" for bits, n in side.items()) for side in MIXED)
    return k, v


def _latent(heads: int, segments: str) -> Latent:
    return Latent.of_layout(f"{heads}:{segments}")


def fused(setup: Setup, sizes: Sizes, slots: int) -> list[Case]:
    """The cases of our ops, those of most interest first."""
    g, d, n = sizes.kv_heads, sizes.head_dim, sizes.kv_heads // sizes.shared
    span = torch.tensor([[0, slots]], device=setup.device)
    whole, (k, v) = Latent(g, d), (_latent(n, text) for text in mixed(sizes.shared * d))
    ops, scale = setup.ops, d**-0.5

    def angles(count: int) -> list[Tensor]:
        x = torch.rand(1, 1, count, d // 2, device=setup.device)
        return [x.cos(), x.sin()]

    up = torch.randn(n, k.width, sizes.shared * d, device=setup.device).to(torch.bfloat16)
    latent = partial(ops["latent_decode"], span=span, scale=scale)
    by_bits = [
        Case(f"latent_decode, {bits} bits", whole.rounded(bits), whole.rounded(bits), d, latent)
        for bits in BITS
    ]

    def anchored(q: Tensor, k: Buffer, v: Buffer) -> object:
        turned = angles_of_blocks
        return ops["anchored_decode"](q, k, v, span, scale, *turned, up, None, BLOCK)

    def rotary(q: Tensor, k: Buffer, v: Buffer) -> object:
        return ops["rotary_decode"](q, k, v, span, scale, *angles_of_slots, up, None)

    angles_of_blocks, angles_of_slots = angles(-(-slots // BLOCK)), angles(slots)
    return [
        *by_bits,
        Case("anchored_decode, segments", k, v, d, anchored),
        Case("latent_decode, segments", k, v, k.width, latent),
        Case("anchored_decode, 16 bits", Latent(n, k.width), Latent(n, v.width), d, anchored),
        Case("rotary_decode, segments", k, v, d, rotary),
    ]


def rivals(sizes: Sizes) -> list[Case]:
    """What reads whole keys and values, of the libraries that are installed."""
    whole, d = Latent(sizes.kv_heads, sizes.head_dim), sizes.head_dim
    found = [
        Case("SDPA", whole, whole, d, partial(F.scaled_dot_product_attention, enable_gqa=True))
    ]
    try:
        flash = importlib.import_module("flash_attn").flash_attn_with_kvcache
        found.append(Case("FlashAttention", whole, whole, d, partial(_flash, flash)))
    except (ImportError, AttributeError):
        pass
    return found


def _flash(flash: Callable[..., object], q: Tensor, k: Tensor, v: Tensor) -> object:
    """FlashAttention takes (B, S, G, D)."""
    return flash(*(x.transpose(1, 2) for x in (q, k, v)))


def flex(sizes: Sizes) -> Case:
    """flex_attention, which compiles at every shape: so it comes last."""
    whole = Latent(sizes.kv_heads, sizes.head_dim)
    call = partial(torch.compile(flex_attention, dynamic=False), enable_gqa=True)
    return Case("flex_attention, compiled", whole, whole, sizes.head_dim, call)


def measure(setup: Setup, sizes: Sizes, budget: Budget) -> Iterator[Row]:
    """A row a case that was measured, or that failed."""
    longest = 0.0
    for last in (False, True):
        for slots, batch in sizes.cells:
            title = f"{slots} slots, batch {batch}"
            what = f"{'flex_attention' if last else 'ops'} at {title}"
            if not budget.allows(what, longest):
                continue
            budget.say(what)
            cases = [flex(sizes)] if last else [*rivals(sizes), *fused(setup, sizes, slots)]
            for case in cases:
                start = time.monotonic()
                if _fits(setup, budget, case, slots, batch, longest):
                    yield _row(setup, sizes, case, slots, batch)
                longest = max(longest, time.monotonic() - start)


def _fits(setup: Setup, budget: Budget, case: Case, slots: int, batch: int, seconds: float) -> bool:
    """Whether there are memory and time for a case."""
    what, needed = f"{case.name} at {slots} slots, batch {batch}", batch * slots * case.nbytes
    if needed > setup.memory:
        budget.skip_large(what, needed, setup.memory)
        return False
    return budget.allows(what, seconds)


@torch.inference_mode()
def _row(setup: Setup, sizes: Sizes, case: Case, slots: int, batch: int) -> Row:
    size = batch * slots * case.nbytes
    row: Row = {"case": case.name, "slots": slots, "batch": batch, "bytes": size}
    try:
        few = min(slots, FEW)
        random = [_few(x, few, setup.device) for x in (case.k, case.v)]
        q = torch.randn(batch, sizes.heads, 1, case.query, device=setup.device).to(torch.bfloat16)
        count = -(-setup.rotation // size)
        pairs = [[_long(x, batch, slots // few) for x in random] for _ in range(count)]
        row["seconds"] = setup.seconds([partial(case.make, q, *pair) for pair in pairs])
        row["share"] = size / row["seconds"] / setup.bandwidth
    except Exception as error:  # of one library at one shape
        row["failed"] = reason(error)
    return row


def _few(latent: Latent, slots: int, device: torch.device) -> Buffer:
    """Random numbers of one sequence."""
    x = torch.randn(1, latent.heads, slots, latent.width, device=device)
    return pack(x, latent) if latent.segments else x.to(torch.bfloat16)


def _long(x: Buffer, batch: int, times: int) -> Buffer:
    """A cache of its own, whose sequences repeat the same slots."""
    if isinstance(x, Tensor):
        return x.repeat(batch, 1, times, 1)
    return x._replace(rows=x.rows.repeat(batch, times, 1))
