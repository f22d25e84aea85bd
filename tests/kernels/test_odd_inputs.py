"""The C++ ops, given arguments that nobody should give: an error, or what the definition says.

Never another answer, and never a read outside a tensor, which may end the process.
"""

import pytest
import torch
from torch import Tensor

from eigenzoo.kernels import cpu, ops
from eigenzoo.zoo.models import attention, linear
from eigenzoo.zoo.models.packing import Latent, Packed, pack

pytestmark = pytest.mark.slow  # the ops are built
BATCH, HEADS, SLOTS, RANK, WIDTH, SIZE = 2, 4, 48, 16, 24, 8

HALVES = {torch.float16, torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def _built():
    cpu.load()


def few(x: Tensor, text: str) -> Packed:
    """Numbers as rows of segments."""
    return pack(x, Latent.of_layout(f"{x.size(1)}:{text}"))


def calls() -> dict[str, tuple]:
    """By name: the op, its definition, and arguments that are as they should be."""
    torch.manual_seed(0)
    span = torch.tensor([[0, 33], [2, 33]])
    bias, slopes = torch.randn(BATCH, SLOTS), torch.rand(HEADS)
    k, v = torch.randn(BATCH, 2, SLOTS, RANK), torch.randn(BATCH, 1, SLOTS, WIDTH)
    angle = torch.randn(BATCH, 1, SLOTS, SIZE // 2)
    maps = torch.randn(2, RANK, 2 * SIZE) / 4, torch.randn(4, 1, SIZE)
    rotation = angle.cos(), angle.sin(), *maps
    q, narrow = torch.randn(BATCH, HEADS, 1, RANK), torch.randn(BATCH, HEADS, 1, SIZE)
    latent = ops.latent_decode, attention.latent_decode
    rotary = ops.rotary_decode, attention.rotary_decode
    anchored = ops.anchored_decode, attention.anchored_decode
    ahead = tuple(x[:, :, ::16] for x in rotation[:2])
    place = (torch.arange(SLOTS) - span[:, :1]).clamp(min=0).int()
    product = ops.linear_decode, linear.linear_decode
    row, scale = torch.randn(BATCH, 1, 12), torch.rand(7)
    table = torch.tensor([[4, 0, 2], [5, 1, 3]]).int()
    pages = [torch.randn(6, x.size(1), 16, x.size(3)) for x in (k, v)]
    weight, codes = torch.randn(7, 12), torch.randint(-127, 128, (7, 12)).char()
    return {
        "latent": (*latent, (q, k, v, span, 0.2, bias, slopes)),
        "latent, some tokens": (*latent, (torch.cat([q] * 3, 2), k, v, span, 0.2, None, slopes)),
        "latent, packed": (*latent, (q, few(k, "8x8+8x3"), few(v, "8x16+8x4+8x2"), span, 0.2)),
        "latent, in pages": (*latent, (q, *pages, span, 0.2, bias, slopes, table)),
        "latent, packed, in pages": (
            *latent,
            (q, few(pages[0], "16x4"), few(pages[1], "24x8"), span, 0.2, None, None, table),
        ),
        "rotary": (*rotary, (narrow, k, v, span, 0.2, *rotation, bias)),
        "rotary, packed": (*rotary, (narrow, few(k, "16x4"), v, span, 0.2, *rotation)),
        "anchored": (*anchored, (narrow, k, v, span, 0.2, *ahead, *maps, 16, bias)),
        "anchored, padded": (*anchored, (narrow, k, v, span, 0.2, *ahead, *maps, 16, bias, place)),
        "anchored, in pages": (
            *anchored,
            (narrow, *pages, span, 0.2, *ahead, *maps, 16, bias, place, table),
        ),
        "anchored, packed": (
            *anchored,
            (narrow, few(k, "8x4+8x2"), few(v, "24x8"), span, 0.2, *ahead, *maps, 16),
        ),
        "lift heads": (ops.lift_heads, attention.lift_heads, (q, maps[0], SIZE)),
        "linear": (*product, (row, weight, None, torch.randn(7))),
        "linear, int8": (*product, (row, codes, scale, None)),
    }


def odd(x: Tensor):
    """Pairs of what is odd, and x made so."""
    yield "NaN", torch.full_like(x, torch.nan) if x.is_floating_point() else x
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64):
        yield str(dtype), x.to(dtype)
    yield "a dimension more", x[None]
    yield "a dimension less", x[0]
    yield "elsewhere", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "a view of negatives", torch._neg_view(-x)
    yield "every second", torch.stack((x, x), -1).flatten(-2)[..., ::2]
    if x.dim() > 1:
        yield "transposed", x.mT.contiguous().mT
        yield "outer dimensions swapped", x.transpose(0, 1).contiguous().transpose(0, 1)
    for i, size in enumerate(x.shape):
        yield f"empty in {i}", x.narrow(i, 0, 0)
        yield f"shorter in {i}", x.narrow(i, 0, max(1, size - 1))
        yield f"one in {i}", x.narrow(i, 0, 1)
        yield f"doubled in {i}", torch.cat((x, x), i)


def mutations(args: tuple):
    for i, x in enumerate(args):
        parts = x if isinstance(x, Packed) else (x,)
        for j, part in enumerate(parts):
            for name, changed in odd(part) if isinstance(part, Tensor) else ():
                new = changed
                if isinstance(x, Packed):
                    new = Packed(*(changed if n == j else p for n, p in enumerate(x)))
                yield f"argument {i}.{j}: {name}", (*args[:i], new, *args[i + 1 :])


def alike(args: tuple) -> list:
    """The same as definitions need it: maps and means in the dtype of the queries, as models have
    them, and rows that are no view of their negatives."""

    def one(i: int, x: object) -> object:
        if isinstance(x, Packed):
            return x._replace(rows=x.rows.resolve_neg())
        maps = isinstance(x, Tensor) and x.is_floating_point() and i in (7, 8)
        return x.to(args[0].dtype) if maps else x

    return [one(i, x) for i, x in enumerate(args)]


SPANS = [(-1, 33), (0, SLOTS + 1), (0, 2**40), (33, 33), (33, 5), (-(2**62), 2**62)]


@pytest.mark.parametrize("name", calls())
def test_an_op_refuses_odd_arguments_or_gives_what_the_definition_does(name):
    op, definition, args = calls()[name]
    torch.testing.assert_close(op(*args), definition(*args), atol=1e-4, rtol=1e-4)
    taken = 0
    for what, changed in mutations(args):
        try:
            got = op(*changed)
        except (RuntimeError, NotImplementedError):
            continue
        if got.is_meta:  # the shape of a result, without one
            continue
        taken += 1
        want = definition(*alike(changed))
        assert got.shape == want.shape, what
        halves = {x.dtype for x in changed if isinstance(x, Tensor)} & HALVES
        rough = 5e-2 if halves else 1e-4
        torch.testing.assert_close(
            got, want, atol=rough, rtol=rough, equal_nan=True, msg=lambda m, what=what: what + m
        )
    assert taken > 10


@pytest.mark.parametrize("bounds", SPANS)
@pytest.mark.parametrize("name", [n for n in calls() if not n.startswith(("lift", "linear"))])
def test_a_span_outside_of_the_cache_or_of_nothing_is_refused(name, bounds):
    op, _, (q, k, v, _, *rest) = calls()[name]
    with pytest.raises(RuntimeError, match=r"expected (a span|keys)"):
        op(q, k, v, torch.tensor([bounds]), *rest)


LAYOUTS = [
    *([], [2], [2, 16], [2, 16, 4, 1]),  # no segment, or half of one
    *([0, 16, 4], [-2, 16, 4], [3, 16, 4], [2**62, 16, 4]),  # heads that do not divide those of q
    *([2, 16, 5], [2, 16, 0], [2, 16, -4], [2, 16, 2**40]),  # bits
    *([2, 15, 4], [2, 18, 2], [2, 20, 3], [2, 0, 4], [2, -16, 4], [2, 2**62, 4]),  # widths
    *([2, 17, 8], [2, 16, 16], [2, 16, 4, 32, 2], [4, 16, 4]),  # more than the row holds
]


@pytest.mark.parametrize("of_values", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_that_does_not_fit_its_rows_is_refused(layout, of_values):
    q, span = torch.randn(BATCH, HEADS, 1, RANK), torch.tensor([[0, 33]])
    x = few(torch.randn(BATCH, 2, SLOTS, RANK), "16x4")
    good, rest = [2, 16, 4], (q, x.rows, x.rows, span, 0.2, None, None)
    assert torch.ops.eigenzoo.latent_decode(*rest, good, good).isfinite().all()
    with pytest.raises(RuntimeError, match=r"expected|queries have"):
        torch.ops.eigenzoo.latent_decode(*rest, *((good, layout) if of_values else (layout, good)))


def test_rows_without_a_layout_and_numbers_with_one_are_refused():
    q, span = torch.randn(BATCH, HEADS, 1, RANK), torch.tensor([[0, 33]])
    x = torch.randn(BATCH, 2, SLOTS, RANK)
    for given, layout in ((few(x, "16x4").rows, None), (x, [2, 16, 4]), (x.byte(), [2, 16, 4])):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.eigenzoo.latent_decode(q, x, given, span, 0.2, None, None, None, layout)


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.ones(1, 2, 3, 8), [1, 8, 4]),
        (torch.ones(1, 2, 3, 8), [2, 16, 4]),
        (torch.ones(1, 2, 3, 8, dtype=torch.long), [2, 8, 4]),
        (torch.ones(2, 3, 8), [2, 8, 4]),
        (torch.ones(1, 2, 3, 8), [2, 8, 5]),
        (torch.ones(1, 2, 3, 3), [2, 3, 4]),
    ],
)
def test_vectors_that_do_not_fit_a_layout_are_not_packed(x, layout):
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.eigenzoo.pack(x, layout)


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (torch.ones(1, 3, 16), [2, 8, 4]),
        (torch.ones(1, 3, 8, dtype=torch.uint8), [2, 8, 4]),
        (torch.ones(3, 16, dtype=torch.uint8), [2, 8, 4]),
        (torch.ones(1, 16, 3, dtype=torch.uint8).mT, [2, 8, 4]),
        (torch.ones(1, 3, 16, dtype=torch.uint8), [2, 3, 4]),
    ],
)
def test_rows_that_do_not_fit_a_layout_are_not_unpacked(rows, layout):
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.eigenzoo.unpack(rows, layout, torch.float32)
