"""Orthogonal matrices whose entries have one size: Hadamard's."""

import torch
from torch import Tensor


def even(size: int) -> Tensor:
    """An orthogonal matrix, fp64: of even entries if `hadamard` makes it, else a random one.

    The same at every call and on every device.
    """
    if (found := hadamard(size)) is not None:
        return found / size**0.5
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random)).Q


def hadamard(size: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal columns, fp64; None where no construction here has one.

    Doubled (Sylvester) from one of size p + 1, or 2 (p + 1), for a prime p (Paley, 1933).
    """
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4:
        return None
    if _prime(size - 1):
        return _paley(size - 1) + torch.eye(size, dtype=torch.float64)
    if _prime(p := size // 2 - 1) and p % 4 == 1:
        one, q = torch.eye(p + 1, dtype=torch.float64), _paley(p)
        return _blocks(q + one, q - one, q - one, -q - one)
    half = hadamard(size // 2)
    return None if half is None else _blocks(half, half, half, -half)


def _blocks(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.cat((torch.cat((a, b), 1), torch.cat((c, d), 1)))


def _paley(p: int) -> Tensor:
    """The conference matrix of a prime: whether differences are squares modulo p, with a border."""
    square = torch.full((p,), -1.0, dtype=torch.float64)
    square[torch.arange(p).square() % p] = 1
    square[0] = 0
    q = torch.ones(p + 1, p + 1, dtype=torch.float64)
    q[1:, 1:] = square[(torch.arange(p)[:, None] - torch.arange(p)) % p]
    q[0, 0] = 0
    if p % 4 == 3:  # else it is symmetric
        q[1:, 0] = -1
    return q


def _prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))
