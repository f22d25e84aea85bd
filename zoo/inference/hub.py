"""Names of the Hugging Face Hub, its cards, and what it means when it does not serve."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

FAILURES = (HTTPError, HFValidationError, OSError)  # of a connection, of a name, of a disk


def parse_hub_id(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """The repository and the revision that `org/name@revision` says, or `revision` beside a name.

    Raises ValueError for what is no name of a repository, and where two revisions are given.
    """
    name, sign, own = source.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1 or (sign and not own):
        raise ValueError(f"{source!r} is no Hub id: expected org/name or org/name@revision")
    if own and revision not in (None, own):
        raise ValueError(f"given revision {revision} and {source}: expected one of the two")
    return name, own or revision


def failure_reason(error: BaseException) -> str:
    """Why the Hub did not serve, and what to do, in a line; there is never a token in it."""
    if isinstance(error, RuntimeError):  # of an upload: what went wrong stands behind it
        error = error.__cause__ or error
    response = getattr(error, "response", None)
    status = 0 if response is None else response.status_code
    said = str(error).strip().splitlines()
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, GatedRepoError):
        return "access to it has to be asked for on its page, and needs `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and needs `hf auth login`"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "it does not know you: `hf auth login`, or set HF_TOKEN to a token that is valid"
    if status == 403:
        return "your token may not do that: take one that may write there"
    if status in (409, 412):
        return "it was changed by someone else at the same time: run the same command again"
    if status == 429 or status >= 500:
        return f"the Hub is in trouble ({status}): run the same command again later"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE forbids to ask it"
    return said[0] if said else type(error).__name__


def card_license(folder: Path) -> str | None:
    """What the card in a checkpoint folder says of its license; None if it says nothing."""
    file = folder / "README.md"
    if not file.exists():
        return None
    try:
        return ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except (ValueError, yaml.YAMLError):
        return None
