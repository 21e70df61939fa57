"""Launchers that meet over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hf_spot.launch.peers import Ended, Host, Peers, Refused, join
from hf_spot.policy.restarts import Verdict

TIMEOUT_S = 20.0


class Meeting:
    """One host and its guests, all in this process."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(8)
        self.invitation: tuple[int, dict[str, Any]] | None = None
        self.gave_up = threading.Event()
        self.peers: list[Peers] = []

    def host(self, machines: int) -> Any:
        made = Host(machines)
        self.invitation = (7, made.invitation)
        return self.pool.submit(made.meet, self.gave_up.wait, TIMEOUT_S, TIMEOUT_S)

    def guest(self, machine: int, machines: int, timeout_s: float = TIMEOUT_S) -> Any:
        address = "127.0.0.1"
        return self.pool.submit(
            join, machine, machines, address, lambda: self.invitation, self.gave_up.wait, timeout_s, TIMEOUT_S
        )

    def together(self, machines: int, timeout_s: float = TIMEOUT_S) -> list[Peers]:
        host = self.host(machines)
        guests = [self.guest(machine, machines, timeout_s) for machine in range(1, machines)]
        found = [guest.result() for guest in guests]
        assert [launch for launch, _ in found] == [7] * (machines - 1)
        self.peers = [host.result(), *(peers for _, peers in found)]
        return self.peers


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    made = Meeting()
    yield made
    made.gave_up.set()
    for peers in made.peers:
        peers.close()
    made.pool.shutdown()


def test_a_failure_on_one_machine_is_known_to_all(meeting: Meeting) -> None:
    host, one, two = meeting.together(3)
    assert host.ended() is None
    one.tell(1, Verdict.FAILED, 3)
    assert host.ended(TIMEOUT_S) == two.ended(TIMEOUT_S) == Ended(1, Verdict.FAILED, 3)


def test_a_connection_that_closes_without_a_word_is_a_machine_lost(meeting: Meeting) -> None:
    host, one, two = meeting.together(3)
    meeting.peers.remove(one)
    one.close()
    assert host.ended(TIMEOUT_S) == two.ended(TIMEOUT_S) == Ended(1, Verdict.LOST, 1)


def test_a_last_word_before_the_connection_closes_is_believed(meeting: Meeting) -> None:
    host, one = meeting.together(2)
    meeting.peers.remove(one)
    one.tell(1, Verdict.FINISHED, 0)
    one.close()
    assert host.ended(TIMEOUT_S) == Ended(1, Verdict.FINISHED, 0)


def test_one_that_is_lost_counts_more_than_one_that_ended_well(meeting: Meeting) -> None:
    host, one, two = meeting.together(3)
    one.tell(1, Verdict.PREEMPTED, 75)
    assert host.ended(TIMEOUT_S) == Ended(1, Verdict.PREEMPTED, 75)
    meeting.peers.remove(two)
    two.close()
    assert one.ended(TIMEOUT_S) == Ended(2, Verdict.LOST, 1)
    assert host.ended() == Ended(2, Verdict.LOST, 1)


def test_a_machine_that_falls_silent_is_lost() -> None:
    silent, connection = socket.socketpair()
    peers = Peers({1: connection}, 0.5)
    try:
        assert peers.ended(TIMEOUT_S) == Ended(1, Verdict.LOST, 1)
    finally:
        peers.close()
        silent.close()


def test_bytes_that_are_no_message_end_the_connection_and_nothing_else() -> None:
    stranger, connection = socket.socketpair()
    peers = Peers({1: connection}, TIMEOUT_S)
    try:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        assert peers.ended(TIMEOUT_S) == Ended(1, Verdict.LOST, 1)
    finally:
        peers.close()
        stranger.close()


def test_a_meeting_left_behind_misleads_nobody(meeting: Meeting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    meeting.invitation = (6, {"port": port, "nonce": "of a dead launch"})
    guest = meeting.guest(1, 2)
    host = meeting.host(2)
    launch, peers = guest.result()
    meeting.peers = [host.result(), peers]
    assert launch == 7


def test_strangers_are_sent_away(meeting: Meeting) -> None:
    host = meeting.host(2)
    assert meeting.invitation is not None
    for hello in (b'{"nonce": "guessed", "machine": 1, "machines": 2}\n', b"[]\n", b"\n"):
        with socket.create_connection(("127.0.0.1", meeting.invitation[1]["port"]), TIMEOUT_S) as stranger:
            stranger.sendall(hello)
            assert stranger.recv(100) == b""
    launch, peers = meeting.guest(1, 2).result()
    meeting.peers = [host.result(), peers]
    assert launch == 7


@pytest.mark.parametrize(("machine", "machines", "why"), [(1, 3, "--num_machines 2"), (5, 2, "there is no machine 5")])
def test_numbers_that_do_not_fit_are_refused_in_words(meeting: Meeting, machine: int, machines: int, why: str) -> None:
    meeting.host(2)
    with pytest.raises(Refused, match=why):
        meeting.guest(machine, machines).result()


def test_whoever_waits_can_be_told_to_stop(meeting: Meeting) -> None:
    host, guest = meeting.host(3), meeting.guest(1, 3)
    meeting.gave_up.set()
    assert host.result() is None
    assert guest.result() is None


def test_patience_ends() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"machines \[1\] did not connect"):
        Host(2).meet(never.wait, TIMEOUT_S, 0.1)
    with pytest.raises(TimeoutError, match=r"machine 0 at .* did not answer"):
        join(1, 2, "127.0.0.1", lambda: None, never.wait, TIMEOUT_S, 0.0)


def test_strangers_of_any_kind_keep_nobody_out(meeting: Meeting) -> None:
    """Silent ones, slow ones, those that never end their line, and more of them than there is room for."""
    host = meeting.host(3)
    assert meeting.invitation is not None
    address = ("127.0.0.1", meeting.invitation[1]["port"])
    ended = threading.Event()
    strangers = [socket.create_connection(address) for _ in range(200)]

    def trickle() -> None:
        while not ended.wait(0.05):
            for stranger in strangers[-20:]:
                with contextlib.suppress(OSError):
                    stranger.sendall(b"{")

    slow = threading.Thread(target=trickle)
    slow.start()
    try:
        lines = [b"[" * 4000 + b"\n", b"x" * 9000, b"\xff\n", b"3\n", b'{"nonce":[]}\n']
        for stranger, line in zip(strangers[-30:-25], lines, strict=True):
            with contextlib.suppress(OSError):
                stranger.sendall(line)
        began = time.monotonic()
        guests = [meeting.guest(machine, 3) for machine in (1, 2)]
        meeting.peers = [host.result(), *(guest.result()[1] for guest in guests)]
        assert time.monotonic() - began < TIMEOUT_S / 2
    finally:
        ended.set()
        slow.join()
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("machines", [2, 3])
def test_a_slow_stranger_delays_no_notice(meeting: Meeting, machines: int) -> None:
    host = meeting.host(machines)
    assert meeting.invitation is not None
    with socket.create_connection(("127.0.0.1", meeting.invitation[1]["port"])) as stranger:
        stranger.sendall(b"{")
        time.sleep(0.5)
        assert not host.done()
        began = time.monotonic()
        meeting.gave_up.set()
        assert host.result() is None
        assert time.monotonic() - began < TIMEOUT_S / 2


def test_a_stranger_in_the_place_of_machine_0_delays_no_notice(meeting: Meeting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        meeting.invitation = (7, {"port": stranger.getsockname()[1], "nonce": "x"})
        guest = meeting.guest(1, 2)
        connection, _ = stranger.accept()
        with connection:
            connection.sendall(b'{"wait":')
            time.sleep(0.5)
            assert not guest.done()
            began = time.monotonic()
            meeting.gave_up.set()
            assert guest.result() is None
            assert time.monotonic() - began < TIMEOUT_S / 2


def test_who_trickles_is_sent_away_after_one_deadline_for_all_of_it(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_spot.launch.peers.GREETING_S", 0.5)
    meeting.host(2)
    assert meeting.invitation is not None
    with socket.create_connection(("127.0.0.1", meeting.invitation[1]["port"])) as stranger:
        stranger.settimeout(0.1)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < TIMEOUT_S:
                stranger.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    if not stranger.recv(1):
                        break
        assert time.monotonic() - began < TIMEOUT_S / 2
