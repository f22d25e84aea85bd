import multiprocessing
import shutil
import signal

import pytest
import tiny
import torch
from contestants import Killed, same

from eigenzoo.zoo.compression.keys import KEYS
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import native_config
from eigenzoo.zoo.measure import tables as report
from eigenzoo.zoo.measure.bench import _serve, bench
from eigenzoo.zoo.measure.bench_grid import BenchGrid, bench_cells, rows_left
from eigenzoo.zoo.measure.contestants import from_checkpoints, from_shape
from eigenzoo.zoo.measure.shapes import SHAPES, random_model, segmented, shaped, uniform
from eigenzoo.zoo.measure.timed_models import Cell, Native, Transformers, weight_bytes
from eigenzoo.zoo.models.families import new_model
from eigenzoo.zoo.utils.jsonl import append

BILLIONS = {
    "opt-125m": 0.125,
    "smollm2-135m": 0.135,
    "llama-3.1-70b": 70.6,
    "opt-1.3b": 1.3,
    "opt-6.7b": 6.7,
    "mpt-1b": 1.31,
    "mpt-7b": 6.65,
    "mpt-30b": 30.0,
    "llama-3.2-1b": 1.24,
    "llama-2-7b": 6.74,
    "llama-3.1-8b": 8.03,
    "opt-66b": 65.7,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "mistral-7b": 7.25,
    "gemma-3-270m": 0.268,  # those of Gemma 3 are of text alone
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.884,
    "gemma-3-12b": 11.771,
    "gemma-3-27b": 27.016,
}


CPU = torch.device("cpu")


def native(name, layers=None, context=0):
    return native_config(shaped(name, layers, context).to_dict())


def cell(context=64, batch=2, slots=64):
    return Cell(context, batch, slots, 3, torch.float32, CPU, compile=False)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = new_model(native(name))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(1e9 * BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("name", ["opt-1.3b", "mpt-7b", "llama-3.1-8b"])
@pytest.mark.parametrize("shared", [1, 4])
def test_uniform_ranks_keep_what_was_asked(name, shared):
    config = native(name, 4, 8192)
    low = uniform(
        config, Settings(keep=0.6, heads_per_latent=(shared, shared), kv_bits=(16,)).fit(config)
    )
    assert 0.49 < low.kv_width / low.dense_kv_width <= 0.6
    assert low.max_position_embeddings >= 8192


def test_shares_that_are_near_have_ranks_of_their_own():
    config = native("opt-1.3b", 4, 8192)
    alone = [
        Settings(keep=keep, heads_per_latent=(1, 1), kv_bits=(16,)).fit(config)
        for keep in (0.6, 0.5)
    ]
    shares = [uniform(config, settings) for settings in alone]
    assert [(low.k_ranks[0], low.v_ranks[0]) for low in shares] == [(40, 32), (32, 32)]


@pytest.mark.parametrize("keys", KEYS)
def test_random_models_decode_with_every_key_scheme(keys):
    config = tiny.native(head_dim=16).config
    low = uniform(config, Settings(keep=0.7, keys=keys, rank_multiple=3, kv_bits=(16,)).fit(config))
    assert 0.6 < low.kv_width / low.dense_kv_width <= 0.7
    model = random_model(low, torch.float32, CPU)
    run = Native("low", low, same).start(cell(20, 1, 30))
    assert run.kv_bytes == 20 * 4 * low.kv_width  # the slots that a step reads, not all
    assert len(run.round()) == 3
    assert model(tiny.tokens(1, 20)).isfinite().all()


def test_random_models_decode_with_segments():
    config = tiny.native(head_dim=16).config
    settings = Settings(heads_per_latent=(2, 2)).fit(config)
    low = segmented(config, settings, "8x8+16x4/16x3")
    layers = low.num_hidden_layers
    assert (low.k_ranks, low.v_ranks) == ((24,) * layers, (16,) * layers)
    assert low.k_segments == ("8x8+16x4",) * layers
    run = Native("low", low, same).start(cell(20, 1, 30))
    assert run.kv_bytes == 20 * sum(x.nbytes(torch.float32) for x in low.latents(0)) * layers
    assert len(run.round()) == 3
    for wrong in ("8x8", "8x8/", "64x8/16x4"):
        with pytest.raises(ValueError, match=r"64x4/32x8|k_ranks"):
            segmented(config, settings, wrong)


def test_cuda_graphs_are_asked_of_torch_and_of_transformers(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda step, **given: asked.append(given) or step)
    graphs = cell()._replace(compile=True, graphs=True)
    Native("low", tiny.native().config, same).start(graphs)
    assert [given["mode"] for given in asked[:2]] == ["reduce-overhead"] * 2
    asked.clear()
    Native("low", tiny.native().config, same).start(graphs._replace(graphs=False))
    assert not any("mode" in given for given in asked)


def test_whole_keys_are_more_than_half_of_the_bytes():
    config = tiny.native().config
    with pytest.raises(ValueError, match=r"keep is 0.5: keys that stay full"):
        uniform(config, Settings(keep=0.5, keys="full", kv_bits=(16,)).fit(config))


def test_a_step_reads_all_weights_but_the_tables_it_looks_up():
    model = tiny.native("opt")
    tables = model.positions.weight.numel()  # the embedding is the head: it is read
    assert weight_bytes(model, model.head) == 4 * (
        sum(p.numel() for p in model.parameters()) - tables
    )
    untied = tiny.native()
    assert weight_bytes(untied, untied.head) == 4 * sum(
        p.numel() for name, p in untied.named_parameters() if name != "embed.weight"
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "mpt"])
def test_transformers_decodes_at_the_end_of_a_filled_cache(family, static, monkeypatch):
    names = {"opt": "opt-125m", "mpt": "mpt-1b", "llama": "llama-3.2-1b"}
    config = shaped(names[family], 1, 80)
    sizes = {
        "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
        "mpt": {"d_model": 32},
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    }
    config.update(sizes[family] | {"num_attention_heads": 4, "vocab_size": 96, "head_dim": 8})
    run = Transformers("transformers", config, static).start(cell(slots=80))
    heads = 2 if family == "llama" else 4
    assert run.kv_bytes == 2 * 64 * 2 * heads * 8 * 4
    assert len(run.round()) == len(run.round()) == 3


@pytest.mark.usefixtures("forked")
def test_contestants_take_turns_in_their_own_processes_and_report_failures(capfd):
    config = tiny.native("opt").config
    settings = Settings(keep=0.5, heads_per_latent=(2, 2), rank_multiple=1, kv_bits=(16,))
    low = uniform(config, settings.fit(config))
    models = [Native("dense", config, same), Native("low", low, same), Native("gone", "/no", same)]
    dense, small, gone = bench(models, cell(), rounds=2)
    assert "/no does not exist" in gone["failed"]
    assert "Traceback" not in capfd.readouterr().err
    assert dense["speedup"] == dense["bound"] == 1
    assert small["speedup"] == pytest.approx(dense["seconds_per_step"] / small["seconds_per_step"])
    assert dense["kv_bytes_read"] == 2 * 64 * 4 * config.kv_width == 2 * small["kv_bytes_read"]
    assert small["bound"] == pytest.approx(1 / (1 - dense["kv_read_share"] / 2))
    read = small["weight_bytes_read"] + small["kv_bytes_read"]
    assert small["floor_seconds"] == pytest.approx(read / small["bandwidth"])
    assert small["kv_read_share"] == small["kv_bytes_read"] / read
    assert small["peak_memory"] > 2**26


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("last", [0, 1])
def test_a_killed_contestant_fails_only_its_own_row(last):
    killed, other = bench([Killed(last), Killed(9)], cell())
    assert killed["failed"] == f"stopped with exit code -{signal.SIGKILL}"
    assert other["tokens_per_second"] == 2


# the one test that does not fork: its process starts as in use, which takes longer
def test_a_bench_in_which_nothing_can_be_timed_ends_in_an_error(run, dense_folder, tmp_path):
    broken = shutil.copytree(dense_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"none")
    options = [
        "--context",
        "32",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--no-compile",
        "--ops",
        "reference",
        "--out",
    ]
    code, table, said = run("bench", broken, *options, tmp_path / "out")
    assert (code, "broken failed: ValueError" in table) == (2, True)
    assert "no model could be timed; the first says: ValueError" in said.splitlines()[-1]


def test_a_table_says_in_one_line_why_one_has_failed(capsys):
    row = {"model": "gone", "context": 64, "batch": 2, "slots": 64, "failed": "OSError: no\nwhy"}
    report.bench([row])
    lines = capsys.readouterr().out.splitlines()
    assert "gone failed: OSError: no" in lines
    assert not any("why" in line for line in lines)


def test_ctrl_c_in_a_terminal_ends_contestants_silently(ctrl_c):
    class Building:
        def start(self, cell):  # compilers receive the signal too, and fail
            ctrl_c()

    class Pipe:
        def send(self, answer):
            pytest.fail(f"nobody listens to {answer}")

    assert _serve(Pipe(), Building(), cell()) is None


def test_a_contestant_ends_without_a_word_if_nobody_listens():
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    assert _serve(theirs, Killed(9), cell()) is None


def test_contestants_of_a_shape_are_dense_and_compressed_with_variants_of_both():
    settings = Settings(keep=0.6, heads_per_latent=(1, 1), kv_bits=(16,))
    made = from_shape("opt-125m", 2, 64, [0.5, 0.25], settings, same)
    assert made.title == "opt-125m, 2 layers"
    assert [s.keep for s in made.settings] == [0.5, 0.25]
    assert made.dtype == torch.float32
    more = made.with_bits([8]).with_transformers()
    names = ["dense", "keep 0.5", "keep 0.25"]
    names += [f"{name}, 8 bits" for name in names]
    assert [c.name for c in more.all] == [*names, "transformers dynamic", "transformers static"]
    assert [c.kv_bits for c in more.natives] == 3 * [None] + 3 * [8]
    assert made.configs["keep 0.5"].kv_width == made.configs["dense"].kv_width // 2
    made.check_length(64)
    with pytest.raises(ValueError, match="4096"):
        made.check_length(4096)
    with pytest.raises(ValueError, match="bits is 5"):
        made.with_bits([5])


def test_contestants_of_one_name_are_told_apart_by_their_paths(dense_folder, tmp_path):
    other = shutil.copytree(dense_folder, tmp_path / dense_folder.name)
    sources = [str(dense_folder), str(other)]
    made = from_checkpoints(sources, same)
    assert [c.name for c in made.all] == [*made.configs] == sources
    assert from_checkpoints(sources[:1], same).title == dense_folder.name
    assert made.dtype == torch.float32
    assert len(from_checkpoints(2 * sources[:1], same).all) == 2  # the same one, twice


def test_a_bench_resumes_its_own_rows_and_keeps_those_of_other_commands(tmp_path, monkeypatch):
    measured, names = [], ["dense", "low"]

    def measure(contestants, cell, rounds):
        measured.append((cell.batch, cell.context, cell.slots))
        about = {"slots": cell.slots, "dtype": "float32", "threads": 1, "device": "cpu"}
        about |= {"context": cell.context, "batch": cell.batch, "failed": ""}
        return [{"model": name} | about for name in names]

    monkeypatch.setattr("eigenzoo.zoo.measure.bench_grid.bench", measure)
    file, grid = tmp_path / "bench.jsonl", BenchGrid((32, 64), (1, 2), buffer=2)
    cells = grid.cells(torch.float32, CPU, compile=False)
    origin = {"ops": "auto", "compiled": False, "command": "one"}

    def left(origin):
        return rows_left(file, origin, names)

    two = origin | {"command": "two"}
    first = [*bench_cells([], [*cells[:2], cells[0]], 1, origin, left(origin), file)]
    other = [*bench_cells([], cells[:1], 1, two, left(two), file)]
    assert measured == [(1, 32, 64), (1, 64, 128), (1, 32, 64)]
    assert left(origin) == first
    assert [*bench_cells([], cells, 1, origin, first, file)] == left(origin)[4:]
    assert measured[3:] == [(2, 32, 64), (2, 64, 128)]
    assert left(two) == other
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 10
    mine = left(origin)
    file.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])  # killed between rows of a cell
    assert left(origin) == mine[:-2]
    assert left(two) == other
    assert [*bench_cells([], cells, 1, origin, left(origin), file)] == mine[-2:]
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("contestants", "0", r"other work \(contestants '1', given '0'\): repeat its command"),
        ("processor", "x", r"other work \(processor None, given 'x'\)"),
        ("code", "0", r"other versions \(code None, given '0'\): go on with those"),
        ("versions", {"torch": "1"}, r"other versions \(torch None, given '1'\)"),
    ],
)
def test_rows_of_other_models_and_versions_are_not_taken_for_ones_own(tmp_path, name, value, says):
    about = {"slots": 64, "dtype": "float32", "threads": 1, "device": "cpu", "failed": ""}
    origin = {"ops": "auto", "compiled": False, "command": "one", "contestants": "1"}
    append(tmp_path / "rows", {"model": "m", "context": 32, "batch": 1, **about, **origin})
    assert len(rows_left(tmp_path / "rows", origin, ["m"])) == 1
    with pytest.raises(ValueError, match=says + ".* or choose another --out"):
        rows_left(tmp_path / "rows", origin | {name: value}, ["m"])


def test_the_content_of_contestants_is_that_of_their_files(dense_folder, tmp_path):
    folders = [shutil.copytree(dense_folder, tmp_path / name / "same") for name in "ab"]
    one, two = (from_checkpoints([str(f)], same).content() for f in folders)
    assert one == two
    weights = folders[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert from_checkpoints([str(folders[1])], same).content() != one


def test_a_bench_refuses_a_file_of_something_else(run, dense_folder, tmp_path):
    file = tmp_path / "bench.jsonl"
    file.write_text("my notes")
    code, _, error = run(
        "bench", dense_folder, "--out", tmp_path, "--context", "64", "--no-compile"
    )
    assert code == 2
    assert "bench.jsonl, line 1: expected a row that eigenzoo bench wrote" in error
    assert file.read_text() == "my notes"
