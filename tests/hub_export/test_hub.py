"""Pushing to and pulling from a Hub on the loopback interface."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from huggingface_hub import constants
from loopback import TOKEN, serve

from eigenzoo.hub_export.hub import STALE
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.hub import parse_hub_id

REPO = "tester/small"


@pytest.fixture(scope="module")
def low_folder(tmp_path_factory, dense_folder):
    """A small compressed checkpoint."""
    from eigenzoo.hub_export.compress import compress_checkpoint
    from eigenzoo.zoo.inference.checkpoint import load

    out = tmp_path_factory.mktemp("low") / "small"
    compress_checkpoint(
        load(str(dense_folder)),
        out,
        Settings(keep=0.6, rank_multiple=2, kv_bits=(16,)),
        "self",
        4,
        32,
    )
    return out


@pytest.fixture
def folder(low_folder, tmp_path):
    """A copy of `low_folder`."""
    return shutil.copytree(low_folder, tmp_path / "small")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process takes for the real one."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda _seconds: None)  # between attempts
        yield hub


def states(output: str) -> dict[str, str]:
    return {x["path"]: x["state"] for x in json.loads(output)["changes"]}


def refused(run, *words) -> str:
    """The one line of error that a command prints."""
    code, output, error = run(*words)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1), error
    assert TOKEN not in output + error
    return lines[0]


def test_a_pushed_folder_is_pulled_as_it_was(run, hub, folder, tmp_path):
    code, output, error = run("push", folder, REPO, "--message", "first")
    assert code == 0, error
    assert f"{hub.url}/{REPO}/commit/" in output
    assert hub.repos[REPO].log == ["initial", "first"]
    code, output, error = run("pull", REPO, tmp_path / "back")
    assert code == 0, error
    assert contents(tmp_path / "back") == contents(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "small"]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_has_not_changed_makes_no_commit(run, hub, folder):
    run("push", folder, REPO)
    code, _, error = run("push", folder, REPO)
    assert code == 0
    assert "nothing has changed" in error
    assert len(hub.repos[REPO].log) == 2


def test_only_what_has_changed_is_sent_and_old_weights_go(run, hub, folder):
    run("push", folder, REPO)
    (folder / "README.md").write_text("other")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, output, error = run("push", folder, REPO, "--json")
    assert code == 0, error
    by_path = states(output)
    assert by_path.pop("README.md") == "changed"
    assert by_path.pop("model.safetensors") == "removed"
    assert by_path.pop("model-00001-of-00001.safetensors") == "new"
    assert by_path.pop("model.safetensors.index.json") == "new"
    assert set(by_path.values()) == {"same"}
    files = hub.repos[REPO].commits[hub.repos[REPO].names["main"]]
    assert "model.safetensors" not in files
    assert len([r for r in hub.requests if r.startswith("PUT /large/")]) == 2  # not the weights


FOREIGN = (
    *("notes.txt", "id_rsa", "trainer_state.json", "optimizer.pt", ".env", ".out.lock"),
    *("figures/speed.csv", "out.partial/new/config.json", ".git/config", "logs/README.md"),
)


def test_only_files_of_a_checkpoint_are_published(run, hub, folder):
    wanted = ("LICENSE", "figures/speed [1].png", "additional_chat_templates/tool.jinja")
    for name in (*FOREIGN, *wanted):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    code, output, error = run("push", folder, REPO, "--json")
    assert code == 0, error
    sent = {name for name, state in states(output).items() if state == "new"}
    files = hub.repos[REPO].commits[hub.repos[REPO].names["main"]].keys() - {".gitattributes"}
    assert files == sent
    assert sent.isdisjoint(FOREIGN)
    assert sent >= {*wanted, "config.json", "tokenizer.json", "modeling_eigen.py"}
    left = {name for name, state in states(output).items() if state == "left out"}
    assert left == {*FOREIGN[:4], "out.partial", "logs"}
    assert "nothing has changed" in run("push", folder, REPO)[2]


@pytest.mark.parametrize("name", ["README.md", "config.json", "figures/speed.png", "x.safetensors"])
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_nothing_outside_of_the_folder_is_published(run, hub, folder, tmp_path, name, words):
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    error = refused(run, "push", folder, REPO, *words)
    assert f"{name} is a link out of the folder" in error
    assert not hub.repos


def test_a_folder_behind_a_link_is_published_but_no_folder_in_it(run, hub, folder, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "secret.png").touch()
    (folder / "figures").symlink_to(tmp_path / "plots")
    assert "figures/secret.png is a link" in refused(run, "push", folder, REPO)
    (folder / "figures").unlink()
    (tmp_path / "link").symlink_to(folder)
    assert run("push", tmp_path / "link", REPO)[0] == 0


def test_a_download_goes_on_with_the_newest_revision_only(run, hub, folder, tmp_path):
    run("push", folder, REPO)
    hub.trouble("GET .*/model.safetensors", times=99, after=1000)
    refused(run, "pull", REPO, tmp_path / "back")
    assert (tmp_path / ".back.pull").exists()
    hub.troubles.clear()
    (folder / "README.md").write_text("other")
    run("push", folder, REPO)
    (tmp_path / "back").mkdir()
    assert run("pull", REPO, tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == contents(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "small"]


def test_a_dry_run_sends_nothing_and_shows_the_card(run, hub, folder):
    code, output, error = run("push", folder, REPO, "--dry-run")
    assert code == 0, error
    assert "model.safetensors" in output
    assert "new" in output
    assert (folder / "README.md").read_text() in output
    assert not hub.repos
    run("push", folder, REPO)
    code, output, _ = run("push", folder, REPO, "--dry-run", "--json")
    assert set(states(output).values()) == {"same"}


def test_a_private_repository_is_made_and_cannot_be_seen_without_a_token(
    run, hub, folder, tmp_path, monkeypatch
):
    run("push", folder, REPO, "--private")
    assert hub.repos[REPO].private
    monkeypatch.setenv("HF_TOKEN", "")
    assert "no such repository, or it is private" in refused(run, "pull", REPO, tmp_path / "back")


def test_a_branch_is_made_and_read_by_its_name(run, hub, folder, tmp_path):
    run("push", folder, REPO)
    (folder / "README.md").write_text("on a branch")
    code, _, error = run("push", folder, REPO, "--revision", "half")
    assert code == 0, error
    run("pull", f"{REPO}@half", tmp_path / "half")
    run("pull", REPO, tmp_path / "main", "--revision", "main")
    texts = [(tmp_path / name / "README.md").read_text() for name in ("half", "main")]
    assert texts[0] == "on a branch" != texts[1]


def test_a_pull_request_leaves_the_main_branch_alone(run, hub, folder):
    run("push", folder, REPO)
    (folder / "README.md").write_text("better")
    code, output, error = run("push", folder, REPO, "--create-pr")
    assert code == 0, error
    assert "/discussions/" in output
    files = hub.repos[REPO].commits[hub.repos[REPO].names["main"]]
    assert files["README.md"] != b"better"


def test_a_hub_id_works_wherever_a_folder_does(run, hub, folder, tmp_path):
    run("push", folder, REPO)
    files = hub.repos[REPO]
    files.names["v1"] = files.names["main"]
    files.commit({"README.md": b"only"}, "main", "spoilt")
    assert "config.json" in refused(run, "inspect", REPO)
    code, output, error = run("inspect", f"{REPO}@v1", "--json")
    assert code == 0, error
    assert json.loads(output)["family"] == "llama"
    words = ["--prompt", "a b", "--max-new-tokens", "3", "--no-compile", "--json"]
    code, output, error = run("generate", f"{REPO}@v1", *words)
    assert code == 0, error
    assert "expected only one revision" in refused(run, "inspect", f"{REPO}@v1", "--revision", "v2")


TROUBLES = {
    "unknown token": ("POST /api/repos/create", 401, "hf auth login"),
    "token that reads": ("POST /api/repos/create", 403, "your token lacks permission"),
    "another's commit": ("POST .*/commit/", 412, "at the same time"),
    "commit refused": ("POST .*/commit/", 500, "unavailable or busy (status 500)"),
    "upload refused": ("PUT /large/", 403, "your token lacks permission"),
}


@pytest.mark.parametrize(("what", "status", "said"), TROUBLES.values(), ids=TROUBLES)
def test_a_push_that_is_refused_says_why_and_commits_nothing(run, hub, folder, what, status, said):
    hub.trouble(what, status, times=99)
    error = refused(run, "push", folder, REPO)
    assert said in error
    assert not hub.repos.get(REPO) or hub.repos[REPO].log == ["initial"]
    if "create" not in what:
        assert "model.safetensors" in error
        assert "same command goes on" in error


def test_a_token_that_may_only_read_is_refused(run, hub, folder, monkeypatch):
    hub.readers.add("hf_reader")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    error = refused(run, "push", folder, REPO)
    assert "your token lacks permission" in error
    assert "hf_reader" not in error


@pytest.mark.parametrize("status", [0, 503])
def test_an_upload_survives_temporary_errors(run, hub, folder, status):
    hub.trouble("PUT /large/", status, times=2)
    code, _, error = run("push", folder, REPO)
    assert code == 0, error
    assert len(hub.repos[REPO].log) == 2


def test_an_interrupted_upload_resumes(run, hub, folder):
    hub.trouble("POST .*/commit/", 503, times=99)
    refused(run, "push", folder, REPO)
    hub.troubles.clear()
    hub.requests.clear()
    code, _, error = run("push", folder, REPO)
    assert code == 0, error
    assert not [r for r in hub.requests if r.startswith("PUT /large/")]  # the Hub has them already


def test_a_download_that_is_cut_leaves_no_partial_folder_and_resumes(run, hub, folder, tmp_path):
    run("push", folder, REPO)
    hub.trouble("GET .*/model.safetensors", times=99, after=1000)
    error = refused(run, "pull", REPO, tmp_path / "back")
    assert "has not come whole" in error
    assert not (tmp_path / "back").exists()
    hub.troubles.clear()
    hub.requests.clear()
    code, _, error = run("pull", REPO, tmp_path / "back")
    assert code == 0, error
    assert contents(tmp_path / "back") == contents(folder)
    assert not [r for r in hub.requests if r.startswith("GET") and r.endswith("README.md")]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_missing_repositories_and_revisions_are_reported_in_a_sentence(run, hub, folder, tmp_path):
    assert "no such repository" in refused(run, "pull", REPO, tmp_path / "back")
    run("push", folder, REPO)
    error = refused(run, "pull", f"{REPO}@v9", tmp_path / "back")
    assert "no such revision" in error
    assert "exists: choose another" in refused(run, "pull", REPO, folder)
    code, _, error = run("pull", REPO, folder, "--force")
    assert code == 0, error


def test_a_link_within_the_folder_is_published_and_a_hidden_one_is_not(run, hub, folder, tmp_path):
    (folder / ".hidden").symlink_to(tmp_path / "nowhere")
    (folder / "LICENSE.md").symlink_to("README.md")
    assert states(run("push", folder, REPO, "--dry-run", "--json")[1])["LICENSE.md"] == "new"


def test_an_incomplete_checkpoint_is_not_pushed(run, hub, folder):
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refused(run, "push", folder, REPO)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(run, "push", folder, REPO)
    assert not hub.repos


@pytest.mark.parametrize("name", ["small", "a/b/c", "a/b@", "a b/c", "/a/b"])
def test_an_invalid_hub_id_is_refused(name):
    with pytest.raises(ValueError, match="is not a Hub id: expected org/name"):
        parse_hub_id(name)


def test_files_that_go_with_the_weights_are_all_that_is_removed():
    assert set(STALE) == {"*.safetensors", "*.safetensors.index.json", "*.py"}


@pytest.mark.slow
def test_a_stranger_loads_a_revision_without_eigenzoo(run, hub, folder, tmp_path):
    run("push", folder, REPO)
    repo = hub.repos[REPO]
    repo.names["v1"] = repo.names["main"]
    repo.commit({"README.md": b"only"}, "main", "spoilt")
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"repo, how = '{REPO}', dict(revision='v1', trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(repo, **how)\n"
        "model = AutoModelForCausalLM.from_pretrained(repo, **how)\n"
        "text = tokenizer('a b', return_tensors='pt')\n"
        "print(model.generate(**text, max_new_tokens=3).shape[1])\n"
    )
    words = len(tiny.tokenizer()("a b")["input_ids"])
    assert int(stranger(hub, code, tmp_path / "home")) == words + 3


@pytest.mark.slow
def test_what_transformers_pushes_itself_brings_its_code_to_the_next_stranger(
    hub, folder, tmp_path
):
    load = (
        "import torch; from transformers import AutoModelForCausalLM as Auto\n"
        "ids = torch.arange(2, 22)[None]\n"
        "model = Auto.from_pretrained({0!r}, trust_remote_code=True)\n"
        "print(model(ids).logits.sum(-1).tolist())\n"
    )
    push = load.format(str(folder)) + f"model.push_to_hub('{REPO}')\n"
    want = stranger(hub, push, tmp_path / "one")
    pushed = hub.repos[REPO].commits[hub.repos[REPO].names["main"]]
    code = {p.name: p.read_bytes() for p in folder.glob("*.py")}
    assert {name: pushed.get(name) for name in code} == code
    assert stranger(hub, load.format(REPO), tmp_path / "two") == want


def stranger(hub, code: str, home) -> str:
    """The output of a process without eigenzoo and with its own Hub cache."""
    place = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    code = "import sys; sys.modules['eigenzoo'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
