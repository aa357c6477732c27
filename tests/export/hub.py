"""A stand-in for the hub's HTTP interface, bound to loopback: it keeps what it receives.

It knows the requests that huggingface_hub makes of an upload without Xet, and nothing else: any
other is answered with 404 and remembered in ``unknown``.
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
from urllib.parse import unquote

TOKEN = "hf_of_a_test"
LARGE = 10_000
"""Bytes from which on a file goes by LFS; the real hub goes by kind, too."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in holds, and how it is to fail.

    ``faults`` are (pattern of a path, answer): a status, or "drop" to hang up without a word.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, int | str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    url: str = ""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]

    # One method a request; each returns a status and JSON.

    def create(self, _: re.Match[str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, answer
        self.repos[name] = Repo(asked.get("visibility") == "private")
        return 200, answer

    def info(self, match: re.Match[str], _: bytes) -> tuple[int, Any]:
        repo = self.repos[match["repo"]]
        siblings = [{"rfilename": name} for name in repo.branches[match["rev"] or "main"]]
        return 200, {"id": match["repo"], "private": repo.private, "siblings": siblings}

    def tree(self, match: re.Match[str], _: bytes) -> tuple[int, Any]:
        files = self.files(match["repo"], unquote(match["rev"]))
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in files.items()
        ]
        return 200, entries

    def branch(self, match: re.Match[str], _: bytes) -> tuple[int, Any]:
        branches = self.repos[match["repo"]].branches
        if match["rev"] in branches:
            return 409, {}
        branches[match["rev"]] = dict(branches["main"])
        return 200, {}

    def validate(self, _: re.Match[str], body: bytes) -> tuple[int, Any]:
        known = json.loads(body)["content"].startswith("---\n")
        return (200, {}) if known else (400, {"errors": [{"message": "no metadata"}]})

    def preupload(self, match: re.Match[str], body: bytes) -> tuple[int, Any]:
        _ = self.files(match["repo"], unquote(match["rev"]))
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def batch(self, _: re.Match[str], body: bytes) -> tuple[int, Any]:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/objects/{item['oid']}", "header": {}}
            known = item["oid"] in self.objects
            objects.append(item if known else {**item, "actions": {"upload": upload}})
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, match: re.Match[str], body: bytes) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == match["oid"]
        self.objects[match["oid"]] = body
        return 200, {}

    def commit(self, match: re.Match[str], body: bytes) -> tuple[int, Any]:
        branch = unquote(match["rev"])
        files = dict(self.files(match["repo"], branch))
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                self.repos[match["repo"]].messages.append(value["summary"])
            elif key == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        self.repos[match["repo"]].branches[branch] = files
        address = f"{self.url}/{match['repo']}/commit/{'1' * 40}"
        return 200, {"commitUrl": address, "commitOid": "1" * 40}


MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", rf"{MODEL}(/revision/(?P<rev>[^/]+))?", Hub.info),
    ("GET", rf"{MODEL}/tree/(?P<rev>[^/]+)", Hub.tree),
    ("POST", rf"{MODEL}/branch/(?P<rev>[^/]+)", Hub.branch),
    ("POST", rf"{MODEL}/preupload/(?P<rev>[^/]+)", Hub.preupload),
    ("POST", rf"{MODEL}/commit/(?P<rev>[^/]+)", Hub.commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", Hub.put),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a stand-in on a free port of 127.0.0.1; its address is ``hub.url``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            fault = next(
                (answer for pattern, answer in hub.faults if re.search(pattern, path)), None
            )
            if fault == "drop":
                self.close_connection = True
                return
            self.answer(*((fault, {"error": "as asked for"}) if fault else self.found(path, body)))

        def found(self, path: str, body: bytes) -> tuple[int, Any]:
            # What is stored under an address of its own needs no token, as with the real one.
            if (
                not path.startswith("/objects/")
                and self.headers["Authorization"] != f"Bearer {TOKEN}"
            ):
                return 401, {"error": "Invalid credentials"}
            for method, pattern, serve in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    try:
                        return serve(hub, match, body)
                    except KeyError:
                        return 404, {"error": "Not found"}
            hub.unknown.append(f"{self.command} {path}")
            return 404, {"error": "Not found"}

        def answer(self, status: Any, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_one

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
