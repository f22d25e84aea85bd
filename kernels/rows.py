"""Reading rows of a cache in Triton, packed or not; `layouts.py` says in which chunks."""

import triton
import triton.language as tl

from ..zoo.models.bits import LEVELS
from ..zoo.models.packing import ALIGN, LOWEST

MOST_HELD = tl.constexpr(128)  # numbers of a chunk: more would take too many registers
SCALE = tl.constexpr(LOWEST)
STEP = tl.constexpr(ALIGN)
MIDDLES = tl.constexpr(tuple(LEVELS.get(bits, 0.0) for bits in range(5)))  # of codes, by bits


def ptx(bits: int, part: int) -> str:
    """Instructions of NVIDIA GPUs that unpack four bytes to four numbers in bf16.

    64 + n in bf16 is 0x4280 + 2 n: the high byte is the same for all codes n, and the low one is
    the code, shifted, and a bit. So two permutations of bytes make four numbers 64 + n.
    """
    low, plane = (15, 4) if bits == 4 else (3, 2)
    lines = [_shift("t", "$2", 1 - plane * part)]
    lines += [f"lop3.b32 t, t, {_each(low << 1)}, 0x80808080, 0xea;"]
    if bits == 3:
        lines += [_shift("h", "$3", 3 - 2 * part), f"lop3.b32 t, h, {_each(8)}, t, 0xea;"]
    lines += ["prmt.b32 $0, t, 0x42424242, 0x5140;", "prmt.b32 $1, t, 0x42424242, 0x7362;"]
    minus = {4: 0xC28F, 3: 0xC287, 2: 0xC283}[bits]  # -64 - middle
    one, both = "0x3f803f80", hex(minus << 16 | minus)
    lines += [f"mov.b32 one, {one};", f"mov.b32 less, {both};"]
    lines += [f"fma.rn.bf16x2 ${i}, ${i}, one, less;" for i in (0, 1)]
    return "{ .reg .b32 t, h, one, less; " + " ".join(lines) + " }"


def _each(byte: int) -> str:
    return hex(byte * 0x01010101)


def _shift(to: str, of: str, left: int) -> str:
    return f"shl.b32 {to}, {of}, {left};" if left >= 0 else f"shr.u32 {to}, {of}, {-left};"


PTX = tl.constexpr(tuple(ptx(n, i) if n > 1 else "" for n in range(5) for i in range(4)))


@triton.jit
def begin(ptr, b, batch, latent, head, slot, ROW: tl.constexpr):
    """Where a latent of a sequence and a slot begins, and its scales. batch, head: strides.

    With pages: where a latent of the first slot of page 0 does.
    """
    if ROW.page == 0:
        if ROW.aligned:
            batch = tl.multiple_of(batch, STEP)
        ptr += b * batch + slot.to(tl.int64) * ROW.slot
    latent = latent.to(tl.int64)
    return ptr + latent * head + latent * ROW.codes, ptr + ROW.scales_at + latent * ROW.scales


@triton.jit
def pages(table_ptr, start, there, PAGE: tl.constexpr, TILE: tl.constexpr):
    """The page of a tile of slots from `start` on, or that of each slot; 0 without pages."""
    if PAGE == 0:
        page = 0
    elif PAGE % TILE == 0:  # tiles begin at multiples of their size
        page = tl.load(table_ptr + start // PAGE).to(tl.int64)
    else:
        slot = start + tl.arange(0, TILE)
        page = tl.load(table_ptr + slot // PAGE, mask=there, other=0).to(tl.int64)
    return page


@triton.jit
def tile_at(ptr, scales, page, stride, start, ROW: tl.constexpr, TILE: tl.constexpr):
    """Where the rows and the scales of a tile are: two pointers, or two for each slot.

    ptr, scales: from `begin` and `next_tile`; page: from `pages`; stride: from a page to the next.
    """
    if ROW.page > 0:
        if ROW.aligned:
            stride = tl.multiple_of(stride, STEP)
        slot = start if ROW.page % TILE == 0 else start + tl.arange(0, TILE)
        at = page * stride + slot % ROW.page * ROW.slot
        ptr += at
        scales += at
    return ptr, scales


@triton.jit
def next_tile(ptr, scales, ROW: tl.constexpr, TILE: tl.constexpr):
    """The pointers of `begin` for the tile that follows; with pages they stay."""
    if ROW.page == 0:
        ptr += TILE * ROW.slot
        scales += TILE * ROW.slot
    return ptr, scales


@triton.jit
def columns(CHUNK: tl.constexpr, start=0):
    """Which numbers of a latent a chunk holds, and whether they exist; `start` elements further."""
    c = tl.arange(0, CHUNK.size * CHUNK.parts)
    element = CHUNK.start + start + c % CHUNK.size
    return CHUNK.first + c // CHUNK.size * CHUNK.width + element, element < CHUNK.width


@triton.jit
def queries(ptr, rows, there, ROW: tl.constexpr):
    """Rows of queries, as one tensor for every chunk; zeros where `there` is false."""
    parts = tl.tuple(())
    for i in tl.static_range(len(ROW.chunks)):
        column, known = columns(ROW.chunks[i])
        at = (rows * ROW.width)[:, None] + column[None, :]
        parts += (tl.load(ptr + at, mask=there[:, None] & known[None, :], other=0),)
    return parts


@triton.jit
def numbers(ptr, rows, there, ROW: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr, start=0):
    """Numbers of a chunk, `start` elements further, not yet scaled, in TYPE: (rows, size * parts).

    ptr: where the first row begins, or each of them; see `tile_at`. TYPE must be fp32 under the
    interpreter, which converts integers to bf16 wrongly.
    """
    element = CHUNK.start + start + tl.arange(0, CHUNK.size)
    mask = there[:, None]
    if not CHUNK.whole:
        mask &= (element < CHUNK.width)[None, :]
    if CHUNK.bits == 16:
        to = (ptr + CHUNK.at).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        if ptr.type.is_block():
            to = to[:, None] + element[None, :]
        else:
            to += (rows * (ROW.slot // 2))[:, None] + element[None, :]
        x = tl.load(to, mask=mask, other=0).to(TYPE)
    else:
        row = ptr + CHUNK.at
        row = row[:, None] if ptr.type.is_block() else row + (rows * ROW.slot)[:, None]
        kept = tl.load(row + element[None, :], mask=mask, other=0)
        if CHUNK.parts > 1:
            high = kept
            if CHUNK.bits == 3:
                shift = (element // (CHUNK.width // 2)).to(tl.uint8)
                to = row + CHUNK.width + (element % (CHUNK.width // 2))[None, :]
                high = tl.load(to, mask=mask, other=0) >> shift[None, :]
            x = unpacked(kept, high, ROW, CHUNK, TYPE)
        elif CHUNK.bits == 8:
            x = kept.to(tl.int8, bitcast=True).to(TYPE)
        else:
            x = kept.to(TYPE)
        if CHUNK.bits > 0 and ROW.ptx and ROW.held and CHUNK.size * CHUNK.parts <= MOST_HELD:
            x = held(x)
    return x


@triton.jit
def held(x):
    """The same numbers, behind instructions that Triton does not look through.

    For operands of a product Triton searches the loads that they come from. If one is of bytes, it
    lays out both operands for bytes, and every tile then moves most of their registers.
    """
    if x.dtype == tl.float32:
        y = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1
        )
    else:
        y = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, is_pure=False, pack=2
        )
    return y


@triton.jit
def unpacked(kept, high, ROW: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr):
    """The numbers of bytes (rows, n): (rows, parts * n), all of the first part first."""
    x = beside(part(kept, high, 0, ROW, CHUNK, TYPE), part(kept, high, 1, ROW, CHUNK, TYPE))
    if CHUNK.parts == 4:
        y = beside(part(kept, high, 2, ROW, CHUNK, TYPE), part(kept, high, 3, ROW, CHUNK, TYPE))
        x = beside(x, y)
    return x


@triton.jit
def part(
    kept, high, PART: tl.constexpr, ROW: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr
):
    """Numbers of one part of bytes."""
    if ROW.ptx:
        x = tl.inline_asm_elementwise(
            PTX[4 * CHUNK.bits + PART], "=r,=r,r,r", [kept, high], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        code = (kept >> (4 if CHUNK.bits == 4 else 2) * PART) & (15 if CHUNK.bits == 4 else 3)
        if CHUNK.bits == 3:
            code |= ((high >> 2 * PART) & 1) << 2
        x = code.to(TYPE) - MIDDLES[CHUNK.bits]
    return x


@triton.jit
def beside(a, b):
    """Two tensors of equal shapes as one, b to the right of a."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def scale_of(ptr, rows, there, ROW: tl.constexpr, CHUNK: tl.constexpr):
    """The scales, in fp32, of the segment of a chunk in some rows."""
    if not ptr.type.is_block():
        ptr += rows * ROW.slot
    code = tl.load(ptr + CHUNK.scale, mask=there, other=0)
    x = tl.cast((code.to(tl.int32) << 20) + SCALE, tl.float32, bitcast=True)
    return held(x) if ROW.ptx and ROW.held else x
