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


def close(got, want, atol=2e-5):  # in fp32: masks take other ways through the sums
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


def test_one_token_reads_every_form_of_a_mask_alike(model):
    seen = torch.arange(14)[None] > 3
    rows = seen[:, None, None]
    forms = [seen, rows, rows.int(), added(rows), rows.expand(1, 8, 1, 14), added(rows).half()]
    got = []
    for mask in forms:
        cache = DynamicCache()
        model(IDS[:, :13], past_key_values=cache, attention_mask=seen[:, :13])
        how = {"position_ids": torch.tensor([[9]]), "past_key_values": cache}
        got.append(model(IDS[:, 13:], attention_mask=mask, **how).logits)
    for logits in got[1:]:
        close(logits, got[0])
    close(got[0][:, -1], model(IDS[:, 4:]).logits[:, -1])


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


def test_positions_with_an_offset_stay_those_of_the_cache(model):
    rows, greedy = tiny.tokens(2, 11), {"max_new_tokens": 8, "do_sample": False}
    rows = {"attention_mask": torch.ones_like(rows), "input_ids": rows}
    rows["attention_mask"][1, :4] = 0
    position_ids = torch.stack((torch.arange(11) + 5, torch.arange(11) - 1))
    how = rows | {"position_ids": position_ids.clamp(min=0), "eos_token_id": None} | greedy
    want = model.generate(**how, use_cache=False).tolist()
    if model.model.config.least_bits < 16:
        want = model.generate(**how).tolist()
    for cache in (None, "static"):
        assert model.generate(**how, cache_implementation=cache).tolist() == want
    assert model.generate(**how, prefill_chunk_size=3).tolist() == want


@pytest.fixture(scope="module")
def both():
    """Two models for each family that takes positions and 4-D masks in transformers."""
    return {family: exported.dense_and_exported(family) for family in ("llama", "opt")}


ROWS = tiny.tokens(2, 14, seed=5)
PACKINGS = torch.cat((BLOCKS, torch.ones(14, 14).tril().bool()[None, None]))
PADDED = PACKINGS.clone()
PADDED[1, :, :, :3] = False  # left padding, whose rows see nothing
GENERATOR = torch.Generator().manual_seed(0)
BIAS = torch.randn(2, 8, 14, 14, generator=GENERATOR).masked_fill(~PACKINGS, -torch.inf)
TWO = torch.stack((RESTART[0], torch.arange(14)))
CALLS = {
    "batch of packings": {"attention_mask": PACKINGS},
    "with positions": {"attention_mask": PACKINGS, "position_ids": TWO},
    "padding and packing": {"attention_mask": PADDED, "position_ids": TWO},
    "both directions": {"attention_mask": torch.ones(2, 1, 14, 14, dtype=torch.bool)},
    "one row for all": {"attention_mask": torch.arange(14)[None, None, None] < 9},
    "added": {"attention_mask": BIAS[:, :1]},
    "added by head": {"attention_mask": BIAS},
    "restart": {"position_ids": TWO},
    "restart, no cache": {"position_ids": TWO, "use_cache": False},
    "restart and a mask": {
        "position_ids": TWO,
        "attention_mask": torch.ones(2, 14, dtype=torch.long),
        "use_cache": False,
    },
    "gaps": {"position_ids": TWO * 3 + 5},
    "one for all": {"position_ids": TWO[:1], "use_cache": False},
}


OPT_CAN = ("with positions", "padding and packing", "restart", "gaps")
PAIRS = [("llama", call) for call in CALLS] + [("opt", call) for call in OPT_CAN]


@pytest.mark.parametrize(("family", "call"), PAIRS)
def test_masks_and_positions_mean_what_they_mean_to_the_dense_model(both, family, call):
    want, got = (model(ROWS, **CALLS[call]).logits for model in both[family])
    real = torch.ones(2, 14, dtype=torch.bool)
    real[1, :3] = call != "padding and packing"
    close(got[real], want[real])
    mask = CALLS[call].get("attention_mask", torch.ones(2, 14, dtype=torch.bool))
    if mask.dim() == 2:
        more = {"attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    else:
        more = {"attention_mask": torch.nn.functional.pad(mask[:, :, -1:], (0, 1), value=0.0)}
    if mask.dtype == torch.bool:
        more["attention_mask"][..., -1] = True
    how = CALLS[call] | {"use_cache": True}
    steps = []
    for model in both[family]:
        cache = DynamicCache()
        model(ROWS, past_key_values=cache, **how)
        last = torch.tensor([[20], [19]])
        steps.append(model(ROWS[:, :1], past_key_values=cache, position_ids=last, **more).logits)
    close(steps[1], steps[0])


@pytest.mark.parametrize("window", [3, 7])
def test_a_window_holds_within_each_packed_text(window):
    changes = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    _, ours = exported.dense_and_exported("qwen2", **changes)
    got = ours(IDS, attention_mask=BLOCKS).logits
    close(got[:, :8], ours(FIRST).logits)
    close(got[:, 8:], ours(SECOND).logits)


@pytest.mark.parametrize("kind", ["rebuilt keys", "anchored keys"])
def test_compiled_in_one_graph_it_does_as_eager(kind):
    torch.compiler.reset()
    model = exported.of_kind(kind, num_hidden_layers=1, k_ranks=(6,), v_ranks=(5,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for call in ("restart, no cache", "padding and packing"):
        close(compiled(ROWS, **CALLS[call]).logits, model(ROWS, **CALLS[call]).logits)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    for cache in caches:
        model(ROWS, past_key_values=cache, position_ids=TWO + 5)
    for ids in ROWS[:, :2].split(1, 1):
        position_ids = torch.tensor([[11], [19]]) + caches[0].get_seq_length() - 14
        how = {"position_ids": position_ids, "attention_mask": torch.ones(2, 1, 1, 16).bool()}
        how["attention_mask"][..., caches[0].get_seq_length() + 1 :] = False
        got, want = (
            run(ids, past_key_values=cache, **how).logits
            for run, cache in zip((compiled, model), caches, strict=True)
        )
        close(got, want)


REFUSED = {
    "three dimensions": {"attention_mask": torch.ones(1, 14, 14)},
    "a list": {"attention_mask": [[1] * 14]},
    "too short": {"attention_mask": torch.ones(1, 13)},
    "too long": {"attention_mask": torch.ones(1, 15)},
    "another batch": {"attention_mask": torch.ones(3, 14)},
    "numbers of texts": {"attention_mask": torch.tensor([[1] * 8 + [2] * 6])},
    "floats 0 and 1": {"attention_mask": BLOCKS.float()},
    "integers to add": {"attention_mask": BLOCKS.int() * -10000},
    "4-D and too short": {"attention_mask": BLOCKS[..., 1:]},
    "4-D with another batch": {"attention_mask": BLOCKS.expand(3, 1, 14, 14)},
    "4-D with other heads": {"attention_mask": BLOCKS.expand(1, 3, 14, 14)},
    "few positions": {"position_ids": torch.arange(13)[None]},
    "positions in floats": {"position_ids": RESTART.float()},
    "positions of axes": {"position_ids": RESTART[None].expand(3, 1, 14)},
    "learned positions": {"position_ids": RESTART + 250},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused(what):
    model = exported.of_kind("learned positions")
    name = next(iter(REFUSED[what]))
    with pytest.raises(ValueError, match=name):
        model(IDS, **REFUSED[what])


def test_rows_of_a_cache_may_be_selected_unless_their_positions_were_given():
    model, mask = exported.of_kind("rebuilt keys"), torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    cache, more = DynamicCache(), torch.nn.functional.pad(mask[1:], (0, 1), value=1)
    model(ROWS, attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    got = model(ROWS[:1, :1], attention_mask=more, past_key_values=cache).logits
    close(got[0, -1], model(torch.cat((ROWS[1:, 4:], ROWS[:1, :1]), 1)).logits[0, -1])

    cache = DynamicCache()
    model(ROWS, position_ids=TWO, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="position_ids of 2 sequences"):
        model(ROWS[:1, :1], past_key_values=cache)


REPEATING = torch.tensor([[5, 9, 33, 7, 120, 8, 41, 5, 9, 33, 7]])


@pytest.mark.parametrize("static", [None, "static"])
@pytest.mark.parametrize(
    "more", [{}, {"attention_mask": (torch.arange(11) > 2).long()[None]}], ids=["", "padded"]
)
def test_assisted_generation_gives_the_same_tokens(model, static, more):
    greedy = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None} | more
    want = model.generate(REPEATING, **greedy)[0].tolist()
    assistant = exported.exported(tiny.stir(type(model.model)(model.model.config), seed=1))
    assistant.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    for how in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        got = model.generate(REPEATING, **greedy, **how, cache_implementation=static)
        assert got[0].tolist() == want
