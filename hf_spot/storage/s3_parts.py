"""Move files to and from S3 in parts, several at a time, each directly between the file and its connection.

botocore's own transfers read a file in blocks of 16 kB, and copy received bytes four times. Here a block has 1 MB in uploads
and 4 MB in downloads. It is read from the file when the connection can send it, and written to the file when it arrives, so
that a transfer needs one block of memory for each connection, whatever the size of the file.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from botocore import exceptions as aws

from hf_spot.storage.parts import BLOCK_IN_BYTES, Job, Piece, Stopped, write_at
from hf_spot.storage.per_process import renamed_when_whole
from hf_spot.storage.store import Progress
from hf_spot.storage.threads import Workers

PART_BYTES = 64 << 20
_MOST_PARTS = 10_000  # S3's limit
_MOST_COPIED_BYTES = 1 << 30  # by one request; S3 allows five times as much, but copies parts in parallel
_COPIED_PART_BYTES = 512 << 20
_READS = 5  # of a part, if the answer repeatedly breaks off without a byte
# Timeouts are not among them: botocore has already retried those.
_BROKEN = (aws.IncompleteReadError, aws.ResponseStreamingError)
_CONTENT_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")


class Transfers:
    """Moves files for one process.

    Args:
        client: boto3's.
        bulk: a client for the bytes of parts. Their signature need not cover them, even without TLS: the journal binds a file
            to its digest, and a second hash would cost more than the transfer.
        connections: number of parts to move at the same time, of all files together.
    """

    def __init__(self, client: Any, bulk: Any, *, connections: int) -> None:
        self._client = client
        self._bulk = bulk
        self._workers = Workers(connections, "hf_spot-part")
        bulk.meta.events.register("before-send.s3", _send_in_blocks)
        # This runs before botocore's retries: otherwise a cancelled part would be tried five times.
        bulk.meta.events.register_first("needs-retry.s3", _end_if_stopped)
        wanted = client.meta.config.request_checksum_calculation != "when_required"
        self._checksum = _checksum() if wanted else None

    def upload(self, target: dict[str, str], extra: dict[str, str], path: Path, progress: Progress | None) -> None:
        """Upload a file by one PutObject, or by a multipart upload, which is aborted if a part fails.

        Args:
            target: bucket, key and owner, for every request.
            extra: for the request that makes the object.
            path: of the file.
            progress: see `Progress`.

        Raises:
            OSError: the file can't be read.
            SpotError: the file became shorter.
        """
        job = Job(progress)
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= PART_BYTES:
                with job.first_trouble():
                    piece = Piece(job, file.fileno(), 0, size)
                    self._bulk.put_object(Body=piece, **target, **extra, **self._sums(piece))
                return
            part_bytes = PART_BYTES * max(1, -(-size // (_MOST_PARTS * PART_BYTES)))

            def send(upload: dict[str, Any], first: int, end: int) -> dict[str, Any]:
                piece = Piece(job, file.fileno(), first, end - first)
                sums = self._sums(piece)
                return {"ETag": self._bulk.upload_part(Body=piece, **upload, **target, **sums)["ETag"], **sums}

            self._in_parts(job, send, range(0, size, part_bytes), size, target, {**extra, **self._about_sums})

    def download(self, target: dict[str, str], path: Path, progress: Progress | None) -> None:
        """Download an object in ranges, into a file beside ``path`` that is renamed when complete.

        Raises:
            OSError: the file can't be written.
        """
        job = Job(progress)
        with renamed_when_whole(path) as file, job.first_trouble():
            begin = self._begin(target)
            total = _CONTENT_RANGE.fullmatch(begin.get("ContentRange", ""))
            size = int(total[1]) if total else int(begin["ContentLength"])
            os.ftruncate(file.fileno(), size)
            same = {"IfMatch": begin["ETag"]} if "ETag" in begin else {}

            def fetch(first: int) -> None:
                self._fetch({**target, **same}, job, file.fileno(), first, min(first + PART_BYTES, size), None)

            # A server that does not support ranges sends the whole object at once.
            end = PART_BYTES if total else size
            rest = [self._workers.submit(job.doing, fetch, first) for first in range(end, size, PART_BYTES)]
            with job.ending(rest):
                self._fetch({**target, **same}, job, file.fileno(), 0, min(end, size), begin["Body"])

    def copy(self, source: dict[str, str], target: dict[str, str], extra: dict[str, str]) -> None:
        """Copy an object by CopyObject; a large one in parts, by UploadPartCopy.

        Args:
            source: bucket, key and owner of the original.
            target: bucket, key and owner of the copy.
            extra: for the request that makes the object.
        """
        origin: dict[str, Any] = {"CopySource": {"Bucket": source["Bucket"], "Key": source["Key"]}}
        if owner := source.get("ExpectedBucketOwner"):
            origin["ExpectedSourceBucketOwner"] = owner
        size = self._client.head_object(**source)["ContentLength"]
        if size <= _MOST_COPIED_BYTES:
            self._client.copy_object(**origin, **target, **extra)
            return

        def send(upload: dict[str, Any], first: int, end: int) -> dict[str, Any]:
            where = f"bytes={first}-{end - 1}"
            made = self._client.upload_part_copy(CopySourceRange=where, **origin, **upload, **target)["CopyPartResult"]
            return {name: value for name, value in made.items() if name != "LastModified"}

        self._in_parts(Job(None), send, range(0, size, _COPIED_PART_BYTES), size, target, {**extra, **self._about_sums})

    def _in_parts(
        self,
        job: Job,
        send: Callable[[dict[str, Any], int, int], dict[str, Any]],
        firsts: range,
        size: int,
        target: dict[str, str],
        extra: dict[str, str],
    ) -> None:
        """Make a multipart upload. Complete it, or abort it if a part fails."""
        upload_id = self._client.create_multipart_upload(**target, **extra)["UploadId"]

        def part(first: int) -> dict[str, Any]:
            number = first // firsts.step + 1
            end = min(first + firsts.step, size)
            return {"PartNumber": number, **send({"UploadId": upload_id, "PartNumber": number}, first, end)}

        try:
            with job.first_trouble():
                futures = [self._workers.submit(job.doing, part, first) for first in firsts]
                with job.ending(futures):
                    parts = [future.result() for future in futures]
                self._client.complete_multipart_upload(UploadId=upload_id, MultipartUpload={"Parts": parts}, **target)
        except BaseException:
            # If this fails, the next launch aborts the upload.
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._client.abort_multipart_upload(UploadId=upload_id, **target)
            raise

    def _begin(self, target: dict[str, str]) -> Any:
        try:
            return self._bulk.get_object(Range=f"bytes=0-{PART_BYTES - 1}", **target)
        except aws.ClientError as error:
            if error.response.get("Error", {}).get("Code") not in ("InvalidRange", "416"):
                raise
            return self._bulk.get_object(**target)  # an empty object has no ranges

    def _fetch(self, target: dict[str, str], job: Job, handle: int, at: int, end: int, body: Any) -> None:
        """Write bytes ``at`` to ``end`` to their place in the file. If an answer breaks off, request the rest."""
        buffer = memoryview(bytearray(min(BLOCK_IN_BYTES, end - at)))
        tries = 0
        while True:
            try:
                if body is None:
                    body = self._bulk.get_object(Range=f"bytes={at}-{end - 1}", **target)["Body"]
                with contextlib.closing(_Answer(body)) as answer:
                    while at < end:
                        block = answer.read_into(buffer[: end - at])
                        job.may_go_on()
                        write_at(handle, block, at)
                        job.see(at, block)
                        at, tries = at + len(block), 0
                        job.moved(len(block))
                return
            except _BROKEN:
                tries += 1
                if tries == _READS:
                    raise
                body = None

    @property
    def _about_sums(self) -> dict[str, str]:
        return {"ChecksumAlgorithm": self._checksum[0], "ChecksumType": self._checksum[2]} if self._checksum else {}

    def _sums(self, piece: Piece) -> dict[str, str]:
        if self._checksum is None:
            return {}
        name, of, _ = self._checksum
        return {f"Checksum{name}": base64.b64encode(of(piece)).decode()}


class _Answer:
    """The body of an answer, read from http.client without the two copies that botocore and urllib3 would make."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self._raw: Any = getattr(body, "_raw_stream", None)
        plain = getattr(self._raw, "_fp", None)
        self._plain = plain if isinstance(plain, http.client.HTTPResponse) and hasattr(self._raw, "release_conn") else None

    def read_into(self, buffer: memoryview) -> memoryview:
        """Return the next bytes, at least one. Raises one of `_BROKEN` if no more arrive."""
        if self._plain is None:
            block = memoryview(self._body.read(len(buffer)))
        else:
            try:
                block = buffer[: self._plain.readinto(buffer)]
            except (OSError, http.client.HTTPException) as error:
                raise aws.ResponseStreamingError(error=error) from error
        if not block:
            raise aws.IncompleteReadError(actual_bytes=0, expected_bytes=len(buffer))
        return block

    def close(self) -> None:
        """Close the body. If all of it was read, the connection can be used again."""
        if self._plain is not None and self._plain.isclosed():
            self._raw.release_conn()
        self._body.close()


class _Blocks:
    """A wrapper that keeps a `Piece` from looking like a file, which botocore would read in blocks of 16 kB."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._piece)

    def seek(self, offset: int) -> None:
        """Do nothing: botocore calls this before it sends the body again, and each iteration starts from the beginning."""


def _send_in_blocks(request: Any, **kwargs: Any) -> None:
    """Replace a request's body with its blocks. botocore calls this when the request is signed."""
    if isinstance(request.body, Piece):
        request.body = _Blocks(request.body)


def _end_if_stopped(caught_exception: Exception | None = None, **kwargs: Any) -> None:
    if isinstance(caught_exception, aws.HTTPClientError) and isinstance(caught_exception.kwargs.get("error"), Stopped):
        raise caught_exception


def _checksum() -> tuple[str, Callable[[Piece], bytes], str]:
    """Return the name of the checksum that S3 verifies, the function that computes it, and its type. CRC-64/NVME is by far the
    fastest."""
    if importlib.util.find_spec("awscrt") is not None:
        from awscrt.checksums import crc64nvme

        return "CRC64NVME", lambda piece: _folded(crc64nvme, piece).to_bytes(8, "big"), "FULL_OBJECT"
    return "CRC32", lambda piece: _folded(zlib.crc32, piece).to_bytes(4, "big"), "COMPOSITE"


def small_sums() -> dict[str, Callable[[bytes], bytes]]:
    """Return functions for the checksums of small bodies, by the lower-case name of the algorithm, beside zlib's own."""
    if importlib.util.find_spec("awscrt") is None:
        return {}
    from awscrt.checksums import crc64nvme

    return {"crc64nvme": lambda body: crc64nvme(body).to_bytes(8, "big")}


def _folded(step: Callable[[Any, int], int], piece: Piece) -> int:
    value = 0
    for block in piece.blocks():
        value = step(block, value)
    return value
