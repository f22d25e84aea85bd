"""Publish checkpoints on the Hugging Face Hub, and fetch them.

huggingface_hub transfers, resumes, retries, shows progress and reads the token, which comes from
`hf auth login` or HF_TOKEN. This module lists what changes, and says in a sentence what went wrong.
"""

import shutil
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..zoo.inference.checkpoint import native_config, read_config
from ..zoo.inference.hub import FAILURES, failure_reason, parse_hub_id
from ..zoo.inference.tensor_files import shards
from ..zoo.utils.output import check_disk, claimed, put, writing
from .card import FIGURES
from .links import check_inside

STALE = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
]  # removed when the folder has no such file
KINDS = (  # of files that belong to a checkpoint; others stay where they are
    *STALE,
    *("config.json", "generation_config.json", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template.*", "additional_chat_templates/*.jinja"),
    f"{FIGURES}/*.png",
)


class Change(NamedTuple):
    """A file, its bytes, and what a push does to it: new, changed, removed, same or left out."""

    path: str
    size: int
    state: str


class Pushed(NamedTuple):
    """What a push did. url: of the commit or the pull request; None if nothing had changed."""

    changes: list[Change]
    url: str | None


def published(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that a push sends. Raises ValueError for one outside it."""
    kinds = (path for kind in KINDS for path in folder.glob(kind))
    files = sorted({path for path in kinds if path.is_file() and not path.name.startswith(".")})
    for path in files:
        check_inside(path, folder)
    return files


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder is a whole checkpoint of a kind that can be loaded."""
    there = {path.name for path in published(folder)}
    native_config(read_config(folder))
    names = [path.name for path in shards(folder, "model.safetensors")]
    lacking = sorted({*names, "README.md"} - there)
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
    local, sent = [], set(published(folder))
    for path in sent:
        name = path.relative_to(folder).as_posix()
        state = "new" if name not in remote else _compare(path, remote[name])
        local.append(Change(name, path.stat().st_size, state))
    others = (p for p in folder.iterdir() if not p.name.startswith(".") and p not in sent)
    kept = [p for p in others if not any(p in path.parents for path in sent)]
    names = {change.path for change in local}
    gone = [n for n in remote if n not in names and any(Path(n).match(p) for p in STALE)]
    local += [Change(p.name, p.lstat().st_size, "left out") for p in kept]
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
        new = [change for change in planned if change.state not in ("same", "left out")]
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
                allow_patterns=[escape(x.path) for x in planned if x.state != "left out"],
                delete_patterns=STALE,
            )
            url = commit.pr_url or commit.commit_url
    except (*FAILURES, RuntimeError) as error:
        raise ValueError(f"{wanted}: {failure_reason(error)}") from error
    return Pushed(planned, url)


def pull(source: str, out: Path, revision: str | None = None, force: bool = False) -> str:
    """Fetch a repository into the folder `out`; returns the commit.

    If the connection breaks, what was downloaded stays beside `out` in the hidden folder
    `.OUT.pull`, from which the same call resumes; `out` itself is complete or not there. Raises
    ValueError if `out` is taken, or the Hub does not answer.
    """
    repo_id, revision = parse_hub_id(source, revision)
    with claimed(out, force) as place:
        doing, work = f"{source} cannot be fetched", place.with_name(f".{place.name}.pull")
        try:
            commit: Any = HfApi().model_info(repo_id, revision=revision).sha
            for other in {*work.glob("*")} - {work / commit}:  # of a revision before
                shutil.rmtree(other)
            check_disk(out, _bytes(repo_id, commit) - _here(work))
            doing = f"{source} has not come whole, and the same command goes on from there"
            snapshot_download(repo_id, revision=commit, local_dir=work / commit)
        except FAILURES as error:
            raise ValueError(f"{doing}: {failure_reason(error)}") from error
        with writing(out):
            shutil.rmtree(work / commit / ".cache", ignore_errors=True)
            (work / commit / ".gitattributes").unlink(missing_ok=True)
            put(work / commit, place, force)
            shutil.rmtree(work)
    return commit


def _bytes(repo_id: str, commit: str) -> int:
    entries = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
    return sum(entry.size for entry in entries if isinstance(entry, RepoFile))


def _here(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
