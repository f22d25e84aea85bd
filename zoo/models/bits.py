"""How many bits a number in the cache may have. Imports nothing, so that a command line can ask."""

BITS = (16, 8, 4)  # per cached number; 16 means not quantized, in the model's dtype
LEVELS = {8: 127.0, 4: 7.5}  # the largest number of a vector, divided by its scale


def check_bits(bits: int | None, width: int = 0) -> None:
    """Raise ValueError unless a cache supports vectors of `width` numbers of `bits` bits.

    None is always accepted: it leaves the bits to another setting.
    """
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits is {bits}: expected one of {', '.join(map(str, BITS))}")
    if bits == 4 and width % 2:
        raise ValueError(
            f"a latent of {width} numbers does not fill whole bytes at 4 bits: use 8 bits, or even "
            "ranks"
        )
