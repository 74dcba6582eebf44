"""A Hugging Face hub on 127.0.0.1: repositories out of local folders, and a log of what was asked for.

It answers what huggingface_hub and datasets ask when they read: information on a repository, its tree, information on
paths, and files; and what huggingface_hub asks when it uploads, with large files by LFS. As on the hub, writing needs a
token, a repository that does not exist answers 401 and the rest of what is missing 404, with
the header that tells what it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
_LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    method: str
    path: str
    status: int


class LoopbackHub:
    """Serves from `with` to its end, or to `stop()`; the port stays the same one."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[str, dict[str, tuple[str, Path]]] = {}
        """By `models/owner/name` or `datasets/owner/name`, then by branch and by commit: the commit and its folder."""
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}  # whether an uploaded repository was made a private one
        """By owner/name: the files of repositories that were made here."""
        self.stored: dict[str, bytes] = {}
        """What LFS was given, by sha256."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = False  # they are joined in server_close
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(self, name: str, folder: Path, *, branch: str = "main", kind: str = "models") -> str:
        """Serve a folder as a branch of a repository; gives its commit."""
        digest = hashlib.sha1(f"{kind}/{name}/{branch}".encode())
        for file in files_of(folder):
            digest.update(f"{file} {_oid(folder / file)}".encode())
        commit = digest.hexdigest()
        revisions = self.repositories.setdefault(f"{kind}/{name}", {})
        revisions[branch] = revisions[commit] = (commit, folder)
        return commit

    def downloaded(self) -> list[str]:
        """The files that were fetched, sorted, in all repositories; a file fetched twice is there twice."""
        got = [
            _FILE.fullmatch(request.path)
            for request in self.requests
            if (request.method, request.status) == ("GET", 200)
        ]
        return sorted(unquote(match[4]) for match in got if match)


def files_of(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    timeout = 20  # a connection without a request must not keep the hub from ending

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._hub.stored[hashlib.sha256(body).hexdigest()] = body
        self._send(200, b"")

    @property
    def _hub(self) -> LoopbackHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        form = parse_qs(body)
        url = urlsplit(self.path)
        if self.command == "POST" and self._wrote(url.path, body):
            return None
        if match := _API.fullmatch(url.path):
            kind, name, what, revision, below = match.groups()
        elif match := _FILE.fullmatch(url.path):
            kind, what = "datasets" if match[1] else "models", "file"
            name, revision, below = match.groups()[1:]
        else:
            return self._send(404, b"")
        uploaded = self._hub.uploads.get(name) if kind == "models" else None
        if uploaded is not None and what == "tree":
            return self._send_json(
                [{"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                 for path, data in uploaded.items()]
            )  # fmt: skip
        if uploaded is not None and what in (None, "revision"):
            siblings = [{"rfilename": path} for path in uploaded]
            return self._send_json({"id": name, "private": self._hub.private[name], "siblings": siblings})
        revisions = self._hub.repositories.get(f"{kind}/{name}")
        if revisions is None:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        found = revisions.get(unquote(revision or "main"))
        if found is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = found
        below = unquote(below or "")
        if what == "file":
            return self._send_file(folder, below, commit)
        if what == "paths-info":
            entries = _entries(folder)
            return self._send_json([entries[path] for path in form["paths"] if path in entries])
        if what == "tree":
            return self._send_tree(
                folder, below, recursive=parse_qs(url.query).get("recursive") in (["True"], ["true"])
            )
        siblings = [{"rfilename": file} for file in files_of(folder)]
        return self._send_json({"id": name, "sha": commit, "siblings": siblings})

    def _wrote(self, path: str, body: str) -> bool:
        """Answer a request that writes."""
        write, lfs = _WRITE.fullmatch(path), _LFS.fullmatch(path)
        if path == "/api/validate-yaml":
            problem = card_problem(json.loads(body)["content"])
            if problem:
                self._send(400, problem.encode())
            else:
                self._send_json({"errors": [], "warnings": []})
        elif not (write or lfs or path == "/api/repos/create"):
            return False
        elif not self.headers.get("Authorization"):
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self._hub.uploads.setdefault(name, {})
            self._hub.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            self._send_json({"url": f"{self._hub.url}/{name}", "id": name})
        elif lfs:
            objects = [
                entry | {"actions": {"upload": {"href": f"{self._hub.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._send_json({"transfer": "basic", "objects": objects})
        elif write and write[2] == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._send_json({"files": files})
        elif write:
            files_now = self._hub.uploads[write[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files_now[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files_now[value["path"]] = self._hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files_now[value["path"]]
            commit = hashlib.sha1(body.encode()).hexdigest()
            self._send_json({"commitUrl": f"{self._hub.url}/{write[1]}/commit/{commit}", "commitOid": commit,
                             "pullRequestUrl": None, "success": True})  # fmt: skip
        return True

    def _send_file(self, folder: Path, file: str, commit: str) -> None:
        if file not in files_of(folder):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(folder / file)}"'}
        return self._send(200, (folder / file).read_bytes(), headers)

    def _send_tree(self, folder: Path, below: str, *, recursive: bool) -> None:
        if below and not (folder / below).is_dir():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        parent = Path(below)
        shown = {
            path: entry
            for path, entry in _entries(folder).items()
            if Path(path).parent == parent or (recursive and parent in Path(path).parents)
        }
        return self._send_json(list(shown.values()))

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._hub.requests.append(Request(self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def card_problem(card: str) -> str | None:
    """What the hub would refuse in the metadata block of a model card; None if nothing."""
    import yaml

    if not card.startswith("---\n"):
        return "no metadata block"
    block = yaml.safe_load(card.split("---\n")[1])
    if not isinstance(block, dict):
        return "the metadata block is no mapping"
    for key in ("license", "library_name", "pipeline_tag"):
        if not isinstance(block.get(key, ""), str):
            return f"{key} must be a string"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(block.get("base_model", "x"))):
        return "base_model must be a model id"
    if not all(isinstance(tag, str) for tag in block.get("tags", [])):
        return "tags must be strings"
    for entry in block.get("model-index", []):
        if not entry.get("name"):
            return "model-index.name is required"
        for result in entry["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                return "model-index.results need a task and a dataset"
            if not all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"]):
                return "model-index.results.metrics need a type and a value"
    return None


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the hub tells of every file and folder, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            entries[name] = {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        else:
            entries[name] = {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}
    return entries
