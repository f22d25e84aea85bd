"""What settings may be chosen from, each name with its meaning.

Nothing here imports torch: the command line makes its choices, and their help, from these tables.
Methods are in `methods.METHODS`, ways to hold keys in `keys.KEYS`.
"""

from collections.abc import Iterable

LATENTS = {
    "separate": "one latent for keys and one for values",
    "joint-kv": "one latent for both, in models without a rotation",
}
BUDGETS = {
    "global": "ranks go where the error falls most per byte",
    "uniform": "the same ranks in all layers, for keys and values alike",
}
REFITS = {
    "output": "the output projection and its bias, by ridge regression",
}
PRECISIONS = {
    "auto": "bfloat16 on CUDA, float32 elsewhere",
    "float32": "exact, and slow on a GPU",
    "bfloat16": "half the bytes",
}


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them: a, b or c."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check_choice(what: str, name: str, table: Iterable[str]) -> None:
    """Raise ValueError unless `name` is in `table`. what: is chosen, for the message."""
    if name not in (names := list(table)):
        raise ValueError(f"{what} {name!r} is unknown: expected one of {', '.join(names)}")
