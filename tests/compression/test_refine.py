"""Refining approaches the original, changes only compressed weights, and is never worse."""

import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from eigenzoo.hub_export.refine import refine_checkpoint, state_file
from eigenzoo.hub_export.remote.modeling_eigen import EigenForCausalLM
from eigenzoo.zoo import cli
from eigenzoo.zoo.compression.allocate import Ranks
from eigenzoo.zoo.compression.compress import compress, gather
from eigenzoo.zoo.compression.distill import Distiller
from eigenzoo.zoo.compression.fold import fold
from eigenzoo.zoo.compression.methods import METHODS
from eigenzoo.zoo.compression.refine import RefineSettings, _Run, learned, refine
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.utils.resume import write_state

JOINT = Settings(
    keep=0.2, latent="joint-kv", heads_per_latent=(4, 4), rank_multiple=1, kv_bits=(16,)
)
WAYS = {
    "llama rebuild": (
        "llama",
        {"tie_word_embeddings": True},
        Settings(keep=0.4, keys="rebuild", kv_bits=(16,)),
    ),
    "llama anchored": ("llama", {}, Settings(keep=0.4, keys="anchored", kv_bits=(16,))),
    "llama biases": (
        "llama",
        {"attention_bias": True, "head_dim": 16},
        Settings(keep=0.1, keys="rebuild", rank_multiple=2, kv_bits=(16,)),
    ),
    "llama 4 bits": ("llama", {}, Settings(keep=0.15, keys="anchored", kv_bits=(4,))),
    "qwen2": ("qwen2", {}, Settings("eigen", 0.3, rank_multiple=1, kv_bits=(16,))),
    "opt": ("opt", {}, Settings(keep=0.2, rank_multiple=1, kv_bits=(16,))),
    "opt 350m": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        JOINT._replace(keep=0.05),
    ),
    "mpt": ("mpt", {}, Settings("kv-heads", 0.5, kv_bits=(16,))),
    "mpt joint": ("mpt", {}, JOINT),
    "mpt clip": ("mpt", {"attn_config": {"clip_qkv": 0.4}}, Settings(keep=0.4, kv_bits=(16,))),
    "foundry qk_ln": (
        "foundry",
        {"qk_ln": True, "clip_qkv": 0.5},
        Settings(keep=0.4, kv_bits=(16,)),
    ),
}
QUICK = RefineSettings(steps=20, batch=8, lr=1e-3, every=10)


def dense_of(way: str):
    family, changes, _ = WAYS[way]
    foundry = family == "foundry"
    dense = tiny.FoundryMPT(changes).native() if foundry else tiny.native(family, **changes)
    for name, p in dense.named_parameters():
        if name.endswith("bias"):
            p.data *= 0.02  # larger ones would outweigh what depends on the text
    return dense


def pair(way: str = "llama rebuild", dtype: torch.dtype = torch.float32):
    """A dense model and its compressed model."""
    dense = dense_of(way)
    dense.to(dtype)
    return dense, compress(dense, tiny.tokens(8, 64), WAYS[way][2]).model


def kl(dense, low, tokens) -> float:
    """KL(dense || low) in nats per token, from all logits at once, over a cache."""
    p, q = (
        m(tokens, cache=m.new_cache(*tokens.shape)).float().log_softmax(-1) for m in (dense, low)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


def same(one, two) -> bool:
    one, two = (m.state_dict() for m in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module", params=WAYS)
def work(request):
    """The models, copies of their weights, held-out text, and the result of refining."""
    models, held_out = pair(request.param), tiny.tokens(4, 50, seed=2)
    before = [{name: x.clone() for name, x in m.state_dict().items()} for m in models]
    return models, before, held_out, refine(*models, tiny.tokens(64, 64), QUICK, held_out)


def test_every_family_and_key_scheme_gets_nearer_to_its_original(work):
    (dense, low), _, held_out, refined = work
    assert [x["step"] for x in refined.history] == [0, 10, 20]
    assert refined.history[0]["held_out"] == pytest.approx(kl(dense, low, held_out), rel=1e-3)
    assert refined.best["held_out"] == pytest.approx(kl(dense, refined.model, held_out), rel=1e-3)
    assert refined.best["held_out"] < 0.995 * refined.history[0]["held_out"]


def test_only_what_compression_made_changes_and_the_rest_is_shared(work):
    models, before, _, refined = work
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    old, new, names = models[1].state_dict(), refined.model.state_dict(), {*learned(models[1])}
    assert {name for name in new if not torch.equal(new[name], old[name])} == names
    shared = {name for name in new if new[name].data_ptr() == old[name].data_ptr()}
    assert shared == new.keys() - names


def test_whole_keys_values_and_layers_stay_as_they_are():
    dense = tiny.native()
    settings = Settings(keep=0.6, heads_per_latent=(1, 1), kv_bits=(16,))
    statistics = gather(dense, tiny.tokens(8, 64), settings)
    bases = METHODS["fisher"].bases(dense, statistics)
    low = fold(dense, bases, Ranks((8, 4, 8), (8, 8, 4)))
    keys = {f"layers.1.attn.{name}" for name in ("q_proj.weight", "k_proj.weight", "k_up")}
    values = {f"layers.2.attn.{name}" for name in ("v_proj.weight", "o_proj.weight", "o_proj.bias")}
    assert keys | values <= set(learned(low)) <= keys | values | {"layers.1.attn.k_mean"}
    with pytest.raises(ValueError, match="no layer of this model is compressed"):
        learned(fold(dense, bases, Ranks((8, 8, 8), (8, 8, 8))))


def test_steps_are_in_proportion_to_the_weights():
    dense, low = pair()
    settings = RefineSettings(steps=1, batch=8, lr=1e-4, warmup=0, every=1)
    refined = refine(dense, low, tiny.tokens(32, 64), settings)
    assert refined.best["step"] == 1
    before, after = low.state_dict(), refined.model.state_dict()
    for name in learned(low):  # the first step of Adam has one size, up to what damps it
        size = before[name].square().mean().sqrt() or 1.0
        step = (after[name] - before[name]).abs().max() / size
        assert 0 <= step < 1.01e-4
        assert step > 0.2e-4 or not before[name].any()


@pytest.mark.parametrize(("lr", "why"), [(0.3, "no new best"), (1e30, "no longer finite")])
def test_refining_never_ends_worse_than_it_began(lr, why):
    dense, low = pair()
    refined = refine(dense, low, tiny.tokens(32, 64), QUICK._replace(lr=lr, every=2, patience=3))
    assert same(refined.model, low)
    assert why in refined.stopped
    assert refined.best["step"] == 0
    json.dumps(refined.history, allow_nan=False)


def interrupted(monkeypatch, after: int):
    """Ctrl-C at a step."""
    whole, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [2, 7])
def test_resumed_equals_uninterrupted(monkeypatch, tmp_path, dtype, after):
    (dense, low), text, state = pair(dtype=dtype), tiny.tokens(64, 48), tmp_path / "state"
    settings = RefineSettings(steps=11, batch=8, lr=1e-3, every=3, weight_decay=0.01)
    want = refine(dense, low, text, settings)
    assert want.best["step"] > 0
    with monkeypatch.context() as patch:
        interrupted(patch, after)
        with pytest.raises(KeyboardInterrupt):
            refine(dense, low, text, settings, state=state)
    assert [x.name for x in tmp_path.iterdir()] == (["state"] if after > 3 else [])
    steps = []
    learn = _Run.learn
    monkeypatch.setattr(_Run, "learn", lambda run: (steps.append(run.step), learn(run)))
    got = refine(dense, low, text, settings, state=state)
    assert steps == [*range(after // 3 * 3, 11)]
    assert got.history == want.history
    assert same(got.model, want.model)


def test_a_state_of_another_run_is_refused(monkeypatch, tmp_path):
    (dense, low), text, state = pair(), tiny.tokens(16, 48), tmp_path / "state"
    settings = RefineSettings(steps=4, every=2)
    refine(dense, low, text, settings, state=state)
    with pytest.raises(ValueError, match=r"left by other work .lr 5e-05, given 0.1"):
        refine(dense, low, text, settings._replace(lr=0.1), state=state)
    with pytest.raises(ValueError, match=r"left by other work .texts "):
        refine(dense, low, text + 1, settings, state=state)
    other = compress(dense, text, Settings(keep=0.3, kv_bits=(16,))).model
    with pytest.raises(ValueError, match=r"left by other work .model "):
        refine(dense, other, text, settings, state=state)
    write_state(tmp_path / "statistics", {}, {"source": "self"})
    with pytest.raises(ValueError, match="left by "):
        refine(dense, low, text, settings, state=tmp_path / "statistics")
    another = pair()[0]  # equal to the original but for what compression replaced
    another.layers[1].attn.v_proj.weight.data += 0.01
    with pytest.raises(ValueError, match=r"left by other work .original "):
        refine(another, low, text, settings, state=state)


def test_a_run_ends_when_its_time_is_up(monkeypatch):
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))  # each call advances a second
    monkeypatch.setattr("eigenzoo.zoo.compression.refine.time", clock)
    rate, seen = RefineSettings.rate, []
    monkeypatch.setattr(RefineSettings, "rate", lambda s, x: (seen.append(x), rate(s, x))[1])
    refined = refine(*pair(), tiny.tokens(16, 48), QUICK._replace(steps=10_000, minutes=0.5))
    assert refined.stopped == "time is up"
    assert refined.history[-1]["step"] == len(seen) < 30
    assert seen == sorted(seen)
    assert seen[-1] > 0.9  # the learning rate has fallen with the time, not with the steps


def test_the_rate_rises_and_falls_and_every_epoch_reads_every_row():
    settings = RefineSettings(steps=10, batch=3, lr=2.0, warmup=0.5)
    rates = [settings.rate(x) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])
    assert RefineSettings(lr=1.0, warmup=0).rate(0) == 1
    order = settings.order(6).flatten()
    epochs = order.view(5, 6)
    assert all(x.sort().values.tolist() == [*range(6)] for x in epochs)
    assert len({tuple(x) for x in epochs.tolist()}) == 5
    assert not torch.equal(order, settings._replace(seed=1).order(6).flatten())


def test_the_divergence_in_pieces_is_that_of_the_whole():
    dense = tiny.native()
    x, target = (torch.randn(300, 64) for _ in range(2))
    one, two = (x.clone().requires_grad_() for _ in range(2))
    got = Distiller().divergence(one, target, dense.head)
    p, q = (dense.head(z).log_softmax(-1) for z in (target, two))
    want = (p.exp() * (p - q)).sum(-1).mean()
    want.backward()
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(one.grad, two.grad)


def test_recomputed_layers_learn_the_same():
    dense, low = pair("llama anchored")
    text = tiny.tokens(16, 48)
    one, two = (refine(dense, low, text, QUICK._replace(recompute=x)) for x in (False, True))
    assert one.history == two.history
    assert same(one.model, two.model)


@pytest.mark.parametrize("way", ["llama anchored", "mpt joint", "foundry qk_ln"])
def test_bfloat16_arithmetic_learns_about_the_same(way):
    dense, low = pair(way)
    text, held_out = tiny.tokens(32, 48), tiny.tokens(4, 48, seed=2)
    gained = []
    for precision in ("float32", "bfloat16"):
        refined = refine(dense, low, text, QUICK._replace(precision=precision), held_out)
        gained.append(kl(dense, low, held_out) - kl(dense, refined.model, held_out))
    assert gained[1] > 0.8 * gained[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_smaller_than_the_dtype_of_the_checkpoint_add_up(dtype):
    dense, low = pair(dtype=dtype)
    refined = refine(dense, low, tiny.tokens(64, 64), QUICK._replace(steps=40, every=20))
    assert refined.model.dtype == dtype
    assert {x.dtype for x in refined.model.state_dict().values()} == {dtype}
    assert refined.best["held_out"] < refined.history[0]["held_out"]


def test_models_and_texts_that_do_not_fit_are_refused():
    dense, low = pair()
    text = tiny.tokens(8, 32)
    with pytest.raises(ValueError, match="is not that of the compressed model"):
        refine(tiny.native(seed=1, tie_word_embeddings=True), low, text)
    with pytest.raises(ValueError, match="is not that of the compressed model"):
        refine(tiny.native("opt"), low, text)
    with pytest.raises(ValueError, match="compressed itself"):
        refine(low, low, text)
    with pytest.raises(ValueError, match="given 1 sequences: expected 2 or more"):
        refine(dense, low, text[:1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("lr", 0.0), ("warmup", 1.0), ("weight_decay", -1.0), ("precision", "float16"),
     ("minutes", 0.0), ("clip", float("nan")), ("patience", 0)],
)  # fmt: skip
def test_invalid_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=name.replace("_", " ")):
        RefineSettings(**{name: value}).check()


# from here on: folders


@pytest.fixture(scope="module")
def low_folder(dense_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("refine") / "low"
    words = ("--keep", "0.2", "--kv-bits", "16", "--samples", "8", "--seq-len", "64")
    words += ("--refit", "none")
    # a refit, or rounding, would leave refining nothing to improve in a random model
    run("compress", dense_folder, out, *words)
    return out


def run(*words) -> int:
    """Exit code of the command line."""
    before, sys.argv = sys.argv, ["eigenzoo", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code or 0
    finally:
        sys.argv = before


def options(dense_folder) -> list:
    words = ["--original", dense_folder, "--steps", "12", "--every", "4", "--lr", "1e-3"]
    return [*words, "--seq-len", "32", "--samples", "32", "--batch", "4"]


def test_the_refined_folder_loads_in_transformers_with_equal_logits(
    dense_folder, low_folder, tmp_path
):
    settings = RefineSettings(steps=12, batch=4, every=4)
    low, dense = load(str(low_folder)), load(str(dense_folder)).model
    record = refine_checkpoint(low, dense, tmp_path / "out", settings, seq_len=32, samples=32)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    native, x = load(str(tmp_path / "out")), tiny.tokens(2, 40)
    theirs = EigenForCausalLM.from_pretrained(tmp_path / "out")
    want = native.model(x, cache=native.model.new_cache(*x.shape))  # rounded, as in a new cache
    torch.testing.assert_close(theirs(x).logits, want, atol=1e-4, rtol=0)
    assert native.config["compression"] == json.loads(json.dumps(record))
    (entry,) = record["refined"]
    assert entry["best_step"] > 0
    assert entry["kl_after"] < entry["kl_before"]
    assert entry["perplexity_after"] == record["evaluation"]["compressed"]
    assert entry["steps"] == 12
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Refined for {entry['best_step']} steps on 896 tokens (mixed: " in card


def test_the_same_command_resumes_after_ctrl_c(
    monkeypatch, capsys, dense_folder, low_folder, tmp_path
):
    words = options(dense_folder)
    assert run("refine", low_folder, tmp_path / "whole", *words, "--json") == 0
    want = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, 6)
        assert run("refine", low_folder, out, *words) == 130
    assert {x.name for x in tmp_path.iterdir()} == {"whole", state_file(out).name}
    assert run("refine", low_folder, out, *words, "--lr", "1") == 2
    assert "lr 0.001, given 1.0" in capsys.readouterr().err
    assert run("refine", low_folder, out, *words, "--json") == 0
    printed, said = capsys.readouterr()
    assert "going on from" in said
    assert json.loads(printed) | {"out": want["out"]} == want
    assert same(load(str(out)).model, load(str(tmp_path / "whole")).model)
    assert {x.name for x in tmp_path.iterdir()} == {"whole", "out"}


def test_refine_measures_on_a_file_and_reports_its_work(capsys, dense_folder, low_folder, tmp_path):
    (tmp_path / "a.txt").write_text(tiny.WORDS * 30)
    words = [*options(dense_folder), "--text", tmp_path / "a.txt"]
    assert run("refine", low_folder, tmp_path / "one", *words) == 0
    assert "a.txt\nwrote" in capsys.readouterr().out
    assert run("refine", tmp_path / "one", tmp_path / "two", *words) == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "two") == 0
    assert capsys.readouterr().out.count("refined") == 2


def test_bad_input_prints_one_line_and_exits_with_2(capsys, dense_folder, low_folder, tmp_path):
    new = tmp_path / "new"
    cases = {
        ("refine", low_folder, new): "local model dense: give it as --original",
        ("refine", dense_folder, new): "was not written by eigenzoo compress",
        ("refine", low_folder, low_folder): "which is read",
        ("refine", low_folder, new, "--steps", "0"): "steps is 0",
        ("refine", low_folder, new, "--original", low_folder): "compressed itself",
        ("refine", low_folder, new, "--text", tmp_path / "none"): "does not exist",
    }
    for words, named in cases.items():
        assert run(*words) == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.splitlines()[-1].startswith("error: ")
        assert named in error
        assert list(tmp_path.iterdir()) == []


def test_the_command_line_has_the_defaults_of_the_library():
    told = inspect.signature(cli.refine.refine).parameters
    assert {name: told[name].default for name in RefineSettings._fields} == (
        RefineSettings._field_defaults
    )
