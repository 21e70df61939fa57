"""A machine of the local spot cloud: a network namespace, a disk, a metadata service, and a process tree that boots in it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from hf_spot.testing import FakeIMDS
from tests import hosts
from tests.spotcloud import guest

IMDS_ADDRESS = "169.254.169.254"
_CLONE_NEWNET = 0x40000000
_SHUT_DOWN_S = 60.0
_REPOSITORY = Path(__file__).parents[2]


def why_not() -> str | None:
    """Why there can't be machines here, or None."""
    if reason := hosts.why_not():
        return reason
    for program in ("unshare", "setpriv", "mount"):
        if shutil.which(program) is None:
            return f"no machines: {program} of util-linux is not installed"
    layers = "lowerdir=/,upperdir=$d/u,workdir=$d/w"
    probe = f"d=$(mktemp -d) && mount -t tmpfs none $d && mkdir $d/u $d/w $d/r && mount -t overlay none $d/r -o {layers}"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--uts", "--fork", "sh", "-c", probe], capture_output=True, text=True
    )
    return f"no machines: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """One that runs from construction until it shuts itself down or is killed.

    Args:
        space: where it gets its network; `tests.hosts.Hosts`, entered.
        metadata: what its metadata service answers.
        user_data: the script that it runs at its first boot, or nothing.
        files: further files on its disk.
    """

    def __init__(self, space: hosts.Hosts, metadata: Mapping[str, str], user_data: bytes, files: Mapping[str, str]) -> None:
        self._killed = False
        number = space.add()
        self.address = space.address(number)
        self.folder = space.folder(number)
        shutil.copy(guest.__file__, self.folder)
        (self.folder / "user-data").write_bytes(user_data)
        settings = {
            "hostname": f"ip-{self.address.replace('.', '-')}",
            "python": sys.executable,
            "visible": [str(_REPOSITORY), sys.prefix, sys.base_prefix],
            "files": {"/sys/class/dmi/id/sys_vendor": "Amazon EC2\n", **files},
        }
        (self.folder / "settings.json").write_text(json.dumps(settings))
        name = space.space(number)
        subprocess.run(["ip", "-n", name, "addr", "add", f"{IMDS_ADDRESS}/32", "dev", "lo"], check=True)
        local = {"local-ipv4": self.address, "hostname": settings["hostname"]}
        self.imds = _within(name, lambda: FakeIMDS(host=IMDS_ADDRESS, port=80, metadata={**local, **metadata})).start()
        # setpriv: gone with this process, however that ends; unshare's child is process 1 of the machine.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child=KILL"]
        program = [sys.executable, "-I", "-S", self.folder / "guest.py", "boot", self.folder / "settings.json"]
        with open(self.folder / "console.log", "ab") as console:
            self.process = space.start(
                number,
                [*command, *program],
                {"PATH": guest.PATH},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def shut_itself_down(self) -> bool | None:
        """Whether it ended by a shutdown of its own, or None while it runs."""
        code = self.process.poll()
        return None if code is None else code == 0

    def read(self, path: str) -> str:
        """A file on its disk, while it runs."""
        [first] = self.process.children()
        return Path("/proc", str(first.pid), "root", path.lstrip("/")).read_text()

    def shut_down(self) -> None:
        """Presses the button: units are told to stop, and have as long as they asked for."""
        for one in self.process.children():
            one.send_signal(signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(_SHUT_DOWN_S)

    def kill(self) -> None:
        """Pulls the plug: kill -9 of everything at once."""
        if not self._killed:
            self._killed = True
            hosts.kill(self.process)
            self.imds.stop()

    def text(self) -> str:
        """What it said: its console, and its units."""
        logs = sorted(
            {path.resolve() for path in [*self.folder.glob("*.log"), *self.folder.glob("log/*.log")] if path.is_file()}
        )
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs)


def _within(space: str, make: Callable[[], FakeIMDS]) -> FakeIMDS:
    """Has a thread of its own, which ends, enter a network namespace: a socket stays where it was made."""
    made: list[FakeIMDS | BaseException] = []

    def enter() -> None:
        try:
            with open(f"/run/netns/{space}") as name:
                if ctypes.CDLL(None, use_errno=True).setns(name.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), space)
            made.append(make())
        except BaseException as error:  # goes to the caller
            made.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]
