"""Check and time the fused ops on a GPU, and decoding by whole models.

`python -m eigenzoo.kernels.bench --out FOLDER` takes at most 8 minutes on one GPU of NVIDIA or AMD.
It writes bench.json and bench.png (extra `plot`), and prints tables. A failed check makes the exit
code 1; timing goes on.
"""

import argparse
import sys
from pathlib import Path

from .setup import Budget, Sizes
from .steps import about, of_gpu, run


def main() -> int:
    """Run all steps; 1 if a check failed, or if nothing was checked."""
    parser = argparse.ArgumentParser(prog="python -m eigenzoo.kernels.bench", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kernels-bench"),
        help="folder for the report (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all (default: %(default)s)")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.5,
        help="share of free memory that the caches of a case may take (default: %(default)s)",
    )
    given = parser.parse_args()
    budget = Budget(60 * given.minutes)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        setup = of_gpu(given.memory)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    command = " ".join(["python -m eigenzoo.kernels.bench", *sys.argv[1:]])
    report = run(setup, Sizes(), budget, given.out, about(command))
    return int(not report["checks"] or not all(row["passed"] for row in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
