"""The Triton launchers compared with the definitions, under Triton's interpreter or on a GPU.

`test_kernels.py` runs this file: the interpreter needs a process of its own, because Triton reads
TRITON_INTERPRET at import. Without that variable, `pytest tests/kernels/interpreted.py` runs the
kernels on a GPU.
"""

import os
from functools import partial
from itertools import chain, combinations, product

import pytest
import tiny
import torch
from repeats import but
from triton.runtime import interpreter

from eigenzoo.kernels import anchored_decode, latent_decode, ops, rotary_decode, split
from eigenzoo.kernels.bench import checks
from eigenzoo.kernels.bench.setup import Setup
from eigenzoo.kernels.install import FUSED
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.generate import Generator
from eigenzoo.zoo.models import attention
from eigenzoo.zoo.models.bits import parse_segments
from eigenzoo.zoo.models.cache import Buffer
from eigenzoo.zoo.models.packing import Latent, pack

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
torch.set_default_device(DEVICE)
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)
LAUNCH = {
    attention.latent_decode: latent_decode.launch,
    attention.anchored_decode: anchored_decode.launch,
    attention.rotary_decode: rotary_decode.launch,
}
# bf16: 2^-8 of numbers up to 2, twice, because the interpreter truncates the result; and the
# definition rounds intermediate results, which the kernels keep in fp32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def sets_of(*options: str) -> list[set[str]]:
    """Every option alone, every two of them, and none."""
    return [set(c) for n in range(3) for c in combinations(options, n)]


def named(x: object) -> str:
    """The id of a parameter."""
    return ("+".join(sorted(x)) or "plain") if isinstance(x, set) else str(x)


def pairs(*options: str):
    """Parametrize a test by every option alone, every two of them, and none."""
    return pytest.mark.parametrize("given", sets_of(*options), ids=named)


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    """Patch Triton's language for the helpers of a module once, not in each call."""
    patched = set()

    def call(helper, *args, **kwargs):
        if helper.fn.__module__ not in patched:
            interpreter._patch_lang(helper.fn)
            patched.add(helper.fn.__module__)
        return helper.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch):
    """Split short sequences as long ones are split, so that some splits have nothing to read."""
    torch.manual_seed(0)
    monkeypatch.setattr(split, "splits_of", lambda *_: 4)


def span_of(slots: int, given: set[str], tokens: int = 1) -> torch.Tensor:
    """The slots that two sequences read: all, or a part of its own for each."""
    if "spans" not in given:
        return torch.tensor([[0, slots]])
    assert slots > tokens + 6
    return torch.tensor([[slots // 3, slots], [2, slots - 4]])


def cache(heads: int, slots: int, width: int, dtype=torch.float32) -> torch.Tensor:
    """(2, heads, slots, width) with NaN behind the last slot, which no kernel may read."""
    x = torch.full((2, heads, slots + 5, width), torch.nan, dtype=dtype)
    x[:, :, :slots] = torch.randn(2, heads, slots, width)
    return x[:, :, :slots]


def kept(x: torch.Tensor, segments: str) -> tuple[Buffer, torch.Tensor, list[int] | None]:
    """A cache as the definition takes it, then its tensor and layout, as a launcher does.

    Rows lie in wider ones, with 255 in all bytes of other columns and slots.
    """
    if not segments:
        return x.float(), x, None
    latent = Latent(x.size(1), x.size(3), parse_segments(segments))
    packed = pack(x, latent)
    wide = torch.full((2, x.size(2) + 3, packed.rows.size(2) + 6), 255, dtype=torch.uint8)
    rows = wide[:, 2:-1, 2:-4]
    rows.copy_(packed.rows)
    return packed, rows, [latent.heads, *chain(*latent.segments)]


def in_pages(x: torch.Tensor, layout, table: torch.Tensor, page: int) -> torch.Tensor:
    """A static cache in these pages, among others and in longer rows; NaN or 255 elsewhere."""
    rows = x if layout else x.transpose(1, 2)  # (2, S, ...)
    shape = table.numel() + 3, page + 1, *rows.shape[2:-1], rows.size(-1) + 8
    pages = torch.full(shape, 255 if layout else torch.nan, dtype=x.dtype)[:, :-1, ..., :-8]
    pages[table.long()] = rows.unflatten(1, (-1, page))
    return pages if layout else pages.transpose(1, 2)


def check(definition, q, k, v, span, *rest, segments=("", ""), page=0):
    """The launcher agrees with the definition, and reads no slot outside of the span.

    page: the launcher reads the cache in pages of so many slots, unless it is 0.
    """
    wide = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest]
    (k, k_rows, k_layout), (v, v_rows, v_layout) = map(kept, (k, v), segments)
    want = definition(q.float(), k, v, span, *wide)
    for x, layout in ((k_rows, k_layout), (v_rows, v_layout)):
        slot = torch.arange(x.size(-2))
        outside = ((slot < span[:, :1]) | (slot >= span[:, 1:])).expand(2, -1)
        (x if layout else x.transpose(1, 2))[outside] = 255 if layout else torch.nan
    name = "k" if definition is attention.latent_decode else "z"
    layouts = {f"{name}_layout": k_layout, "v_layout": v_layout}
    if page:
        table = (1 + torch.randperm(2 * k_rows.size(-2) // page)).view(2, -1).int()
        k_rows = in_pages(k_rows, k_layout, table, page)
        v_rows = in_pages(v_rows, v_layout, table, page)
        first = torch.arange(table.size(1)) * page  # slots
        unused = (first + page <= span[:, :1]) | (first >= span[:, 1:])
        layouts["table"] = table.masked_fill(unused, 2**31 - 1)
    got = LAUNCH[definition](q, k_rows, v_rows, span, *rest, **layouts)
    assert got.dtype == q.dtype
    torch.testing.assert_close(got.float(), want, atol=TOLERANCE[q.dtype], rtol=0)


def latent(slots, given, rk=16, rv=32, dtype=torch.float32, heads=4, k_heads=2, v_heads=2):
    """Arguments of `latent_decode`."""
    tokens = 3 if "tokens" in given else 1
    if "uneven" in given:
        k_heads, v_heads = 4, 1
    bias = torch.randn(2, slots) if "bias" in given else None
    slopes = torch.rand(heads) if "slopes" in given else None
    q = torch.randn(2, heads, tokens, rk).to(dtype)
    k, v = cache(k_heads, slots, rk, dtype), cache(v_heads, slots, rv, dtype)
    return q, k, v, span_of(slots, given, tokens), rk**-0.5, bias, slopes


@pytest.mark.parametrize("slots", LENGTHS)
@pytest.mark.parametrize("splits", [1, 4])
def test_latent_decode_reads_every_length(slots, splits, monkeypatch):
    monkeypatch.setattr(split, "splits_of", lambda *_: splits)
    check(attention.latent_decode, *latent(slots, set()))


@pairs("bias", "slopes", "tokens", "spans", "uneven")
def test_latent_decode_takes_every_option(given):
    check(attention.latent_decode, *latent(150, given))


@pytest.mark.parametrize(
    ("rk", "rv"), [(80, 48), (96, 112), (1, 77), (128, 24), (2, 320), (513, 7), (72, 33)]
)
def test_latent_decode_takes_every_rank(rk, rv):
    check(attention.latent_decode, *latent(70, {"spans"}, rk, rv))


@pytest.mark.parametrize(
    ("heads", "k_heads", "v_heads"), [(1, 1, 1), (6, 3, 2), (6, 2, 6), (20, 1, 1), (9, 3, 1)]
)
def test_latent_decode_shares_latents_among_any_number_of_heads(heads, k_heads, v_heads):
    shared = {"heads": heads, "k_heads": k_heads, "v_heads": v_heads}
    check(attention.latent_decode, *latent(40, {"tokens", "slopes"}, **shared))


def test_a_bias_of_minus_infinity_hides_whole_tiles():
    arguments = latent(200, {"bias"})
    arguments[5][:, :130] = -torch.inf
    check(attention.latent_decode, *arguments)


def test_the_first_of_a_few_tokens_may_see_nothing_of_the_last_tile():
    check(attention.latent_decode, *latent(129, {"tokens"}))


def test_caches_of_any_layout_are_read():
    q, k, v, span, scale, *_ = latent(40, set())
    want = attention.latent_decode(q, k, v, span, scale)
    stretched = torch.full((2, 40, 2, 24), torch.nan)  # slots before heads, columns behind
    stretched[..., :16] = k.transpose(1, 2)
    got = latent_decode.launch(
        q.mT.contiguous().mT, stretched[..., :16].transpose(1, 2), v.mT.contiguous().mT, span, scale
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def anchored(slots, given, block, rank=16, dtype=torch.float32, heads=4, kv=2, k_heads=2):
    """Arguments of `anchored_decode`, head size 16."""
    v_heads = 2
    if "uneven" in given:
        k_heads, v_heads = 1, 2
    tokens = 3 if "tokens" in given else 1
    angle = torch.rand(2 if "angles" in given else 1, tokens, -(-slots // block), 8)
    mean = torch.randn(kv, 1, 16).to(dtype) if "mean" in given else None
    up = (rank**-0.5 * torch.randn(k_heads, rank, kv // k_heads * 16)).to(dtype)
    q, z = torch.randn(2, heads, tokens, 16), cache(k_heads, slots, rank, dtype)
    v = cache(v_heads, slots, 32, dtype)
    bias = torch.randn(2, slots) if "bias" in given else None
    span = span_of(slots, given, tokens)
    options = bias, positions(slots, span) if "padding" in given else None
    return q.to(dtype), z, v, span, 0.25, angle.cos(), angle.sin(), up, mean, block, *options


def positions(slots: int, span: torch.Tensor) -> torch.Tensor:
    """Positions of the slots of two sequences with holes; another text is in front of the span."""
    hole = torch.rand(2, slots) < 0.3
    position = ((~hole).cumsum(1) - 1).clamp(min=0)
    in_front = torch.arange(slots) < span[:, :1]
    return torch.where(in_front, slots - 1, position).int()


@pairs("bias", "mean", "angles", "spans", "uneven", "padding")
def test_anchored_decode_takes_every_option(given):
    check(attention.anchored_decode, *anchored(90, given, 32))


FEW = sets_of("bias", "mean", "angles", "spans", "uneven")


@pytest.mark.parametrize(
    ("given", "block"),
    but([*((x, 32) for x in FEW), *product(FEW[:1], (16, 128))], product(FEW, (16, 32, 128))),
    ids=named,
)
def test_anchored_decode_takes_a_few_tokens(given, block):
    check(attention.anchored_decode, *anchored(130, {"tokens", *given}, block))


@pytest.mark.parametrize("slots", LENGTHS)
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("padding", [(), ("padding",)], ids=["", "padding"])
def test_anchored_decode_reads_every_length(slots, block, padding):
    check(attention.anchored_decode, *anchored(slots, {"mean", *padding}, block))


@pytest.mark.parametrize("block", [2, 3, 24, 32, 100, 128, 150, 4096])
@pytest.mark.parametrize("padding", [(), ("padding",)], ids=["", "padding"])
def test_anchored_decode_takes_every_block(block, padding):
    check(attention.anchored_decode, *anchored(150, {"spans", "mean", *padding}, block))


@pytest.mark.parametrize("shift", [1, 8, 15])
def test_a_tile_may_begin_anywhere_in_a_block(shift):
    *arguments, _ = anchored(130, set(), 16)
    position = (torch.arange(130)[None] - shift).clamp(min=0).int()  # one row for all sequences
    check(attention.anchored_decode, *arguments, position)


@pytest.mark.parametrize(("heads", "kv", "k_heads"), [(6, 2, 2), (6, 6, 2), (1, 1, 1), (20, 2, 1)])
@pytest.mark.parametrize("rank", [5, 40])
def test_anchored_decode_shares_latents_among_any_number_of_heads(heads, kv, k_heads, rank):
    shared = {"heads": heads, "kv": kv, "k_heads": k_heads}
    q, z, _, *rest = anchored(70, {"spans"}, 16, rank, **shared)
    check(attention.anchored_decode, q, z, cache(1, 70, 20), *rest)


def rotary(slots, given, rank=16, dtype=torch.float32, heads=4, kv=2, k_heads=2, head_dim=16):
    """Arguments of `rotary_decode`."""
    tokens = 3 if "tokens" in given else 1
    v_heads = 2
    if "uneven" in given:
        k_heads, v_heads = 1, 1
    angle = torch.rand(2 if "angles" in given else 1, 1, slots, head_dim // 2)
    mean = torch.randn(kv, 1, head_dim).to(dtype) if "mean" in given else None
    up = (rank**-0.5 * torch.randn(k_heads, rank, kv // k_heads * head_dim)).to(dtype)
    q = torch.randn(2, heads, tokens, head_dim).to(dtype)
    z, v = cache(k_heads, slots, rank, dtype), cache(v_heads, slots, 32, dtype)
    bias = torch.randn(2, slots) if "bias" in given else None
    span, scale = span_of(slots, given, tokens), head_dim**-0.5
    return q, z, v, span, scale, angle.cos(), angle.sin(), up, mean, bias


@pairs("bias", "mean", "tokens", "angles", "spans", "uneven")
def test_rotary_decode_takes_every_option(given):
    check(attention.rotary_decode, *rotary(40, given))


@pytest.mark.parametrize("slots", LENGTHS)
def test_rotary_decode_reads_every_length(slots):
    check(attention.rotary_decode, *rotary(slots, {"mean"}))


@pytest.mark.parametrize(("rank", "head_dim"), [(80, 16), (5, 80), (70, 24), (160, 2), (900, 16)])
def test_rotary_decode_takes_every_rank_and_head_size(rank, head_dim):
    check(attention.rotary_decode, *rotary(20, {"spans"}, rank, head_dim=head_dim))


@pytest.mark.parametrize(("heads", "kv", "k_heads"), [(6, 2, 2), (4, 4, 1), (1, 1, 1)])
def test_rotary_decode_shares_latents_among_any_number_of_heads(heads, kv, k_heads):
    shared = {"heads": heads, "kv": kv, "k_heads": k_heads}
    q, z, _, *rest = rotary(20, {"mean"}, **shared)
    check(attention.rotary_decode, q, z, cache(1, 20, 20), *rest)


def test_a_lift_that_is_not_held_is_read_for_every_tile(monkeypatch):
    monkeypatch.setattr(rotary_decode, "MOST_HELD", 0)
    check(attention.rotary_decode, *rotary(70, {"spans", "mean"}, 70))


MIXED = "16x16+16x8+32x4+16x2"  # 80 numbers
KEPT = {  # segments of keys and values, at ranks 80 and 80
    "8": ("80x8", "80x8"),
    "4": ("80x4", "80x4"),
    "3": ("80x3", "80x3"),
    "2": ("80x2", "80x2"),
    "mixed": (MIXED, "48x4+24x3+8x2"),
    "only keys": (MIXED, ""),
    "only values": ("", MIXED),
}


MADE = {f.__name__: f for f in (latent, anchored, rotary)}


@pytest.mark.parametrize(
    ("name", "kept"),
    but([*product(["latent"], KEPT), *product(MADE, list(KEPT)[4:])], product(MADE, KEPT)),
)
def test_packed_numbers_are_read_as_what_they_stand_for(name, kept):
    made, segments = MADE[name], KEPT[kept]
    wide = {anchored: {"block": 32, "rank": 80}, latent: {"rk": 80}, rotary: {"rank": 80}}[made]
    arguments = list(made(90, {"spans", "mean", "bias", "padding"}, **wide))
    arguments[2] = cache(2, 90, 80)
    check(getattr(attention, f"{made.__name__}_decode"), *arguments, segments=segments)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_packed_numbers_are_read_in_bf16(made):
    wide = {anchored: {"block": 32, "rank": 80}, latent: {"rk": 80}, rotary: {"rank": 80}}[made]
    arguments = list(made(40, {"spans", "mean"}, dtype=torch.bfloat16, **wide))
    arguments[2] = cache(2, 40, 80, torch.bfloat16)
    check(
        *(getattr(attention, f"{made.__name__}_decode"), *arguments), segments=(MIXED, "64x4+16x2")
    )


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("16x2", "16x3"),
        ("4x4+4x2", "2x8+8x3"),
        ("1x16+2x8+320x4", "132x2"),
        ("514x8", "200x3"),
        ("3x16+72x4", "38x4"),
    ],
)
def test_segments_have_any_width(k, v):
    ranks = [sum(s.width for s in parse_segments(x)) for x in (k, v)]
    check(attention.latent_decode, *latent(40, {"uneven"}, *ranks), segments=(k, v))


@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.parametrize("segments", ["6x4", MIXED, "134x8+40x3"])
def test_packed_latents_of_any_rank_are_lifted(segments, held, monkeypatch):
    monkeypatch.setattr(rotary_decode, "MOST_HELD", held)
    rank = sum(s.width for s in parse_segments(segments))
    arguments = rotary(40, {"mean", "tokens"}, rank)
    check(attention.rotary_decode, *arguments, segments=(segments, "24x4+8x2"))


PAGED = [{"bias"}, {"spans", "padding"}, {"spans", "tokens", "mean"}]


@pytest.mark.parametrize("segments", [("", ""), (MIXED, "48x4+24x3+8x2")], ids=["", "segments"])
@pytest.mark.parametrize(
    ("given", "page"),
    but(zip(PAGED, (16, 32, 48), strict=True), product(PAGED, (16, 32, 48))),
    ids=named,
)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_cache_in_pages_is_read_through_a_table(made, given, page, segments):
    wide = {anchored: {"block": 32, "rank": 80}, latent: {"rk": 80}, rotary: {"rank": 80}}[made]
    arguments = list(made(96, given, **wide))
    arguments[2] = cache(2, 96, 80)
    definition = getattr(attention, f"{made.__name__}_decode")
    check(definition, *arguments, segments=segments, page=page)


def test_numbers_of_16_bits_at_odd_addresses_are_refused():
    q, k, v, *rest = latent(20, set())
    _, rows, layout = kept(k, "8x16+8x4")
    odd = torch.zeros(2, 20, rows.size(2) + 1, dtype=torch.uint8)[..., 1:]
    with pytest.raises(ValueError, match="16 bits at odd addresses"):
        latent_decode.launch(q, odd, v, *rest, k_layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_halves_are_added_up_in_fp32(made, dtype):
    block = {"block": 32} if made is anchored else {}
    definition = getattr(attention, f"{made.__name__}_decode")
    check(definition, *made(90, {"spans", "mean", "slopes"}, dtype=dtype, **block))


@pytest.mark.parametrize("name", checks.OPS)
@pytest.mark.parametrize(("tokens", "segments"), [(1, ""), (4, checks.MIXED)])
def test_the_checks_of_the_bench_pass(name, tokens, segments):
    kernels = {
        definition.__name__: partial(with_layouts, LAUNCH[definition]) for definition in FUSED
    }
    setup = Setup(torch.device(DEVICE), "", 0, 0, 1.0, len, kernels, str)
    error = checks.error_of(setup, checks.Check(name, tokens, segments))
    assert error <= checks.TOLERANCE


def with_layouts(launch, q, k, v, *rest):
    """Call a launcher as `ops` does."""
    (k, k_layout), (v, v_layout) = ops._parts(k, q), ops._parts(v, q)
    name = "k_layout" if launch is latent_decode.launch else "z_layout"
    return launch(q, k, v, *rest, **{name: k_layout, "v_layout": v_layout})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (
            "llama",
            Settings(
                keep=0.6, keys="rebuild", heads_per_latent=(2, 1), rank_multiple=2, kv_bits=(16,)
            ),
        ),
        (
            "llama",
            Settings(
                keep=0.6, keys="anchored", anchor_block=3, heads_per_latent=(4, 2), kv_bits=(16,)
            ),
        ),
        ("mpt", Settings(keep=0.6, heads_per_latent=(2, 4), rank_multiple=2, kv_bits=(16,))),
        (
            "opt",
            Settings(
                keep=0.6, heads_per_latent=(4, 4), latent="joint-kv", rank_multiple=2, kv_bits=(16,)
            ),
        ),
    ],
)
def test_a_model_writes_the_same_text_through_the_kernels(family, settings):
    layers = {"n_layers" if family == "mpt" else "num_hidden_layers": 1}
    with torch.device("cpu"):
        model = compress(tiny.native(family, **layers), tiny.tokens(8, 64), settings).model
    model = model.to(DEVICE)
    prompts = [[5, 9, 33, 7, 120], [8, 41]]
    want = list(Generator(model, 2, 20, compile=False).stream(prompts, 6))
    for layer in model.layers:
        for definition in FUSED:
            setattr(layer.attn, definition.__name__, LAUNCH[definition])
    got = list(Generator(model, 2, 20, compile=False).stream(prompts, 6))
    assert torch.equal(torch.stack(got), torch.stack(want))
