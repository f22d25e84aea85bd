"""Cases that run the code of other cases: with --runslow only, see tests/conftest.py."""

from collections.abc import Iterable

import pytest

repeats = pytest.mark.repeats


def but(kept: Iterable, cases: Iterable) -> list:
    """`cases` for `parametrize`, of which all but those in `kept` run with --runslow only."""
    kept, cases = list(kept), list(cases)
    assert kept
    assert all(x in cases for x in kept)
    return [x if x in kept else _repeat(x) for x in cases]


def _repeat(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=repeats)
