import pytest
import torch

from eigenzoo.zoo.models.bits import LEVELS
from eigenzoo.zoo.models.cache import Rounding, StaticCache
from eigenzoo.zoo.models.packing import Latent, pack

LATENTS = [(Latent(1, 24), Latent(2, 16)), (Latent(4, 8), Latent(1, 40))]


def test_bytes_are_those_of_the_compressed_widths():
    cache = StaticCache(LATENTS, batch=3, slots=10, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 10 * 2 * (24 + 2 * 16 + 4 * 8 + 40)
    stored = [x.untyped_storage().nbytes() for x in cache.keys + cache.values]
    assert cache.nbytes == sum(stored)


def test_writes_land_in_their_slots_and_nowhere_else():
    cache = StaticCache(LATENTS, batch=1, slots=5)
    k, v = torch.ones(1, 4, 2, 8), torch.ones(1, 1, 2, 40)
    keys, values = cache.layer(1).update(torch.tensor([1, 3]), k, v)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert keys[0, 0, :, 0].tolist() == [0, 1, 0, 1, 0]
    assert values[0, 0, :, 0].tolist() == [0, 1, 0, 1, 0]
    assert not cache.keys[0].any()


@pytest.mark.parametrize(("batch", "slots"), [(2, [4]), (1, [3, 4, 5]), (1, [-1])])
def test_writes_that_do_not_fit_are_refused(batch, slots):
    cache = StaticCache(LATENTS, batch=1, slots=5)
    tokens = torch.zeros(batch, len(slots), dtype=torch.long)
    with pytest.raises(ValueError, match="cache"):
        cache.check(tokens, torch.tensor(slots))


def test_the_first_slots_are_a_view():
    cache = StaticCache(LATENTS, batch=1, slots=5)
    first = cache.first(2)
    first.layer(0).update(torch.tensor([1]), torch.ones(1, 1, 1, 24), torch.ones(1, 2, 1, 16))
    assert cache.keys[0][0, 0, :, 0].tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="cache of 2"):
        first.check(torch.zeros(1, 1, dtype=torch.long), torch.tensor([2]))


@pytest.mark.parametrize(
    ("bits", "rows"), [(8, (32, 40, 40, 48)), (4, (16, 24, 24, 24)), (2, (8, 16, 16, 16))]
)
def test_packed_buffers_have_the_bytes_of_their_rows(bits, rows):
    """Of a token: codes, a byte a scale, and zeros up to a multiple of 8 bytes."""
    cache = StaticCache(LATENTS, batch=3, slots=10, bits=bits)
    assert cache.nbytes == 3 * 10 * sum(rows)
    stored = [buffer.rows.untyped_storage().nbytes() for buffer in cache.keys + cache.values]
    assert cache.nbytes == sum(stored)
    latents = [latent.rounded(bits) for pair in LATENTS for latent in pair]
    assert cache.nbytes == 30 * sum(latent.nbytes(torch.float32) for latent in latents)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_no_packed_number_of_8_bits_is_off_by_more_than_a_fraction_of_the_largest(size):
    x = size * torch.randn(2, 3, 50, 24)
    off = (pack(x, Latent(3, 24).rounded(8)).unpack(torch.float32) - x).abs()
    step = x.abs().amax(-1, keepdim=True) / LEVELS[8]
    assert (off <= 0.5001 * 1.125 * step).all()  # a scale is at most an eighth above its step


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_packed_writes_land_in_their_slots_in_place(bits):
    cache = StaticCache(LATENTS, batch=1, slots=5, bits=bits)
    address = cache.keys[1].rows.data_ptr()
    x = torch.randn(1, 4, 2, 8)
    keys, _ = cache.layer(1).update(torch.tensor([1, 3]), x, torch.randn(1, 1, 2, 40))
    assert keys.rows.data_ptr() == address
    assert torch.equal(keys.rows[:, [1, 3]], pack(x, Latent(4, 8).rounded(bits)).rows)
    assert not keys.rows[:, [0, 2, 4]].any()


def test_bits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"bits is 5: expected one of 16, 8, 4"):
        StaticCache(LATENTS, 1, 5, bits=5)
    with pytest.raises(
        ValueError, match="a latent of 7 numbers does not fill whole bytes at 4 bits"
    ):
        StaticCache([(Latent(1, 7), Latent(1, 8))], 1, 5, bits=4)


def test_numbers_are_rounded_in_training_as_in_a_cache_and_gradients_pass():
    keys, values = Latent(2, 16).rounded(2), Latent(2, 16)
    k, v = torch.randn(2, 1, 2, 3, 16, requires_grad=True)
    pos = torch.arange(3)
    got, whole = Rounding(keys, values).update(pos, k, v)
    kept, _ = StaticCache([(keys, values)], 1, 3).layer(0).update(pos, k.detach(), v.detach())
    torch.testing.assert_close(got, kept.unpack(k.dtype))
    assert whole is v
    weight = torch.randn_like(got)
    assert torch.equal(torch.autograd.grad(got, k, weight)[0], weight)
