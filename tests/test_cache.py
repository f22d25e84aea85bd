import pytest
import torch

from eigenzoo.zoo.cache import Latent, StaticCache

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
def test_what_does_not_fit_is_refused(batch, slots):
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
