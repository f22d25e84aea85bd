"""The Hugging Face Hub: its ids, the reasons of its failures, and the license on a card."""

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

from ..utils.regular import readable

FAILURES = (HTTPError, HFValidationError, OSError)  # connection, bad name, disk


def parse_hub_id(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """The repository and the revision of org/name@revision, or of org/name and `revision`.

    Raises ValueError if it is not the id of a repository, or if two different revisions are given.
    """
    name, sign, own = source.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1 or (sign and not own):
        raise ValueError(f"{source!r} is not a Hub id: expected org/name or org/name@revision")
    if own and revision not in (None, own):
        raise ValueError(f"given revision {revision} and {source}: expected only one revision")
    return name, own or revision


def failure_reason(error: BaseException) -> str:
    """Why a request to the Hub failed and what to do, in one line without access tokens."""
    if isinstance(error, RuntimeError):  # an upload raises it; its cause says what went wrong
        error = error.__cause__ or error
    response = getattr(error, "response", None)
    status = 0 if response is None else response.status_code
    lines = str(error).strip().splitlines()
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, GatedRepoError):
        return "the repository is gated: request access on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: run `hf auth login` if it is"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "you have no token, or an invalid one: run `hf auth login`, or set a valid HF_TOKEN"
    if status == 403:
        return "your token lacks permission: use one that may write to this repository"
    if status in (409, 412):
        return "someone else changed the repository at the same time: run the same command again"
    if status == 429 or status >= 500:
        return f"the Hub is unavailable or busy (status {status}): run the same command again later"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it"
    return lines[0] if lines else type(error).__name__


def card_license(folder: Path) -> str | None:
    """The license on the card of a checkpoint folder; None if it has no card or no license."""
    file = folder / "README.md"
    if not file.exists():
        return None
    readable(file)
    try:
        return ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except (ValueError, yaml.YAMLError):
        return None
