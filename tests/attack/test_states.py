import json
import shutil
import struct

import attack
import fresh
from attack import (
    COMMANDS,
    Row,
    assert_refused,
    both,
    fifo,
    folder,
    overwrite,
    set_json,
    truncate,
    write,
)

STATE = "ref.state.safetensors"
PROGRESS = "low2.partial/progress.json"


def files(place, pattern):
    return sorted(str(path.relative_to(place)) for path in place.glob(pattern))


def each(pattern, change):
    """A change to every file of a pattern."""
    return lambda place: [change(name)(place) for name in files(place, pattern)]


def first_row(place):
    """Leave the row of the dense model only."""
    path = place / "rows.jsonl"
    path.write_text(path.read_text().partition("\n")[0] + "\n")


DAMAGE = {
    "empty": lambda name: write(name, b""),
    "text": lambda name: write(name, "a cat"),
    "half": lambda name: truncate(name, 0.5),
    "short by one": lambda name: truncate(name, 0.9999),
    "zeros at the end": lambda name: overwrite(name, 0.99, bytes(8)),
    "other number": lambda name: overwrite(name, 0.9, b"\x7f"),
    "huge header": lambda name: overwrite(name, 0, struct.pack("<Q", 2**60)),
    "folder": folder,
}
JSON = {
    "list": write(PROGRESS, "[1]"),
    "null": write(PROGRESS, "null"),
    "empty object": write(PROGRESS, "{}"),
    "binary": write(PROGRESS, b"\xff\xfe"),
    "deep": write(PROGRESS, "[" * 100_000),
    "other facts": set_json(PROGRESS, facts={}),
    "facts list": set_json(PROGRESS, facts=[1]),
    "done text": set_json(PROGRESS, done="x"),
    "done beyond": set_json(PROGRESS, done=10**6),
    "done negative": set_json(PROGRESS, done=-1),
}
ROWS = [
    *(Row(f"state: {k}", damage(STATE), COMMANDS["continue"]) for k, damage in DAMAGE.items()),
    *(Row(f"progress: {k}", damage(PROGRESS), COMMANDS["resume"]) for k, damage in DAMAGE.items()),
    *(Row(f"progress: {k}", change, COMMANDS["resume"]) for k, change in JSON.items()),
    *(
        Row(f"partial: {k}", each("low2.partial/**/*.safetensors", damage), COMMANDS["resume"])
        for k, damage in DAMAGE.items()
        if k != "other number"
    ),
    *(
        Row(
            f"statistics: {k}",
            both(each("rows.statistics/*.safetensors", damage), first_row),
            COMMANDS["sweep"].replace("out.jsonl", "rows.jsonl"),
        )
        for k, damage in DAMAGE.items()
        if k != "folder"
    ),
]


@attack.table(ROWS)
def test_a_damaged_state_is_refused_in_one_line(row, place, capsys):
    assert_refused(row, place, capsys)


PIPES = {
    "config": ("dense/config.json", "inspect dense"),
    "weights": ("dense/model.safetensors", COMMANDS["evaluate"]),
    "index": ("dense/model.safetensors.index.json", COMMANDS["evaluate"]),
    "generation config": ("dense/generation_config.json", COMMANDS["generate"]),
    "tokenizer": ("dense/tokenizer.json", COMMANDS["generate"]),
    "template": ("dense/chat_template.jinja", COMMANDS["generate"]),
    "card": ("dense/README.md", COMMANDS["generate"]),
    "text": ("a.txt", COMMANDS["evaluate"]),
    "rows": ("rows.jsonl", COMMANDS["report"]),
    "sheet": ("sheet.json", COMMANDS["card"]),
    "gguf": ("pipe.gguf", "inspect pipe.gguf"),
    "state": (STATE, COMMANDS["continue"]),
    "progress": (PROGRESS, COMMANDS["resume"]),
}
RUN = """
import json, os, sys
from eigenzoo.zoo.cli import main
for folder, *words in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.argv = ["eigenzoo", *words]
    try:
        main()
    except SystemExit as stopped:
        print(os.path.basename(folder), stopped.code, flush=True)
"""


def test_a_pipe_instead_of_a_file_is_refused_and_not_waited_for(good, tmp_path):
    lines = []
    for name, (file, words) in PIPES.items():
        place = shutil.copytree(good, tmp_path / name.replace(" ", "-"))
        fifo(file)(place)
        lines.append([str(place), *words.split()])
    done = fresh.python("-c", RUN, json.dumps(lines), limit=60)
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert codes == {name.replace(" ", "-"): "2" for name in PIPES}, done.stderr
    assert done.stderr.count("error: ") == len(PIPES)
    assert "Traceback" not in done.stderr
