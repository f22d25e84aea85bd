"""eigenzoo evaluate."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..utils.records import EvaluationRow
from .options import (
    FILE_HELP,
    TEXTS,
    AsJson,
    Device,
    DomainFiles,
    Domains,
    Dtype,
    KeepTokens,
    KvBits,
    Ops,
    Revision,
    Seed,
    Sinks,
    Source,
    Trust,
    Window,
    option,
)
from .values import command_line, fuse, load, refuse_unused

RETRIEVAL = "Retrieval"
TASKS = "Tasks"
PERPLEXITY = "perplexity"  # what is measured if no other measurement is asked for
OF_WINDOWS, OF_TASKS = (PERPLEXITY, "--by-position"), ("--tasks",)
GOES_WITH = {  # a parameter: the measurements that it changes
    "window": OF_WINDOWS,
    "windows": OF_WINDOWS,
    "text": (*OF_WINDOWS, "--retrieval"),
    "length": ("--retrieval", "--ruler"),
    "facts": ("--retrieval",),
    "samples": ("--ruler",),
    "keep_tokens": ("--retrieval", "--ruler"),
    "batch_size": ("--ruler", "--tasks"),
    "ops": ("--retrieval", "--ruler", "--tasks"),
    "original": ("--domains", "--domain"),
    **dict.fromkeys(
        ("limit", "include_path", "apply_chat_template", "num_fewshot", "gen_kwargs"), OF_TASKS
    ),
}


def evaluate(
    ctx: typer.Context,
    source: Source,
    text: Annotated[
        Path | None,
        option(
            "--text",
            help=f"File to measure perplexity on: {FILE_HELP}",
            default="Python's own help",
        ),
    ] = None,
    domains: Domains = False,
    domain: DomainFiles = None,
    original: Annotated[
        str | None,
        option(
            "--original",
            help="With --domains or --domain: measure the uncompressed model too, and show the "
            "increase of perplexity.",
            default="not measured",
            panel=TEXTS,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens in a window; windows do not overlap.",
            show_default="2048, or what the model can read",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=0, help="Largest number of windows; 0: the whole text.")
    ] = 0,
    by_position: Annotated[
        bool,
        typer.Option(
            "--by-position", help="Measure also how perplexity depends on the tokens before."
        ),
    ] = False,
    retrieval: Annotated[
        bool,
        option(
            "--retrieval",
            help="Instead of perplexity: plant facts in a text, and ask for them at its end.",
            panel=RETRIEVAL,
        ),
    ] = False,
    length: Annotated[
        list[int] | None,
        option(
            "--length",
            help="Tokens in a text with facts, answer included; repeat for more.",
            default="256, 512, ... up to 2048, with --ruler 4096, or what the model can read",
            panel=RETRIEVAL,
            metavar="<int>",
        ),
    ] = None,
    facts: Annotated[
        int, option("--facts", help="Facts for each length and depth.", panel=RETRIEVAL, min=1)
    ] = 5,
    ruler: Annotated[
        bool,
        option(
            "--ruler",
            help="Instead of perplexity: ask for numbers, variables and frequent words of long "
            "texts, after RULER (arXiv 2404.06654).",
            panel=RETRIEVAL,
        ),
    ] = False,
    samples: Annotated[
        int | None,
        option(
            "--samples",
            help="With --ruler: texts for each task and length.",
            default="20",
            panel=RETRIEVAL,
            min=1,
        ),
    ] = None,
    keep_tokens: KeepTokens = None,
    tasks: Annotated[
        str | None,
        option(
            "--tasks",
            help="Instead of perplexity: tasks of lm-evaluation-harness, A,B,...; needs the extra "
            "`eval`.",
            panel=TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        option(
            "--limit",
            help="Largest number of documents in a task.",
            default="all",
            panel=TASKS,
            min=1,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        option(
            "--include-path",
            help="Folder with more tasks in YAML files; Python code that they name is run.",
            panel=TASKS,
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        option(
            "--apply-chat-template",
            help="Put questions into the chat template of the tokenizer, and examples into turns.",
            panel=TASKS,
        ),
    ] = False,
    num_fewshot: Annotated[
        int | None,
        option(
            "--num-fewshot",
            help="Examples before a question.",
            default="as the task says",
            panel=TASKS,
            min=0,
        ),
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        option(
            "--gen-kwargs",
            help="Settings of tasks that generate, as temperature=0.8,max_gen_toks=64 or a JSON "
            "object.",
            default="as the task says",
            panel=TASKS,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        option(
            "--batch-size", help="Texts in one batch of a task, or of --ruler.", panel=TASKS, min=1
        ),
    ] = 1,
    dtype: Dtype = "auto",
    ops: Ops = "auto",
    kv_bits: KvBits = None,
    sliding_window: Window = 0,
    sinks: Sinks = 0,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity, retrieval and other tasks.

    SOURCE may be compressed or not.
    """
    from ..inference.checkpoint import stop_tokens
    from ..inference.domains import read_domains
    from ..inference.evict import check_alone
    from ..inference.texts import read_text
    from ..measure import tables
    from ..measure.domains import measure_domains
    from ..measure.quality import Probes, measure
    from ..models.ring import Kept
    from ..utils.provenance import device_name, versions

    if keep_tokens:
        check_alone(batch_size)
    several = read_domains(domains, domain or ())
    if several and (text or by_position or retrieval or ruler or tasks):
        raise ValueError(
            "--domains and --domain measure perplexity on texts of their own: leave --text, "
            "--by-position, --retrieval, --ruler and --tasks out; a file goes with --domain FILE"
        )
    kept = Kept(sliding_window, sinks)
    kept.check()
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if not all(names):
        raise ValueError(f"tasks is {tasks!r}: expected names, A,B,...")
    asked = {"--by-position": by_position, "--retrieval": retrieval, "--ruler": ruler}
    asked["--tasks"] = bool(tasks)
    asked[PERPLEXITY] = not any(asked.values())
    asked |= {"--domains": domains, "--domain": bool(domain)}
    refuse_unused(ctx, GOES_WITH, asked)
    words = read_text(text)
    if tasks:  # fails before the model is read
        if find_spec("lm_eval") is None:
            raise ValueError("--tasks needs the package lm-eval: pip install 'eigenzoo[eval]'")
        from ..measure.lm_eval_tasks import load_tasks, parse_gen_kwargs, run_tasks

        given = None if gen_kwargs is None else parse_gen_kwargs(gen_kwargs)
        chosen = load_tasks(names, include_path, trust_remote_code, num_fewshot, given)
    checkpoint = load(source, dtype, device, revision, trust_remote_code)
    fuse(checkpoint.model.keep(*kept), ops, compile=False)
    probes = Probes(
        *(not (retrieval or ruler or tasks), window, windows, by_position, retrieval, length or ()),
        *(facts, seed, kv_bits, ruler, samples or 20, batch_size),
        keep=keep_tokens,
    )
    if several:
        kind = str(checkpoint.model.dtype).removeprefix("torch.")
        dense = load(original, kind, device, None, trust_remote_code) if original else None
        size = window, windows, kv_bits
        result = measure_domains(source, checkpoint, several, *size, dense)
    else:
        result = measure(source, checkpoint, words, probes)
    model = checkpoint.model
    if sliding_window:
        result["sliding_window"] = [*kept]
    if tasks:
        result["tasks"] = run_tasks(
            *(model, checkpoint.tokenizer, chosen, limit, batch_size, stop_tokens(checkpoint)),
            *(trust_remote_code, kv_bits, apply_chat_template),
        )
        result["task_settings"] = {
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "gen_kwargs": given,
            "limit": limit,
        }
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
