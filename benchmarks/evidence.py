"""All about a model at several shares: text, facts, tasks, speed, memory and time.

    python benchmarks/evidence.py MODEL FOLDER --keep 0.4 --keep 0.25 --keep 0.16 \\
        [--domain wiki-2.txt --domain speech-2.txt] [--steps 200] [--part text --part facts]

Every number is of a command that users type, run in a process of its own. What it printed is kept
in FOLDER, beside the models: the same command goes on after an interruption. Prints a row for the
uncompressed model, and two for each share: as `compress` leaves it, and after `refine`. Peaks of
memory are of the whole process, on Linux and macOS.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAIN = "from eigenzoo.zoo.cli import main; main()"
PARTS = ("text", "facts", "ruler", "speed")  # besides compressing


def run(kept: Path, *words: str) -> dict[str, Any]:
    """What a command prints, its minutes and its peak of memory, kept in a file.

    Raises SystemExit if it fails; its own words are then above.
    """
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["command"] == [*words]:
            return found
        raise SystemExit(f"{kept} is of another command: choose another folder, or remove it")
    print("eigenzoo", *words, file=sys.stderr, flush=True)
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    printed = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"eigenzoo {' '.join(words)}: status {os.waitstatus_to_exitcode(status)}")
    found = {
        "command": [*words],
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "printed": json.loads(printed),
    }
    draft = kept.with_suffix(".new")
    draft.write_text(json.dumps(found))
    draft.replace(kept)
    return found


def models(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """What is told of each model, and where it lies; those that are missing are made."""
    yield {"share": 1.0, "form": "uncompressed"}, args.model
    text = ["--calibration", args.calibration, "--samples", str(args.samples)]
    for keep in args.keep:
        low, better = (str(args.folder / f"{keep}{kind}") for kind in ("", "-refined"))
        asked = ["--keep", str(keep), *text, "--dtype", args.dtype]
        made = run(args.folder / f"{keep}.json", "compress", args.model, low, *asked)
        share = made["printed"]["share"]
        yield {"keep": keep, "share": share, "form": "closed", **_cost(made)}, low
        if args.steps:
            asked = ["--original", args.model, "--steps", str(args.steps)]
            asked += ["--calibration", args.calibration, "--precision", args.precision]
            asked += ["--minutes", str(args.minutes)] if args.minutes else []
            asked += ["--lr", str(args.lr)] if args.lr else []
            made = run(args.folder / f"{keep}-refined.json", "refine", low, better, *asked)
            yield {"keep": keep, "share": share, "form": "refined", **_cost(made)}, better


def _cost(made: dict[str, Any]) -> dict[str, Any]:
    return {"minutes": made["minutes"], "peak_bytes": made["peak_bytes"]}


def measured(args: argparse.Namespace, name: str, model: str, part: str) -> dict[str, Any]:
    """Fields of a row: one part of what is asked for."""
    kept, dtype = args.folder / f"{name}-{part}.json", ("--dtype", args.dtype)
    if part == "text":
        files = [x for file in args.domain for x in ("--domain", file)]
        size = "--window", str(args.window), "--windows", str(args.windows)
        done = run(kept, "evaluate", model, "--domains", *files, *size, *dtype)
        texts = done["printed"]["domains"]["texts"]
        return {"perplexity": {x["text"]: x["perplexity"] for x in texts}}
    lengths = [x for length in args.length or [] for x in ("--length", str(length))]
    if part == "facts":
        asked = ["--retrieval", "--facts", str(args.facts), *lengths, *dtype]
        return {"facts": run(kept, "evaluate", model, *asked)["printed"]}
    asked = ["--ruler", "--samples", str(args.questions), *lengths, *dtype]
    asked += ["--batch-size", str(args.batch_size), "--ops", args.ops]
    return {"ruler": run(kept, "evaluate", model, *asked)["printed"]}


def main() -> None:
    """Make the models, measure them, and print a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=float, action="append", required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="repeat for more; else all")
    parser.add_argument("--calibration", default="mixed")
    parser.add_argument("--samples", type=int, default=32, help="sequences that compress reads")
    parser.add_argument("--steps", type=int, default=200, help="of refine; 0: do not refine")
    parser.add_argument("--minutes", type=float, help="that refine trains; else all steps")
    parser.add_argument("--lr", type=float, help="of refine; else its default")
    parser.add_argument("--precision", default="auto", help="of refine")
    parser.add_argument("--domain", action="append", default=[], help="a file; repeat for more")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, action="append", help="of facts and ruler")
    parser.add_argument("--facts", type=int, default=1, help="for each of five depths")
    parser.add_argument("--questions", type=int, default=10, help="of each task of ruler")
    parser.add_argument("--batch-size", type=int, default=1, help="of ruler")
    parser.add_argument("--ops", default="auto", help="of ruler")
    parser.add_argument("--dtype", default="auto", help="of the models; speed has its own")
    parser.add_argument(
        "--context", type=int, action="append", help="tokens in the cache, for speed"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = args.part or PARTS

    rows = []
    for told, model in models(args):
        row = told
        name = Path(model).name if told["form"] != "uncompressed" else "uncompressed"
        for part in [x for x in PARTS if x in parts and x != "speed"]:
            if told["form"] == "refined" and part != "text":
                continue  # the same sizes; its facts were asked of the closed form
            row = row | measured(args, name, model, part)
        if "text" in parts and rows:
            over = rows[0]["perplexity"]
            more = {x: 100 * (p / over[x] - 1) for x, p in row["perplexity"].items()}
            row |= {"increase": more, "mean": sum(more.values()) / len(more)}
            row |= {"worst": max(more.values())}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if "speed" in parts:
        low = [str(args.folder / str(keep)) for keep in args.keep]
        asked = [x for context in args.context or [2048] for x in ("--context", str(context))]
        done = run(args.folder / "speed.json", "bench", args.model, *low, *asked)
        print(json.dumps({"speed": done["printed"]}))


if __name__ == "__main__":
    main()
