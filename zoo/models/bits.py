"""How many bits a number in the cache may have. Imports nothing, so that a command line can ask."""

BITS = (16, 8, 4)  # 16 stands for the model's own dtype, not quantized
LEVELS = {8: 127.0, 4: 7.5}  # steps from zero to the largest number


def check_bits(bits: int | None, width: int = 0) -> None:
    """Raise ValueError unless `bits` is one of `BITS` and `width` such numbers fill whole bytes.

    bits: None stands for what the model's config says.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits is {bits}: expected one of {', '.join(map(str, BITS))}")
    if bits == 4 and width % 2:
        raise ValueError(
            f"a latent of {width} numbers leaves half a byte at 4 bits: take 8 bits, or even ranks"
        )
