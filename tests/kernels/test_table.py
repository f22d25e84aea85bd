"""Caches in pages, read through a table: the C++ ops give what they give for one long page."""

import pytest
import torch
from torch import Tensor

from eigenzoo.kernels import cpu, ops
from eigenzoo.zoo.models import attention
from eigenzoo.zoo.models.cache import Buffer
from eigenzoo.zoo.models.packing import Latent, Packed, pack

pytestmark = pytest.mark.slow  # the first test builds the ops, in half a minute
SLOTS, HEADS, KV, HEAD_DIM, RANK, BLOCK = 384, 6, 2, 16, 40, 16
NOTHING = torch.tensor([-1, 2**31 - 1, -(2**31)]).int()  # entries that nobody may use
SPANS = {
    "one sequence": [[0, 384]],
    "a few slots": [[0, 13]],
    "odd spans": [[5, 300], [130, 131 + 16], [0, 383]],
}
KEPT = {  # segments of keys and of values
    "numbers": ("", ""),
    "segments": ("8x16+8x8+16x4+8x2", "16x4+24x3"),
    "keys in segments": ("24x8+16x3", ""),
}


@pytest.fixture(autouse=True, scope="module")
def _built():
    cpu.load()


def cache(batch: int, heads: int, segments: str, dtype: torch.dtype) -> Buffer:
    """A static cache of numbers or of segments."""
    x = torch.randn(batch, heads, SLOTS, RANK)
    return pack(x, Latent.of_layout(f"{heads}:{segments}")) if segments else x.to(dtype)


def poison(x: Tensor) -> Tensor:
    return x.fill_(torch.nan if x.is_floating_point() else 255)


def in_pages(
    keys: Buffer, values: Buffer, span: Tensor, page: int, shuffled: bool
) -> tuple[Buffer, Buffer, Tensor]:
    """Both in pages, and their table. What is outside of the span is poisoned.

    Keys and values of equal dtypes share rows; there is room between rows and between pages.
    """
    together = isinstance(keys, Packed) == isinstance(values, Packed)
    rows = [
        x.rows if isinstance(x, Packed) else x.transpose(1, 2).flatten(2) for x in (keys, values)
    ]
    batch, each = len(rows[0]), SLOTS // page
    order = torch.randperm(batch * each + 3) if shuffled else torch.arange(batch * each + 3)
    table = order[1:-2].view(batch, each)
    kept, slot = [], torch.arange(SLOTS)
    seen = (slot >= span[:, :1]) & (slot < span[:, 1:])  # (B, S)
    for x in [torch.cat(rows, 2)] if together else rows:
        new = poison(x.new_empty(batch * each + 3, page + 2, x.size(2) + 6))[:, :-2, :-6]
        new[table] = poison(x.clone()).where(~seen[..., None], x).unflatten(1, (each, page))
        kept.append(new)
    widths = [x.size(2) for x in rows]
    kept = kept[0].split(widths, 2) if together else kept
    used = seen.unflatten(1, (each, page)).any(2)
    nothing = NOTHING[torch.randint(3, table.shape)]
    new = [
        x._replace(rows=y)
        if isinstance(x, Packed)
        else y.unflatten(2, (x.size(1), -1)).transpose(1, 2)
        for x, y in zip((keys, values), kept, strict=True)
    ]
    return new[0], new[1], torch.where(used, table.int(), nothing)


def rotation(n: int, new: int = 1) -> tuple[Tensor, Tensor]:
    angle = 6 * torch.rand(1, new, n, HEAD_DIM // 2)
    return angle.cos(), angle.sin()


def calls(batch: int, span: Tensor, new: int, heads: int, dtype: torch.dtype) -> dict[str, tuple]:
    """By name: an op, its definition, queries, and what follows the span."""
    up = (torch.randn(heads, RANK, KV // heads * HEAD_DIM) / 6).to(dtype)
    mean, bias = torch.randn(KV, 1, HEAD_DIM).to(dtype), torch.randn(batch, SLOTS)
    q = torch.randn(batch, HEADS, new, HEAD_DIM).to(dtype)
    slopes = torch.rand(HEADS)
    wide = torch.randn(batch, HEADS, new, RANK).to(dtype)
    blocks = SLOTS // BLOCK
    position = (torch.arange(SLOTS) - span[:, :1]).clamp(min=0).int() if new == 1 else None
    anchored = *rotation(blocks, new), up, mean, BLOCK, bias
    return {
        "latent": (ops.latent_decode, attention.latent_decode, wide, (None, slopes)),
        "anchored": (ops.anchored_decode, attention.anchored_decode, q, (*anchored, None)),
        "padded": (ops.anchored_decode, attention.anchored_decode, q, (*anchored, position)),
        "rotary": (
            ops.rotary_decode,
            attention.rotary_decode,
            q,
            (*rotation(SLOTS), up, mean, bias),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "adjacent"])
@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("segments", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("bounds", SPANS.values(), ids=SPANS)
def test_pages_are_read_as_one_long_page(bounds, segments, page, shuffled, new, dtype):
    torch.manual_seed(0)
    span = torch.tensor(bounds)
    batch = len(bounds)
    for heads in (1, 2):
        k, v = cache(batch, heads, segments[0], dtype), cache(batch, 2, segments[1], dtype)
        k_pages, v_pages, table = in_pages(k, v, span, page, shuffled)
        for name, (op, definition, q, rest) in calls(batch, span, new, heads, dtype).items():
            want = op(q, k, v, span, 0.3, *rest)
            got = op(q, k_pages, v_pages, span, 0.3, *rest, table=table)
            assert torch.equal(got, want), name
            if page != 16 or not shuffled:
                continue
            want = definition(q, k, v, span, 0.3, *rest)
            got = definition(q, k_pages, v_pages, span, 0.3, *rest, table=table)
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def good() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, keys and values in 4 pages of 16, and a table for two sequences."""
    x = torch.randn(4, 1, 16, 8)
    return torch.randn(2, 2, 1, 8), x, torch.randn_like(x), torch.tensor([[2, 3], [0, 1]]).int()


@pytest.mark.parametrize("entry", [-1, 4, 2**31 - 1, -(2**31)])
def test_an_entry_for_no_page_is_refused_where_the_span_needs_it(entry):
    q, k, v, table = good()
    span = torch.tensor([[0, 32], [3, 17]])
    for b, i in ((0, 0), (1, 1)):
        wrong = table.clone()
        wrong[b, i] = entry
        with pytest.raises(RuntimeError, match=f"page {entry} for .* but there are 4 pages"):
            ops.latent_decode(q, k, v, span, 0.2, table=wrong)
    table[0, 0] = table[1, 1] = entry
    assert (
        ops.latent_decode(q, k, v, torch.tensor([[16, 32], [0, 16]]), 0.2, table=table)
        .isfinite()
        .all()
    )


def test_a_table_of_another_form_and_pages_that_differ_are_refused():
    q, k, v, table = good()
    span = torch.tensor([[0, 20]])
    for wrong in (table.long(), table[:1], table[0], table.mT, table[:, :1].contiguous()):
        with pytest.raises(RuntimeError, match="expected"):
            ops.latent_decode(q, k, v, span, 0.2, table=wrong)
    for less in (v[:3], v[:, :, :8]):
        with pytest.raises(RuntimeError, match=r"expected (as many|values)"):
            ops.latent_decode(q, k, less, span, 0.2, table=table)
