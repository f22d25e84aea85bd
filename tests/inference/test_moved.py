"""Rows of a text may be read behind another text, where they are what they would be there."""

import pytest
import tiny
import torch
from exported import of_kind

from eigenzoo.zoo.inference.moved import move, shift_step
from eigenzoo.zoo.models.packing import Packed

BLOCK = 4
PACKED = {
    "k_ranks": (8,) * 3,
    "v_ranks": (8,) * 3,
    "k_segments": ("4x8+4x4",) * 3,
    "v_segments": ("", "4x8+4x4", "8x8"),
}


def native(kind: str, **changes):
    return of_kind(kind, **changes).model


def read(model, cache, tokens, start: int):
    """Logits of tokens at the slots from `start` on."""
    return model(tokens, None, cache.first(start + tokens.size(1)))


def behind(model, begin: int, document, seed: int):
    """A cache with a random beginning of some tokens and a document."""
    cache = model.new_cache(1, 64)
    if begin:
        read(model, cache, tiny.tokens(1, begin, seed=seed), 0)
    read(model, cache, document, begin)
    return cache


def rows(cache, layer: int, start: int, count: int) -> list:
    """What a layer caches of some tokens."""
    return [
        x.rows[:, start : start + count]
        if isinstance(x, Packed)
        else x[:, :, start : start + count]
        for x in cache.layer(layer)
    ]


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["numbers", "bits"])
def test_rows_of_the_first_layer_do_not_tell_in_which_block_they_stand(changes):
    model = native("anchored keys", **changes)
    document = tiny.tokens(1, 12, seed=3)
    near, far = behind(model, 8, document, 1), behind(model, 20, document, 2)
    for a, b in zip(rows(near, 0, 8, 12), rows(far, 0, 20, 12), strict=True):
        assert torch.equal(a, b)
    off = behind(model, 19, document, 2)
    assert not torch.equal(rows(near, 0, 8, 12)[0], rows(off, 0, 19, 12)[0])  # not by a block
    for a, b in zip(rows(near, 1, 8, 12), rows(far, 1, 20, 12), strict=True):
        assert not torch.equal(a, b)  # what stands before enters above the first layer


@pytest.mark.parametrize("kind", ["anchored keys", "rebuilt keys", "ALiBi"])
def test_moved_rows_of_a_single_layer_are_read_as_if_they_were_computed_there(kind):
    model = native(kind)
    model.layers = model.layers[:1]
    document, tail = tiny.tokens(1, 12, seed=3), tiny.tokens(1, 5, seed=4)
    there = behind(model, 20, document, 2)
    want = read(model, there, tail, 32), model(tail[:, :1], torch.tensor([32]), there)
    moved = behind(model, 20, tiny.tokens(1, 12, seed=5), 2)
    assert not torch.equal(read(model, moved, tail, 32), want[0])
    source = behind(model, 8, document, 1)
    move(source, 8, moved, 20, 12)
    assert torch.equal(read(model, moved, tail, 32), want[0])
    assert torch.equal(model(tail[:, :1], torch.tensor([32]), moved), want[1])


def test_nothing_but_the_slots_that_are_named_changes():
    model = native("anchored keys", **PACKED)
    source, cache = (behind(model, 0, tiny.tokens(1, 40, seed=s), 0) for s in (1, 2))
    before = behind(model, 0, tiny.tokens(1, 40, seed=2), 0)
    move(source, 8, cache, 20, 12)
    for layer in range(3):
        for start, count, same, at in (
            (0, 20, before, 0),
            (20, 12, source, 8),
            (32, 8, before, 32),
        ):
            for a, b in zip(
                rows(cache, layer, start, count), rows(same, layer, at, count), strict=True
            ):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "step"), [("anchored keys", BLOCK), ("rebuilt keys", 1), ("windows", 1), ("ALiBi", 1)]
)
def test_rows_move_by_blocks_or_where_keys_are_not_rotated_by_any_number(kind, step):
    assert shift_step(native(kind).config) == step


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("full keys", "layer 0 caches keys that are rotated"),
        ("pairs", "pairs are keys that are rotated"),
        ("learned positions", "adds learned positions"),
    ],
)
def test_models_whose_rows_tell_their_positions_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        shift_step(native(kind).config)


@pytest.mark.parametrize("slots", [(-1, 0, 4), (60, 0, 8), (0, 60, 8)])
def test_slots_that_a_cache_lacks_are_refused(slots):
    cache = native("anchored keys").new_cache(1, 64)
    start, at, count = slots
    with pytest.raises(ValueError, match=f"given {count} slots from {start} of 64 to {at} of 64"):
        move(cache, start, cache, at, count)
