"""Azure Blob Storage for its real client: the requests that `AzureStore` makes, as Azurite answers them, with MD5s compared.

https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from xml.sax.saxutils import escape

from tests.storage.fake_http import Answer, Asked, FakeServer, Refused

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"the key of a fake").decode()
PAGE = 100


@dataclass
class Blob:
    content: bytes | None = None  # None: has blocks, and was never made of them
    etag: str = ""
    blocks: dict[str, bytes] = field(default_factory=dict)


def refuse(status: int, code: str) -> Refused:
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}.</Message></Error>'
    return Refused(Answer(status, body.encode(), {"x-ms-error-code": code, "Content-Type": "application/xml"}))


class FakeAzure(FakeServer):
    """``env()`` leads the real client here."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: dict[str, dict[str, Blob]] = {}
        self._lock = threading.RLock()
        self._etags = itertools.count(1)

    def env(self) -> dict[str, str]:
        text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint}/{ACCOUNT};"
        return {"AZURE_STORAGE_CONNECTION_STRING": text}

    def decide(self, asked: Asked) -> Answer:
        if not asked.headers.get("authorization", "").startswith(f"SharedKey {ACCOUNT}:"):
            raise refuse(401, "NoAuthenticationInformation")
        _, container, *rest = asked.path.strip("/").split("/")
        name = "/".join(rest)
        with self._lock:
            if asked.query.get("restype") == "container" and asked.method == "PUT":
                self.containers[container] = {}
                return self._made(201)
            if container not in self.containers:
                raise refuse(404, "ContainerNotFound")
            blobs = self.containers[container]
            if asked.query.get("comp") == "list":
                return _listing(container, blobs, asked)
            if asked.method == "PUT":
                return self._put(blobs, name, asked)
            blob = blobs.get(name)
            if blob is None or blob.content is None:
                raise refuse(404, "BlobNotFound")
            if "if-match" in asked.headers and asked.headers["if-match"] != blob.etag:
                raise refuse(412, "ConditionNotMet")
            if asked.method == "DELETE":
                del blobs[name]
                return Answer(202)
            return _read(blob, asked)

    def _put(self, blobs: dict[str, Blob], name: str, asked: Asked) -> Answer:
        blob = blobs.get(name)
        stands = blob is not None and blob.content is not None
        if (told := asked.headers.get("content-md5")) and told != _md5(asked.body):
            raise refuse(400, "Md5Mismatch")
        if asked.query.get("comp") == "block":
            blobs.setdefault(name, Blob()).blocks[asked.query["blockid"]] = asked.body
            return Answer(201, headers={"Content-MD5": _md5(asked.body)})
        if stands and asked.headers.get("if-none-match") == "*":
            raise refuse(409, "BlobAlreadyExists")
        if asked.query.get("comp") == "blocklist":
            wanted = re.findall(r"<Latest>([^<]*)</Latest>", asked.body.decode())
            blocks = blob.blocks if blob else {}
            if missing := [block for block in wanted if block not in blocks]:
                raise refuse(400, f"InvalidBlockList{len(missing)}"[:16])
            content = b"".join(blocks[block] for block in wanted)
        elif source := asked.headers.get("x-ms-copy-source"):
            origin = blobs.get(source.split("/", 5)[5])
            if origin is None or origin.content is None:
                raise refuse(404, "BlobNotFound")
            content = origin.content
        else:
            content = asked.body
        etag = f'"0x{next(self._etags):X}"'
        blobs[name] = Blob(content, etag)
        copied = {"x-ms-copy-id": "1", "x-ms-copy-status": "success"} if "x-ms-copy-source" in asked.headers else {}
        return self._made(202 if copied else 201, etag, **copied)

    def _made(self, status: int, etag: str = '"0x0"', **headers: str) -> Answer:
        return Answer(status, headers={"ETag": etag, "Last-Modified": formatdate(usegmt=True), **headers})


def _read(blob: Blob, asked: Asked) -> Answer:
    content = blob.content or b""
    headers = {"ETag": blob.etag, "Last-Modified": formatdate(usegmt=True), "x-ms-blob-type": "BlockBlob"}
    if asked.method == "HEAD":
        return Answer(200, b"", {**headers, "Content-Length": str(len(content))})
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("x-ms-range", ""))
    if not wanted:
        return Answer(200, content, headers)
    first = int(wanted[1])
    if first >= len(content):
        raise refuse(416, "InvalidRange")
    part = content[first : int(wanted[2]) + 1 if wanted[2] else None]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    if asked.headers.get("x-ms-range-get-content-md5") == "true":
        headers["Content-MD5"] = _md5(part)
    return Answer(206, part, headers)


def _listing(container: str, blobs: dict[str, Blob], asked: Asked) -> Answer:
    uncommitted = "uncommittedblobs" in asked.query.get("include", "")
    prefix, marker = asked.query.get("prefix", ""), asked.query.get("marker", "")
    found = sorted(
        name
        for name, blob in blobs.items()
        if name.startswith(prefix) and name >= marker and (uncommitted or blob.content is not None)
    )
    page, rest = found[:PAGE], found[PAGE:]
    told = "".join(
        f"<Blob><Name>{escape(name)}</Name><Properties><Content-Length>{len(blobs[name].content or b'')}</Content-Length>"
        f"<Etag>{blobs[name].etag or '0x0'}</Etag><BlobType>BlockBlob</BlobType></Properties></Blob>"
        for name in page
    )
    next_marker = f"<NextMarker>{escape(rest[0])}</NextMarker>" if rest else "<NextMarker />"
    text = f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{container}"><Blobs>{told}</Blobs>'
    return Answer(200, f"{text}{next_marker}</EnumerationResults>".encode(), {"Content-Type": "application/xml"})


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()
