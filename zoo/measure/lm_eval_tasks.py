"""Tasks of lm-evaluation-harness (extra `eval`): load them by name, run a model on them."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import evaluate as hub_metrics
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval._cli.utils import key_val_to_dict, try_parse_json
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from ..utils.records import TaskRow
from .lm_eval_model import NativeLM, wanted_of

log = logging.getLogger(__name__)


def load_tasks(
    names: Sequence[str],
    include: Path | None = None,
    trust_remote_code: bool = False,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Tasks, groups or tags of lm-evaluation-harness by name, with their data.

    include: a folder with YAML files of more tasks; Python files that they name are run.
    trust_remote_code: run metrics that are scripts on the Hub. num_fewshot: examples before each
    question, where a task does not fix their number at 0. gen_kwargs: replace settings of the
    tasks that generate. Raises ValueError for names that are unknown, for data that cannot be read
    and for settings that are not supported.
    """
    if include is not None and not include.is_dir():
        raise ValueError(f"{include} is no folder: expected one with YAML files of tasks")
    manager = TaskManager(include_path=include)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown or not names:
        raise ValueError(
            f"task {', '.join(unknown)!r} is unknown: expected names that `lm-eval ls tasks` "
            "lists, or of YAML files in the folder --include-path"
        )
    random.seed(DEFAULT_RANDOM_SEED)  # as lm-eval's own command line seeds
    np.random.seed(DEFAULT_OTHER_SEED)
    with _hub_metrics(trust_remote_code):
        try:
            tasks = manager.load(list(names))
        except (OSError, DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the data of {', '.join(names)} cannot be read: {reason}") from error
    for name, task in tasks["tasks"].items():
        _set(name, task, num_fewshot, gen_kwargs or {})
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    if gen_kwargs and not any(map(_generates, tasks["tasks"].values())):
        raise ValueError(f"none of {', '.join(names)} generates text: leave --gen-kwargs out")
    return tasks


def _generates(task: Any) -> bool:
    return task.get_config("output_type") == "generate_until"


def _set(name: str, task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any]) -> None:
    """Put settings of the command line into a task, as lm-eval's own command line does."""
    if _generates(task):
        task.set_config("generation_kwargs", dict(gen_kwargs), update=True)
        wanted_of(task.get_config("generation_kwargs"))  # fails before the model is read
    if num_fewshot is not None and task.get_config("num_fewshot") == 0:
        log.info("%s stays without examples, as its own settings say", name)
    elif num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)


def parse_gen_kwargs(text: str) -> dict[str, Any]:
    """KEY=VALUE,... or a JSON object, as lm-eval's own command line reads them.

    Raises ValueError for anything else.
    """
    try:
        given = try_parse_json(text)
        if isinstance(given, str):
            given = key_val_to_dict(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"gen kwargs is {text!r}: {error}") from None
    if not isinstance(given, dict) or not given:
        raise ValueError(f"gen kwargs is {text!r}: expected KEY=VALUE,... or a JSON object")
    return given


def run_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    limit: int | None = None,
    batch_size: int = 1,
    stop: Sequence[int] = (),
    trust_remote_code: bool = False,
    bits: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, TaskRow]:
    """Metrics of what `load_tasks` returned, by task, named `METRIC,FILTER` as lm-eval does.

    limit: documents to take of each task at most; stop, bits: as in `NativeLM`.
    apply_chat_template: questions are a user's messages, and examples are turns of the chat. Raises
    ValueError for tasks that would run code which the model writes, and without a chat template.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: leave --apply-chat-template out")
    lm = NativeLM(model, tokenizer, batch_size, stop, bits)
    with _hub_metrics(trust_remote_code):
        results = evaluate(
            lm,
            tasks,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    rows: dict[str, TaskRow] = {}
    for name, row in results["results"].items():
        metrics = {key: value for key, value in row.items() if key not in ("name", "alias")}
        facts = {"version": results["versions"].get(name), "shots": results["n-shot"].get(name)}
        rows[name] = facts | metrics
    return rows


@contextmanager
def _hub_metrics(trusted: bool) -> Iterator[None]:
    """Refuse metrics that are scripts on the Hub, which lm-eval fetches and runs without asking."""
    if trusted:
        yield
        return
    wanted = []

    def refuse(name: str, *_: Any, **__: Any) -> None:
        wanted.append(name)
        raise ValueError(f"the metric {name} is refused")

    with patch.object(hub_metrics, "load", refuse):
        try:
            yield
        finally:
            if wanted:  # lm-eval may have caught the error, and failed later without the metric
                raise ValueError(
                    f"the metric {wanted[0]} is a script on the Hub: pass --trust-remote-code to "
                    "fetch and run it, or choose other tasks"
                )
