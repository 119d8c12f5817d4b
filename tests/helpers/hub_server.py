"""A model hub on this machine: enough of its HTTP interface for huggingface_hub to upload to and to download from."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Files of each branch by repository, and the messages of the commits in order."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    unavailable: set[str] = field(default_factory=set)  # OWNER/NAME/FILE for which the hub fails
    commits: list[dict[str, Any]] = field(default_factory=list)

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository][branch]


def sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else b"".join(self.chunks())
        words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
        if words[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {"main": {}})
            return self.answer({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)
        if words[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        repository, kind, branch = "/".join(words[2:4]), words[4], words[5]
        branches = self.hub.repositories[repository]
        if kind == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return self.answer({})
        if kind == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer({"files": modes})
        header, *operations = (json.loads(line) for line in body.splitlines())
        assert kind == "commit" and all(each["key"] == "file" for each in operations)
        if pull := "create_pr=1" in self.path:
            branches.setdefault(branch := "refs/pr/1", dict(branches["main"]))
        for each in operations:
            branches[branch][each["value"]["path"]] = base64.b64decode(each["value"]["content"])
        names = sorted(each["value"]["path"] for each in operations)
        self.hub.commits.append({"repository": repository, "branch": branch, "files": names} | header["value"])
        oid = sha(branches[branch])
        discussion = f"{self.hub.url}/{repository}/discussions/1" if pull else None
        url = f"{self.hub.url}/{repository}/commit/{oid}"
        return self.answer({"commitUrl": url, "commitOid": oid, "pullRequestUrl": discussion})

    def chunks(self) -> Iterator[bytes]:
        """Parts of a body that is sent in chunks."""
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def do_GET(self) -> None:
        words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
        described = words[:2] == ["api", "models"]
        words = words[2:] if described else words
        repository, revision = "/".join(words[:2]), words[3] if len(words) > 3 else "main"
        branches = self.hub.repositories.get(repository)
        if branches is None:
            return self.answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        files = next((its for name, its in branches.items() if revision in (name, sha(its))), None)
        if files is None:
            return self.answer({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        if described and words[2:3] == ["tree"]:
            entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            return self.answer(entries)
        if described:
            return self.answer(
                {"id": repository, "sha": sha(files), "siblings": [{"rfilename": path} for path in files], "tags": []}
            )
        path = "/".join(words[4:])
        if f"{repository}/{path}" in self.hub.unavailable:
            return self.answer({"error": "down"}, 403)  # huggingface_hub tries again after most others
        if path not in files:
            return self.answer({"error": "no"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha(files))
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self.answer(files[path], ETag=etag, X_Repo_Commit=sha(files))

    do_HEAD = do_GET


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the hub for the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
