"""Machines that come and go, over real sockets and a real journal, all in this process: launchers without their trainings."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import hf_spot
from hf_spot.arguments import SpotArguments
from hf_spot.errors import ConfigError, NoAnswer
from hf_spot.launch.addresses import own_addresses
from hf_spot.launch.command import Machines
from hf_spot.launch.elastic import Elastic, Met
from hf_spot.launch.group import Hosting, Member, Present, Unreached, visit
from hf_spot.launch.peers import Ended, Host, join
from hf_spot.policy.restarts import Verdict
from hf_spot.run.mailbox import Mailbox
from hf_spot.run.run import Run
from hf_spot.run.told_steps import Heartbeat, Told
from hf_spot.runtime import Plan, Runtime, StepCounter
from hf_spot.storage.faulty import Fault, FaultyStore
from hf_spot.storage.open import open_store
from tests.waiting import wait_for

PATIENCE_S = 60.0


@dataclass
class Machine:
    """A launcher."""

    name: str
    elastic: Elastic
    noticed: threading.Event
    met: Met | Verdict | None = None

    @property
    def rank(self) -> int:
        assert isinstance(self.met, Met)
        return self.met.machines.rank

    def lost(self) -> Ended | None:
        assert isinstance(self.met, Met)
        return self.met.group.ended(PATIENCE_S)


@dataclass
class World:
    """A run, and the machines that meet in it."""

    url: str
    machines: list[Machine] = field(default_factory=list)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def add(self, least: int = 2, most: int = 3, *, faults: Sequence[Fault] = (), **more: Any) -> Machine:
        noticed, name = threading.Event(), f"machine-{len(self.machines)}"
        elastic = Elastic(
            Run(FaultyStore(open_store(self.url), faults)) if faults else Run(self.url),
            Machines(most, least=least, processes=more.pop("processes", 1)),
            SpotArguments(peer_timeout_s=5),
            lambda: {"hostname": name, "machine": {"price_usd_per_hour": 1.0}},
            noticed.wait,
            **more,
        )
        self.machines.append(Machine(name, elastic, noticed))
        return self.machines[-1]

    def meet(self, machine: Machine) -> Future[Any]:
        def meet() -> None:
            machine.met = machine.elastic.meet()

        return self.pool.submit(meet)

    def all_meet(self, *machines: Machine) -> list[Machine]:
        """By their ranks."""
        for met in [self.meet(one) for one in machines]:
            met.result(PATIENCE_S)
        launches = {one.met.launch for one in machines if isinstance(one.met, Met)}
        assert len(launches) == 1
        return sorted(machines, key=lambda one: one.rank)

    def claims(self) -> list[dict[str, Any]]:
        return [entry.data for entry in Run(self.url).events() if entry.kind == "claim"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(str(tmp_path / "run"))
    yield made
    for machine in made.machines:
        machine.noticed.set()
    made.pool.shutdown()
    for machine in made.machines:
        machine.elastic.close("the test is over")


def test_all_that_come_train_together_and_the_journal_says_who(world: World) -> None:
    ordered = world.all_meet(*(world.add() for _ in range(3)))
    assert [one.rank for one in ordered] == [0, 1, 2]
    [claim] = world.claims()
    assert claim["machines"] == len(claim["roster"]) == 3
    assert all(one["machine"] == {"price_usd_per_hour": 1.0} for one in claim["roster"])
    assert all(isinstance(one.met, Met) and one.met.machines.count == 3 for one in ordered)


def test_without_one_that_dies_the_others_go_on_at_once(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    first[2].elastic.close("killed")
    began = time.monotonic()
    assert first[0].lost() == first[1].lost() == Ended(2, Verdict.LOST, 1)
    assert time.monotonic() - began < 1.0
    assert world.all_meet(first[0], first[1]) == first[:2]
    assert [claim["machines"] for claim in world.claims()] == [3, 2]


def test_the_bell_of_each_rings_when_another_one_has_ended(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    groups = [one.met.group for one in first[:2] if isinstance(one.met, Met)]
    assert select.select([one.bell for one in groups], [], [], 0.0)[0] == []
    first[2].elastic.close("killed")
    for one in groups:
        assert select.select([one.bell], [], [], PATIENCE_S)[0]
        one.bell.silence()
        assert one.ended() == Ended(2, Verdict.LOST, 1)
    assert select.select([one.bell for one in groups], [], [], 0.0)[0] == []


def test_without_machine_0_another_one_claims_the_run(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    first[0].elastic.close("killed")
    assert first[1].lost() == first[2].lost() == Ended(0, Verdict.LOST, 1)
    assert {one.name for one in world.all_meet(first[1], first[2])} == {first[1].name, first[2].name}


def test_two_leave_in_the_same_second_and_one_of_them_is_machine_0(world: World) -> None:
    first = world.all_meet(*(world.add(most=4) for _ in range(4)))
    first[0].elastic.close("killed")
    first[1].elastic.close("killed")
    assert [one.lost() for one in first[2:]] == [Ended(0, Verdict.LOST, 1)] * 2
    came = world.add(most=4)  # and another one comes at that moment
    meeting = [world.meet(one) for one in (came, *first[2:])]
    # Three can't share the samples of four machines: whoever of the three opens the meeting, two train, and one is a spare.
    wait_for(lambda: sum(one.done() for one in meeting) == 2, "for two of three")
    assert [claim["machines"] for claim in world.claims()] == [4, 2]


def test_a_spare_that_comes_and_dies_again_and_again_disturbs_nobody(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    for _ in range(3):
        spare = world.add()
        coming = world.meet(spare)
        wait_for_a_spare(first[0])
        spare.noticed.set()
        coming.result(PATIENCE_S)
        spare.elastic.close("killed")
        wait_for(lambda: not present(first[0]).waiting, "for the end of the spare")
    for one in first:
        assert isinstance(one.met, Met)
        assert one.met.group.ended() is None
    assert len(world.claims()) == 1


def test_a_notice_while_the_others_are_awaited_lets_them_go_on_without_this_machine(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    meetings = [world.meet(one) for one in first[:2]]  # the third still ends its ranks
    wait_for(lambda: len(present(first[0]).waiting) == len(present(first[0]).busy) == 1, "for the second")
    assert not any(one.done() for one in meetings)
    first[1].noticed.set()
    meetings[1].result(PATIENCE_S)
    first[1].elastic.close("leaving")
    assert first[1].met is Verdict.PREEMPTED
    meetings.append(world.meet(first[2]))
    meetings[0].result(PATIENCE_S)
    meetings[2].result(PATIENCE_S)
    assert [first[0].rank, first[2].rank] == [0, 1]
    assert [claim["machines"] for claim in world.claims()] == [3, 2]


def test_below_the_minimum_the_rest_wait_for_another_one(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    first[0].elastic.close("killed")
    first[1].elastic.close("killed")
    first[2].lost()
    alone = world.meet(first[2])
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(2) == 1, "for the meeting")
    assert not alone.done()
    came = world.add()
    world.all_meet(came)
    alone.result(PATIENCE_S)
    assert {came.rank, first[2].rank} == {0, 1}


def present(host: Machine) -> Present:
    hosting = host.elastic._hosting
    assert hosting is not None
    return hosting.present()


def wait_for_a_spare(host: Machine) -> None:
    wait_for(lambda: present(host).waiting, "for the spare")


def test_one_that_comes_while_the_others_train_is_a_spare_and_replaces_the_next_that_goes(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    spare = world.add()
    coming = world.meet(spare)
    wait_for_a_spare(first[0])
    assert not coming.done()
    first[1].elastic.close("killed")
    first[0].lost()
    ordered = world.all_meet(first[0], first[2])
    coming.result(PATIENCE_S)
    assert [one.name for one in [*ordered, spare]] == [first[0].name, first[2].name, spare.name]
    assert spare.rank == 2


def test_a_spare_outlives_the_host_it_waited_for(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    spare = world.add()
    coming = world.meet(spare)
    wait_for_a_spare(first[0])
    first[0].elastic.close("killed")
    first[1].lost()
    ordered = world.all_meet(first[1], first[2])
    coming.result(PATIENCE_S)
    assert sorted([one.rank for one in [*ordered, spare]]) == [0, 1, 2]


def test_the_size_divides_the_samples_of_a_step_and_the_rest_are_spares(world: World) -> None:
    machines = [world.add(least=1, most=4) for _ in range(3)]
    meeting = [world.meet(one) for one in machines]
    wait_for(lambda: sum(one.done() for one in meeting) == 2, "for two of three: 3 do not divide 4")
    launched = [one for one in machines if one.met is not None]
    assert sorted(one.rank for one in launched) == [0, 1]
    launched[0].elastic.close("killed") if launched[0].rank else launched[1].elastic.close("killed")
    host = next(one for one in launched if one.rank == 0)
    host.lost()
    world.all_meet(host)
    for one in meeting:
        one.result(PATIENCE_S)
    assert world.claims()[-1]["machines"] == 2


def test_a_run_that_is_finished_ends_the_wait_of_a_spare(world: World) -> None:
    first = world.all_meet(*(world.add() for _ in range(3)))
    spare = world.add()
    coming = world.meet(spare)
    wait_for_a_spare(first[0])
    first[0].elastic.close("finished")
    coming.result(PATIENCE_S)
    assert spare.met is Verdict.FINISHED


def test_a_notice_ends_every_wait(world: World) -> None:
    alone = world.add()
    waiting = world.meet(alone)
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    alone.noticed.set()
    began = time.monotonic()
    waiting.result(PATIENCE_S)
    assert alone.met is Verdict.PREEMPTED
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["list", "create", "get"])
def test_a_store_that_does_not_answer_for_a_moment_ends_no_wait(
    world: World, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.elastic._STORE_PAUSE_S", 0.05)
    cut_off = [Fault(method, occurrence=call + later) for later in range(3)]
    first = world.all_meet(world.add(2, 2, faults=cut_off), world.add(2, 2, faults=cut_off))
    assert [one.rank for one in first] == [0, 1]


def test_a_store_that_no_longer_answers_ends_the_wait_after_the_time_for_a_meeting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.elastic._STORE_PAUSE_S", 0.05)
    monkeypatch.setattr("hf_spot.launch.elastic.MEETING_S", 0.5)
    with pytest.raises(NoAnswer) as told:
        world.add(faults=[Fault("list", occurrence=0)]).elastic.meet()
    assert told.value.exit_code == 75


def test_another_number_of_processes_is_refused_in_words(world: World) -> None:
    waiting = world.meet(world.add())
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    with pytest.raises(ConfigError, match="machine 0 runs 1 processes, and this machine 4"):
        world.add(processes=4).elastic.meet()
    assert not waiting.done()


def test_another_number_of_machines_and_another_script_are_refused_in_words(world: World) -> None:
    waiting = world.meet(world.add(words=["script", "--lr", "1"]))
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    with pytest.raises(ConfigError, match="machine 0 was started for at most 3 machines, and this machine for 4"):
        world.add(most=4, words=["script", "--lr", "1"]).elastic.meet()
    with pytest.raises(ConfigError, match="machine 0 runs another script, or another version of it"):
        world.add(words=["an older one", "--lr", "1"]).elastic.meet()
    assert not waiting.done()


def test_other_arguments_of_the_script_are_named_on_both_machines(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "hf_spot")
    world.all_meet(*(world.add(most=2, words=["script", "--lr", lr]) for lr in "12"))
    wait_for(lambda: len([one for one in caplog.messages if one.endswith("number 2")]) == 2, "for both to say so")


def test_a_machine_with_a_rank_is_told_that_the_others_have_none(world: World) -> None:
    world.meet(world.add())
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    told = {"machine": 1, "machines": 2, "member": None}
    assert "without --machine_rank" in stranger(world, **told)["refused"]


@contextlib.contextmanager
def fixed_machine_0(world: World) -> Iterator[Run]:
    """Machine 0 of two with ranks, which has claimed the run and waits for the other."""
    run, host, over = Run(world.url), Host(2), threading.Event()
    run.claim({"machines": 2})
    Mailbox(run).invite(host.invitation)
    waiting = world.pool.submit(host.meet, over.wait, PATIENCE_S, PATIENCE_S)
    try:
        yield run
        assert not waiting.done()
    finally:
        over.set()
        waiting.result(PATIENCE_S)


def test_a_machine_without_a_rank_is_refused_by_fixed_machines_that_wait(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        fixed_machine_0(world),
        pytest.raises(ConfigError, match="it was started with --machine_rank, and this machine without"),
    ):
        world.add(least=1).elastic.meet()
    assert "another machine was told: it was started with --machine_rank" in caplog.text
    assert len(world.claims()) == 1


def test_fixed_machines_that_train_lose_the_run_to_no_machine_without_a_rank(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with fixed_machine_0(world) as run:
        pass  # once all are there, nobody listens any more
    newcomer = world.add(least=1)
    coming = world.meet(newcomer)
    wait_for(lambda: "it begins another one if nothing is written to the run for 10 s" in caplog.text, "for the warning")
    run.record("notice", {"kind": "ADVISORY"})
    with pytest.raises(ConfigError, match="launch 1 has fixed machines"):
        coming.result(PATIENCE_S)
    assert len(world.claims()) == 1


def test_fixed_machines_that_train_refuse_one_without_a_rank_however_seldom_they_write(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    run, host = Run(world.url), Host(2)
    run.claim({"machines": 2})
    Mailbox(run).invite(host.invitation)
    waiting = world.pool.submit(host.meet, threading.Event().wait, PATIENCE_S, PATIENCE_S)
    joined = join(1, 2, "127.0.0.1", Mailbox(run).invitation, threading.Event().wait, PATIENCE_S, PATIENCE_S)
    main, port = waiting.result(PATIENCE_S), host.invitation["port"]
    assert joined is not None and main is not None
    with contextlib.closing(main), contextlib.closing(joined[1]):
        with pytest.raises(ConfigError, match="it was started with --machine_rank, and this machine without"):
            world.add(least=1).elastic.meet()
        assert "another machine was told: it was started with --machine_rank" in caplog.text
        with pytest.raises(TimeoutError):  # one of theirs comes again: it waits for the next launch, and disturbs nobody
            join(1, 2, "127.0.0.1", Mailbox(run).invitation, lambda _: False, PATIENCE_S, 0.1)
        assert main.ended() is None and joined[1].ended() is None
    assert len(world.claims()) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_fixed_machines_that_nobody_reaches_live_as_long_as_their_heart_beats(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def beat(step: int) -> None:
        heartbeat = Heartbeat(1, step, datetime.now(timezone.utc), {}, "out")
        Mailbox(run).tell_steps(1, Told(heartbeat=heartbeat))

    with fixed_machine_0(world) as run:
        beat(3)
    coming = world.meet(world.add(least=1))
    wait_for(lambda: "it begins another one if nothing is written to the run for 150 s" in caplog.text, "for the warning")
    beat(4)
    with pytest.raises(ConfigError, match="launch 1 has fixed machines"):
        coming.result(PATIENCE_S)
    assert len(world.claims()) == 1


def test_fixed_machines_that_are_gone_give_way_to_one_without_a_rank(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with fixed_machine_0(world):
        pass
    monkeypatch.setattr(Elastic, "_quiet_s", 0.5)
    newcomer = world.add(least=1, most=1)
    world.meet(newcomer).result(PATIENCE_S)
    assert isinstance(newcomer.met, Met) and newcomer.met.launch == 2


def test_a_command_that_has_changed_trains_on_where_another_one_has_finished_the_run(world: World) -> None:
    first = world.all_meet(*(world.add(most=2) for _ in range(2)))
    run = Run(world.url)
    run.adopt(1)
    run.journal.append("finished", {"step": 9, "exit_code": 0, "committed_step": 9})
    late = world.add(most=2)  # with the command that has finished it
    world.meet(late).result(PATIENCE_S)
    assert late.met is Verdict.FINISHED
    longer = world.all_meet(*(world.add(most=2, finished=1) for _ in range(2)))  # while the first ones still end
    assert [one.met.launch for one in longer if isinstance(one.met, Met)] == [2, 2]
    assert {one.name for one in longer}.isdisjoint(one.name for one in first)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"version": "99.0"}, f"machine 0 runs hf_spot {hf_spot.__version__}, and this machine 99.0"),
        ({"has_key": True}, "HF_SPOT_JOURNAL_KEY is not set on machine 0"),
        ({"nonce": "guessed"}, None),
        ({"member": {"id": 3}}, None),
        ({"member": None}, None),
    ],
)
def test_who_does_not_belong_is_refused(world: World, told: dict[str, Any], why: str | None) -> None:
    waiting = world.meet(world.add())
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    answer = stranger(world, **told)
    assert answer == {} if why is None else why in answer["refused"]
    assert not waiting.done()


def test_with_a_key_host_and_guest_prove_that_they_know_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPOT_JOURNAL_KEY", "k" * 32)
    ordered = world.all_meet(world.add(), world.add())
    assert [one.rank for one in ordered] == [0, 1]
    invitation = Mailbox(Run(world.url)).meeting(1, 0)
    assert invitation is not None
    with pytest.raises(Unreached):  # the host's proof is not what this guest expects
        visit(invitation, Member("x", "x", 1, most=3), b"another key", 5.0)
    assert "does not know" in stranger(world, attempt=0, has_key=True, proof="guessed")["refused"]


def test_strangers_delay_nobody(world: World) -> None:
    """Silent ones, one that never ends its line, and one that greets and never proves anything."""
    host = world.meet(world.add())
    wait_for(lambda: Mailbox(Run(world.url)).newest_attempt(1) == 1, "for the meeting")
    invitation = Mailbox(Run(world.url)).meeting(1, 1)
    assert invitation is not None
    strangers = [socket.create_connection(("127.0.0.1", invitation["port"])) for _ in range(150)]
    try:
        for one in strangers[-20:]:
            with contextlib.suppress(OSError):
                one.sendall(b"{")
        strangers[0].close()
        began = time.monotonic()
        guests = [world.meet(world.add()) for _ in range(2)]
        for one in [host, *guests]:
            one.result(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 4
    finally:
        for one in strangers:
            one.close()


@pytest.fixture
def hosting() -> Iterator[Hosting]:
    made = Hosting(Member("h", "h", 1), None, 5.0)
    yield made
    made.close("the test is over")


@pytest.mark.parametrize("addresses", [["::1"], ["127.0.0.1"], ["198.51.100.7", "no address", "127.0.0.1"]])
def test_of_many_addresses_the_one_that_answers_is_taken(hosting: Hosting, addresses: list[str]) -> None:
    if "::1" in addresses and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    guest = visit({**hosting.invitation, "addresses": addresses}, Member("g", "g", 1), None, 5.0)
    guest.ready()
    wait_for(lambda: [one.name for one in hosting.present().waiting] == ["g"], "for the guest")
    go = hosting.start(4, ["g"], 29500)
    found = guest.wait_for_go(PATIENCE_S)
    assert found is not None
    assert (found.launch, found.rank, found.members, found.main_ip) == (4, 1, ("h", "g"), addresses[-1])
    assert go.own_ip == found.main_ip
    guest.close()
    assert hosting.ended(PATIENCE_S) == Ended(1, Verdict.LOST, 1)


def test_a_port_where_nobody_listens_is_told_from_a_machine_that_does_not_answer(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_spot.launch.group.GREETING_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    invitation = {**hosting.invitation, "addresses": ["127.0.0.1"], "port": port}
    with pytest.raises(Unreached) as closed:
        visit(invitation, Member("g", "g", 1), None, 5.0)
    with socket.create_server(("127.0.0.1", 0)) as frozen, pytest.raises(Unreached) as silent:
        visit({**invitation, "port": frozen.getsockname()[1]}, Member("g", "g", 1), None, 5.0)
    assert (closed.value.is_gone, silent.value.is_gone) == (True, False)
    for strange in (
        {},
        {"addresses": "127.0.0.1", "port": port},
        {"addresses": [], "port": 0},
        {"addresses": [3], "port": "x"},
    ):
        with pytest.raises(Unreached):
            visit(strange, Member("g", "g", 1), None, 5.0)


def test_a_machine_that_connects_again_is_not_there_already(hosting: Hosting) -> None:
    first = visit(hosting.invitation, Member("g", "g", 1), None, 5.0)
    first.ready()
    wait_for(lambda: hosting.present().waiting, "for the guest")
    hosting.start(4, ["g"], 29500)
    again = visit(hosting.invitation, Member("g", "g", 1), None, 5.0)
    assert hosting.ended(PATIENCE_S) == Ended(1, Verdict.LOST, 1)
    assert [one.id for one in hosting.present().waiting] == ["g"]
    assert first.ended(PATIENCE_S) == Ended(0, Verdict.LOST, 1)
    for one in (first, again):
        one.close()


def test_a_host_that_another_one_was_faster_than_closes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.launch.group._TICK_S", 2 * PATIENCE_S)
    began_s = time.monotonic()
    Hosting(Member("a", "a", 1), None, 5.0).close("another machine was first")
    assert time.monotonic() - began_s < PATIENCE_S


def test_a_host_that_says_nothing_is_lost_and_a_guest_likewise(hosting: Hosting) -> None:
    guest = visit(hosting.invitation, Member("g", "g", 1), None, 0.3)  # the host says something once a second
    assert guest.ended(PATIENCE_S) == Ended(0, Verdict.LOST, 1)
    assert not guest.was_closed
    guest.close()


def test_a_machine_that_was_frozen_does_not_take_that_time_for_silence_of_the_others(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = visit(hosting.invitation, Member("g", "g", 1), None, 30.0)
    wait_for(lambda: hosting.present().waiting, "for the guest")
    clock = time.monotonic
    monkeypatch.setattr("hf_spot.launch.group.time.monotonic", lambda: clock() + 1000.0)
    assert guest.ended(1.0) is None
    assert hosting.present().waiting
    guest.close()


def test_an_interface_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="--interface nowhere0 does not exist"):
        own_addresses("nowhere0")
    with pytest.raises(ConfigError, match="--interface lo has no address"):
        own_addresses("lo")


def test_a_machine_that_was_fenced_looks_for_the_others(world: World) -> None:
    """Frozen while the others went on: it claims nothing, and waits as a spare."""
    first = world.all_meet(*(world.add() for _ in range(2)))
    Run(world.url).claim({"by": "somebody who has claimed the run meanwhile"})
    first[1].elastic.close("killed")
    first[0].lost()
    again = world.meet(first[0])
    came = world.meet(world.add())
    for one in (again, came):
        one.result(PATIENCE_S)
    assert [claim.get("machines") for claim in world.claims()] == [2, None, 2]


def test_a_spare_is_taken_in_when_that_is_worth_it(world: World, tmp_path: Path) -> None:
    later_s = [0.0]
    clock = {"clock": lambda: time.monotonic() + later_s[0]}
    first = world.all_meet(*(world.add(most=4, **clock) for _ in range(2)))
    spares = [world.meet(world.add(most=4)) for _ in range(2)]
    wait_for(lambda: len(present(first[0]).waiting) == 2, "for the spares")
    runtime = Runtime(world.url, 1, tmp_path, SpotArguments())
    StepCounter(runtime.step_path).tell(9)  # the first training of the script has ended
    steps = StepCounter(runtime.step_path_of(2))
    host = first[0].elastic

    def look(step: int) -> str | None:
        steps.tell(step)
        later_s[0] += 1.1
        return host.look(runtime)

    runtime.tell_plan(Plan(5, 8))
    assert look(1) is None  # how long a step takes is not known
    later_s[0] += 1.0  # what a change costs is measured: from the meeting to the first step
    assert look(3) is None  # two more steps are not worth one
    runtime.tell_plan(Plan(10**6, 8))
    host.forget_plan()
    assert look(4) == "from 2 to 4 machines"
    assert first[1].elastic.look(runtime) is None  # the host decides
    ordered = world.all_meet(*first)
    for one in spares:
        one.result(PATIENCE_S)
    assert world.claims()[-1]["machines"] == 4
    assert [one.name for one in ordered] == [one.name for one in first]


def test_the_samples_of_a_step_are_known_before_anything_is_committed(world: World, tmp_path: Path) -> None:
    first = world.all_meet(*(world.add(least=1) for _ in range(3)))
    runtime = Runtime(world.url, 1, tmp_path, SpotArguments())
    runtime.tell_plan(Plan(100, 24))  # of which two machines get the same number, although two do not divide three
    for one in first:
        one.elastic.look(runtime)
        one.elastic.concluded(Verdict.PREEMPTED)
    first[2].elastic.close("killed")
    first[0].lost()
    world.all_meet(*first[:2])
    assert [claim["machines"] for claim in world.claims()] == [3, 2]


def stranger(world: World, attempt: int = 1, proof: str | None = None, **more: Any) -> dict[str, Any]:
    """The last answer to somebody who knows the invitation; empty if there is none."""
    invitation = Mailbox(Run(world.url)).meeting(1, attempt)
    assert invitation is not None
    hello = {
        "nonce": invitation["nonce"],
        "challenge": "c",
        "member": {"id": "x", "name": "x", "ranks": 1, "about": {}, "most": 3, "words": []},
        "has_key": False,
        "version": hf_spot.__version__,
        **more,
    }
    with socket.create_connection(("127.0.0.1", invitation["port"]), PATIENCE_S) as connection:
        lines = connection.makefile()
        connection.sendall(json.dumps(hello).encode() + b"\n")
        if proof is not None:
            lines.readline()
            connection.sendall(json.dumps({"proof": proof}).encode() + b"\n")
        told: dict[str, Any] = json.loads(lines.readline() or "{}")
        return told
