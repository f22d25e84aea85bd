"""Random small changes to files that are read: a command works, or refuses in one line."""

import json
import random

import attack
import pytest

WORDS = (
    "",
    "x",
    None,
    True,
    -1,
    0,
    1,
    3,
    2.5,
    10**30,
    1e308,
    [],
    [1],
    {},
    {"a": 1},
    "\x1b[2J",
    "true",
)
FILES = {
    "dense/config.json": ("inspect", "generate"),
    "low/config.json": ("inspect low", "generate low", "card"),
    "dense/model.safetensors.index.json": ("evaluate",),
    "dense/model.safetensors": ("generate", "stream"),
    "dense/tokenizer.json": ("generate",),
    "dense/tokenizer_config.json": ("generate",),
    "dense/generation_config.json": ("generate",),
    "rows.jsonl": ("report",),
    "sheet.json": ("card",),
}


def places(value, path=()):
    """The paths to all values within a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in [*inner][:40]:
            yield from places(one, (*path, key))


def spoil(value, chance: random.Random):
    """One value within a JSON value is another, or is gone."""
    *above, last = chance.choice([path for path in places(value) if path])
    for key in above:
        value = value[key]
    if chance.random() < 0.2:
        del value[last]
    else:
        value[last] = chance.choice(WORDS)


def mutate(path, chance: random.Random) -> None:
    """A change to the values of a JSON file, to its bytes, or to its length."""
    raw = bytearray(path.read_bytes())
    how = chance.choice(("value", "value", "value", "bytes", "cut"))
    if how == "value" and path.suffix != ".safetensors":
        first, *rest = raw.decode().split("\n") if path.suffix == ".jsonl" else (raw.decode(),)
        value = json.loads(first)
        for _ in range(chance.choice((1, 1, 2))):
            spoil(value, chance)
        raw = bytearray("\n".join((json.dumps(value), *rest)).encode())
    elif how == "cut":
        del raw[chance.randrange(len(raw)) :]
    else:
        for _ in range(chance.choice((1, 4, 16))):
            raw[chance.randrange(min(len(raw), 5000))] = chance.randrange(256)
    path.write_bytes(raw)


def pytest_generate_tests(metafunc):
    seeds = range(200 if metafunc.config.getoption("--runslow") else 2)
    cases = [(file, seed) for file in FILES for seed in seeds]
    metafunc.parametrize(("file", "seed"), cases, ids=[f"{file} {seed}" for file, seed in cases])


def test_a_changed_file_is_read_or_refused_in_one_line(file, seed, place, capsys):
    chance = random.Random(f"{file} {seed}")
    path = place / file
    if not path.exists():  # an index is optional
        names = {f"model.layers.{i}": "model.safetensors" for i in range(3)}
        path.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    mutate(path, chance)
    command = chance.choice(FILES[file])
    capsys.readouterr()
    try:
        code = attack.run(attack.COMMANDS[command].split())
    except Exception as error:
        pytest.fail(f"{command}: {type(error).__name__}: {error}\n{path.read_bytes()[:2000]!r}")
    if code:
        assert code == 2
        attack.check_refusal(capsys.readouterr().err)
