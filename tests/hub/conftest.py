"""A hub on the loopback: it speaks what `huggingface_hub` asks for a push and a download, and fails when told to."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_loopbackwrites"
READER = "hf_loopbackreads"
PART = 40_000


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{branch}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        named = self.branches.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens instead of the next `count` answers to requests whose `METHOD path` fits the pattern `where`.

    Kinds: `drop` closes the connection (half of the body read), `hang` answers nothing for a while, `lost` does as
    asked and drops the answer, a number is a status.
    """

    where: str
    kind: str | int
    count: int = 1


class LoopbackHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: dict[str, int] = {}
        self.patience = 1.5

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repository]
        return found.commits[found.find(revision)]

    def handle_error(self, *_: object) -> None:  # a client that hangs up is what the tests do
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        if self.silent:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(data))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, words: str, code: str = "") -> None:
        self.answer(status, {"error": words}, X_Error_Message=words, **({"X_Error_Code": code} if code else {}))

    def handle_request(self) -> None:
        self.silent = False
        split = urlsplit(self.path)
        path, query = split.path, parse_qs(split.query)
        line = f"{self.command} {path}"
        self.server.requests.append(line)
        size = int(self.headers.get("Content-Length") or 0)
        fault = next((one for one in self.server.faults if one.count and re.search(one.where, line)), None)
        if fault is not None:
            fault.count -= 1
            if fault.kind == "drop":
                self.rfile.read(size // 2)
                self.close_connection = True
                return
            if fault.kind == "hang":
                time.sleep(self.server.patience)
                self.close_connection = True
                return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while length := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(size)
        if fault is not None and isinstance(fault.kind, int):
            self.answer(fault.kind, b"busy", Retry_After="0")
            return
        self.silent = fault is not None
        self.route(path, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub, parts = self.server, [unquote(part) for part in path.strip("/").split("/")]
        writing = self.command == "POST"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.command == "PUT":
            oid = parts[1]
            if len(parts) == 3:
                hub.parts[oid, int(parts[2])] = body
            else:
                self.store(oid, body)
            hub.received[oid] = hub.received.get(oid, 0) + len(body)
            self.answer(200, ETag=hashlib.md5(body).hexdigest())
        elif parts[0] == "complete":
            told = json.loads(body)
            pieces = [hub.parts[told["oid"], part["partNumber"]] for part in told["parts"]]
            self.store(told["oid"], b"".join(pieces))
            self.answer(200, {})
        elif writing and path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif token not in (TOKEN, READER) and (writing or self.hidden(parts)):
            self.refuse(401, "Invalid username or password.")
        elif token == READER and writing:
            self.refuse(403, "You don't have the rights to do that.")
        elif path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            if name in hub.repositories:
                self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            else:
                hub.repositories[name] = made = Repository(told.get("visibility") == "private")
                made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
                self.answer(200, {"url": f"{hub.url}/{name}"})
        elif parts[0] == "api":
            self.repository("/".join(parts[2:4]), parts[4:], query, body)
        elif parts[-1] == "batch":
            self.batch(json.loads(body))
        elif "resolve" in parts:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "Not found")

    def hidden(self, parts: list[str]) -> bool:
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        return name in self.server.repositories and self.server.repositories[name].private

    def store(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body

    def batch(self, told: dict) -> None:
        hub, objects = self.server, []
        for entry in told["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid in hub.objects:
                objects.append({"oid": oid, "size": size})
                continue
            if size > PART:
                urls = {str(n + 1): f"{hub.url}/lfs/{oid}/{n + 1}" for n in range(-(-size // PART))}
                upload = {"href": f"{hub.url}/complete/{oid}", "header": {"chunk_size": str(PART), **urls}}
            else:
                upload = {"href": f"{hub.url}/lfs/{oid}"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def repository(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server
        found = hub.repositories.get(name)
        if found is None:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return
        verb, revision, folder = (rest or ["revision"])[0], (rest[1:] or ["main"])[0], "/".join(rest[2:])
        pull = "create_pr" in query
        if verb == "refs":
            refs = {"branches": found.branches, "tags": found.tags}
            self.answer(200, {"converts": [], **{kind: [
                {"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": commit} for key, commit in named.items()
            ] for kind, named in refs.items()}})  # fmt: skip
            return
        if verb == "branch":
            if revision in found.branches:
                self.refuse(409, "Reference already exists")
            else:
                found.branches[revision] = found.branches["main"]
                self.answer(200, {})
            return
        commit = found.find(revision)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        elif verb == "revision":
            files = [{"rfilename": key} for key in sorted(found.commits[commit])]
            self.answer(200, {"id": name, "sha": commit, "private": found.private, "siblings": files})
        elif verb == "tree":
            files = {key: data for key, data in found.commits[commit].items() if key.startswith(folder)}
            if not files:
                self.refuse(404, f"{folder} does not exist", "EntryNotFound")
                return
            self.answer(200, [{"type": "file", "path": key, "size": len(files[key]), "oid": git_oid(files[key])}
                              for key in sorted(files)])  # fmt: skip
        elif verb == "preupload":
            files = found.commits[commit]
            modes = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(entry["path"], files[entry["path"]]) if entry["path"] in files else None,
                }
                for entry in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})
        elif verb == "commit":
            self.commit(found, name, commit, revision, body, pull)
        elif verb == "tag":
            tag = json.loads(body)["tag"]
            if tag in found.tags:
                self.refuse(409, "Tag reference exists already")
            else:
                found.tags[tag] = commit
                self.answer(200, {})
        else:
            self.refuse(404, "Not found")

    def commit(self, found: Repository, name: str, base: str, revision: str, body: bytes, pull: bool) -> None:
        files, message = dict(found.commits[base]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        told: dict[str, object] = {}
        if pull:
            found.pulls += 1
            revision = f"refs/pr/{found.pulls}"
            told["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{found.pulls}"
        made = found.commit(revision, files, message)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made, **told})

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.server.repositories.get(name)
        commit = found and found.find(revision)
        if found is None or commit is None:
            self.refuse(404, "Repository not found", "RepoNotFound" if found is None else "RevisionNotFound")
        elif file not in found.commits[commit]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            data = found.commits[commit][file]
            self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    """What the Hub says of a file that it has: sha256 of a large one, git's hash of another."""
    return hashlib.sha256(data).hexdigest() if path.endswith((".safetensors", ".png")) else git_oid(data)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, save_teacher: Any) -> Path:
    """A finished run on a tiny teacher, which lies beside it; one KV head stays exact."""
    from linearize.api import linearize

    folder = tmp_path_factory.mktemp("run")
    teacher = save_teacher(folder / "teacher", initializer_range=0.3)
    batches = [f"stages.{i}.{key}" for i in range(2) for key in ("batch=2", "micro_batch=1")]
    settings = ["data.length=64", "data.held_out=2", "data.loss=all", "exact_heads=[[1,1]]", *batches]
    return linearize(teacher, "liger", folder / "tiny", data="builtin", tokens=768, overrides=settings).output


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running hub, which this process may reach; waits between tries take no time."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from linearize import hub as pushing

    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setattr(pushing, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(pushing, "TIMEOUT", 0.5)
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
