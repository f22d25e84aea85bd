import json

import pytest
import tiny
import torch

from eigenzoo.zoo.compression.calibrate import calibrate
from eigenzoo.zoo.compression.compress import compress
from eigenzoo.zoo.compression.moments import Needs
from eigenzoo.zoo.compression.search import ErrorBudget
from eigenzoo.zoo.compression.settings import Settings, needs
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.data import calibration_tokens, encode
from eigenzoo.zoo.inference.perplexity import perplexity
from eigenzoo.zoo.inference.steps import decode_step, prefill
from eigenzoo.zoo.measure import calibrator as passes
from eigenzoo.zoo.measure import sweep as sweeping
from eigenzoo.zoo.measure.calibrator import Calibration, kind, narrow, union
from eigenzoo.zoo.measure.evaluate import Evaluation, decode_speed
from eigenzoo.zoo.measure.grid import distinct, grid
from eigenzoo.zoo.measure.sweep import Sweep
from eigenzoo.zoo.utils import jsonl

METHODS = ["fisher", "attention", "eigen"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file to calibrate on and one to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(tiny.WORDS * 30)
    (folder / "b.txt").write_text(tiny.WORDS[::-1] * 10)
    return folder


@pytest.fixture
def sweep(dense, texts, tmp_path):
    """A function that sweeps into a file and returns all its rows."""

    def call(axes, windows=2, model=dense, seq_len=32, words="a.txt", **options):
        work = Sweep(
            model,
            tmp_path / "out.jsonl",
            Evaluation(texts / "b.txt", 64, windows),
            [Calibration(str(texts / words), 6, seq_len)],
            **options,
        )
        return list(work.rows(distinct(grid({"kv_bits": [(16,)], **axes}), model.model.config)))

    return call


@pytest.fixture
def calls(monkeypatch):
    """The arguments of all calls of `calibrate` and `compress`."""
    made = {"calibrate": [], "compress": []}

    def counted(module, name, function):
        def call(model, tokens, *rest):
            made[name].append(rest)
            return function(model, tokens, *rest)

        monkeypatch.setattr(module, name, call)

    counted(passes, "calibrate", calibrate)
    counted(sweeping, "compress", compress)
    return made


def out(tmp_path):
    return (tmp_path / "out.jsonl").read_bytes()


def read_rows(path):
    return jsonl.read_rows(path, jsonl.SWEEP)


def test_refits_share_one_calibration(sweep, calls):
    rows = sweep({"keep": [0.5], "refit": [(), ("output",)]})
    assert [row["fitted"]["refit"] for row in rows[1:]] == [[], ["output"]]
    assert len(calls["calibrate"]) == 1
    assert len({row["perplexity"] for row in rows}) == 3


@pytest.mark.parametrize(("family", "joint"), [("llama", False), ("opt", False), ("opt", True)])
def test_split_statistics_equal_those_taken_directly(family, joint):
    model, x = tiny.native(family), tiny.tokens(4, 32)
    heads = model.config.num_key_value_heads
    small = (2, 2) if joint else (1, 2)
    have, want = (Needs(n, False, True, joint) for n in ((heads, heads), small))
    got = narrow(calibrate(model, x, *have), have, want)
    for a, b in zip(got, calibrate(model, x, *want), strict=True):
        assert a.moments.keys() == b.moments.keys()
        for m, n in zip(a.moments.values(), b.moments.values(), strict=True):
            assert torch.equal(m.count, n.count)
            torch.testing.assert_close(m.mean, n.mean, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(m.covariance, n.covariance, atol=1e-5, rtol=1e-4)


def test_weighted_statistics_are_of_one_sharing():
    model, x = tiny.native(), tiny.tokens(4, 32)
    have, want = (Needs(n, gradients=True) for n in ((4, 4), (2, 2)))
    assert kind(have) != kind(want)
    with pytest.raises(ValueError, match="gather them for each"):
        narrow(calibrate(model, x, *have), have, want)
    unweighted = [n._replace(weighted=False) for n in (have, want)]
    with pytest.raises(ValueError, match="gather them for each"):
        narrow(calibrate(model, x, *unweighted[0]), *unweighted)


def test_one_pass_serves_fisher_with_and_without_weights():
    config = tiny.native().config
    wants = [
        needs(Settings(m, keep=0.6, kv_bits=(16,)).fit(config), config)
        for m in ("fisher", "fisher-plain")
    ]
    assert [(n.unweighted, n.weighted) for n in wants] == [(False, True), (True, False)]
    assert kind(wants[0]) == kind(wants[1])
    assert union(wants) == wants[0]._replace(unweighted=True)


def test_one_pass_serves_heads_per_latent_that_do_not_divide_each_other():
    wants = [Needs((2, 1)), Needs((3, 1), queries=True)]
    assert union(wants) == Needs((6, 1), queries=True)


def test_rows_equal_compressing_and_evaluating_by_hand(sweep, dense, texts):
    axes = {"method": METHODS, "keep": [0.5], "heads_per_latent": [None, (2, 1)]}
    rows = sweep(axes)
    model, words = dense.model, dense.tokenizer
    tokens = calibration_tokens(str(texts / "a.txt"), model, words, 6, 32)
    test = encode(words, (texts / "b.txt").read_text())
    assert rows[0]["perplexity"] == perplexity(model, test, 64, 2).perplexity
    checked = 0
    for row in rows[1:]:
        if "refused" in row:
            continue
        checked += 1
        shared = row["settings"]["heads_per_latent"]
        asked = row["settings"] | {"heads_per_latent": shared and tuple(shared)}
        low = compress(model, tokens, Settings(**asked)).model
        assert row["k_ranks"] == list(low.config.k_ranks)
        assert row["v_ranks"] == list(low.config.v_ranks)
        assert row["perplexity"] == pytest.approx(perplexity(low, test, 64, 2).perplexity, rel=1e-4)
        assert row["tokens"] == 126
        assert row["dense_perplexity"] == rows[0]["perplexity"]
        assert row["kv_bytes_per_token"] == low.config.kv_width * 2
        assert row["kv_share"] == low.config.kv_width / low.config.dense_kv_width <= 0.5
    assert checked == 5  # eigen shares no latents


def test_statistics_are_taken_once_for_all_cells_that_can_share_them(sweep, calls):
    axes = {
        "method": METHODS,
        "keep": [0.8, 0.5],
        "heads_per_latent": [(1, 1), (2, 4)],
        "keys": ["rebuild", "anchored"],
    }
    rows = sweep(axes)
    assert len(calls["compress"]) == sum("perplexity" in row for row in rows) - 1 == 18
    # without gradients one pass serves both sharings; with gradients each needs its own
    assert sorted(c[:2] + c[4:5] for c in calls["calibrate"]) == sorted(
        (heads, gradients, anchor)
        for heads, gradients in (((1, 1), True), ((2, 4), True), ((2, 4), False))
        for anchor in (1, 16)
    )


def test_layers_are_measured_once_for_all_shares_to_keep(sweep, dense, texts, monkeypatch):
    measured, error = [], ErrorBudget._error

    def counted(search, layer, *ranks):
        measured.append((search.multiple, layer, *ranks))
        return error(search, layer, *ranks)

    monkeypatch.setattr(ErrorBudget, "_error", counted)
    axes = {"method": ["eigen"], "keep": [0.8, 0.4, 0.6], "rank_multiple": [1, 4]}
    rows = sweep(axes)[1:]
    together = set(measured)
    assert len(measured) == len(together)
    assert {multiple for multiple, *_ in together} == {1, 4}
    measured.clear()
    tokens = calibration_tokens(str(texts / "a.txt"), dense.model, dense.tokenizer, 6, 32)
    for row in rows:
        alone = compress(dense.model, tokens, Settings(**row["settings"]))
        assert row["layers"] == alone.layers
        assert row["fitted"]["error_budget"] == alone.settings.error_budget
    assert set(measured) == together
    assert len(measured) > len(together)


def test_existing_rows_are_not_computed_again(sweep, calls, tmp_path):
    axes = {"method": ["fisher", "eigen"], "keep": [0.8, 0.5], "keys": ["rebuild", "anchored"]}
    first, text = sweep(axes), out(tmp_path)
    for made in calls.values():
        made.clear()
    assert sweep(axes) == first == read_rows(tmp_path / "out.jsonl")
    assert out(tmp_path) == text
    assert calls == {"calibrate": [], "compress": []}


def test_another_run_calibrates_only_if_nothing_was_kept(sweep, calls, tmp_path):
    sweep({"keep": [0.8]})
    assert len(calls["calibrate"]) == 1
    more = sweep({"keep": [0.8, 0.5]})
    assert len(calls["calibrate"]) == 1
    assert len(calls["compress"]) == 2
    fresh = sweep({"keep": [0.8, 0.5]}, save_statistics=False, force=True)
    assert len(calls["calibrate"]) == 2
    assert not (tmp_path / "out.statistics").exists()
    same = ("perplexity", "k_ranks", "v_ranks", "curves")
    assert [[a.get(k) for k in same] for a in more] == [[b.get(k) for k in same] for b in fresh]


def test_decoding_is_timed_beside_the_dense_model(sweep, dense, monkeypatch):
    given = []

    def timed(generators, steps):
        given.append([(g.model.config.kv_width, g.slots) for g in generators])
        assert all(g.decode is decode_step for g in generators)  # not compiled
        assert all(g.prefill is prefill for g in generators)
        assert decode_speed(generators, steps, rounds=1)[1] > 0
        return [4.0, 5.0]

    monkeypatch.setattr(sweeping, "decode_speed", timed)
    first, low, refused = sweep({"keep": [0.5, 0.01]}, decode=48)
    config = dense.model.config
    full = config.dense_kv_width
    assert given == [[(full, 48), (low["kv_share"] * full, 48)]]
    timed = {"slots": 48, "ops": "plain", "seconds_per_step": 0.2, "speedup": 1.25}
    assert low["decode"] == timed
    assert low["seconds"]["decode"] > 0
    assert "decode" not in first
    assert "decode" not in refused


def test_rows_without_the_requested_decoding_are_computed_again(sweep, calls, tmp_path):
    axes = {"keep": [0.8, 0.01]}
    first = sweep(axes)
    timed = sweep(axes, decode=48)
    assert len(calls["compress"]) == 2 + 1  # refused settings are not tried again
    assert timed[1]["decode"]["slots"] == 48
    assert [r["perplexity"] for r in timed[:2]] == [r["perplexity"] for r in first[:2]]
    assert read_rows(tmp_path / "out.jsonl") == [*first, timed[1]]
    for made in calls.values():
        made.clear()
    assert sweep(axes, decode=48) == sweep(axes) == timed
    assert calls == {"calibrate": [], "compress": []}
    text = out(tmp_path)
    with pytest.raises(ValueError, match=r"slots 48, given 32.*--force"):
        sweep(axes, decode=32)
    with pytest.raises(ValueError, match=r"ops 'plain', given 'fused'.*--force"):
        sweep(axes, decode=48, ops="fused")
    for slots in (8, 257):
        with pytest.raises(ValueError, match="expected 16 to 256"):
            sweep(axes, decode=slots, force=True)
    assert out(tmp_path) == text


def test_a_half_written_row_is_removed_and_computed_again(sweep, tmp_path):
    axes = {"keep": [0.8, 0.5]}
    rows, text = sweep(axes), out(tmp_path)
    for end in (len(text) - 1, len(text) - 300, text.rfind(b"\n", 0, -1) + 5):
        (tmp_path / "out.jsonl").write_bytes(text[:end])
        again = sweep(axes)
        assert [r["settings"] for r in again] == [r["settings"] for r in rows]
        assert [r["perplexity"] for r in again] == [r["perplexity"] for r in rows]
        assert read_rows(tmp_path / "out.jsonl") == again


def test_an_interrupt_loses_only_the_running_cell(sweep, monkeypatch, tmp_path, ctrl_c):
    def stopped(model, tokens, settings, *rest):
        if settings.keep == 0.5:
            ctrl_c()
        return compress(model, tokens, settings, *rest)

    axes = {"keep": [0.8, 0.5, 0.4]}
    monkeypatch.setattr(sweeping, "compress", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(axes)
    dense, one = read_rows(tmp_path / "out.jsonl")
    assert (dense["settings"], one["settings"]["keep"]) == (None, 0.8)
    monkeypatch.setattr(sweeping, "compress", compress)
    assert len(sweep(axes)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.statistics"]
    assert not list((tmp_path / "out.statistics").glob("*.part"))


def test_settings_that_do_not_fit_are_refused_and_the_sweep_goes_on(sweep):
    rows = sweep({"method": ["kv-heads", "fisher"], "keep": [0.6, 0.5, 0.01]})
    by_cell = {(r["settings"]["method"], r["settings"]["keep"]): r for r in rows[1:]}
    assert "merges whole heads" in by_cell["kv-heads", 0.6]["refused"]
    assert "expected at least" in by_cell["fisher", 0.01]["refused"]
    assert all("perplexity" in by_cell[name] for name in (("kv-heads", 0.5), ("fisher", 0.6)))
    assert len(by_cell) == 6


def test_rows_of_another_run_are_left_alone_unless_forced(sweep, dense, tmp_path):
    sweep({"keep": [0.5]})
    text = out(tmp_path)
    with pytest.raises(ValueError, match=r"'windows': 2.*'windows': 1.*--force"):
        sweep({"keep": [0.5]}, windows=1)
    other = dense._replace(model=tiny.native(seed=5, head_dim=16, attention_bias=True))
    with pytest.raises(ValueError, match=r"left by other work \(weights .*--force"):
        sweep({"keep": [0.5]}, model=other)
    with pytest.raises(
        ValueError, match=r"none\.txt does not exist"
    ):  # before anything is replaced
        sweep({"keep": [0.5]}, words="none.txt", force=True)
    assert out(tmp_path) == text
    rows = sweep({"keep": [0.5]}, windows=1, force=True)
    assert rows == read_rows(tmp_path / "out.jsonl")
    assert rows[0]["tokens"] == 63


def test_rows_of_other_code_versions_tokenizers_and_devices_are_not_taken_for_ones_own(
    sweep, dense, tmp_path, monkeypatch
):
    axes = {"keep": [0.5]}
    rows = sweep(axes)
    text = out(tmp_path)
    other = tiny.tokenizer(begin=True)
    with pytest.raises(ValueError, match=r"other work \(tokenizer '\w+', given '\w+'\): repeat"):
        sweep(axes, model=dense._replace(tokenizer=other))
    file = tmp_path / "out.jsonl"
    for name, value in {"code": "0", "versions": rows[0]["versions"] | {"torch": "1"}}.items():
        file.unlink()
        jsonl.append(file, rows[0] | {name: value})
        with pytest.raises(ValueError, match=r"other versions \(.*: go on with those.* --force"):
            sweep(axes)
    file.unlink()
    jsonl.append(file, rows[0] | {"place": "cuda"})
    with pytest.raises(ValueError, match=r"other work \(device 'cuda', given 'cpu'\)"):
        sweep(axes)
    older = {k: v for k, v in rows[0].items() if k not in ("code", "tokenizer", "place")}
    file.write_text(json.dumps(older) + "\n")
    with pytest.raises(ValueError, match="other versions"):
        sweep(axes)
    file.write_bytes(text)
    assert sweep(axes) == rows


def test_two_rows_of_one_cell_are_refused(sweep, tmp_path):
    sweep({"keep": [0.01]})
    text = out(tmp_path)
    (tmp_path / "out.jsonl").write_bytes(text + text.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match="holds two rows of"):
        sweep({"keep": [0.01]})


def test_damaged_statistics_are_refused(sweep, tmp_path):
    sweep({"keep": [0.8]})
    for kept in sorted((tmp_path / "out.statistics").iterdir()):
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-4] + bytes(4) if whole[-4:] != bytes(4) else whole[:-4] + b"1234")
        with pytest.raises(ValueError, match=f"{kept.name} is damaged .* delete it"):
            sweep({"keep": [0.8, 0.5]})
        kept.write_bytes(whole)
    one, two = sorted((tmp_path / "out.statistics").iterdir())
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=f"{one.name} was left by other work"):
        sweep({"keep": [0.8, 0.5]})


def test_a_file_of_something_else_is_never_touched(sweep, tmp_path):
    for text in (b"my notes", b'{"a": 1}\n', b"one\ntwo\n", b'{"versions": {}\n{"versions": 1}\n'):
        (tmp_path / "out.jsonl").write_bytes(text)
        with pytest.raises(
            ValueError, match=r"out\.jsonl, line 1: expected a row that eigenzoo sweep wrote"
        ):
            sweep({"keep": [0.5]})
        assert out(tmp_path) == text


def test_other_calibration_adds_rows_to_the_file(sweep):
    one = sweep({"keep": [0.5]})
    two = sweep({"keep": [0.5]}, seq_len=48)
    assert two[0] == one[0]
    assert two[1]["calibration"]["seq_len"] == 48
    assert two[1]["perplexity"] != one[1]["perplexity"]


def test_a_row_tells_the_sources_and_knows_their_texts(dense, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("the cat")
    two.write_text("a mat")
    described = Calibration(f"{one}:2,self,{two}").describe(dense.tokenizer)
    assert described["source"] == "one.txt:2, self:1, two.txt:1"
    two.write_text("a bird")
    assert Calibration(f"{one}:2,self,{two}").describe(dense.tokenizer) != described
    mixed = Calibration().describe(dense.tokenizer)
    assert mixed["source"] == "mixed: self, chat, help, source"
    assert mixed["digest"] != Calibration("help").describe(dense.tokenizer)["digest"] is not None
    assert Calibration("self,chat").describe(dense.tokenizer)["digest"] is None


def test_a_sweep_calibrates_on_a_mixture(dense, texts, tmp_path):
    calibrations = [Calibration(x, 6, 32) for x in ("self", f"self,{texts}/a.txt:2")]
    evaluation = Evaluation(texts / "b.txt", 64, 2)
    work = Sweep(dense, tmp_path / "out.jsonl", evaluation, calibrations)
    _, own, mixture = work.rows(distinct(grid({"keep": [0.5]}), dense.model.config))
    assert mixture["calibration"]["source"] == "self:1, a.txt:2"
    assert mixture["perplexity"] != own["perplexity"]


def test_a_compressed_model_is_no_baseline(sweep, dense):
    low = compress(dense.model, tiny.tokens(4, 32), Settings(keep=0.5, kv_bits=(16,))).model
    with pytest.raises(ValueError, match="compressed already"):
        sweep({"keep": [0.5]}, model=dense._replace(model=low))


def test_a_grid_has_one_cell_for_every_combination_that_differs(sweep):
    axes = {"method": ["fisher", "attention"], "keep": [0.8, 0.5], "keys": ["rebuild", "anchored"]}
    assert len(grid(axes)) == 8
    assert len(grid(axes | {"anchor_block": [8, 32]})) == 4 + 8
    rows = sweep({"keep": [0.5], "heads_per_latent": [None, (4, 4)]})  # the same on four kv heads
    assert len(rows) == 2
    with pytest.raises(ValueError, match="method 'fishr' is unknown"):
        grid(axes | {"method": ["fisher", "fishr"]})
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        grid(axes | {"keep": [0.5, 1.5]})
    assert len(grid(axes | {"method": ["fisher", "eigen"]})) == 8  # the sweep refuses some of them


def test_needs_describe_what_gather_takes():
    settings = Settings(
        "attention",
        keep=0.6,
        heads_per_latent=(2, 1),
        keys="anchored",
        anchor_block=8,
        kv_bits=(16,),
    )
    want = Needs((2, 1), gradients=False, queries=True, joint=False, anchor=8)
    assert needs(settings, tiny.native().config) == want


def test_the_command_writes_rows_and_prints_them(run, dense_folder, texts, tmp_path):
    words = ["--keep", "0.5", "--keep", "0.4", "--method", "fisher", "--method", "kv-heads"]
    words += ["--calibration", texts / "a.txt", "--calibration", "self"]
    words += ["--samples", "4", "--seq-len", "32", "--text", texts / "b.txt", "--window", "64"]
    file = tmp_path / "rows.jsonl"
    code, text, error = run("sweep", dense_folder, file, *words, "--json")
    rows = json.loads(text)
    assert code == 0
    assert len(rows) == 1 + 2 * 4
    assert rows == read_rows(file)
    assert [r["calibration"]["source"] for r in rows[1:]] == ["a.txt"] * 4 + ["self"] * 4
    assert "[9/9]" in error
    assert "refused" in error
    assert rows[1]["command"].startswith("eigenzoo sweep ")
    assert set(rows[-1]["seconds"]) == {"text", "calibrate", "compress", "evaluate"}
    code, text, error = run("sweep", dense_folder, file, *words)
    assert code == 0
    assert "9 cells are in" in error
    assert "keep 0.5" in text
    code, _, error = run("sweep", dense_folder, file, *words, "--windows", "1")
    assert code == 2
    assert "--force" in error
    code, _, error = run("sweep", dense_folder, texts / "a.txt", *words)
    assert code == 2
    assert "a.txt, line 1: expected a row that eigenzoo sweep wrote, but it is no JSON" in error


def test_the_command_times_decoding(run, dense_folder, texts, tmp_path):
    words = ["sweep", dense_folder, tmp_path / "rows.jsonl", "--text", texts / "b.txt"]
    words += ["--samples", "4", "--seq-len", "16", "--keep", "0.5", "--windows", "1"]
    code, text, error = run(*words, "--decode", "32", "--json")
    assert code == 0
    decode = json.loads(text)[1]["decode"]
    assert decode["slots"] == 32
    assert f", {decode['speedup']:.2f}x at decoding" in error
    assert f", {decode['speedup']:.2f}x" in run(*words)[1]
    code, _, error = run(*words, "--decode", "8")
    assert code == 2
    assert "expected 16 to 256" in error


def test_the_model_is_loaded_as_evaluate_loads_it(run, dense_folder, texts, tmp_path):
    words = ["--text", texts / "b.txt", "--windows", "2", "--json", "--dtype", "bfloat16"]
    quick = ["--samples", "4", "--seq-len", "16", "--keep", "0.5"]
    code, text, _ = run("sweep", dense_folder, tmp_path / "rows.jsonl", *words, *quick)
    assert code == 0
    evaluated = json.loads(run("evaluate", dense_folder, *words)[1])
    dense = json.loads(text)[0]
    assert (
        load(str(dense_folder)).model.config.max_position_embeddings == evaluated["window"] == 256
    )
    assert dense["evaluation"]["window"] == 256
    assert dense["dtype"] == "bfloat16"
    assert all(dense[name] == evaluated[name] for name in ("perplexity", "tokens", "kv_share"))
