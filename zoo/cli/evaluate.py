"""eigenzoo evaluate."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..utils.records import EvaluationRow
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
    from ..inference.data import python_docs, read_text
    from ..measure import tables
    from ..measure.quality import Probes, measure
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
    probes = Probes(
        *(not (retrieval or tasks), window, windows, by_position, retrieval, length or ()),
        *(facts, seed, kv_bits),
    )
    result = measure(source, checkpoint, words, name_of(text), probes)
    model = checkpoint.model
    if tasks:
        result["tasks"] = run_tasks(
            *(model, checkpoint.tokenizer, chosen, limit, batch_size, stop_tokens(checkpoint)),
            *(trust_remote_code, kv_bits),
        )
    if not as_json:
        tables.evaluation(result)
        return
    row: EvaluationRow = {
        **result,
        "processor": device_name(model.device),
        "versions": versions(),
        "command": command_line(),
    }
    print(json.dumps(row, default=float))
