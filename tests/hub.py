"""The Hugging Face Hub in small: its API over HTTP, served from directories, and able to fail in every way on demand.

Set HF_ENDPOINT to `Hub.url` where a client runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
CHUNK = 64 * 1024


@dataclass
class Repository:
    """A repository: its files and how it behaves.

    Attributes:
        folder: Its files.
        gated: Whether only `tokens` may read it.
        private: Whether others are told that there is none.
        tokens: Who may read it where not everybody may.
        refs: Branches and tags beside "main", and the commits they name.
    """

    folder: Path
    gated: bool = False
    private: bool = False
    tokens: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """Changes with the files."""
        names = "".join(f"{path}{(self.folder / path).stat().st_size}" for path in self.files)
        return hashlib.sha1(names.encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def resolve(self, revision: str) -> str | None:
        known = {"main": self.commit, self.commit: self.commit} | self.refs
        return known.get(revision)


class Hub:
    """Use it with `with`. What it does is set by its attributes, at any time.

    Attributes:
        repositories: By "owner/name".
        requests: Every request so far, as "GET /path".
        authorizations: The Authorization headers of all requests.
        sent_bytes: Bytes of files that were sent, or begun to be.
        failing: A status that every request is answered with, such as 500; None for none.
        hang_after: Bytes of a large file after which the connection stalls until `released`; None for never.
        cut_after: Bytes of a large file after which the connection is closed, the next time only; None for never.
        released: Lets what hangs go on.
        hanging: Set once something hangs.
    """

    def __init__(self, **repositories: Path) -> None:
        self.repositories = {name: Repository(folder) for name, folder in repositories.items()}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.sent_bytes = 0
        self.authorizations: list[str] = []
        self.failing: int | None = None
        self.hang_after: int | None = None
        self.cut_after: int | None = None
        self._is_closed = False
        self.released, self.hanging = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, folder: Path, **behaviour: Any) -> Repository:
        repository = self.repositories[repo_id] = Repository(folder, **behaviour)
        return repository

    def downloads(self, suffix: str = "") -> list[str]:
        """Bodies of files that were asked for."""
        return [line for line in self.requests if line.startswith("GET ") and "/resolve/" in line and suffix in line]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self._is_closed:
            # On a connection that was kept.
            handler.close_connection = True
            return
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {path}")
        token = handler.headers.get("Authorization", "")
        self.authorizations.append(token)
        if self.failing is not None:
            _json(handler, self.failing, {"error": "it was told to fail"})
            return
        match = API.fullmatch(path) or RESOLVE.fullmatch(path)
        repository = self.repositories.get(match["repo"]) if match else None
        if match is None or repository is None:
            _json(
                handler, 401 if not token else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return
        may_read = token.removeprefix("Bearer ") in repository.tokens
        if repository.private and not may_read:
            _json(handler, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        is_file = "/resolve/" in path
        if repository.gated and not may_read and is_file:
            _json(handler, 403 if token else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        commit = repository.resolve(match["revision"] or "main")
        if commit is None:
            _json(handler, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif is_file:
            self._send_file(handler, repository, commit, match["path"])
        elif match["what"] == "tree":
            _json(handler, 200, [_entry(repository, file) for file in repository.files])
        else:
            siblings = [{"rfilename": file, **_entry(repository, file)} for file in repository.files]
            info = {"id": match["repo"], "modelId": match["repo"], "sha": commit, "siblings": siblings}
            _json(handler, 200, {**info, "private": repository.private, "gated": repository.gated, "tags": []})

    def _send_file(self, handler: BaseHTTPRequestHandler, repository: Repository, commit: str, path: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if path not in repository.files:
            _json(handler, 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = (repository.folder / path).read_bytes()
        headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        start, end, status = 0, len(data), 200
        if (wanted := handler.headers.get("Range")) is not None and handler.command == "GET":
            self.ranges.append(wanted)
            first, *last = map(int, re.findall(r"\d+", wanted))
            start, end, status = first, min([len(data), *(position + 1 for position in last)]), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        if handler.command == "GET":
            self.sent_bytes += end - start
            self._send_body(handler, data[start:end])

    def _send_body(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        for position in range(0, len(data), CHUNK):
            if self.cut_after is not None and position >= self.cut_after:
                self.cut_after = None
                handler.close_connection = True
                return
            if self.hang_after is not None and position >= self.hang_after:
                handler.wfile.flush()
                self.hanging.set()
                self.released.wait(60)
            try:
                handler.wfile.write(data[position : position + CHUNK])
            except OSError:
                # The client left.
                handler.close_connection = True
                return


def _entry(repository: Repository, file: str) -> dict[str, Any]:
    data = (repository.folder / file).read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if file.endswith((".safetensors", ".bin")):
        digest = hashlib.sha256(data).hexdigest()
        # The tree calls it oid, the model's siblings sha256.
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
    return entry


def _json(handler: BaseHTTPRequestHandler, status: int, content: object, headers: dict[str, str] | None = None) -> None:
    body = json.dumps(content).encode()
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
