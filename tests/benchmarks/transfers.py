"""How fast a checkpoint travels: ``python tests/benchmarks/transfers.py [--gb 3] [--json FILE]``.

A checkpoint in memory (``/dev/shm``) goes to an S3 server that only moves bytes (`sink.py`) and comes back. Beside hf_spot,
whose uploads are bound to the journal by a digest and whose restores are verified by it: boto3 as it is, s5cmd, rclone and the
AWS CLI, of which those that are not installed are left out; and the ceiling, which is plain sockets with nothing checked. Each
is measured in a process of its own, in turn; what counts is the best of ``--rounds``, and its processor seconds.

The second half goes to real servers: SeaweedFS, which moves the bytes of what it copies, and JuiceFS, if that is installed,
which points to them. What a server takes at most is measured with bare parts over plain sockets, signed beforehand. Beside it
a full upload, and that of a checkpoint of which nine tenths are unchanged.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
PART_BYTES = 64 << 20
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "sink",
    "AWS_SECRET_ACCESS_KEY": "sink",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "RCLONE_CONFIG": os.devnull,
    "RCLONE_S3_PROVIDER": "Other",
    "RCLONE_S3_USE_DATA_INTEGRITY_PROTECTIONS": "false",  # it can't stream with them where no TLS is
    "RCLONE_S3_ENV_AUTH": "true",
    "RCLONE_S3_NO_CHECK_BUCKET": "true",
}


# -- the clients: each moves the folder, in a process of its own ---------------------------------------------------------


def hf_spot_up(folder: Path, name: str) -> None:
    from hf_spot.run.checkpoint import CommitRequest
    from hf_spot.run.run import Run

    run = Run(f"s3://sink/{name}")
    run.claim()
    with counted():
        request = CommitRequest(step=1)
        run.commit(request, run.upload(folder, request))


def hf_spot_down(folder: Path, name: str) -> None:
    from hf_spot.run.run import Run

    run = Run(f"s3://sink/{name}")
    run.state()
    with counted():
        run.pull(folder)


def boto3_up(folder: Path, name: str) -> None:
    import boto3

    client = boto3.client("s3")
    with counted():
        for path in folder.iterdir():
            client.upload_file(str(path), "sink", f"{name}/{path.name}")


def boto3_down(folder: Path, name: str) -> None:
    import boto3

    client = boto3.client("s3")
    folder.mkdir()
    with counted():
        for found in client.list_objects_v2(Bucket="sink", Prefix=f"{name}/")["Contents"]:
            client.download_file("sink", found["Key"], str(folder / found["Key"].rpartition("/")[2]))


def ceiling_up(folder: Path, name: str) -> None:
    """``sendfile`` of parts over two connections."""

    def send(piece: tuple[Path, int, int]) -> None:
        path, first, count = piece
        with path.open("rb") as file, _connected() as connection:
            connection.sendall(
                f"PUT /sink/{name}/{path.name}?partNumber=1&uploadId=1 HTTP/1.1\r\nContent-Length: {count}\r\n\r\n".encode()
            )
            connection.sendfile(file, first, count)
            http.client.HTTPResponse(connection).begin()

    with counted(), ThreadPoolExecutor(2) as pool:
        list(pool.map(send, _pieces(folder)))


def ceiling_down(folder: Path, name: str) -> None:
    """What comes in over two connections goes to its place in a file."""
    source = Path(os.environ["SINK_FOLDER"])
    folder.mkdir()

    def fetch(piece: tuple[Path, int, int]) -> None:
        path, first, count = piece
        handle = os.open(folder / path.name, os.O_WRONLY | os.O_CREAT)
        buffer = memoryview(bytearray(1 << 20))
        with _connected() as connection:
            asked = (
                f"GET /sink/hf_spot/e0001/checkpoint-1/{path.name} HTTP/1.1\r\nRange: bytes={first}-{first + count - 1}\r\n\r\n"
            )
            connection.sendall(asked.encode())
            response = http.client.HTTPResponse(connection)
            response.begin()
            while got := response.readinto(buffer):
                os.pwrite(handle, buffer[:got], first)
                first += got
        os.close(handle)

    with counted(), ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch, _pieces(source)))


def _pieces(folder: Path) -> Iterator[tuple[Path, int, int]]:
    for path in folder.iterdir():
        size = path.stat().st_size
        yield from ((path, first, min(PART_BYTES, size - first)) for first in range(0, size, PART_BYTES))


def _connected() -> socket.socket:
    where = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    return socket.create_connection((where.hostname, where.port))


@contextmanager
def counted() -> Iterator[None]:
    """Prints what happens within it: seconds, and seconds of all processors."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    took_s = time.perf_counter() - began
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"s": took_s, "cpu_s": cpu_s}))


def commands(program: str, where: str, folder: str, name: str) -> list[str]:
    """What a program of others is called with."""
    remote = f"s3://sink/{name}"
    pairs = {"up": (f"{folder}/", remote + "/"), "down": (f"{remote}/*" if program == "s5cmd" else remote, f"{folder}/")}
    source, target = pairs[where]
    if program == "s5cmd":
        return ["s5cmd", "--endpoint-url", os.environ["AWS_ENDPOINT_URL"], "--log", "error", "cp", source, target]
    if program == "rclone":
        endpoint = ["--s3-endpoint", os.environ["AWS_ENDPOINT_URL"]]
        return ["rclone", *endpoint, "copy", *(one.replace("s3://", ":s3:") for one in (source, target))]
    return ["aws", "s3", "sync", "--quiet", source, target]


# -- what is measured ----------------------------------------------------------------------------------------------------


def measure(client: str, where: str, folder: Path, name: str) -> dict[str, float]:
    """One transfer."""
    if client in ("s5cmd", "rclone", "aws"):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(commands(client, where, str(folder), name), check=True)
        took_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"s": took_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    command = [sys.executable, __file__, "--only", f"{client}_{where}", str(folder), name]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def make_checkpoint(folder: Path, size_bytes: int) -> Path:
    """Two thirds are the optimizer's; random bytes."""
    folder.mkdir(parents=True)
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(b"small")
    block = os.urandom(1 << 24)
    for name, size in (("optimizer.pt", size_bytes * 2 // 3), ("model.safetensors", size_bytes // 3)):
        with (folder / name).open("wb") as file:
            for first in range(0, size, len(block)):
                file.write(block[: min(len(block), size - first)])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=3.0, help="size of the checkpoint, in 10^9 bytes (3)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="hf_spot,boto3,s5cmd,rclone,aws,ceiling")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        globals()[options.only[0]](Path(options.only[1]), options.only[2])
        return
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    wanted = [one for one in options.clients.split(",") if one in ("hf_spot", "boto3", "ceiling") or shutil.which(one)]
    size_bytes = int(options.gb * 1e9)
    with tempfile.TemporaryDirectory(prefix="hf_spot-transfers-", dir="/dev/shm") as scratch:
        folder = make_checkpoint(Path(scratch) / "checkpoint-1", size_bytes)
        with sink(folder):
            best = {where: against_peers(where, wanted, options.rounds, folder, Path(scratch)) for where in ("up", "down")}
    found: dict[str, Any] = {"gb": options.gb, "cores": os.cpu_count()}
    for where, title in (("up", "upload and commit"), ("down", "restore, verified")):
        print(f"{title}, {options.gb:g} GB, {os.cpu_count()} cores shared with the server")
        peers = [one["s"] for client, one in best[where].items() if client not in ("hf_spot", "ceiling")]
        for client, one in sorted(best[where].items(), key=lambda pair: pair[1]["s"]):
            print(f"  {client:8} {options.gb / one['s']:5.2f} GB/s  {one['cpu_s'] / options.gb:5.2f} processor seconds per GB")
        ours = best[where]["hf_spot"]["s"]
        found[where] = {**best[where], "of_best_peer": min(peers) / ours, "of_ceiling": best[where]["ceiling"]["s"] / ours}
        print(f"  hf_spot is {min(peers) / ours:.2f} of the best peer, {best[where]['ceiling']['s'] / ours:.2f} of the ceiling")
    servers = {"SeaweedFS": seaweedfs(), **({"JuiceFS": juicefs()} if shutil.which("juicefs") else {})}
    size_bytes = min(size_bytes, 10**9)
    found["servers"] = {name: real_server(size_bytes, options.rounds, server) for name, server in servers.items()}
    for name, took in found["servers"].items():
        bare, full, second = took["bare_s"], took["full_s"], took["second_s"]
        print(f"{name}: it takes {size_bytes / bare / 1e9:.2f} GB/s, and {bare / full:.2f} of that from hf_spot")
        print(f"  nine tenths unchanged: {second:.2f} s instead of {full:.2f} s ({second / full:.2f} of it)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def against_peers(where: str, clients: list[str], rounds: int, folder: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """Each client's best."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for client in clients:
            into = folder if where == "up" else scratch / "back"
            took = measure(client, where, into, client)
            if where == "down":
                check(folder, into)
                shutil.rmtree(into)
            best[client] = min(best.get(client, took), took, key=lambda one: one["s"])
    return best


def check(folder: Path, back: Path) -> None:
    """What came back is all there; a client that found everything in place has measured nothing."""
    for path in folder.iterdir():
        found = [one for one in back.rglob(path.name) if one.is_file()]
        assert found and found[0].stat().st_size == path.stat().st_size, f"{path.name} did not come back: {found}"


@contextmanager
def sink(folder: Path) -> Iterator[None]:
    """The server; this process's environment leads to it."""
    server = subprocess.Popen(
        [sys.executable, HERE / "sink.py", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    os.environ.update(SETTINGS, AWS_ENDPOINT_URL=server.stdout.readline().strip(), SINK_FOLDER=str(folder))
    try:
        yield
    finally:
        server.stdin.close()
        server.wait()


def real_server(size_bytes: int, rounds: int, server: AbstractContextManager[str]) -> dict[str, float]:
    """Seconds for the bytes of a checkpoint alone, for a full upload with its commit, and for one of which a tenth is new: the
    best of each. The server gives its bucket's URL."""
    sys.path.insert(0, str(HERE.parent.parent))
    from hf_spot.run.checkpoint import CommitRequest
    from hf_spot.run.run import Run

    with server as url, tempfile.TemporaryDirectory(prefix="hf_spot-transfers-", dir="/dev/shm") as scratch:
        folder = make_checkpoint(Path(scratch) / "checkpoint-1", size_bytes // 10)
        with (folder / "base.safetensors").open("wb") as file:
            for _ in range(size_bytes * 9 // 10 // (1 << 20)):
                file.write(os.urandom(1 << 20))
        took: list[tuple[float, ...]] = []
        for number in range(rounds):
            run = Run(f"{url}/run-{number}", allow_unfenced_store=True)
            run.claim()
            commit: Callable[[int], float] = lambda step: _seconds(lambda: _commit(run, folder, CommitRequest(step=step)))  # noqa: B023, E731
            bare_s = min(bare_parts(folder, f"bare-{number}-{connections}", connections) for connections in (2, 4))
            full_s = commit(1)
            block = os.urandom(1 << 20)
            for name in ("optimizer.pt", "model.safetensors"):
                with (folder / name).open("r+b") as file:
                    file.write(block)
            took.append((bare_s, full_s, commit(2)))
        return dict(zip(("bare_s", "full_s", "second_s"), map(min, zip(*took, strict=True)), strict=True))


def bare_parts(folder: Path, name: str, connections: int) -> float:
    """Seconds for sending a folder's files with ``sendfile``, nothing hashed or checked: what a client of this server can
    reach. What is asked before and after is not counted."""
    import boto3

    client = boto3.Session().client("s3")  # the servers before had other keys
    uploads = {}
    pieces: list[tuple[Path, int, int, str]] = []
    for path, first, count in _pieces(folder):
        where = {"Bucket": "tests", "Key": f"{name}/{path.name}"}
        if path not in uploads:
            uploads[path] = client.create_multipart_upload(**where)["UploadId"]
        part = {**where, "UploadId": uploads[path], "PartNumber": first // PART_BYTES + 1}
        pieces.append((path, first, count, client.generate_presigned_url("upload_part", Params=part)))

    def send(piece: tuple[Path, int, int, str]) -> None:
        path, first, count, url = piece
        where = urlsplit(url)
        with path.open("rb") as file, _connected() as connection:
            head = f"PUT {where.path}?{where.query} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {count}\r\n\r\n"
            connection.sendall(head.encode())
            connection.sendfile(file, first, count)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200, response.read()

    with ThreadPoolExecutor(connections) as pool:
        took_s = _seconds(lambda: list(pool.map(send, pieces)))
    for path, upload in uploads.items():
        client.abort_multipart_upload(Bucket="tests", Key=f"{name}/{path.name}", UploadId=upload)
    return took_s


@contextmanager
def seaweedfs() -> Iterator[str]:
    """A server that copies an object by moving its bytes."""
    from tests.servers import SeaweedFS

    with SeaweedFS() as server:
        server.make_bucket("tests")
        os.environ.update(server.env())
        yield "s3://tests"


@contextmanager
def juicefs() -> Iterator[str]:
    """A server that copies an object by pointing to its bytes. It ignores create-if-absent."""
    from tests.servers import free_ports

    keys = {"MINIO_ROOT_USER": "benchmark", "MINIO_ROOT_PASSWORD": "benchmark"}
    with tempfile.TemporaryDirectory(prefix="hf_spot-juicefs-") as folder:
        meta, where = f"sqlite3://{folder}/meta.db", f"127.0.0.1:{free_ports(1)[0]}"
        make = ["juicefs", "format", "--storage", "file", "--bucket", f"{folder}/data/", meta, "tests"]
        subprocess.run(make, check=True, capture_output=True)
        serve = ["juicefs", "gateway", "--no-usage-report", "--cache-dir", f"{folder}/cache", meta, where]
        gateway = subprocess.Popen(serve, env={**os.environ, **keys}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            host, port = where.split(":")
            while gateway.poll() is None:
                with suppress(OSError), socket.create_connection((host, int(port))):
                    break
                time.sleep(0.1)
            access = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
            os.environ.update(access, AWS_ENDPOINT_URL=f"http://{where}")
            yield "s3://tests"
        finally:
            gateway.terminate()
            gateway.wait()


def _commit(run: Any, folder: Path, request: Any) -> None:
    run.commit(request, run.upload(folder, request))


def _seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
