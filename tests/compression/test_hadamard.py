import torch

from eigenzoo.zoo.compression.hadamard import hadamard


def test_all_widths_of_segments_have_one():
    for width in (1, 2, *range(16, 513, 16)):
        h = hadamard(width)
        assert h is not None
        assert h.abs().eq(1).all()
        assert torch.equal(h.mT @ h, width * torch.eye(width, dtype=torch.float64))


def test_other_sizes_have_none():
    assert hadamard(6) is None
    assert hadamard(92) is None  # there is one, which no prime gives
