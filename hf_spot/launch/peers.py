"""Connect the launchers of one training on several machines: they meet, exchange heartbeats, and report how they end.

torchrun's agents connect the ranks, but they start too early (a machine may come back before the others know that it was gone)
and detect failures too late: when a machine dies, the others wait in a collective for half an hour. Therefore:

* Machine 0 claims the run, listens on a port, and writes the port to the store under its new launch, with a nonce. The others
  read it and connect. When all are connected, machine 0 sends "go". A connection proves that a machine is alive, so an
  invitation left behind by a dead launch does no harm.
* From then on each machine sends a line every second. Silence for ``timeout_s``, or a connection that closes without a final
  message, means that the machine is lost; machine 0 informs the others.

Lines are JSON, one message each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_spot.launch.addresses import own_addresses
from hf_spot.launch.bell import Bell
from hf_spot.policy.restarts import Verdict

log = logging.getLogger("hf_spot")

BEAT_S = 1.0
GREETING_S = 5.0
_SAY_EVERY_S = 30.0
_TICK_S = 0.2
_LONGEST_LINE_BYTES = 4096
LONGEST_MESSAGE_BYTES = 65536  # between machines that know each other
_WITHOUT_RANK = "it was started with --machine_rank, and this machine without it"
_MOST_STRANGERS = 128  # connections that have not identified themselves yet

Wait = Callable[[float], bool]  # waits for a number of seconds; True if there is no point in waiting any longer


@dataclass(frozen=True)
class Ended:
    """How the launch ended on another machine. ``verdict`` is LOST if it sent no final message."""

    machine: int
    verdict: Verdict
    code: int


class Peers:
    """The connections of a launch that has begun.

    Args:
        connections: to each other machine on machine 0; to machine 0 on the others.
        timeout_s: silence after which a machine counts as lost.
        clock: seconds, monotonic.
        reception: answers machines that come now; owned by this object.
    """

    def __init__(
        self,
        connections: dict[int, socket.socket],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        reception: Reception | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._connections = dict(connections)
        self._heard_at = dict.fromkeys(connections, clock())
        self._buffers = dict.fromkeys(connections, b"")
        self._changed = threading.Condition()
        self.bell = Bell()  # as `hf_spot.launch.group.Group.bell`
        self._ended: dict[int, Ended] = {}
        self._said: list[tuple[int, dict[str, Any]]] = []
        self._sending = threading.Lock()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        for machine, connection in connections.items():
            connection.settimeout(GREETING_S)
            self._selector.register(connection, selectors.EVENT_READ, machine)
        self._reception = reception
        if reception is not None:
            self._selector.register(reception, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._work, name="hf_spot-peers", daemon=True)
        self._thread.start()

    def ended(self, wait_s: float = 0.0) -> Ended | None:
        """Return a machine that has ended, preferably one that failed or was lost; None if all are still running.

        Args:
            wait_s: how long to wait for one to end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended, wait_s)
            found = sorted(self._ended.values(), key=lambda one: one.verdict in (Verdict.FINISHED, Verdict.PREEMPTED))
            return found[0] if found else None

    def tell(self, machine: int, verdict: Verdict, code: int) -> None:
        """Tell the other machines how the launch ended on this one."""
        self._send_to_all(_ended_message(Ended(machine, verdict, code)))

    def say(self, about: dict[str, Any]) -> None:
        """Send a message to machine 0, or from machine 0 to all others."""
        self._send_to_all({"say": about})

    def said(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what other machines have sent by `say` since the last call, each with the machine."""
        with self._changed:
            said, self._said = self._said, []
            return said

    def close(self) -> None:
        """Close the connections. If `tell` was not called before, the others consider this machine lost."""
        with self._changed:
            self._closing = True
        self._thread.join()
        for connection in self._connections.values():
            connection.close()
        if self._reception is not None:
            self._reception.close()
        self._selector.close()
        self.bell.close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        beat_at = self._clock()
        while not self._closing:
            for key, _ in self._selector.select(_TICK_S):
                if key.data is not None:
                    self._read(key.data)
            if self._reception is not None:
                self._reception.answer()
            if self._clock() >= beat_at:
                beat_at = self._clock() + BEAT_S
                self._send_to_all({"beat": True})
            for machine in list(self._heard_at):
                if self._clock() - self._heard_at[machine] > self._timeout_s:
                    self._gone(machine)

    def _read(self, machine: int) -> None:
        try:
            data = self._connections[machine].recv(LONGEST_MESSAGE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._gone(machine)
            return
        self._heard_at[machine] = self._clock()
        *lines, self._buffers[machine] = (self._buffers[machine] + data).split(b"\n")
        try:
            if len(self._buffers[machine]) > LONGEST_MESSAGE_BYTES:
                raise ValueError("too long a line")
            for message in map(decode, lines):
                if isinstance(about := message.get("say"), dict):
                    with self._changed:
                        self._said.append((machine, about))
                if "ended" in message:
                    self._note(Ended(message["ended"], Verdict(message["verdict"]), message["code"]))
        except (ValueError, KeyError):
            self._gone(machine)

    def _gone(self, machine: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._connections[machine])
        self._heard_at.pop(machine, None)
        self._note(Ended(machine, Verdict.LOST, 1))

    def _note(self, ended: Ended) -> None:
        with self._changed:
            if self._closing or ended.machine in self._ended:
                return
            self._ended[ended.machine] = ended
            self._changed.notify_all()
            self.bell.ring()
        if len(self._connections) > 1:  # machine 0 of three or more: the others are connected only through it
            self._send_to_all(_ended_message(ended), besides=ended.machine)

    def _send_to_all(self, message: dict[str, Any], besides: int | None = None) -> None:
        alive = {machine: self._connections[machine] for machine in list(self._heard_at) if machine != besides}
        with self._sending:
            _tell_all(alive, message)


class Host:
    """Machine 0 of a meeting.

    Args:
        machines: number of machines, including this one.
    """

    def __init__(self, machines: int) -> None:
        self._machines = machines
        self._nonce = uuid.uuid4().hex
        dual = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
        self._listener.setblocking(False)

    @property
    def invitation(self) -> dict[str, Any]:
        """Return what the other machines need in order to connect; a machine that was started without a rank is refused."""
        return {"port": self._listener.getsockname()[1], "nonce": self._nonce, "addresses": own_addresses(), "is_fixed": True}

    def meet(self, wait: Wait, timeout_s: float, patience_s: float) -> Peers | None:
        """Wait for the other machines. Return None if ``wait`` says that there is no point in waiting.

        Args:
            wait: see `Wait`.
            timeout_s: of the `Peers`.
            patience_s: how long to wait.

        Raises:
            TimeoutError: a machine did not connect.
        """
        guests: dict[int, socket.socket] = {}
        began = said = beat = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._listener)
            door = stack.enter_context(contextlib.closing(Door(self._listener)))
            while True:
                if time.monotonic() - beat > BEAT_S:
                    beat = time.monotonic()
                    _tell_all(guests, {"wait": True})
                for connection, line in door.arrivals(_TICK_S):
                    self._greet(connection, line, guests)
                for machine in [one for one, connection in guests.items() if not _is_alive(connection)]:
                    guests.pop(machine).close()
                if len(guests) == self._machines - 1:
                    break
                missing = sorted(set(range(1, self._machines)) - guests.keys())
                if time.monotonic() - said > _SAY_EVERY_S:
                    said = time.monotonic()
                    log.info("waiting for machines %s", ", ".join(map(str, missing)))
                if wait(0.0) or time.monotonic() - began > patience_s:
                    for connection in guests.values():
                        connection.close()
                    if time.monotonic() - began > patience_s:
                        raise TimeoutError(f"machines {missing} did not connect within {patience_s:.0f} s")
                    return None
            _tell_all(guests, {"go": True})
            stack.pop_all()
            return Peers(guests, timeout_s, reception=Reception(self._listener, door, self._nonce))

    def _greet(self, connection: socket.socket, line: bytes, guests: dict[int, socket.socket]) -> None:
        connection.settimeout(GREETING_S)
        try:
            hello = decode(line)
            if hello.get("nonce") != self._nonce:
                raise ValueError("it does not belong to this launch")
            why = None
            if "member" in hello:  # as `hf_spot.launch.group.visit` greets
                why = _WITHOUT_RANK
            elif hello.get("machines") != self._machines:
                why = f"machine 0 was started with --num_machines {self._machines}"
            elif hello.get("machine") not in range(1, self._machines):
                why = f"there is no machine {hello.get('machine')} of {self._machines}"
            elif hello["machine"] in guests and _is_alive(guests[hello["machine"]]):
                why = f"machine {hello['machine']} is already connected"
            if why is not None:
                send(connection, {"refused": why})
                raise ValueError(f"another machine was told: {why}" if "member" in hello else why)
            guests[hello["machine"]] = connection
        except (OSError, ValueError) as error:
            _send_away(connection, error)


class Reception:
    """Tells machines that were started without a rank, while fixed machines train, that they can't join: otherwise they would
    take the run from machines that seldom write to it. A fixed machine that comes again tries until the next launch begins.

    Args:
        listener: on the port of the invitation.
        door: of the listener.
        nonce: of the invitation.
    """

    def __init__(self, listener: socket.socket, door: Door, nonce: str) -> None:
        self._listener = listener
        self._door = door
        self._nonce = nonce

    def fileno(self) -> int:
        """As `Door.fileno`."""
        return self._door.fileno()

    def answer(self) -> None:
        """Answer those that have greeted; wait for nobody."""
        for connection, line in self._door.arrivals(0.0):
            with connection, contextlib.suppress(OSError, ValueError):
                hello = decode(line)
                if hello.get("nonce") == self._nonce and "member" in hello:
                    connection.settimeout(GREETING_S)
                    send(connection, {"refused": _WITHOUT_RANK})
                    log.warning("refused a connection: another machine was told: %s", _WITHOUT_RANK)

    def close(self) -> None:
        """Close the port."""
        self._door.close()
        self._listener.close()


class Door:
    """Connections that have not identified themselves. Each has one deadline for its entire first line, and delays no other.

    Args:
        listener: accepts them, without blocking.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._waiting: dict[socket.socket, tuple[float, bytes]] = {}  # the deadline, and the bytes received so far

    def arrivals(self, timeout_s: float) -> list[tuple[socket.socket, bytes]]:
        """Wait for at most ``timeout_s`` seconds. Return connections with their first line; the caller then owns them."""
        found = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):
                    self._admit(self._listener.accept()[0])
            elif isinstance(key.fileobj, socket.socket) and (line := self._read(key.fileobj)) is not None:
                found.append((key.fileobj, line))
        for connection in [one for one, (until, _) in self._waiting.items() if time.monotonic() > until]:
            self._refuse(connection, TimeoutError(f"no greeting in {GREETING_S:.0f} s"))
        return found

    def fileno(self) -> int:
        """Return a descriptor that can be read from when `arrivals` has something to do."""
        return self._selector.fileno()

    def close(self) -> None:
        """Close the remaining connections."""
        for connection in [*self._waiting]:
            self._forget(connection)
            connection.close()
        self._selector.close()

    def _admit(self, connection: socket.socket) -> None:
        if len(self._waiting) >= _MOST_STRANGERS:
            self._refuse(next(iter(self._waiting)), ConnectionError("too many connections at once"))
        connection.setblocking(False)
        self._waiting[connection] = time.monotonic() + GREETING_S, b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> bytes | None:
        if connection not in self._waiting:  # refused in this round
            return None
        until, line = self._waiting[connection]
        try:
            data = connection.recv(_LONGEST_LINE_BYTES)
            if not data and not line:  # of several addresses it has tried, another one answered first; or a health check
                self._forget(connection)
                connection.close()
                return None
            if not data:
                raise ConnectionError("closed")
            line += data
            if b"\n" not in line and len(line) >= _LONGEST_LINE_BYTES:
                raise ValueError("too long a line")
        except (BlockingIOError, InterruptedError):
            return None
        except (OSError, ValueError) as error:
            self._refuse(connection, error)
            return None
        if b"\n" not in line:
            self._waiting[connection] = until, line
            return None
        self._forget(connection)
        return line.partition(b"\n")[0]

    def _refuse(self, connection: socket.socket, why: Exception) -> None:
        self._forget(connection)
        _send_away(connection, why)

    def _forget(self, connection: socket.socket) -> None:
        del self._waiting[connection]
        self._selector.unregister(connection)


def _send_away(connection: socket.socket, why: Exception) -> None:
    log.warning("refused a connection: %s", why)
    connection.close()


class Refused(Exception):
    """Machine 0 refused this machine, and would refuse it again."""


def join(
    machine: int,
    machines: int,
    address: str,
    read_invitation: Callable[[], tuple[int, dict[str, Any]] | None],
    wait: Wait,
    timeout_s: float,
    patience_s: float,
) -> tuple[int, Peers] | None:
    """Connect to machine 0, from any other machine, and wait until all machines are connected.

    Args:
        machine: rank of this machine.
        machines: number of machines.
        address: of machine 0.
        read_invitation: returns the newest launch and the invitation of its machine 0, or None.
        wait: see `Wait`.
        timeout_s: of the `Peers`; also for machine 0, which sends a line every second while it waits.
        patience_s: how long to try.

    Returns:
        The number of the launch, and the connections; None if ``wait`` said that there is no point in waiting.

    Raises:
        Refused: the machines were started with numbers that do not match.
        TimeoutError: the machines did not meet within ``patience_s``.
    """
    began = said = time.monotonic()
    while True:
        invitation = read_invitation()
        if invitation is not None:
            launch, found = invitation
            connection = _connect(machine, machines, address, found, wait, timeout_s)
            if connection is not None:
                return launch, Peers({0: connection}, timeout_s)
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            log.info("waiting for machine 0 at %s", address)
        if time.monotonic() - began > patience_s:
            raise TimeoutError(f"machine 0 at {address} did not answer within {patience_s:.0f} s")
        if wait(BEAT_S):
            return None


def _connect(
    machine: int, machines: int, address: str, invitation: dict[str, Any], wait: Wait, timeout_s: float
) -> socket.socket | None:
    """Return a connection once machine 0 has sent "go"; None if it is not there, or disappears."""
    try:
        connection = socket.create_connection((address, invitation["port"]), GREETING_S)
    except (OSError, KeyError, TypeError, OverflowError):
        return None
    try:
        connection.settimeout(GREETING_S)
        send(connection, {"nonce": invitation.get("nonce"), "machine": machine, "machines": machines})
        heard_at, line = time.monotonic(), b""
        connection.settimeout(_TICK_S)
        while not wait(0.0) and time.monotonic() - heard_at < timeout_s:
            byte = _read_byte(connection)
            line += byte
            if byte != b"\n":
                if len(line) > _LONGEST_LINE_BYTES:
                    raise ValueError("too long a line")
                continue
            message, line, heard_at = decode(line), b"", time.monotonic()
            if "refused" in message:
                raise Refused(message["refused"])
            if "go" in message:
                return connection
    except (OSError, ValueError):
        pass
    except Refused:
        connection.close()
        raise
    connection.close()
    return None


def _tell_all(connections: dict[int, socket.socket], message: dict[str, Any]) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):  # a broken connection is found by reading
            send(connection, message)


def _ended_message(ended: Ended) -> dict[str, Any]:
    return {"ended": ended.machine, "verdict": ended.verdict.value, "code": ended.code}


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message. Raises OSError."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def decode(line: bytes) -> dict[str, Any]:
    """Return the message in a line. Raises ValueError if it is not a message."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("too deep a message") from error
    if not isinstance(message, dict):
        raise ValueError(f"not a message: {line!r}")
    return message


def _read_byte(connection: socket.socket) -> bytes:
    """Read one byte only, so that later messages stay in the socket. Return b"" after a timeout. Raises OSError at the end."""
    try:
        byte = connection.recv(1)
    except TimeoutError:
        return b""
    if not byte:
        raise ConnectionError("closed")
    return byte


def _is_alive(connection: socket.socket) -> bool:
    before = connection.gettimeout()
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(before)
