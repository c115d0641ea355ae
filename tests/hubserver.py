"""A model and data set hub of one's own, small enough to read: what `huggingface_hub` and `datasets` ask of one.

    with serve({"datasets/me/rows": {"main": {"data.jsonl": b"…"}}}) as hub:
        env = {"HF_ENDPOINT": hub.url}

A repository is `{revision: {path: bytes}}`; a revision's commit is the digest of its files. Repositories in `gated`
need a token, as writing does: without one they answer as the real hub does, 401 and `GatedRepo`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


@dataclass
class Hub:
    """`requests` are what was asked: (method, path)."""

    repositories: MutableMapping[str, Mapping[str, Files]]
    gated: frozenset[str] = frozenset()
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def files(self, repository: str, revision: str) -> Files | None:
        revisions = self.repositories[repository]
        by_commit = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision, by_commit.get(revision))


def commit_of(files: Files) -> str:
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


@contextmanager
def serve(repositories: MutableMapping[str, Mapping[str, Files]], gated: frozenset[str] = frozenset()) -> Iterator[Hub]:
    """`repositories`: "datasets/me/rows" or, a model, "me/model"."""
    hub = Hub(repositories, gated)

    class Bound(Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if path in ("api/repos/create", "api/validate-yaml"):
            return self._create(json.loads(body)) if path == "api/repos/create" else self._send_json({"errors": []})
        is_api, path = path.startswith("api/"), path.removeprefix("api/").removeprefix("models/")
        repository = next((name for name in self.hub.repositories if f"{path}/".startswith(f"{name}/")), None)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository in self.hub.gated and not self._is_known():
            return self._refuse(401, "GatedRepo")
        verb, _, rest = path.removeprefix(repository).strip("/").partition("/")
        revision, _, rest = rest.partition("/")
        files = self.hub.files(repository, revision or "main")
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if not is_api:
            return self._send_file(files, rest) if rest in files else self._refuse(404, "EntryNotFound")
        if verb in ("preupload", "commit"):
            return (
                self._write(repository, revision, verb, body) if self._is_known() else self._refuse(401, "Unauthorized")
            )
        if verb in ("tree", "paths-info"):
            wanted = json.loads(body)["paths"] if "json" in self.headers.get("Content-Type", "") else None
            wanted = wanted or parse_qs(body.decode()).get("paths")
            return self._send_json(list(self._entries(files, rest, wanted)))
        owner = repository.removeprefix("datasets/")
        return self._send_json(
            {
                "id": owner, "sha": commit_of(files), "private": False, "gated": repository in self.hub.gated,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": name} for name in files],
            }
        )  # fmt: skip

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, asked: Mapping[str, str]) -> None:
        if not self._is_known():
            return self._refuse(401, "Unauthorized")
        name = f"{asked['organization']}/{asked['name']}"
        self.hub.repositories.setdefault(name, {"main": {}})
        return self._send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def _write(self, repository: str, revision: str, verb: str, body: bytes) -> None:
        if verb == "preupload":
            answer = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._send_json({"files": answer})
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        files = {name: base64.b64decode(content) for name, content in sent.items()}
        self.hub.repositories[repository] = {revision: {**self.hub.repositories[repository][revision], **files}}
        oid = commit_of(files)
        return self._send_json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository}/commit/{oid}"}
        )

    def _entries(self, files: Files, folder: str, wanted: list[str] | None) -> Iterator[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        folders = {name.rpartition("/")[0] for name in files if "/" in name}
        for name in sorted(folders):
            if name in wanted if wanted is not None else name.startswith(prefix):
                yield {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        for name, content in sorted(files.items()):
            if name in wanted if wanted is not None else name.startswith(prefix):
                yield {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, files: Files, name: str) -> None:
        self._send(
            200, files[name], {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
        )

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        start, end = 0, len(content)
        if status == 200 and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(end, int(last or end) + 1), 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:end])
