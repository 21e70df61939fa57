"""A store or a cloud service that does not answer when a command starts is awaited for some minutes; what is wrong is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hf_spot.arguments import SpotArguments
from hf_spot.cloud.ec2_errors import explain
from hf_spot.cloud.provision import _may_work_later
from hf_spot.errors import AccessDenied, BucketNotFound, CloudError, ConfigError, NoAnswer, SpotError, StoreUnavailable
from hf_spot.launch.command import Command, Machines, Reading
from hf_spot.launch.supervisor import Supervisor, launch
from hf_spot.run.first_contact import FirstContact, is_unavailable, patiently
from hf_spot.run.run import Run
from hf_spot.storage.credential_source import SourceFailed
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.open import open_store


def of_credentials() -> StoreUnavailable:
    """As a store raises it, and as `hf_spot.storage.probe` raises it again."""
    first, second = StoreUnavailable("please log in"), StoreUnavailable("checking: please log in")
    first.__cause__, second.__cause__ = SourceFailed(ValueError("please log in")), first
    return second


class Service:
    """Fails with these errors, one after the other, and then answers; a clock that only its waits move."""

    def __init__(self, *errors: SpotError) -> None:
        self.errors, self.now_s = list(errors), 0.0

    def ask(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def patiently(self, is_temporary: Callable[[SpotError], bool] = is_unavailable) -> str:
        return patiently(self.ask, FirstContact(is_temporary, 300.0, lambda: self.now_s), self.sleep)


def test_an_answer_that_comes_late_is_awaited_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(*(StoreUnavailable("no route") for _ in range(6)))
    assert service.patiently() == "answer"
    assert 30 < service.now_s < 90
    assert caplog.messages == ["no route; trying again for up to 5 minutes"]


def test_after_minutes_without_an_answer_the_exit_code_lets_a_scheduler_start_again() -> None:
    service = Service(*(StoreUnavailable("no route", hint="look at the proxy") for _ in range(1000)))
    with pytest.raises(NoAnswer, match=r"no answer for 3\d\d s: no route") as told:
        service.patiently()
    assert (told.value.exit_code, told.value.hint) == (75, "look at the proxy")
    assert 300 <= service.now_s <= 315


@pytest.mark.parametrize(
    "wrong",
    [
        BucketNotFound("no such bucket"),
        AccessDenied("no"),
        ConfigError("no"),
        of_credentials(),
        CloudError("no", code="UnauthorizedOperation"),
        explain("CredentialRetrievalError"),
        explain("NoCredentialsError"),
        explain("InvalidAMIID.NotFound"),
    ],
    ids=lambda error: f"{type(error).__name__} {getattr(error, 'code', '')}",
)
def test_what_is_wrong_is_an_error_at_once_with_code_2(wrong: SpotError) -> None:
    service = Service(wrong)
    with pytest.raises(type(wrong)) as told:
        service.patiently(_may_work_later)
    assert told.value is wrong and wrong.exit_code == 2 and service.now_s == 0.0


@pytest.mark.parametrize("code", ["ConnectionError", "RequestLimitExceeded", "InternalError", "503"])
def test_ec2_that_does_not_answer_is_awaited_as_well(code: str) -> None:
    service = Service(explain(code), StoreUnavailable("no"))
    assert service.patiently(_may_work_later) == "answer"


class Read(Reading):
    """A command line that has been parsed already."""

    def __init__(self, command: Command) -> None:
        self.argv, self._command = ["--dry-run"], command

    def result(self) -> Command:
        return self._command


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.run.first_contact._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("hf_spot.launch.supervisor.FirstContact", partial(FirstContact, limit_s=0.5))


def command_of(store: FaultyStore, **more: object) -> Command:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return Command(store, SpotArguments(notice="none"), 0, [sys.executable, "-c", "pass"], environ, **more)  # type: ignore[arg-type]


def out_for(times: int, tmp_path: Path) -> FaultyStore:
    faults = [Fault("*", occurrence=1 + number) for number in range(times)] if times else [Fault("*", occurrence=0)]
    return FaultyStore(open_store(tmp_path / "run"), faults)


@pytest.mark.usefixtures("hasty")
def test_a_launch_awaits_a_store_that_does_not_answer_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(Read(command_of(out_for(3, tmp_path), dry_run=True))) == 0
    with pytest.raises(NoAnswer) as told:
        launch(Read(command_of(out_for(0, tmp_path), dry_run=True)))
    assert told.value.exit_code == 75


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("machines", [Machines(), Machines(2, 1, "127.0.0.1")], ids=["claims", "joins"])
def test_a_launch_awaits_a_store_that_is_out_when_it_claims_or_joins(tmp_path: Path, machines: Machines) -> None:
    command = command_of(out_for(0, tmp_path), machines=machines)
    with pytest.raises(NoAnswer):
        Supervisor(Run(command.store), command).supervise()
    if machines.count == 1:
        command = command_of(out_for(8, tmp_path))
        assert Supervisor(Run(command.store), command).supervise() == 0
        assert Run(tmp_path / "run").state().launch == 1
