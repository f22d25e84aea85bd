"""Publish checkpoints on the Hugging Face Hub, and fetch them.

huggingface_hub transfers, resumes, retries, shows progress and reads the token, which comes from
`hf auth login` or HF_TOKEN. This module lists what changes, and says in a sentence what went wrong.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..zoo.inference.checkpoint import native_config, read_config
from ..zoo.inference.hub import FAILURES, failure_reason, parse_hub_id
from .export import check_free, put
from .links import check_links

STALE = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
]  # removed when the folder has no such file


class Change(NamedTuple):
    """A file, its bytes, and what a push does to it: new, changed, removed or same."""

    path: str
    size: int
    state: str


class Pushed(NamedTuple):
    """What a push did. url: of the commit or the pull request; None if nothing had changed."""

    changes: list[Change]
    url: str | None


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder is a whole checkpoint of a kind that can be loaded.

    Links that lead out of it are refused too: what they lead to would be published.
    """
    check_links(folder)
    native_config(read_config(folder))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    lacking = sorted(n for n in {*names, "README.md"} if not (folder / n).is_file())
    if lacking:
        raise ValueError(
            f"{folder} lacks {', '.join(lacking)}: expected a folder that eigenzoo compress wrote"
        )


def changes(folder: Path, repo_id: str, revision: str | None = None) -> list[Change]:
    """What pushing `folder` would do to a repository, which need not exist. Sorted by path.

    Raises ValueError if the Hub does not answer.
    """
    remote: dict[str, RepoFile] = {}
    try:
        entries = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        pass  # every file is new
    except FAILURES as error:
        raise ValueError(
            f"the Hub does not tell what {repo_id} holds: {failure_reason(error)}"
        ) from error
    local = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            state = "new" if name not in remote else _compare(path, remote[name])
            local.append(Change(name, path.stat().st_size, state))
    names = {change.path for change in local}
    gone = [n for n in remote if n not in names and any(Path(n).match(p) for p in STALE)]
    return sorted([*local, *(Change(n, remote[n].size, "removed") for n in gone)])


def _compare(path: Path, remote: RepoFile) -> str:
    with path.open("rb") as file:
        if remote.lfs is not None:
            same = sha_fileobj(file).hex() == remote.lfs.sha256
        else:
            same = git_hash(file.read()) == remote.blob_id
    return "same" if same else "changed"


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> Pushed:
    """Upload a checkpoint folder; the repository and the branch are created if they are missing.

    Nothing is committed if nothing has changed. create_pr: open a pull request against the main
    branch instead. Raises ValueError for a folder that is no whole checkpoint, and if the Hub
    refuses or the connection breaks: the message says what is missing and how to resume.
    """
    check_folder(folder)
    if create_pr and revision:
        raise ValueError(f"a pull request goes to the main branch: expected no revision {revision}")
    api, url = HfApi(), None
    wanted = f"{repo_id} does not take the upload"
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        planned = changes(folder, repo_id, revision)
        new = [change for change in planned if change.state != "same"]
        if new:
            names = ", ".join(change.path for change in new)
            size = sum(change.size for change in new if change.state != "removed") / 1e6
            wanted = (
                f"{repo_id} has not all of the upload: {names} ({size:.1f} MB) may be missing, and "
                "the same command goes on from there"
            )
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Upload {folder.resolve().name} with eigenzoo",
                create_pr=create_pr,
                ignore_patterns=[".*", "*/.*"],
                delete_patterns=STALE,
            )
            url = commit.pr_url or commit.commit_url
    except (*FAILURES, RuntimeError) as error:
        raise ValueError(f"{wanted}: {failure_reason(error)}") from error
    return Pushed(planned, url)


def pull(source: str, out: Path, revision: str | None = None, force: bool = False) -> str:
    """Fetch a repository into the folder `out`; returns the commit.

    If the connection breaks, what was downloaded stays beside `out` in a hidden folder, from which
    the same call resumes; `out` itself is complete or not there. Raises ValueError if `out` is
    taken, or the Hub does not answer.
    """
    repo_id, revision = parse_hub_id(source, revision)
    check_free(out, force)
    doing = f"{source} cannot be fetched"
    try:
        commit: Any = HfApi().model_info(repo_id, revision=revision).sha
        part = out.with_name(f".{out.name}-{commit[:12]}.part")
        doing = f"{source} has not come whole, and the same command goes on from there"
        snapshot_download(repo_id, revision=commit, local_dir=part)
    except FAILURES as error:
        raise ValueError(f"{doing}: {failure_reason(error)}") from error
    shutil.rmtree(part / ".cache", ignore_errors=True)
    (part / ".gitattributes").unlink(missing_ok=True)
    old = part.with_suffix(".old")
    put(part, out, old)
    shutil.rmtree(old, ignore_errors=True)
    return commit
