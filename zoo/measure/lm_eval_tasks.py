"""Tasks of lm-evaluation-harness (extra `eval`): load them by name, run a model on them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import evaluate as hub_metrics
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ..models.model import Model
from ..utils.records import TaskRow
from .lm_eval_model import NativeLM


def load_tasks(
    names: Sequence[str], include: Path | None = None, trust_remote_code: bool = False
) -> Any:
    """Tasks, groups or tags of lm-evaluation-harness by name, with their data.

    include: a folder with YAML files of more tasks; Python files that they name are run.
    trust_remote_code: run metrics that are scripts on the Hub. Raises ValueError for names that
    are unknown and for data that cannot be read.
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
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return tasks


def run_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    limit: int | None = None,
    batch_size: int = 1,
    stop: Sequence[int] = (),
    trust_remote_code: bool = False,
    bits: int | None = None,
) -> dict[str, TaskRow]:
    """Metrics of what `load_tasks` returned, by task, named `METRIC,FILTER` as lm-eval does.

    limit: documents to take of each task at most; stop, bits: as in `NativeLM`. Raises ValueError
    for tasks that would run code which the model writes.
    """
    lm = NativeLM(model, tokenizer, batch_size, stop, bits)
    with _hub_metrics(trust_remote_code):
        results = evaluate(lm, tasks, limit=limit)
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
