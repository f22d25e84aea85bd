"""How much of each layer's error is left at every rank, as rows of a sweep keep it."""

from collections.abc import Sequence

from ..compression.basis import LayerBasis
from ..compression.solve import Basis
from ..utils.records import Curve, Curves

POINTS = 16  # evenly spaced ranks of a curve; the powers of two come on top


def curves(bases: Sequence[LayerBasis]) -> Curves:
    """The shares of error left for keys, and for values where they have latents of their own."""
    made: Curves = {"k": _curve([basis.k for basis in bases])}
    if values := [basis.v for basis in bases if basis.v is not None]:
        made["v"] = _curve(values)
    return made


def _curve(bases: Sequence[Basis]) -> Curve:
    full = bases[0].spectrum.size(1)
    even = {round(i * full / POINTS) for i in range(POINTS + 1)}
    ranks = sorted(even | {2**i for i in range(full.bit_length())})
    left = [b.errors()[ranks] / b.errors()[0] for b in bases]
    return {"ranks": ranks, "left": [[float(f"{x:.4g}") for x in e.tolist()] for e in left]}
