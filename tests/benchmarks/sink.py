"""An S3 server that throws away what it is given, so that a store's speed and disk limit nothing: ``python sink.py [FOLDER]``.

It keeps objects of up to 8 MB, which a journal needs. Larger ones it drops in the kernel, and sends back the file of
their name in FOLDER, from the kernel too: what a client reaches against it is the client's own limit. It prints its endpoint
and serves until its standard input ends.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_KEPT_BYTES = 8 << 20
_BLOCK_BYTES = 1 << 20


class Sink(ThreadingHTTPServer):
    """Objects by path, and how many bytes have come in."""

    daemon_threads = True

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.came_in_bytes = 0


class Handler(BaseHTTPRequestHandler):
    """The requests that an upload with its commit makes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out apart, and would wait 40 ms for each other
    server: Sink

    def setup(self) -> None:
        super().setup()
        self.block = memoryview(bytearray(_BLOCK_BYTES))

    def do_PUT(self) -> None:
        path, query = self._asked()
        body = self._swallow()
        with self.server.lock:
            refused = self.headers.get("If-None-Match") and path in self.server.objects
            if not refused and "uploadId" not in query:
                self.server.objects[path] = body
        if refused:
            self._answer(412, "<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self._answer(200)

    def do_POST(self) -> None:
        path, query = self._asked()
        body = self._swallow()
        if "uploads" in query:
            return self._answer(200, "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        if "uploadId" in query:
            with self.server.lock:
                self.server.objects[path] = b""
            return self._answer(200, '<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>')
        with self.server.lock:
            for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.server.objects.pop(f"{path.rstrip('/')}/{unescape(name)}", None)
        return self._answer(200, "<DeleteResult/>")

    def do_DELETE(self) -> None:
        path, _ = self._asked()
        with self.server.lock:
            self.server.objects.pop(path, None)
        self._answer(204)

    def do_GET(self) -> None:
        path, query = self._asked()
        with self.server.lock:
            if "uploads" in query:
                return self._answer(200, "<ListMultipartUploadsResult/>")
            if "prefix" in query:
                bucket, prefix, after = path.rstrip("/"), query.get("prefix", [""])[0], query.get("start-after", [""])[0]
                names = sorted(name.removeprefix(f"{bucket}/") for name in self.server.objects)
                found = [name for name in names if name.startswith(prefix) and name > after]
                sizes = [self._size(f"{bucket}/{name}") for name in found]
                listed = "".join(
                    f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>&quot;1&quot;</ETag>"
                    f"<LastModified>2026-11-25T00:00:00Z</LastModified></Contents>"
                    for name, size in zip(found, sizes, strict=True)
                )
                return self._answer(200, f"<ListBucketResult>{listed}</ListBucketResult>")
            body = self.server.objects.get(path)
        if body is None:
            return self._answer(404, "<Error><Code>NoSuchKey</Code></Error>")
        if body or self.server.folder is None:
            return self._answer(200, body)
        return self._send_file(self.server.folder / PurePosixPath(path).name)

    do_HEAD = do_GET

    def _size(self, path: str) -> int:
        body = self.server.objects[path]
        if body or self.server.folder is None:
            return len(body)
        return (self.server.folder / PurePosixPath(path).name).stat().st_size

    def _send_file(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if self.command == "GET":
                self.connection.sendfile(file, first, last - first + 1)

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        split = urlsplit(self.path)
        return unquote(split.path), parse_qs(split.query, keep_blank_values=True)

    def _swallow(self) -> bytes:
        left = int(self.headers.get("Content-Length") or 0)
        with self.server.lock:
            self.server.came_in_bytes += left
        if left <= _KEPT_BYTES:
            return self.rfile.read(left)
        left -= len(self.rfile.read1(min(left, _BLOCK_BYTES)))  # type: ignore[attr-defined]
        while left:
            left -= self.connection.recv_into(self.block, min(left, _BLOCK_BYTES), socket.MSG_TRUNC)
        return b""

    def _answer(self, status: int, content: str | bytes = b"") -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """There are too many of them."""


if __name__ == "__main__":
    sink = Sink(Path(sys.argv[1]) if sys.argv[1:] else None)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{sink.server_port}", flush=True)
    sys.stdin.read()
    print(sink.came_in_bytes)
