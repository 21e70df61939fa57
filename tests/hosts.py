"""Several hosts on this machine: network namespaces joined by a bridge, each with its own address, loopback, shared memory and
folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.zygote import Zygote

# `ip netns exec` has given the command a mount namespace of its own.
_WITH_OWN_MEMORY = 'mount -t tmpfs tmpfs /dev/shm && exec "$0" "$@"'


def why_not() -> str | None:
    """Why there can't be hosts here, or None."""
    if shutil.which("ip") is None:
        return "no network namespaces: iproute2 is not installed"
    if os.geteuid() != 0:
        return "no network namespaces: needs root"
    probe = f"hfspot-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process of this user chooses a network meanwhile."""
    with open(Path(tempfile.gettempdir(), f"hf_spot-tests-nets-{os.geteuid()}"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_net() -> str:
    """The beginning of addresses that no bridge has: two networks of one name would answer for each other."""
    listed = json.loads(subprocess.run(["ip", "-j", "-4", "addr"], check=True, capture_output=True, text=True).stdout)
    taken = {address["local"].rpartition(".")[0] for link in listed for address in link.get("addr_info", ())}
    return random.SystemRandom().choice([net for third in range(1, 255) if (net := f"10.213.{third}") not in taken])


class Hosts:
    """``with Hosts(2, folder) as hosts:`` makes them; everything that runs on them is killed at the end.

    Args:
        count: of hosts.
        folder: each host gets a folder of its own in it, ``host-0`` and so on.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self._folder = folder
        self._name = f"hf{random.SystemRandom().randrange(16**5):05x}"
        self._net = ""
        self.processes: list[psutil.Popen] = []

    def __enter__(self) -> Hosts:
        try:
            self._ip("link", "add", self._name, "type", "bridge")
            with _alone():
                self._net = _free_net()
                self._ip("addr", "add", f"{self.outside}/24", "dev", self._name)
            self._ip("link", "set", self._name, "up")
            for host in range(self.count):
                self._make(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            kill(process)
        for host in range(self.count):
            subprocess.run(["ip", "netns", "delete", self.space(host)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._name], capture_output=True)

    @property
    def outside(self) -> str:
        """This machine's address, as the hosts see it."""
        return f"{self._net}.254"

    def add(self) -> int:
        """One more; its number."""
        self.count += 1
        self._make(self.count - 1)
        return self.count - 1

    def address(self, host: int) -> str:
        return f"{self._net}.{host + 1}"

    def folder(self, host: int) -> Path:
        return self._folder / f"host-{host}"

    def start(
        self, host: int, command: Sequence[str | Path], env: Mapping[str, str], zygote: Zygote | None = None, **more: Any
    ) -> psutil.Popen:
        """Runs a command on a host, in its folder. A Python is forked from the zygote, if there is one."""
        within = ["ip", "netns", "exec", self.space(host), "sh", "-c", _WITH_OWN_MEMORY, *map(str, command)]
        if zygote is None:
            process = psutil.Popen(within, env=dict(env), cwd=self.folder(host), **more)
        else:
            with zygote.forking(self.space(host)):
                process = psutil.Popen([*map(str, command)], env=dict(env), cwd=self.folder(host), **more)
        self.processes.append(process)
        return process

    def unplug(self, host: int) -> None:
        """From now on nothing that the host sends arrives anywhere: not even that its connections are closed."""
        self._ip("link", "set", f"{self._name}-{host}", "down")

    def plug_in(self, host: int) -> None:
        self._ip("link", "set", f"{self._name}-{host}", "up")

    def space(self, host: int) -> str:
        """Name of its network namespace."""
        return f"{self._name}-host-{host}"

    def _make(self, host: int) -> None:
        space, link = self.space(host), f"{self._name}-{host}"
        self._ip("netns", "add", space)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        self._ip("link", "set", link, "master", self._name, "up")
        self._ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._ip("-n", space, "link", "set", "eth0", "up")
        self._ip("-n", space, "link", "set", "lo", "up")
        self.folder(host).mkdir()

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


def kill(process: psutil.Popen) -> None:
    """kill -9 of a process and of everything below it."""
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=30)
