"""Through a proxy that fails a quarter of all requests, before a real S3 server: nothing is lost, and nobody is fooled.

One number replays a test's trouble: the seed, with the name of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from hf_spot.errors import StoreError
from hf_spot.run.manifest import files_in
from hf_spot.run.run import CommitRequest, Run
from hf_spot.run.upload import Uploader
from tests.hostile import Hostile
from tests.proxy import Answer, Exchange, Proxy
from tests.servers import SeaweedFS

T = TypeVar("T")
LAUNCHES, SAVES, PATIENCE_S = 3, 4, 60.0


def persistent(act: Callable[[], T]) -> T:
    """A user, or a scheduler, that starts the same command again."""
    for _ in range(20):
        try:
            return act()
        except StoreError:
            continue
    return act()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    """How long to wait between tries is botocore's business and ours; only that there are tries matters here."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.0)
    monkeypatch.setattr("hf_spot.run.upload._FIRST_RETRY_S", 0.01)


@pytest.mark.parametrize("seed", range(4))
def test_launch_after_launch_goes_on_from_the_last_save(
    seed: int,
    seaweedfs: SeaweedFS,
    make_checkpoint: Callable[[int, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"s3://tests/hostile-{seed}"
    step = 0
    with Hostile(seaweedfs.endpoint, seed, rate=0.25) as hostile:
        monkeypatch.setenv("AWS_ENDPOINT_URL", hostile.endpoint)
        for launch in range(LAUNCHES):
            machine = tmp_path / f"machine-{launch}"
            run = Run(url)
            persistent(run.claim)
            newest = persistent(run.latest)
            assert (newest.step if newest else 0) == step
            if newest:
                restored = persistent(lambda run=run, machine=machine: run.pull(machine))
                saved = tmp_path / f"machine-{launch - 1}" / newest.name
                assert {name: (restored / name).read_bytes() for name in files_in(restored)} == {
                    name: (saved / name).read_bytes() for name in files_in(saved)
                }
            uploader = Uploader(run, machine / "pins", save_total_limit=2)
            for _ in range(SAVES):
                step += 5
                uploader.submit(make_checkpoint(step, machine), CommitRequest(step=step))
                assert uploader.drain(PATIENCE_S), uploader.trouble
            uploader.close()
        assert sum(hostile.faults.values()) > 40, hostile.faults

    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
    run = Run(url)
    run.claim()
    run.collect_garbage()
    assert [ref.step for ref in run.state().checkpoints] == [step - 5, step]
    assert all(problems == [] for problems in run.verify().values())
    steps = [entry.data["step"] for entry in run.events() if entry.kind == "commit"]
    assert steps == list(range(5, step + 5, 5))
    wanted = {f"{c.ref.prefix}/{file.path}" for c in run.checkpoints() for file in c.files}
    assert {info.key for info in run.store.list("e")} == wanted


class Once(Proxy):
    """The first answer to each request of one method is lost, or damaged; the second is as it should be."""

    def __init__(self, endpoint: str, method: str) -> None:
        super().__init__(endpoint)
        self.method = method
        self.hit: set[str] = set()

    def carry(self, exchange: Exchange) -> None:
        answer = exchange.forward()
        if exchange.method != self.method or exchange.path in self.hit or (not answer.content and self.method == "GET"):
            exchange.answer(answer)
            return
        self.hit.add(exchange.path)
        if self.method == "GET":
            exchange.answer(Answer(answer.status, answer.headers, answer.content[:-9] + b"?" + answer.content[-8:]))
        else:
            exchange.reset()


@pytest.mark.parametrize("validation", ["when_supported", "when_required"])
def test_what_is_damaged_on_the_way_is_asked_for_again(
    validation: str,
    seaweedfs: SeaweedFS,
    s3_url: str,
    make_checkpoint: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """boto3 finds damage itself in what was put in one piece and is read whole; the rest is ours to find."""
    Run(s3_url).push(make_checkpoint(5))
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", validation)
    with Once(seaweedfs.endpoint, "GET") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        pulled = Run(s3_url).pull(tmp_path / "pulled")
        assert {name.rpartition("/")[2] for name in proxy.hit} >= {"00000002.json", "model.safetensors", "optimizer.pt"}
    assert (pulled / "model.safetensors").read_bytes() == (tmp_path / "out/checkpoint-5/model.safetensors").read_bytes()


def test_a_run_whose_every_answer_is_lost_once_is_claimed_at_the_first_try(
    seaweedfs: SeaweedFS, s3_url: str, make_checkpoint: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Once(seaweedfs.endpoint, "PUT") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run = Run(s3_url)
        assert run.claim() == 1
        run.push(make_checkpoint(5))
        assert len(proxy.hit) > 8
    assert [entry.kind for entry in run.events()] == ["claim", "commit"]
