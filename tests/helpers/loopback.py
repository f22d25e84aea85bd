"""A server with the part of the Hub's HTTP API that publishing and loading use.

Repositories are in memory: commits are dictionaries of files, and branches and tags name commits.
`Hub.trouble` makes requests fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 34
LARGE = (".safetensors", ".png", "tokenizer.json")  # uploaded separately from commits
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by id, and the commit ids that branches and tags name."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # commit messages

    def commit(self, files: Files, branch: str, message: str) -> str:
        """Add a commit to a branch and return its id."""
        oid = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[oid], self.names[branch] = dict(files), oid
        self.log.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        """The commit id for a branch, a tag or a commit id; None if there is none."""
        oid = self.names.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Trouble:
    """Let requests whose method and path match `what` fail, `times` times."""

    what: str
    status: int = 0  # HTTP status of the response; 0: the connection is cut
    times: int = 1
    after: int = 0  # bytes of the response that are sent before the cut

    def due(self, request: str) -> bool:
        """Whether this request fails; counts it if so."""
        if not self.times or not re.search(self.what, request):
            return False
        self.times -= 1
        return True


@dataclass
class Hub:
    """The state of the server."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: Files = field(default_factory=dict)  # by SHA-256
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    readers: set[str] = field(default_factory=set)  # tokens that may not write
    url: str = ""

    def trouble(self, what: str, status: int = 0, times: int = 1, after: int = 0) -> None:
        """Let requests fail: see `Trouble`."""
        self.troubles.append(Trouble(what, status, times, after))


class RefusedError(Exception):
    """An error response: its HTTP status, and the Hub's error code."""


class Handler(BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    cut: int | None = None

    def log_message(self, *_: object) -> None:
        """Do not log requests."""

    def do_GET(self) -> None:
        """Respond to a request of any method."""
        self.cut = None
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.hub.requests.append(request)
        due = [t for t in self.hub.troubles if t.due(request)]
        if due and not due[0].status and not due[0].after:
            self.connection.close()  # before the body is read
            self.close_connection = True
            return
        body = self._body()
        try:
            if due and due[0].status:
                raise RefusedError(due[0].status, "")
            if due:
                self.cut = due[0].after
            self._route(path, parse_qs(urlsplit(self.path).query), body)
        except RefusedError as failed:
            status, code = failed.args
            self._answer({"error": code or "trouble"}, status, {"X-Error-Code": code})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, what: Any = b"", status: int = 200, headers: Any = None) -> None:
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if self.cut is None else data[: self.cut])
            if self.cut is not None:
                self.close_connection = True

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = token == TOKEN or token in self.hub.readers
        writes = re.search(r"/repos/create$|/(commit|branch|tag|preupload)/|/objects/batch$", path)
        if token and not known:
            raise RefusedError(401, "")
        if (writes and not token) or (path == "/api/whoami-v2" and not token):
            raise RefusedError(401, "")
        if writes and token in self.hub.readers:
            raise RefusedError(403, "")
        if path == "/api/whoami-v2":
            return self._answer({"name": "tester", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/large/(\w+)", path):
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != match[1]:
                    raise RefusedError(400, "")
                self.hub.large[match[1]] = body
            return self._answer()
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body)["objects"])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(self._repo(match[1], known), unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?", path):
            repo = self._repo(match[1], known)
            return self._model(repo, match[1], match[2] or "revision", match[3], query, body)
        raise RefusedError(404, f"no such route: {self.command} {path}")

    def _repo(self, name: str, known: bool) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise RefusedError(404, "RepoNotFound")
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return self._answer(answer | {"error": "it exists"}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors lfs\n"}, "main", "initial")
        return self._answer(answer)

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        for x in objects:
            if x["oid"] not in self.hub.large:
                x["actions"] = {"upload": {"href": f"{self.hub.url}/large/{x['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _model(self, repo: Repo, name: str, verb: str, rest: Any, query: Any, body: bytes) -> None:
        first, _, below = (rest or "main").partition("/")
        revision = unquote(first)
        if verb == "branch":
            repo.names.setdefault(revision, repo.names["main"])
            return self._answer({})
        oid = repo.find(revision)
        if oid is None:
            raise RefusedError(404, "RevisionNotFound")
        files = repo.commits[oid]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._answer({"id": name, "sha": oid, "tags": [], "siblings": siblings})
        if verb == "tree":
            entries = [entry(path, files[path]) for path in sorted(files) if path.startswith(below)]
            if not entries:
                raise RefusedError(404, "EntryNotFound")
            return self._answer(entries)
        if verb == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())
            paths = asked if isinstance(asked, list) else asked["paths"]
            return self._answer([entry(path, files[path]) for path in paths if path in files])
        if verb == "tag":
            repo.names[json.loads(body)["tag"]] = oid
            return self._answer({})
        if verb == "preupload":
            return self._answer(
                {"files": [self._mode(x, files) for x in json.loads(body)["files"]]}
            )
        if verb == "commit":
            return self._commit(repo, name, revision, files, "create_pr" in query, body)
        raise RefusedError(404, f"no such route: {verb}")

    def _mode(self, asked: dict[str, Any], files: Files) -> dict[str, Any]:
        path = asked["path"]
        mode = "lfs" if path.endswith(LARGE) else "regular"
        held = entry(path, files[path]) if path in files else None
        oid = held and (held["lfs"]["oid"] if "lfs" in held else held["oid"])
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _commit(
        self, repo: Repo, name: str, branch: str, files: Files, pull: bool, body: bytes
    ) -> None:
        new, message = dict(files), ""
        for line in body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                new[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del new[value["path"]]
        oid = repo.commit(new, f"refs/pr/{len(repo.log)}" if pull else branch, message)
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{name}/commit/{oid}",
        }
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repo.log) - 1}"
        self._answer(answer)

    def _file(self, repo: Repo, revision: str, path: str) -> None:
        oid = repo.find(revision)
        if oid is None:
            raise RefusedError(404, "RevisionNotFound")
        if path not in repo.commits[oid]:
            raise RefusedError(404, "EntryNotFound")
        data, held = repo.commits[oid][path], entry(path, repo.commits[oid][path])
        tag = held["lfs"]["oid"] if "lfs" in held else held["oid"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or self.command == "HEAD":
            return self._answer(data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._answer(data[first : last + 1], 206, headers)


def entry(path: str, data: bytes) -> dict[str, Any]:
    """The Hub's description of a file."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    facts: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git}
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        facts["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return facts


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub, until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
