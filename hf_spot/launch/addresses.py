"""The addresses of this machine: those that others may reach it at, and the network interface of each."""

from __future__ import annotations

import ipaddress
import socket
import time

import psutil

from hf_spot.errors import ConfigError

_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))  # reserved for documentation
_TRY_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1


def own_addresses(interface: str | None = None) -> list[str]:
    """Return the addresses at which other machines may reach this one, the most likely first: that of the default route.

    Loopback is left out unless there is nothing else: then all machines are on this one.

    Args:
        interface: take only the addresses of this network interface; None takes those of all.

    Raises:
        ConfigError: there is no such interface, or it has no address.
    """
    by_interface = {
        name: [part.address for part in parts if part.family in (socket.AF_INET, socket.AF_INET6)]
        for name, parts in psutil.net_if_addrs().items()
    }
    if interface is not None:
        found = [one for one in by_interface.get(interface, []) if _is_usable(one)]
        if not found:
            why = "has no address that other machines reach" if interface in by_interface else "does not exist"
            raise ConfigError(
                f"--interface {interface} {why}", hint=f"one of {', '.join(sorted(by_interface))}; ip -br addr shows them"
            )
        return found
    every = [one for parts in by_interface.values() for one in parts if _is_usable(one)]
    routed = [address for family, where in _ELSEWHERE if (address := _source(family, where)) in every]
    return list(dict.fromkeys([*routed, *every])) or ["127.0.0.1"]


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address of this machine, or None."""
    found = [name for name, parts in psutil.net_if_addrs().items() if any(part.address == address for part in parts)]
    return found[0] if found else None


def plain(address: str) -> str:
    """Return an IPv4 address that a socket shows in the form of IPv6 as IPv4, and any other as it is."""
    return address.removeprefix("::ffff:") if "." in address else address


def _is_usable(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a scope, such as fe80::1%eth0
        return False
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_multicast or parsed.is_unspecified)


def _source(family: socket.AddressFamily, where: str) -> str:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((where, 1))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:  # no route, or no IPv6
        return ""


def wait_for_listener(address: str, port: int, limit_s: float) -> bool:
    """Wait until somebody listens on a port of another machine. Return False if nobody does after ``limit_s`` seconds."""
    until_s, pause_s = time.monotonic() + limit_s, _FIRST_PAUSE_S
    while (left_s := until_s - time.monotonic()) > 0:
        if _listens(address, port, min(_TRY_S, left_s)):
            return True
        time.sleep(min(pause_s, left_s))
        pause_s = min(_LONGEST_PAUSE_S, 1.3 * pause_s)
    return False


def _listens(address: str, port: int, timeout_s: float) -> bool:
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.settimeout(timeout_s)
            probe.bind(("", 0))
            if probe.getsockname()[1] == port:  # on one machine it would reach itself, and take the port from who is to listen
                return False
            probe.connect(target)
            return True
    except OSError:
        return False
