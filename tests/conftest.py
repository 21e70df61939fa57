"""Fixtures for every room."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import botocore.loaders
import botocore.session
import hypothesis
import pytest

from tests import leftovers
from tests.servers import Azurite, FakeGCS, SeaweedFS
from tests.waiting import PATIENCE_S
from tests.zygote import HAND_OVER, Zygote

if TYPE_CHECKING:
    from tests.storage.fake_azure import FakeAzure
    from tests.storage.fake_hub import FakeHub

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell does this to what it runs in the background; the processes that tests start would never hear a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # nohup does this, and hf-spot would rightly leave the signal ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A launch that lasts a while would import torch once more beside its training: `tests/launch/test_warm.py` asks for that.
os.environ["HF_SPOT_WARM_SPARES"] = "off"
# Two workers and what they start share two cores: threads of torch would spin while they wait for each other. It is read
# when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# The Hub of these tests is on this machine. huggingface_hub reads it when it is imported.
os.environ.pop("HF_HUB_OFFLINE", None)

# With it torch is here already.
_handed_over = Zygote.handed_over()


# What is not compiled yet is compiled once, and not by each of hundreds of Pythons: a third of the processor time of a launch.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@cache
def _loader_of(search_path: str | None) -> botocore.loaders.Loader:
    return botocore.loaders.create_loader(search_path)


def _shared_loader(search_path: str | None = None) -> botocore.loaders.Loader:
    loader = _loader_of(search_path)
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # each session of boto3 adds its own again
    return loader


# botocore reads the models of S3 and EC2 again for each session: a tenth of a second and more, hundreds of times.
botocore.session.create_loader = _shared_loader


# On a machine that is busy with other things an example takes as long as it takes.
hypothesis.settings.register_profile("calm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("calm")


# While tests are collected, torch and transformers are imported, and the collector would look for garbage in them again and
# again.
gc.disable()


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    """Fork xdist's workers, and a zygote for each: torch is imported once, and not twice by each of them."""
    if not getattr(session.config.option, "tx", None):
        yield
        return
    made = Zygote()
    os.environ[HAND_OVER] = "wanted"
    with made.forking():
        yield
    del os.environ[HAND_OVER]  # a worker in place of one that has crashed imports for itself
    made.close()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, and not by each of xdist's workers
        leftovers.remove()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # hardly anything here is garbage


def _freeze() -> None:
    """Let the collector leave out what is there now, as Trainer has it look for garbage before each training."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        _freeze()  # the modules that these tests have imported


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    # Tests take from milliseconds to a minute: with xdist's own choice one worker has long nothing to do at the end.
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Each of xdist's workers begins with its share of the slow tests: whoever began one as the last of all would end alone.
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    shares = [len(others) * number // workers for number in range(workers + 1)]
    items[:] = [
        item for number in range(workers) for item in slow[number::workers] + others[shares[number] : shares[number + 1]]
    ]


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line that tells how much a suite has tried; they are printed together at the end."""
    return partial(record_property, "counted")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for one in terminalreporter.stats.get("passed", []) if one.when == "call"]
    lines = [str(value) for report in reports for name, value in report.user_properties if name == "counted"]
    if lines:
        terminalreporter.section("counted")
        terminalreporter.write_line("\n".join(sorted(lines)))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], object]], Path]:
    """Gives a folder that is filled once, by whoever of xdist's workers wants it first; the others wait for it.

    What it is called with: a name, and a function that fills the folder, which it is given.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = shared / f"once-{name}"
        with open(shared / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                filling = shared / f"filling-{name}-{worker_id}"
                filling.mkdir()
                fill(filling)
                filling.rename(folder)  # one that could not be filled is tried again, by another
        return folder

    return make


@pytest.fixture(scope="session")
def plain_in_peace(made_once: Callable[[str, Callable[[Path], object]], Path], zygote: Zygote) -> Path:
    """What plain.py leaves when nobody interrupts it, under plain ``python``: ``losses.jsonl`` and ``out/final``."""

    def train(folder: Path) -> None:
        script = Path(__file__).parent / "training" / "scripts" / "plain.py"
        with zygote.forking():
            subprocess.run(
                [sys.executable, str(script), "--output_dir", "out", "--diary", "losses.jsonl", "--weights", "out/final"],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                check=True,
                capture_output=True,
                timeout=PATIENCE_S,
            )

    return made_once("plain-in-peace", train)


@pytest.fixture(scope="session")
def loop_of_ranks_in_peace(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """What ddp_loop.py leaves on two ranks of one machine that nobody interrupts: the run ``twin`` and its diary."""

    def train(folder: Path) -> None:
        from tests.training.loops import loops_in

        with loops_in(folder) as loops:
            loops.run("twin", script="ddp_loop.py", ranks=2)

    return made_once("loop-of-ranks", train)


@pytest.fixture(scope="session")
def case_in_peace(made_once: Callable[[str, Callable[[Path], object]], Path], zygote: Zygote) -> Callable[[str], Path]:
    """What a case of the matrix leaves when nobody interrupts it."""

    def of(name: str) -> Path:
        def train(folder: Path) -> None:
            from tests.matrix.runner import in_peace

            with zygote.forking():
                code, said = in_peace(name, folder)
            assert code == 0, said

        return made_once(f"case-{name.replace(' ', '-')}", train)

    return of


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks Pythons that have imported torch: one for each of xdist's workers."""
    made = _handed_over or Zygote({"OMP_NUM_THREADS": "1"})
    yield made
    made.close()


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """A running S3 server: one for the whole session (with xdist, for each worker)."""
    with SeaweedFS() as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3_url(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place on that server, with the environment that lets boto3 find it."""
    for name, value in seaweedfs.env().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def hub() -> Iterator[FakeHub]:
    """A Hugging Face Hub that speaks to the real client."""
    from tests.storage.fake_hub import FakeHub

    with FakeHub() as server:
        yield server


@pytest.fixture
def logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """That Hub, with the environment that leads there."""
    for name, value in hub.env().items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def hub_repo_url(logged_in: FakeHub) -> str:
    """A fresh place in a model repository."""
    name = f"me/{uuid.uuid4().hex}"
    logged_in.make(f"models/{name}")
    return f"hf://{name}/run"


@pytest.fixture
def hub_bucket_url(logged_in: FakeHub) -> str:
    """A fresh place in a bucket of the Hub."""
    name = f"me/{uuid.uuid4().hex}"
    logged_in.make(f"buckets/{name}")
    return f"hf://buckets/{name}/run"


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[FakeGCS]:
    """Google Cloud Storage, in memory."""
    with FakeGCS() as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def gcs_url(fake_gcs: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place there."""
    for name, value in fake_gcs.env().items():
        monkeypatch.setenv(name, value)
    return f"gs://tests/{uuid.uuid4().hex}"


def _azure_url(server: Azurite | FakeAzure, monkeypatch: pytest.MonkeyPatch) -> str:
    from azure.storage.blob import BlobServiceClient

    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    name = f"tests-{uuid.uuid4().hex}"
    BlobServiceClient.from_connection_string(os.environ["AZURE_STORAGE_CONNECTION_STRING"]).create_container(name)
    return f"az://{name}/run"


@pytest.fixture(scope="session")
def fake_azure() -> Iterator[FakeAzure]:
    """Azure Blob Storage, as far as its client asks for it here."""
    from tests.storage.fake_azure import FakeAzure

    with FakeAzure() as server:
        yield server


@pytest.fixture
def azure_url(fake_azure: FakeAzure, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place there."""
    return _azure_url(fake_azure, monkeypatch)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """Microsoft's emulator, where it is installed."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("Microsoft's emulator is not installed: npm install -g azurite")
    with Azurite(program) as server:
        yield server


@pytest.fixture
def azurite_url(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh place there."""
    return _azure_url(azurite, monkeypatch)


CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sub/.metadata")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a folder that has everything a resume reads, with contents that depend on the step."""

    def make(step: int, parent: Path | None = None) -> Path:
        folder = (parent or tmp_path / "out") / f"checkpoint-{step}"
        for name in CHECKPOINT_FILES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} of step {step}".encode() * 100)
        return folder

    return make
