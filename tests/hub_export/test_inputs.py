"""Masks and positions of an exported model: packed texts, prefixes, and every cache."""

import exported
import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

IDS = tiny.tokens(1, 14)
FIRST, SECOND = IDS[:, :8], IDS[:, 8:]
RESTART = torch.cat((torch.arange(8), torch.arange(6)))[None]
BLOCKS = torch.block_diag(torch.ones(8, 8), torch.ones(6, 6)).tril().bool()[None, None]
MORE = tiny.tokens(1, 2, seed=3)


def added(mask, dtype=torch.float32, hidden=None):
    """A mask of bool as floats that are added to the scores."""
    hidden = torch.finfo(dtype).min if hidden is None else hidden
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.fixture(scope="module", params=exported.KINDS)
def model(request):
    return exported.of_kind(request.param)


def run_alone(model, use_cache: bool):
    """The logits of each text, run alone with what follows it."""
    return [
        model(torch.cat((text, token), 1), use_cache=use_cache).logits
        for text, token in zip((FIRST, SECOND), MORE.T[:, :, None], strict=True)
    ]


@pytest.fixture(scope="module")
def alone(model):
    return run_alone(model, use_cache=True)


FORMS = {
    "bool": BLOCKS,
    "int": BLOCKS.long(),
    "float": added(BLOCKS),
    "-inf": added(BLOCKS, hidden=-torch.inf),
    "float16": added(BLOCKS, torch.float16),
    "bfloat16": added(BLOCKS, torch.bfloat16),
    "of a batch": BLOCKS.expand(1, 1, 14, 14),
    "of every head": BLOCKS.expand(1, 8, 14, 14),
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_texts_answer_as_each_alone(model, alone, form):
    got = model(IDS, attention_mask=FORMS[form], position_ids=RESTART).logits
    close(got[:, :8], alone[0][:, :8])
    close(got[:, 8:], alone[1][:, :6])


def test_positions_that_restart_separate_texts_without_a_cache(model):
    alone = run_alone(model, use_cache=False)
    for given in (RESTART, RESTART[0]):
        got = model(IDS, position_ids=given, use_cache=False).logits
        close(got[:, :8], alone[0][:, :8])
        close(got[:, 8:], alone[1][:, :6])


@pytest.mark.parametrize("static", [False, True])
def test_packed_texts_are_continued_from_a_cache(model, alone, static):
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache()
    slots = 20 if static else 14

    def step(ids, rows, position_ids):
        mask = torch.zeros(1, 1, ids.size(1), slots, dtype=torch.bool)
        for i, seen in enumerate(rows):
            mask[0, 0, i, seen] = True
        how = {"attention_mask": mask, "position_ids": torch.tensor([position_ids])}
        return model(ids, past_key_values=cache, **how).logits

    rows = [list(range(8)[: i + 1] if i < 8 else range(8, i + 1)) for i in range(14)]
    step(IDS, rows, RESTART[0].tolist())
    slots += 0 if static else 1
    got = step(MORE[:, :1], [[*range(8), 14]], [8])  # one token, the next of the first text
    close(got[:, -1], alone[0][:, -1])
    slots += 0 if static else 1
    got = step(MORE[:, 1:], [[*range(8, 14), 15]], [6])
    close(got[:, -1], alone[1][:, -1])


def test_branches_of_one_prompt_go_in_together(model, alone):
    cache = DynamicCache()
    model(FIRST, past_key_values=cache)
    ids = torch.cat((MORE[:, :1], MORE[:, 1:], MORE[:, :1]), 1)
    mask = torch.ones(1, 1, 3, 11, dtype=torch.bool)
    mask[..., 8:] = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]])
    how = {"attention_mask": mask, "position_ids": torch.tensor([[8, 8, 9]])}
    got = model(ids, past_key_values=cache, **how).logits
    close(got[:, 0], alone[0][:, -1])
    want = model(torch.cat((FIRST, MORE[:, 1:], MORE[:, :1]), 1)).logits
    close(got[:, 1:], want[:, -2:])
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., 8] = False
    how = {"attention_mask": mask, "position_ids": torch.tensor([[10]])}
    got = model(MORE[:, :1], past_key_values=cache, **how).logits
    want = model(torch.cat((FIRST, MORE[:, 1:], MORE[:, :1], MORE[:, :1]), 1)).logits
    close(got[:, -1], want[:, -1])
