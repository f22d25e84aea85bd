"""The instructions that unpack numbers on NVIDIA GPUs, run here by an emulator of five of them."""

import re

import pytest
import torch

from eigenzoo.kernels.rows import ptx
from eigenzoo.zoo.models.bits import LEVELS

WORD = (1 << 32) - 1


def run(text: str, given: dict[str, int]) -> dict[str, int]:
    """Registers after the instructions of a text, each a 32-bit word."""
    registers = dict(given)

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 0) & WORD

    for line in re.sub(r"\{ \.reg [^;]*;|\}", "", text).split(";"):
        if not line.strip():
            continue
        op, to, *words = line.replace(",", " ").split()
        registers[to] = OPS[op](*map(value, words))
    return registers


def prmt(a: int, b: int, order: int) -> int:
    both = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes([both[order >> shift & 7] for shift in (0, 4, 8, 12)], "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


def fma(a: int, b: int, c: int) -> int:
    x, y, z = (halves(word).double() for word in (a, b, c))
    low, high = (x * y + z).bfloat16().view(torch.int16).tolist()
    return low & 0xFFFF | (high & 0xFFFF) << 16


def halves(word: int) -> torch.Tensor:
    """The two numbers in bf16 of a word, the low one first."""
    signed = [(x ^ 0x8000) - 0x8000 for x in (word & 0xFFFF, word >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16)


OPS = {
    "shl.b32": lambda a, n: a << n & WORD,
    "shr.u32": lambda a, n: a >> n,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "mov.b32": lambda a: a,
    "fma.rn.bf16x2": fma,
}


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_four_bytes_become_the_numbers_of_a_part(bits, part):
    if bits == 4 and part > 1:
        pytest.skip("a byte holds two numbers of 4 bits")
    torch.manual_seed(0)
    for low in torch.randint(256, (40, 4)).tolist():
        high = low[::-1]
        words = (int.from_bytes(x, "little") for x in (low, high))
        after = run(ptx(bits, part), dict(zip(("$2", "$3"), words, strict=True)))
        got = torch.cat([halves(after["$0"]), halves(after["$1"])]).tolist()
        codes = [x >> 4 * part & 15 for x in low] if bits == 4 else [x >> 2 * part & 3 for x in low]
        if bits == 3:
            codes = [c | (x >> 2 * part & 1) << 2 for c, x in zip(codes, high, strict=True)]
        assert got == [c - LEVELS[bits] for c in codes]
