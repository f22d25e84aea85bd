import os
import signal
import sys
from functools import partial

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # share cores; before torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a Hub has one of its own
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool per process

import fresh
import tiny
import torch

from eigenzoo.zoo import cli
from eigenzoo.zoo.inference.checkpoint import load

# a shell makes background jobs ignore Ctrl-C, and processes of tests would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


# files that take ten seconds or more, the longest first
LONGEST = (
    "kernels", "smollm2", "cpu_ops", "stream", "export", "generate", "aot", "keys", "cli",
    "speculative", "examples", "ways_in", "benchmarks", "fold", "hub", "card", "tiny_models",
    "mixing", "report", "refine", "configs", "linear", "readme", "killed", "parallel",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run repeats and more seeds")


def pytest_generate_tests(metafunc):
    """A test that takes a `kill_seed` runs once, and with --runslow thirty times."""
    if "kill_seed" in metafunc.fixturenames:
        metafunc.parametrize(
            "kill_seed", range(30 if metafunc.config.getoption("--runslow") else 1)
        )


def pytest_collection_modifyitems(config, items):
    """Leave out repeats. Run the longest files first, so that processes end at about one time."""
    if not config.getoption("--runslow"):
        repeated = [item for item in items if item.get_closest_marker("repeats")]
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if item not in repeated]
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A random Llama with biases and a chat template, saved as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny.save(folder, chat=True, head_dim=16, attention_bias=True)
    return folder


@pytest.fixture(scope="session")
def dense(dense_folder):
    """The checkpoint of `dense_folder`, loaded."""
    return load(str(dense_folder))


@pytest.fixture
def ctrl_c():
    """Press Ctrl-C while code in C runs, which turns the interrupt into another error."""

    def press(*_):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("what code in C makes of an interrupt")

    return press


@pytest.fixture
def forked(monkeypatch):
    """Contestants of a bench run in processes that start at once, see `fresh`."""
    fresh.start()
    monkeypatch.setattr("multiprocessing.get_context", lambda _: fresh.CONTEXT)


@pytest.fixture
def backend(request, monkeypatch):
    """The compiler of graphs. `aot_eager` builds no C++: the same graphs and guards, in seconds."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    return request.param


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line; exit code, standard output, standard error."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eigenzoo", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call
