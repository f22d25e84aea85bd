"""Rows of text or chats of a Hub dataset."""

from importlib.util import find_spec

from tqdm import tqdm

from .hub import FAILURES
from .texts import Text, take

BUFFER = 1000  # rows among which the next one is drawn; so many are read before the first


def check_datasets(name: str) -> None:
    """Raise ValueError if the package that reads datasets is not installed."""
    if find_spec("datasets") is None:
        raise ValueError(f"hub:{name} needs the package datasets: pip install 'eigenzoo[data]'")


def hub_text(name: str, characters: int, seed: int = 0) -> Text:
    """Rows of a dataset `DATASET[:CONFIG]`, streamed: `text` or `messages` of its train split.

    They are shuffled, in a buffer and by files of the dataset, and have `characters` characters or
    a little more, or are the whole split. Raises ValueError if the dataset cannot be read or has no
    such column.
    """
    check_datasets(name)
    import datasets

    dataset, _, config = name.partition(":")
    failures = (*FAILURES, datasets.exceptions.DatasetsError)
    try:
        stream = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except (*failures, ValueError) as error:
        raise _unreadable(dataset, error) from error
    stream = stream.shuffle(seed=seed, buffer_size=BUFFER)
    with tqdm(stream, desc="reading", unit="row", disable=None, leave=False) as rows:
        try:
            return take(f"hub:{name}", enumerate(rows, start=1), characters)
        except failures as error:  # the network may fail at any row
            raise _unreadable(dataset, error) from error


def _unreadable(dataset: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"the dataset {dataset} could not be read: {reason}")
