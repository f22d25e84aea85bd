"""eigenzoo evaluate."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, cast

import typer

from ..utils.records import EvaluationResult, EvaluationRow, PositionRecord, RetrievalRecord
from .options import (
    AsJson,
    Device,
    Dtype,
    KvBits,
    Revision,
    Seed,
    Source,
    Trust,
    command_line,
    load,
    name_of,
)

LENGTHS = (256, 512, 1024, 2048)


def evaluate(
    source: Source,
    text: Annotated[
        Path | None, typer.Option(help="Text file.", show_default="Python's own help")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that are read together.", show_default="2048, or what the model can read"
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows; 0: all of the text.")] = 0,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also perplexity by the number of tokens before.")
    ] = False,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Instead, ask for facts planted in the text.")
    ] = False,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a text with a fact in it; repeat for more.",
            show_default="256, 512, ... up to 2048, or what the model can read",
        ),
    ] = None,
    facts: Annotated[int, typer.Option(min=1, help="Facts for each length and depth.")] = 5,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, A,B,...; needs the extra eval."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of a task.", show_default="all")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with YAML files of more tasks; Python in them is run."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a task in one batch.")] = 1,
    dtype: Dtype = "auto",
    kv_bits: KvBits = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure SOURCE, dense or compressed: perplexity on a text, retrieval, and tasks."""
    from ..inference.checkpoint import stop_tokens
    from ..inference.data import encode, python_docs, read_text
    from ..inference.perplexity import mean_perplexity, token_losses
    from ..measure import probe
    from ..measure import tables as report
    from ..measure.evaluate import cache_size
    from ..utils.provenance import device_name, versions

    if (length and not retrieval) or ((limit or include_path) and not tasks):
        raise ValueError("--length goes with --retrieval, --limit and --include-path with --tasks")
    words = python_docs() if text is None else read_text(text)
    if tasks:  # fails before the model is read
        if find_spec("lm_eval") is None:
            raise ValueError("--tasks needs the package lm-eval: pip install 'eigenzoo[eval]'")
        from ..measure.lm_eval_tasks import load_tasks, run_tasks

        names = [name.strip() for name in tasks.split(",")]
        chosen = load_tasks(names, include_path, trust_remote_code)
    checkpoint = load(source, dtype, device, revision, trust_remote_code)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    longest = model.config.max_position_embeddings
    result: EvaluationResult = {"model": source, **cache_size(model.config, model.dtype, kv_bits)}
    if by_position or not (retrieval or tasks):
        window = window or min(2048, longest)
        tokens = encode(tokenizer, words).to(model.device)
        losses = token_losses(model, tokens, window, windows, kv_bits)
        quality = mean_perplexity(losses)
        result["perplexity"], result["tokens"] = quality.perplexity, quality.tokens
        result["text"], result["window"] = name_of(text), window
        if by_position:
            buckets = [x._asdict() for x in probe.by_position(losses)]
            result["by_position"] = cast(list[PositionRecord], buckets)
    if retrieval:
        length = length or [n for n in LENGTHS if n <= longest] or [longest]
        rows = probe.retrieval(
            model, tokenizer, words, length, facts=facts, seed=seed, bits=kv_bits
        )
        result["text"] = name_of(text)
        result["retrieval"] = cast(list[RetrievalRecord], [x._asdict() for x in rows])
    if tasks:
        stop = stop_tokens(checkpoint)
        result["tasks"] = run_tasks(
            model, tokenizer, chosen, limit, batch_size, stop, trust_remote_code, kv_bits
        )
    if not as_json:
        report.evaluation(result)
        return
    row: EvaluationRow = {
        **result,
        "processor": device_name(model.device),
        "versions": versions(),
        "command": command_line(),
    }
    print(json.dumps(row, default=float))
