"""A stand-in for the Hugging Face Hub: the endpoints that huggingface_hub calls to push and to
download models, over HTTP, in memory.

    with HubStandIn() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("me/name")

Written after the requests that huggingface_hub sends. Metadata is validated by the rules that the
Hub documents for model cards, in `metadata_errors`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "A" * 34
READ_TOKEN = "hf_" + "B" * 34
USER = "me"
LICENSES = {"apache-2.0", "mit", "llama2", "llama3", "cc-by-4.0", "gemma", "other", "unknown"}
RELATIONS = {"finetune", "adapter", "quantized", "merge"}
ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LFS_FROM = 1 << 16
"""Bytes from which a file that is no text is stored as a large file."""


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    message: str = ""


@dataclass
class Repo:
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> Commit:
        history = self.branches.setdefault(branch, [])
        seed = f"{self.name} {branch} {len(history)} {sorted(files)}"
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), files, message)
        history.append(made)
        return made

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in every if commit.oid == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1].files


class HubStandIn:
    """The server; `url` is its endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        """Large files by their sha256; those of an interrupted push stay."""
        self.uploads: list[str] = []
        """The sha256 of every large file that was sent, in order."""
        self.requests: list[str] = []
        """Method and path of every request."""
        self.refuse: dict[str, int] = {}
        """Part of a request's method and path to the status that it gets."""
        self.datasets: set[str] = set()
        self.ignored: set[str] = set()
        """Files that a .gitignore keeps out."""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(name, private)
        repo.commit("main", {".gitattributes": b"", **files}, "initial commit")
        return repo

    def __enter__(self) -> HubStandIn:
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def metadata_errors(content: str) -> list[str]:
    """Return what is wrong with a model card's metadata, by the Hub's documented rules."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata is no mapping"]
    wrong = []
    if "license" in data and data["license"] not in LICENSES:
        wrong.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str) or not ID.fullmatch(name):
                wrong.append(f'"{key}" with value "{name}" is not valid')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        wrong.append('"base_model_relation" is not valid')
    if "base_model_relation" in data and "base_model" not in data:
        wrong.append('"base_model_relation" without "base_model"')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append('"tags" must be an array of strings')
    for key in ("pipeline_tag", "library_name"):
        if not isinstance(data.get(key, ""), str):
            wrong.append(f'"{key}" must be a string')
    return wrong + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    wrong = []
    for model in index:
        if not model.get("name"):
            wrong.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for part, keys in (("task", ["type"]), ("dataset", ["type", "name"])):
                wrong += [
                    f'"model-index[0].results[0].{part}.{key}" must be a string'
                    for key in keys
                    if not isinstance(result.get(part, {}).get(key), str)
                ]
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    wrong.append('"model-index[0].results[0].metrics" need type and value')
    return wrong


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        self.parts = urlsplit(self.path)
        self.query = parse_qs(self.parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.parts.path}"
        self.hub.requests.append(line)
        for part, status in self.hub.refuse.items():
            if part in line:
                return self.error(status, "refused for the test")
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, line):
                return getattr(self, name)(*map(unquote, match.groups()))
        return self.error(404, f"no such endpoint: {line}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self, name: str) -> bool:
        if self.token != TOKEN or name.partition("/")[0] != USER:
            self.error(403, "You don't have the rights to write to this repository")
            return False
        return True

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READ_TOKEN)):
            self.error(401, "Repository not found", "RepoNotFound")
            return None
        return found

    def commit_at(self, name: str, revision: str) -> tuple[Repo, Commit] | None:
        if (repo := self.repo(name)) is None:
            return None
        if (commit := repo.at(revision)) is None:
            self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repo, commit

    def whoami(self) -> None:
        if self.token not in (TOKEN, READ_TOKEN):
            return self.error(401, "Invalid user token.")
        return self.json({"type": "user", "name": USER, "orgs": [], "auth": {}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self.may_write(name):
            return None
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.add(name, {}, private=wanted.get("visibility") == "private")
        self.json({"url": url, "name": name})
        return None

    def validate(self) -> None:
        wrong = metadata_errors(json.loads(self.body)["content"])
        if self.headers.get("Accept") == "text/plain":
            text = "\n".join(f"- {message}" for message in wrong)
            self.send(400 if wrong else 200, text.encode())
            return
        errors = [{"message": message} for message in wrong]
        self.json({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def info(self, name: str, revision: str = "main") -> None:
        if (found := self.commit_at(name, revision)) is None:
            return
        repo, commit = found
        rows: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            rows = [{**row, "size": len(commit.files[row["rfilename"]])} for row in rows]
        values = {"id": name, "modelId": name, "private": repo.private, "sha": commit.oid}
        self.json({**values, "siblings": rows, "tags": [], "downloads": 0, "likes": 0})

    def dataset(self, name: str) -> None:
        if name not in self.hub.datasets:
            self.error(401, "Repository not found", "RepoNotFound")
            return
        self.json({"id": name, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})

    def tree(self, name: str, revision: str) -> None:
        if (found := self.commit_at(name, revision)) is None:
            return
        self.json([_entry(path, data) for path, data in found[1].files.items()])

    def preupload(self, name: str, revision: str) -> None:
        if not self.may_write(name) or (found := self.commit_at(name, revision)) is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            text = b"\0" not in base64.b64decode(file["sample"])
            large = file["size"] >= LFS_FROM or not text
            there = found[1].files.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            answer |= {"shouldIgnore": file["path"] in self.hub.ignored}
            answers.append(answer | ({} if there is None else {"oid": _oid(there, large=large)}))
        self.json({"files": answers, "commitOid": found[1].oid})

    def batch(self, name: str) -> None:
        if not self.may_write(name):
            return
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/store/{wanted['oid']}"}}
            objects.append(row)
        self.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "the data is not what its name says")
        self.hub.large[oid] = self.body
        self.hub.uploads.append(oid)
        return self.send(200, b"")

    def branch(self, name: str, branch: str) -> None:
        if not self.may_write(name) or (repo := self.repo(name)) is None:
            return None
        if branch in repo.branches:
            return self.error(409, "Reference already exists")
        repo.commit(branch, dict(repo.files))
        self.json({})
        return None

    def commit(self, name: str, revision: str) -> None:
        if not self.may_write(name) or (found := self.commit_at(name, revision)) is None:
            return None
        repo, before = found
        files, message = dict(before.files), ""
        for item in map(json.loads, self.body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", before.oid) != before.oid:
                    return self.error(
                        412, "A commit has happened since. Please refresh and try again."
                    )
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.error(400, f"LFS object {value['oid']} is missing")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        made = repo.commit(revision, files, message)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid})
        return None

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self.commit_at(name, revision)) is None:
            return None
        if (data := found[1].files.get(path)) is None:
            return self.error(404, "Entry not found", "EntryNotFound")
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        headers = {"X-Repo-Commit": found[1].oid, "ETag": f'"{_entry(path, data)["oid"]}"'}
        if lfs := _entry(path, data).get("lfs"):
            headers |= {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(len(data))}
        self.send(206 if start else 200, data[start:], headers)
        return None


def _oid(data: bytes, *, large: bool) -> str:
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    row["oid"] = _oid(data, large=False)
    if len(data) >= LFS_FROM or b"\0" in data[:512]:
        row["lfs"] = {"oid": _oid(data, large=True), "size": len(data), "pointerSize": 130}
    return row


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{NAME}", "info"),
    (r"GET /api/datasets/(.+)", "dataset"),
    (rf"GET /api/models/{NAME}/revision/(.+)", "info"),
    (rf"GET /api/models/{NAME}/tree/([^/]+)/?", "tree"),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", "preupload"),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", "commit"),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", "branch"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /store/(\w+)", "store"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
"""Method and path of a request to the method above that answers it."""
