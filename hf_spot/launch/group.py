"""The machines of a training that come and go: connections that stand from the meeting to the end, over all launches.

One machine is the host (`Hosting`), which all others (`Visiting`) are connected to. A guest waits until the host says "go" with
its rank; a guest that comes while the others train is a spare. Messages are lines of JSON, as between the machines of a fixed
launch (`hf_spot.launch.peers`), whose `Door` keeps strangers from delaying anyone. With a key, host and guest prove to each
other that they know it before anything else is said: HMAC-SHA-256 over two random challenges.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import hf_spot
from hf_spot.errors import EXIT_PREEMPTED
from hf_spot.launch.addresses import own_addresses, plain
from hf_spot.launch.bell import Bell
from hf_spot.launch.peers import BEAT_S, GREETING_S, LONGEST_MESSAGE_BYTES, Door, Ended, Refused, decode, log, send
from hf_spot.policy.restarts import Verdict

FINISHED, HUNG = "finished", "hung"  # why a host closes
_TICK_S = 0.2
_CONNECT_S = 2.0


class Group(Protocol):
    """What a launch needs of the connections to the other machines."""

    @property
    def bell(self) -> Bell:
        """Is rung when another machine has ended."""

    def ended(self, wait_s: float = 0.0) -> Ended | None:
        """As `hf_spot.launch.peers.Peers.ended`."""

    def tell(self, machine: int, verdict: Verdict, code: int) -> None:
        """As `hf_spot.launch.peers.Peers.tell`."""

    def say(self, about: dict[str, Any]) -> None:
        """As `hf_spot.launch.peers.Peers.say`."""

    def said(self) -> list[tuple[int, dict[str, Any]]]:
        """As `hf_spot.launch.peers.Peers.said`."""


@dataclass(frozen=True)
class Member:
    """A machine.

    Args:
        id: different for each launcher that is started, so that a machine that comes again is not taken for the one before.
        name: for people.
        ranks: that it runs.
        about: what the journal records of it.
        most: machines that may train, by its command line.
        words: digests of the words of its command, the script first.
    """

    id: str
    name: str
    ranks: int
    about: dict[str, Any] = field(default_factory=dict)
    most: int = 0
    words: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, told: Any) -> Member:
        """Return the member in a message. Raises ValueError."""
        try:
            made = cls(**told)
        except TypeError as error:
            raise ValueError(f"not a machine: {told!r}") from error
        if not (isinstance(made.id, str) and isinstance(made.name, str) and type(made.ranks) is int):
            raise ValueError(f"not a machine: {told!r}")
        if not (isinstance(made.about, dict) and type(made.most) is int and isinstance(made.words, list)):
            raise ValueError(f"not a machine: {told!r}")
        return made


@dataclass(frozen=True)
class Go:
    """The beginning of a launch.

    Args:
        launch: its number.
        rank: of this machine.
        members: ids of all machines, by rank.
        main_ip: where machine 0 is reached from here.
        own_ip: where this machine is reached from machine 0.
        port: for the ranks to find each other.
    """

    launch: int
    rank: int
    members: tuple[str, ...]
    main_ip: str
    own_ip: str
    port: int


class Channel:
    """A connection, from which whole messages are read.

    Args:
        connection: owned by the channel from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        self._sending = threading.Lock()
        self.heard_s = time.monotonic()
        connection.settimeout(GREETING_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived. Raises OSError if it is closed, ValueError for anything but messages."""
        data = self.connection.recv(LONGEST_MESSAGE_BYTES)
        if not data:
            raise ConnectionError("closed")
        self.heard_s = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_MESSAGE_BYTES:
            raise ValueError("too long a line")
        return [decode(line) for line in lines]

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. A connection that is broken is found by reading."""
        with contextlib.suppress(OSError), self._sending:
            send(self.connection, message)

    def forgive(self, looked_s: float, now_s: float) -> None:
        """Do not take the time for silence in which this machine itself was frozen: it wakes with connections that look whole,
        and the others may live.

        Args:
            looked_s: when its messages were read for the last time before; they are read again and again.
            now_s: when they were read now.
        """
        if now_s - looked_s > 2 * BEAT_S:
            self.heard_s = min(self.heard_s + now_s - looked_s, now_s)

    @property
    def own_ip(self) -> str:
        """Return this machine's address."""
        return plain(self.connection.getsockname()[0])

    @property
    def other_ip(self) -> str:
        """Return the other machine's address."""
        return plain(self.connection.getpeername()[0])


def _proof(key: bytes | None, whose: str, nonce: str, challenges: Iterable[str]) -> str:
    return hmac.new(key or b"", "\n".join((whose, nonce, *challenges)).encode(), "sha256").hexdigest()


def _differing(own: Sequence[str], other: Sequence[str]) -> str:
    """Return in words which arguments of two commands differ: those that it names are counted from 1."""
    if len(own) != len(other):
        return f"{len(own) - 1} here, {len(other) - 1} there"
    return f"number {', '.join(str(index) for index, (one, two) in enumerate(zip(own, other, strict=True)) if one != two)}"


class _Endings:
    """What the other machines have said about the launch under way: how it has ended there, and whatever else."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.bell = Bell()
        self._ended: dict[int, Ended] = {}
        self._said: list[tuple[int, dict[str, Any]]] = []

    def begin(self) -> None:
        with self.changed:
            self._ended, self._said = {}, []

    def keep(self, machine: int, about: Any) -> None:
        if isinstance(about, dict):
            with self.changed:
                self._said.append((machine, about))

    def said(self) -> list[tuple[int, dict[str, Any]]]:
        with self.changed:
            said, self._said = self._said, []
            return said

    def note(self, ended: Ended) -> bool:
        """Return whether it is new."""
        with self.changed:
            if ended.machine in self._ended:
                return False
            self._ended[ended.machine] = ended
            self.changed.notify_all()
            self.bell.ring()
            return True

    def first(self, wait_s: float) -> Ended | None:
        with self.changed:
            self.changed.wait_for(lambda: self._ended, wait_s)
            found = sorted(self._ended.values(), key=lambda one: one.verdict in (Verdict.FINISHED, Verdict.PREEMPTED))
            return found[0] if found else None


# -- the host ---------------------------------------------------------------------------------------------------------


@dataclass
class _Guest:
    channel: Channel
    member: Member
    expected: str  # its proof
    until_s: float  # when it must have proven
    is_proven: bool = False
    rank: int | None = None  # in the launch whose ranks may still run there


@dataclass(frozen=True)
class Present:
    """The guests of a host.

    Args:
        waiting: are ready for a launch, in the order in which they came.
        busy: have not ended the launch before.
        changed_s: when one has come or gone for the last time.
        lost_silently: how many of the launch were lost without their connection being closed.
        gone: ids of those that have gone, whether their connection was closed or they fell silent.
    """

    waiting: tuple[Member, ...]
    busy: tuple[Member, ...]
    changed_s: float
    lost_silently: int
    gone: frozenset[str]


class Hosting:
    """Machine 0: listens from construction until `close`.

    Args:
        me: this machine.
        key: that guests must know; None for none.
        timeout_s: silence after which a machine counts as lost.
        interface: the network interface to be reached by; None for any.

    Raises:
        ConfigError: there is no such interface.
    """

    def __init__(self, me: Member, key: bytes | None, timeout_s: float, interface: str | None = None) -> None:
        self.me = me
        self._key = key
        self._timeout_s = timeout_s
        self._addresses = own_addresses(interface)
        self._nonce = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self._door = Door(self._listener)
        self._guests: dict[socket.socket, _Guest] = {}
        self._endings = _Endings()
        self._launch = 0
        self._count = 1
        self._changed_s = time.monotonic()
        self._lost_silently = 0
        self._gone_ids: set[str] = set()
        self._closing = False
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._work, name="hf_spot-host", daemon=True)
        self._thread.start()

    @property
    def invitation(self) -> dict[str, Any]:
        """Return what other machines need to find this one."""
        return {"addresses": self._addresses, "port": self._listener.getsockname()[1], "nonce": self._nonce}

    def present(self) -> Present:
        """Return the guests that are here."""
        with self._endings.changed:
            known = [one for one in self._guests.values() if one.is_proven]
            return Present(
                tuple(one.member for one in known if one.rank is None),
                tuple(one.member for one in known if one.rank is not None),
                self._changed_s,
                self._lost_silently,
                frozenset(self._gone_ids),
            )

    def start(self, launch: int, guests: Sequence[str], port: int) -> Go:
        """Begin a launch with these guests, in the order of their ranks, and keep the others as spares.

        Args:
            launch: its number, which this machine has claimed.
            guests: their ids.
            port: for the ranks.
        """
        members = (self.me.id, *guests)
        own = "127.0.0.1"
        self._endings.begin()
        with self._endings.changed:
            self._launch, self._count, self._lost_silently = launch, len(members), 0
            there = {one.member.id: one for one in self._guests.values() if one.is_proven}
            for rank, id in enumerate(members[1:], 1):
                if (guest := there.get(id)) is None:
                    self._endings.note(Ended(rank, Verdict.LOST, 1))
                    continue
                guest.rank, own = rank, guest.channel.own_ip
                guest.channel.send({"go": {"launch": launch, "rank": rank, "members": members, "port": port}})
            for guest in there.values():
                if guest.rank is None:
                    guest.channel.send({"spare": launch})
        return Go(launch, 0, members, own, own, port)

    @property
    def bell(self) -> Bell:
        """As `Group.bell`."""
        return self._endings.bell

    def ended(self, wait_s: float = 0.0) -> Ended | None:
        """As `Group.ended`."""
        return self._endings.first(wait_s)

    def tell(self, machine: int, verdict: Verdict, code: int) -> None:
        """As `Group.tell`."""
        self._tell_members(Ended(machine, verdict, code))

    def say(self, about: dict[str, Any]) -> None:
        """As `Group.say`."""
        for guest in self._known():
            if guest.rank is not None:
                guest.channel.send({"say": about, "launch": self._launch})

    def said(self) -> list[tuple[int, dict[str, Any]]]:
        """As `Group.said`."""
        return self._endings.said()

    def close(self, why: str) -> None:
        """Tell the guests that this machine goes, and close all connections.

        Args:
            why: `FINISHED` if the run is, `HUNG` if it hangs for good; anything else lets them meet again.
        """
        self._closing = True
        self._waker.close()  # the thread need not wait any longer, and neither do machines that meet elsewhere
        self._thread.join()
        self._woken.close()
        for guest in self._guests.values():
            guest.channel.send({"bye": why})
            guest.channel.connection.close()
        self._door.close()
        self._listener.close()
        self._selector.close()
        self._endings.bell.close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        beat_s = looked_s = time.monotonic()
        while not self._closing:
            for key, _ in self._selector.select(_TICK_S):
                if isinstance(key.fileobj, socket.socket) and key.fileobj in self._guests:
                    self._read(self._guests[key.fileobj])
            for connection, line in self._door.arrivals(0.0):
                self._greet(connection, line)
            now = time.monotonic()
            for guest in self._known():
                guest.channel.forgive(looked_s, now)
            looked_s = now
            if now >= beat_s:
                beat_s = now + BEAT_S
                for guest in self._known():
                    guest.channel.send({"beat": True})
            for guest in list(self._guests.values()):
                if guest.is_proven and now - guest.channel.heard_s > self._timeout_s:
                    self._gone(guest, silently=True)
                elif not guest.is_proven and now > guest.until_s:
                    self._gone(guest)

    def _known(self) -> list[_Guest]:
        return [one for one in list(self._guests.values()) if one.is_proven]

    def _greet(self, connection: socket.socket, line: bytes) -> None:
        try:
            channel = Channel(connection)
            hello = decode(line)
            if not hmac.compare_digest(str(hello.get("nonce")).encode(), self._nonce.encode()):
                raise ValueError("it does not belong to this meeting")
            if "machines" in hello:  # as `hf_spot.launch.peers.join` greets
                told = "it was started without --machine_rank, and this one with it"
                channel.send({"refused": told})
                raise ValueError(told)
            member = Member.of(hello.get("member"))
            if (why := self._why_not(hello, member)) is not None:
                channel.send({"refused": why})
                raise ValueError(why)
        except (OSError, ValueError) as error:
            log.warning("refused a connection: %s", error)
            connection.close()
            return
        challenges = str(hello.get("challenge")), secrets.token_hex(16)
        channel.send({"challenge": challenges[1], "proof": _proof(self._key, "host", self._nonce, challenges)})
        expected = _proof(self._key, "guest", self._nonce, challenges)
        with self._endings.changed:
            self._guests[connection] = _Guest(channel, member, expected, time.monotonic() + GREETING_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _why_not(self, hello: dict[str, Any], member: Member) -> str | None:
        if hello.get("version") != hf_spot.__version__:
            return f"machine 0 runs hf_spot {hf_spot.__version__}, and this machine {hello.get('version')}"
        if hello.get("has_key") is not (self._key is not None):
            return f"HF_SPOT_JOURNAL_KEY is {'' if self._key else 'not '}set on machine 0, and here it is the other way round"
        if member.ranks != self.me.ranks:
            return f"machine 0 runs {self.me.ranks} processes, and this machine {member.ranks}"
        if member.most != self.me.most:  # the samples of a step are those of so many
            return f"machine 0 was started for at most {self.me.most} machines, and this machine for {member.most}"
        if member.words[:1] != self.me.words[:1]:
            return "machine 0 runs another script, or another version of it"
        return None

    def _read(self, guest: _Guest) -> None:
        try:
            for message in guest.channel.read():
                self._hear(guest, message)
        except (OSError, ValueError, KeyError, TypeError):
            self._gone(guest)

    def _hear(self, guest: _Guest, message: dict[str, Any]) -> None:
        if not guest.is_proven:
            if not hmac.compare_digest(str(message.get("proof")).encode(), guest.expected.encode()):
                guest.channel.send({"refused": "it does not know the HF_SPOT_JOURNAL_KEY of machine 0"})
                raise ValueError("a wrong proof")
            for other in self._known():
                if other.member.id == guest.member.id:  # its connection broke, and it has noticed that first
                    self._gone(other)
            with self._endings.changed:
                guest.is_proven, self._changed_s = True, time.monotonic()
                self._gone_ids.discard(guest.member.id)
            log.info("machine %s is here", guest.member.name)
            self._tell_who_is_here()
            if guest.member.words != self.me.words:
                told = _differing(self.me.words, guest.member.words)
                name = guest.member.name
                log.warning("machine %s was started with other arguments of the script than this one: %s", name, told)
                guest.channel.send({"words": self.me.words})
        elif "ready" in message and guest.rank is not None and message["ready"] == self._launch:  # not an earlier launch
            with self._endings.changed:
                rank, guest.rank = guest.rank, None
            self._tell_members(ended := Ended(rank, Verdict.PREEMPTED, EXIT_PREEMPTED))
            self._endings.note(ended)
        elif "ended" in message and guest.rank is not None and message["launch"] == self._launch:
            ended = Ended(guest.rank, Verdict(message["verdict"]), int(message["code"]))
            if self._endings.note(ended):
                self._tell_members(ended)
        elif "say" in message and guest.rank is not None and message["launch"] == self._launch:
            self._endings.keep(guest.rank, message["say"])

    def _gone(self, guest: _Guest, *, silently: bool = False) -> None:
        self._selector.unregister(guest.channel.connection)
        with self._endings.changed:
            del self._guests[guest.channel.connection]
            if guest.is_proven:
                self._changed_s = time.monotonic()
                self._gone_ids.add(guest.member.id)
            if guest.rank is not None:
                self._lost_silently += silently
        guest.channel.connection.close()
        if guest.is_proven:
            self._tell_who_is_here()
            log.info("machine %s is gone%s", guest.member.name, ": no sign of life" if silently else "")
        if guest.rank is not None and self._endings.note(ended := Ended(guest.rank, Verdict.LOST, 1)):
            self._tell_members(ended)

    def _tell_who_is_here(self) -> None:
        """Tell all guests whom to expect when they meet without this machine."""
        known = self._known()
        for guest in known:
            guest.channel.send({"here": [one.member.id for one in known]})

    def _tell_members(self, ended: Ended) -> None:
        for guest in self._known():
            if guest.rank is not None and guest.rank != ended.machine:
                guest.channel.send(_ended_message(ended, self._launch))


# -- a guest ----------------------------------------------------------------------------------------------------------


class Unreached(Exception):
    """Nobody who belongs to the meeting has answered.

    Args:
        is_gone: the other machine itself says that nobody listens there.
    """

    def __init__(self, *, is_gone: bool) -> None:
        super().__init__("nobody answers")
        self.is_gone = is_gone


def visit(
    invitation: dict[str, Any], me: Member, key: bytes | None, timeout_s: float, interface: str | None = None
) -> Visiting:
    """Connect to a host.

    Args:
        invitation: that the host has published.
        me: this machine.
        key: that the host must know; None for none.
        timeout_s: silence after which the host counts as lost.
        interface: the network interface to use; None for any.

    Raises:
        Refused: the host will not have this machine, and says why.
        Unreached: it can't be reached, or is not who it says.
    """
    nonce, challenge = str(invitation.get("nonce")), secrets.token_hex(16)
    sources = own_addresses(interface) if interface is not None else []
    connection = _connect(invitation, sources)
    try:
        channel = Channel(connection)
        hello = {"nonce": nonce, "challenge": challenge, "member": asdict(me)}
        send(connection, {**hello, "version": hf_spot.__version__, "has_key": key is not None})
        messages: list[dict[str, Any]] = []
        until_s = time.monotonic() + GREETING_S
        while not messages and time.monotonic() < until_s:
            messages = channel.read()
        answer = messages[0] if messages else {}
        if "refused" in answer:
            raise Refused(str(answer["refused"]))
        challenges = challenge, str(answer.get("challenge"))
        expected = _proof(key, "host", nonce, challenges)
        if not hmac.compare_digest(str(answer.get("proof")).encode(), expected.encode()):
            log.warning("%s does not know the key of the run: it is no machine of ours", channel.other_ip)
            raise Unreached(is_gone=False)
        send(connection, {"proof": _proof(key, "guest", nonce, challenges)})
        return Visiting(channel, timeout_s, me.words)
    except (OSError, ValueError) as error:
        connection.close()
        raise Unreached(is_gone=isinstance(error, ConnectionError)) from error
    except BaseException:
        connection.close()
        raise


def _connect(invitation: dict[str, Any], sources: Sequence[str]) -> socket.socket:
    """Try all addresses at once, and return the connection that stands first. Raises Unreached."""
    addresses, port = invitation.get("addresses"), invitation.get("port")
    if not isinstance(addresses, list) or type(port) is not int or not 0 < port < 65536:
        raise Unreached(is_gone=False)
    tried: dict[socket.socket, str] = {}
    refused = 0
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for address in map(str, addresses):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = stack.enter_context(contextlib.closing(socket.socket(family, socket.SOCK_STREAM)))
            made.setblocking(False)
            try:
                if source := next((one for one in sources if (":" in one) == (":" in address)), None):
                    made.bind((source, 0))
                code = made.connect_ex((address, port))
            except (OSError, ValueError):
                continue
            if code in (0, errno.EINPROGRESS):
                tried[made] = address
                selector.register(made, selectors.EVENT_WRITE)
            refused += code == errno.ECONNREFUSED
        until_s = time.monotonic() + _CONNECT_S
        while tried and (left_s := until_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                made = next(one for one in tried if one is key.fileobj)
                selector.unregister(made)
                del tried[made]
                code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0 and made.getsockname() != made.getpeername():  # of a free port, one may reach oneself
                    return made.dup()
                refused += code in (0, errno.ECONNREFUSED)
    raise Unreached(is_gone=refused == len(addresses))


class Visiting:
    """A guest's connection to its host, until `close`. Made by `visit`.

    Args:
        channel: the connection.
        timeout_s: silence after which the host counts as lost.
        words: as in `Member`.
    """

    def __init__(self, channel: Channel, timeout_s: float, words: Sequence[str] = ()) -> None:
        self._channel = channel
        self._words = words
        self._timeout_s = timeout_s
        self._endings = _Endings()
        self._launch = 0
        self._rank = 0
        self._go: Go | None = None
        self.lost_s: float | None = None  # when the host was heard for the last time, once it is lost
        self.was_closed = False  # the connection was closed, by the host or by the kernel of a machine whose launcher died
        self.bye: str | None = None
        self.here: frozenset[str] = frozenset()  # ids of the host's guests, spares included
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="hf_spot-guest", daemon=True)
        self._thread.start()

    def ready(self) -> None:
        """Tell the host that no rank runs here any more."""
        self._channel.send({"ready": self._launch})

    def wait_for_go(self, wait_s: float) -> Go | None:
        """Return the launch that the host begins, or None if it has not for ``wait_s`` seconds, or is lost."""
        with self._endings.changed:
            self._endings.changed.wait_for(lambda: self._go is not None or self.lost_s is not None, wait_s)
            go, self._go = self._go, None
            return go

    @property
    def bell(self) -> Bell:
        """As `Group.bell`."""
        return self._endings.bell

    def ended(self, wait_s: float = 0.0) -> Ended | None:
        """As `Group.ended`."""
        return self._endings.first(wait_s)

    def tell(self, machine: int, verdict: Verdict, code: int) -> None:
        """As `Group.tell`."""
        self._channel.send(_ended_message(Ended(machine, verdict, code), self._launch))

    def say(self, about: dict[str, Any]) -> None:
        """As `Group.say`."""
        self._channel.send({"say": about, "launch": self._launch})

    def said(self) -> list[tuple[int, dict[str, Any]]]:
        """As `Group.said`."""
        return self._endings.said()

    def close(self) -> None:
        """Close the connection."""
        self._closing = True
        self._thread.join()
        self._channel.connection.close()
        self._endings.bell.close()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        beat_s = looked_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.connection, selectors.EVENT_READ)
            while not self._closing and self.lost_s is None:
                if selector.select(_TICK_S):
                    self._read()
                now = time.monotonic()
                self._channel.forgive(looked_s, now)
                looked_s = now
                if now >= beat_s:
                    beat_s = now + BEAT_S
                    self._channel.send({"beat": True})
                if self.lost_s is None and now - self._channel.heard_s > self._timeout_s:
                    self._lose()

    def _read(self) -> None:
        try:
            for message in self._channel.read():
                self._hear(message)
        except (OSError, ValueError, KeyError, TypeError):
            self.was_closed = True
            self._lose()

    def _hear(self, message: dict[str, Any]) -> None:
        if "go" in message:
            told = message["go"]
            channel = self._channel
            go = Go(
                int(told["launch"]),
                int(told["rank"]),
                tuple(map(str, told["members"])),
                channel.other_ip,
                channel.own_ip,
                int(told["port"]),
            )
            self._endings.begin()
            with self._endings.changed:
                self._go, self._launch, self._rank = go, go.launch, go.rank
                self._endings.changed.notify_all()
        elif "ended" in message and message["launch"] == self._launch:
            self._endings.note(Ended(int(message["ended"]), Verdict(message["verdict"]), int(message["code"])))
        elif "say" in message and message["launch"] == self._launch:
            self._endings.keep(0, message["say"])
        elif "words" in message:
            told = _differing(self._words, list(map(str, message["words"])))
            log.warning("machine 0 was started with other arguments of the script than this machine: %s", told)
        elif "spare" in message:
            log.info("launch %s has enough machines: this one waits as a spare", message["spare"])
        elif "here" in message:
            self.here = frozenset(map(str, message["here"]))
        elif "bye" in message:
            self.bye = str(message["bye"])

    def _lose(self) -> None:
        self._endings.note(Ended(0, Verdict.LOST, 1))
        with self._endings.changed:
            self.lost_s = self._channel.heard_s
            self._endings.changed.notify_all()


def _ended_message(ended: Ended, launch: int) -> dict[str, Any]:
    return {"ended": ended.machine, "verdict": ended.verdict.value, "code": ended.code, "launch": launch}
