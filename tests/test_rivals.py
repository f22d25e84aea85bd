"""Rivals' caches, as benchmarks/rivals.py simulates them."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from eigenzoo.zoo.inference.perplexity import token_losses

FILES = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rivals(monkeypatch):
    """The modules rivals, rival_caches and rival_bench."""
    monkeypatch.syspath_prepend(str(FILES))
    return [import_module(name) for name in ("rivals", "rival_caches", "rival_bench")]


@pytest.fixture
def caches(rivals):
    return rivals[1]


@pytest.fixture(scope="module")
def model():
    return tiny.native(head_dim=16)


def made(caches, model, name: str, bits: int):
    """A rival for heads of 16 numbers, with a window of 32 tokens and a sink of 8 if it has any."""
    read = caches.readers(model, tiny.tokens(4, 64))
    return {
        "rotated": lambda: caches.rotated(bits, model.config.num_key_value_heads, 16),
        "kivi": lambda: caches.kivi(bits, 16, window=32),
        "squat": lambda: caches.squat(bits, read["queries"], window=32),
        "oscar": lambda: caches.oscar(bits, **read)._replace(window=32, sink=8),
    }[name]()


NAMES = ("rotated", "kivi", "squat", "oscar")


def test_shares_are_of_codes_scales_zero_points_and_the_window(caches):
    queries = torch.eye(64).double().expand(1, 3, 64, 64)
    # 64 numbers of a head: 4 bits each and one scale of 16
    assert caches.rotated(4, 3, 64).share(2048) == (4 * 64 + 16) / (16 * 64)
    # 128 of 2048 tokens in 16 bits; 32 numbers of 2 bits share a scale and a zero point
    low = (2 * 32 + 32) / (16 * 32)
    assert caches.kivi(2, 64).share(2048) == pytest.approx((128 + 1920 * low) / 2048)
    assert caches.squat(2, queries).share(2048) == caches.kivi(2, 64).share(2048)
    low = (2 * 64 + 32) / (16 * 64)
    assert caches.oscar(2, queries, queries).share(2048) == pytest.approx(
        (64 + 256 + 1728 * low) / 2048
    )
    assert caches.kivi(2, 64).share(100) == 1


@pytest.mark.parametrize("name", NAMES)
def test_errors_fall_with_bits(caches, model, name):
    rows = tiny.tokens(2, 130)
    dense = torch.stack([token_losses(model, row, 130)[0] for row in rows])

    def error(bits: int) -> float:
        losses = caches.rival_losses(model, rows, made(caches, model, name, bits))
        assert losses.shape == dense.shape
        return float((losses - dense).square().mean())

    two, four, eight = map(error, (2, 4, 8))
    assert two > 4 * four > 16 * eight > 0


@pytest.mark.parametrize("name", ["kivi", "squat", "oscar"])
def test_tokens_in_the_window_and_in_the_sink_are_exact(caches, model, name):
    rows = tiny.tokens(2, 97)
    rival = made(caches, model, name, 2)
    dense = torch.stack([token_losses(model, row, 97)[0] for row in rows])
    wide = caches.rival_losses(model, rows, rival._replace(window=96))
    torch.testing.assert_close(wide, dense, atol=1e-5, rtol=1e-5)
    layer = caches.RivalLayer(rival, 0)
    k, v = torch.randn(2, 1, 4, 96, 16, generator=torch.Generator().manual_seed(0))
    for part in torch.arange(96).split(32):
        read = layer.update(part, k[:, :, part], v[:, :, part])
    for x, y in zip(read, (k, v), strict=True):
        assert torch.equal(x[:, :, -32:], y[:, :, -32:])
        assert not torch.isclose(x[:, :, 8:64], y[:, :, 8:64]).all(-1).any()
        if name == "oscar":
            assert torch.equal(x[:, :, :8], y[:, :, :8])


def test_squat_keeps_errors_of_keys_from_what_queries_read(caches):
    random = torch.Generator().manual_seed(0)
    q = (
        torch.randn(4, 500, 5, generator=random).double()
        @ torch.randn(4, 5, 64, generator=random).double()
    )  # queries of 5 dimensions
    k = torch.randn(1, 4, 64, 64, generator=random)
    gram = q.mT @ q / 500

    def error(rival) -> torch.Tensor:
        lost = (rival.keys(0, k) - k).double()
        return (q @ lost[0].mT).square().sum()

    plain, aware = caches.kivi(4, 64), caches.squat(4, gram[None])
    assert error(aware) < 0.3 * error(plain)  # those of the last 16 of 64 channels remain
    assert torch.equal(aware.values(0, k), plain.values(0, k))


def test_readers_are_gram_matrices_of_rotated_queries_and_of_averaged_values(caches, model):
    x, layer, seen = tiny.tokens(3, 20), model.layers[1].attn, []
    read = caches.readers(model, x)
    attend = layer.attend
    layer.attend = lambda q, *rest: seen.append(q) or attend(q, *rest)
    model(x)
    del layer.attend
    q = seen[0].unflatten(1, (4, 2))  # (B, G, heads of a group, T, D)
    want = torch.einsum("bgmti,bgmtj->gij", q, q).double() / 60
    torch.testing.assert_close(read["queries"][1], want, atol=1e-4, rtol=1e-4)
    inputs = []
    hook = layer.o_proj.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    model(x)
    hook.remove()
    y = inputs[0].unflatten(2, (4, 2, 16))
    want = torch.einsum("btgmi,btgmj->gij", y, y).double() / 60
    torch.testing.assert_close(read["outputs"][1], want, atol=1e-4, rtol=1e-4)


def test_heads_that_no_hadamard_matrix_fits_are_refused(caches):
    with pytest.raises(ValueError, match="heads have 80 numbers: expected a power of 2"):
        caches.rotated(4, 2, 80)


@pytest.fixture
def texts(rivals, dense_folder, tmp_path, monkeypatch) -> list:
    """Arguments for a small model, and small texts."""
    bench = rivals[2]
    for name, value in {"WINDOW": 64, "SAMPLES": 8, "LENGTH": 32}.items():
        monkeypatch.setattr(bench, name, value)
    for name in ("python_source", "python_help"):
        monkeypatch.setattr(bench, name, lambda held_out: tiny.WORDS * (9 if held_out else 8))
    (tmp_path / "text.txt").write_text(tiny.WORDS * 20)
    words = [dense_folder, "--wiki", tmp_path / "text.txt", "--speech", tmp_path / "text.txt"]
    return [*words, "--cache", tmp_path / "kept"]


def test_variants_of_the_method_are_measured_on_the_same_texts(rivals, texts, monkeypatch, capsys):
    ablations = import_module("ablations")
    names = ["no refit", "refit", "drawn labels", "more tokens"]
    only = [word for name in names for word in ("--only", name)]
    words = ["ablations.py", *texts, "--keep", "0.3", "--keep", "0.2", *only]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    ablations.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["variant"], r["keep"]) for r in rows] == [(n, k) for n in names for k in (0.3, 0.2)]
    assert all(row["share"] <= row["keep"] for row in rows)
    losses = {row["variant"]: row["perplexity"]["wiki"] for row in rows if row["keep"] == 0.2}
    assert len(set(losses.values())) == 4


def test_drawn_labels_are_those_that_the_model_expects(rivals):
    ablations = import_module("ablations")
    logits = 50 * torch.eye(5)  # sure of token i in row i
    with ablations.drawn_labels():
        loss = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="sum")
    assert loss < 1e-6


def test_rivals_are_set_beside_our_caches_on_four_texts(
    rivals, texts, tmp_path, monkeypatch, capsys
):
    command, _, bench = rivals
    ours = {x: (command.OURS[x][0], (0.6, 1 / 2)) for x in ("ours", "eigen", "kv-heads")}
    monkeypatch.setattr(command, "OURS", ours)
    words = [*texts, "--plot", tmp_path / "plot.png"]

    def run(*more) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["rivals.py", *map(str, (*words, *more))])
        command.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    dense, *rows = run()
    assert list(dense["increase"].values()) == [0, 0, 0, 0]
    named = [(row["cache"], row["setting"]) for row in rows]
    assert {"rotated", "kivi", "squat", "oscar", *ours} <= {name for name, _ in named}
    assert ("kv-heads", "keep 0.5") in named  # and 0.6 is no whole number of heads
    assert ("kv-heads", "keep 0.6") not in named
    for row in rows:
        assert list(row["increase"]) == ["wiki", "speech", "code", "help"]
        assert row["mean"] <= row["worst"] == max(row["increase"].values())
        if row["setting"].startswith("keep"):
            assert row["share"] <= float(row["setting"].removeprefix("keep "))
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    monkeypatch.setattr(bench, "calibration_tokens", None)  # what was calibrated is not again
    monkeypatch.setattr(bench, "gather", None)
    again = run("--only", "squat", "--only", "ours keep 0.6")
    chosen = [
        r
        for r in rows
        if r["cache"] == "squat" or (r["cache"], r["setting"]) == ("ours", "keep 0.6")
    ]
    assert again[1:] == chosen
