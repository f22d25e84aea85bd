import attack
from attack import (
    COMMANDS,
    QUICK,
    Row,
    assert_refused,
    link,
    nothing,
)

LONG = "x" * 300
OUTS = {
    "no folder above": "none/out",
    "file above": "a.txt/out",
    "a file": "a.txt",
    "long": LONG,
    "long above": f"{LONG}/out",
    "empty": "''",
    "here": ".",
    "above": "..",
    "root": "/",
    "device": "/dev/null",
    "proc": "/proc/out",
    "taken": "low",
    "source": "dense",
    "below the source": "dense/out",
}
WRITERS = {
    "compress": f"compress dense OUT {QUICK}",
    "stream": f"compress dense OUT --stream {QUICK}",
    "refine": COMMANDS["refine"].replace("out", "OUT"),
    "report": "report rows.jsonl --out OUT",
    "pull": "pull org/name OUT",
    "demo": "demo --out OUT",
    "sweep": COMMANDS["sweep"].replace("out.jsonl", "OUT"),
    "bench": COMMANDS["bench"] + " --out OUT",
}
LINKS = {
    "dangling link": link("out", "nowhere/at/all"),
    "loop": link("out", "out"),
}
SOURCES = {
    "missing": "none",
    "missing below": "dense/none/none",
    "a file": "a.txt",
    "below a file": "a.txt/dense",
    "empty": "''",
    "long": LONG,
    "very long": "x" * 5000,
    "device": "/dev/null",
    "folder of nothing": "tmp",
    "home of nobody": "~nobody-at-all/x",
    "two slashes": "a/b/c",
    "revision of nothing": "org/name@",
    "two revisions": "org/name@main --revision other",
    "no Hub": "org/name",
    "bad id": "'org/na me'",
    "escapes": "$'org/\\x1b[2J'",
    "address": "https://huggingface.co/org/name",
}
READERS = ("inspect", "evaluate", "compress", "generate", "bench", "sweep")
USAGE = {
    "unknown command": "frob",
    "unknown option": "inspect dense --frob",
    "too many": "inspect dense low",
    "too few": "compress dense",
    "no value": "compress dense out --keep",
    "flag with a value": "compress dense out --json=yes",
    "unknown root option": "--frob inspect dense",
    "compressed source": f"compress low out {QUICK}",
    "force on the source": f"compress dense dense --force {QUICK}",
    "resume without stream": f"compress dense out --no-stream --resume {QUICK}",
    "unfinished work": f"compress dense low2 --stream {QUICK}",
    "stream and plain": f"compress dense out --stream --plain {QUICK}",
    "stream of itself": "compress dense out --stream --calibration self --samples 4 --seq-len 16",
    "plain latents": f"compress dense out --plain {QUICK}",
    "refine dense": COMMANDS["refine"].replace("low", "dense"),
    "refine by low": COMMANDS["refine"].replace("--original dense", "--original low"),
    "no new tokens": "generate dense -p cat --no-compile --max-new-tokens 0",
    "bench of nothing": "bench",
    "bench of both": "bench dense --shape opt-125m",
    "layers of a checkpoint": COMMANDS["bench"] + " --layers 1",
    "report of nothing": "report --out out",
    "card of dense": "card dense sheet.json",
    "card of nothing": "card tmp",
    "push of dense": "push dense org/name --dry-run",
    "push to a bad id": "push low name --dry-run",
    "pull of a bad id": "pull name out",
    "length of nothing": "evaluate dense --length 16",
}
FREE = {  # where these may write
    "report": ("below the source",),
    "demo": ("below the source",),
    "sweep": ("below the source",),
    "bench": ("below the source", "source", "taken", "empty", "here", "above", "root"),
}
ROWS = [
    *(
        Row(f"{command} to {name}", nothing, words.replace("OUT", out))
        for command, words in WRITERS.items()
        for name, out in OUTS.items()
        if name not in FREE.get(command, ())
    ),
    *(
        Row(f"{command} to a {name}", change, words.replace("OUT", "out"))
        for command, words in WRITERS.items()
        for name, change in LINKS.items()
    ),
    *(
        Row(f"{command} of {name}", nothing, COMMANDS[command].replace("dense", source, 1))
        for command in READERS
        for name, source in SOURCES.items()
    ),
    *(Row(name, nothing, words) for name, words in USAGE.items()),
]


@attack.table(ROWS)
def test_bad_paths_and_usage_are_refused_in_one_line(row, place, capsys):
    assert_refused(row, place, capsys)
