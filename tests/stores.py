"""A web server of files on loopback that can be slow, fail, cut off and be killed, and counts what is asked of it."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Store:
    """The files of a folder by HTTP, with ETags and parts of files, as S3 has them.

    Attributes:
        fails: name -> the answers (numbers, or "cut": half of the file) that its next requests get, before it works.
        pause: seconds that each answer takes.
        whole: times that a whole file was sent, by name; `parts`: that a part of one was.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.fails: dict[str, list[Any]] = {}
        self.pause = 0.0
        self.knows_parts = True
        self.whole: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self.port = 0
        self.begin()

    def begin(self) -> None:
        """Also again, at the same port."""
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                store.connections.append(self.connection)

            def do_HEAD(self) -> None:
                store.answer(self, body=False)

            def do_GET(self) -> None:
                store.answer(self, body=True)

            do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """With the connections that it has."""
        self.server.shutdown()
        self.server.server_close()
        while self.connections:
            with contextlib.suppress(OSError):
                self.connections.pop().shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/tars"

    def name(self, path: str) -> str:
        """Within the folder."""
        return path.rpartition("/")[2]

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        name = self.name(request.path)
        time.sleep(self.pause)
        with self.lock:
            failure = self.fails[name].pop(0) if body and self.fails.get(name) else None
        path = self.folder / name
        if isinstance(failure, int) or not path.is_file():
            request.send_error(failure or 404)
            request.close_connection = True
            return
        content = path.read_bytes()
        asked = request.headers.get("Range") if body and self.knows_parts else None
        found = content
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            found = content[int(first) : int(last) + 1]
        request.send_response(206 if asked else 200)
        request.send_header("Content-Length", str(len(found)))
        request.send_header("ETag", f'"{hash(content)}"')
        if asked:
            request.send_header("Content-Range", f"bytes {asked.removeprefix('bytes=')}/{len(content)}")
        request.end_headers()
        if not body:
            return
        if failure == "cut":
            request.wfile.write(found[: len(found) // 2])
            request.close_connection = True
            return
        with self.lock:
            (self.parts if asked else self.whole)[name] += 1
        request.wfile.write(found)


class Hub(Store):
    """The files of a folder as the data set u/d of Hugging Face's hub: what `HfFileSystem` asks of it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def name(self, path: str) -> str:
        return unquote(urlsplit(path).path).removeprefix("/datasets/u/d/resolve/main/")

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        if path == "/api/datasets/u/d":
            facts: Any = {"id": "u/d", "sha": "0" * 40, "private": False, "tags": [], "siblings": []}
            self.tell(request, facts)
        elif path.startswith("/api/datasets/u/d/tree/main"):
            folder = self.folder / path.removeprefix("/api/datasets/u/d/tree/main").strip("/")
            self.tell(request, [self.entry(found) for found in sorted(folder.iterdir())] if folder.is_dir() else None)
        elif path.startswith("/datasets/u/d/resolve/main/"):
            super().answer(request, body=body)
        else:
            self.tell(request, None)

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest}

    @staticmethod
    def tell(request: BaseHTTPRequestHandler, facts: Any) -> None:
        """None: there is nothing of that name."""
        content = json.dumps({"error": "Repository not found"} if facts is None else facts).encode()
        request.send_response(200 if facts is not None else 404)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        if facts is None:
            request.send_header("X-Error-Code", "RepoNotFound")
        request.end_headers()
        request.wfile.write(content)


def mode(file: dict[str, Any]) -> str:
    """How the hub wants a file."""
    return "lfs" if file["path"].endswith((".safetensors", ".onnx")) else "regular"


class ModelHub(Store):
    """Hugging Face's hub as it takes models and gives them back: what `create_repo`, `upload_folder` and
    `hf_hub_download` ask of it. Files are kept below the folder, USER/MODEL/NAME.

    Attributes:
        token: the one that it knows.
        private: whether a model is for its owner alone, by its name.
        asked: "METHOD /path" of each request.
    """

    def __init__(self, folder: Path):
        self.token = "hf_right"
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}
        super().__init__(folder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def name(self, path: str) -> str:
        return re.sub("^/?(.*)/resolve/main/", r"\1/", unquote(urlsplit(path).path))

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        sent = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command in ("GET", "HEAD") and "/resolve/main/" in path:
            self.file(request, self.folder / self.name(path), body=body)
        elif request.command == "PUT":
            self.large[path.rpartition("/")[2]] = sent
            self.tell(request, {})
        elif request.headers.get("Authorization") != f"Bearer {self.token}":
            self.tell(request, {"error": "Invalid username or password."}, 401)
        elif path == "/api/whoami-v2":
            self.tell(request, {"type": "user", "name": "user", "orgs": [], "auth": {}})
        elif path == "/api/repos/create":
            self.create(request, json.loads(sent))
        elif path == "/api/validate-yaml":
            front = json.loads(sent)["content"].split("---")[1]
            wrong = (
                [] if "license: unheard" not in front else [{"message": '"license" must be one of [apache-2.0, mit]'}]
            )
            self.tell(request, {"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif path.endswith("/preupload/main"):
            answers = {"shouldIgnore": False, "oid": None}
            self.tell(
                request, {"files": [{**one, **answers, "uploadMode": mode(one)} for one in json.loads(sent)["files"]]}
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(sent)["objects"]
            found = [{**one, "actions": {"upload": {"href": f"{self.url}/{one['oid']}"}}} for one in wanted]
            self.tell(request, {"objects": found, "transfer": "basic"})
        elif path.endswith("/commit/main"):
            model = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.commit(model, [json.loads(line) for line in sent.splitlines()])
            self.tell(request, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{model}/commit/1"})
        else:
            self.tell(request, None)

    def create(self, request: BaseHTTPRequestHandler, given: dict[str, Any]) -> None:
        if given["organization"] != "user":
            self.tell(request, {"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        model = f"{given['organization']}/{given['name']}"
        is_new = model not in self.private
        if is_new:
            self.private[model] = given.get("visibility") == "private" or given.get("private") is True
        self.tell(request, {"url": f"{self.url}/{model}", "id": model}, 200 if is_new else 409)

    def commit(self, model: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            path = self.folder / model / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.large[value["oid"]] if "oid" in value else base64.b64decode(value["content"]))

    def file(self, request: BaseHTTPRequestHandler, path: Path, *, body: bool) -> None:
        if not path.is_file():
            known = path.parent.is_dir()
            self.tell(request, {"error": "not found"}, 404, "EntryNotFound" if known else "RepoNotFound")
            return
        content = path.read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", "1" * 40)
        request.end_headers()
        if body:
            request.wfile.write(content)

    @staticmethod
    def tell(request: BaseHTTPRequestHandler, facts: Any, status: int = 200, code: str = "") -> None:
        content = json.dumps({"error": "Repository not found"} if facts is None else facts).encode()
        request.send_response(status if facts is not None else 404)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        if code or facts is None:
            request.send_header("X-Error-Code", code or "RepoNotFound")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)
