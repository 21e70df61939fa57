"""What runs inside a machine of the local spot cloud: its init, and stand-ins for systemctl, shutdown, apt and pip.

One program with several names, as busybox is. It imports the standard library only, and is run without site-packages.
``boot`` is process 1 of the machine: it lays a disk of its own over this machine's (an overlay in memory), and then does what
cloud-init and systemd do: runs the user data, and the units that this starts. Units are interpreted as far as `_KNOWN` goes; a
key that would be ignored in silence is an error instead.
"""

from __future__ import annotations

import configparser
import ctypes
import gzip
import json
import os
import pwd
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOST = Path("/run/spotcloud")  # a folder of the cloud's, seen inside every machine
PROGRAM = HOST / "guest.py"
STATES = Path("/run/systemd/spotcloud")
SYSTEM_CONF = "/etc/systemd/system.conf.d/spotcloud.conf"
UNITS = (Path("/etc/systemd/system"), Path("/run/systemd/system"))
USER_DATA = Path("/var/lib/cloud/instance/scripts/part-001")
NAMES = ("systemctl", "journalctl", "shutdown", "poweroff", "apt-get", "apt", "pip", "pip3", "python3", "python")
_PATIENCE_S = 10.0  # between SIGTERM and SIGKILL when the machine shuts down

_KNOWN = {
    "Unit": {
        "OnSuccess",
        "OnFailure",
        "StartLimitIntervalSec",
        "StartLimitBurst",
        "StartLimitAction",
        "SuccessAction",
        "FailureAction",
    },
    "Service": {
        *("Type", "ExecStartPre", "ExecStart", "ExecStartPost", "ExecStop", "ExecStopPost", "RemainAfterExit"),
        *("Environment", "EnvironmentFile", "PassEnvironment", "WorkingDirectory", "User", "StandardOutput", "StandardError"),
        *("Restart", "RestartSec", "RestartPreventExitStatus", "RestartForceExitStatus", "SuccessExitStatus"),
        *("KillMode", "KillSignal", "TimeoutStopSec", "TimeoutSec"),
    },
    "Timer": {"OnBootSec", "OnActiveSec", "OnUnitActiveSec", "Unit"},
}
# What makes no difference here: order at boot (there is none), time limits at start, sandboxes.
_WITHOUT_EFFECT = {
    *("Description", "Documentation", "After", "Before", "Wants", "Requires", "DefaultDependencies", "WantedBy"),
    *("TimeoutStartSec", "LimitNOFILE", "LimitMEMLOCK", "TasksMax", "OOMPolicy", "OOMScoreAdjust", "Nice", "UMask", "Group"),
    *("NoNewPrivileges", "PrivateTmp", "ProtectSystem", "ProtectHome", "SyslogIdentifier", "AccuracySec", "RuntimeMaxSec"),
    *("SendSIGKILL", "Slice", "Delegate", "ConditionPathExists"),
}


class Unusable(Exception):
    """Something that this small systemd can't do, or a real one would refuse."""


# -- the machine ------------------------------------------------------------------------------------------------------


def boot(settings_path: str) -> int:
    """Process 1. Its exit code is 0 when the machine shut itself down."""
    settings = json.loads(Path(settings_path).read_text())
    _lay_disk(Path(settings_path).parent, settings)
    socket.sethostname(settings["hostname"])
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that the wait below ends
    _run_user_data()
    while not stopping:
        _reap()
        signal.sigtimedwait([], 0.05)
    _say("the machine shuts down")
    active = [
        one.name.removesuffix(".json")
        for one in STATES.glob("*.json")
        if _state(one.name.removesuffix(".json")).get("Supervisor")
    ]
    for name in active:
        _kill(_state(name)["Supervisor"], signal.SIGTERM)
    while any(_state(name)["ActiveState"] in ("active", "activating") for name in active):
        _reap()
        time.sleep(0.02)
    os.kill(-1, signal.SIGTERM)
    give_up_at = time.monotonic() + _PATIENCE_S
    while _reap() and time.monotonic() < give_up_at:
        time.sleep(0.02)
    return 0


def _reap() -> bool:
    """Buries the dead; whether anybody is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


def _lay_disk(folder: Path, settings: Mapping[str, Any]) -> None:
    disk = folder / "disk"
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", disk)
    for name in ("upper", "work", "root"):
        (disk / name).mkdir()
    root = disk / "root"
    layers = f"lowerdir=/,upperdir={disk / 'upper'},workdir={disk / 'work'}"
    _mount("-t", "overlay", "-o", layers, "overlay", root)
    for path in settings["visible"]:  # what lies on other file systems than / is not in the overlay
        if os.stat(path).st_dev != os.stat("/").st_dev:
            (root / path[1:]).mkdir(parents=True, exist_ok=True)
            _mount("--bind", path, root / path[1:])
            _mount("-o", "remount,bind,ro", root / path[1:])
    _mount("-t", "proc", "proc", root / "proc")
    _mount("--rbind", "/dev", root / "dev")
    (root / str(HOST)[1:]).mkdir(parents=True)
    _mount("--bind", folder, root / str(HOST)[1:])
    (folder / "log").mkdir()  # logs outlive the machine
    (root / "var/log").mkdir(parents=True, exist_ok=True)
    _mount("--bind", folder / "log", root / "var/log")
    os.chroot(root)
    os.chdir("/")
    for path, text in settings["files"].items():
        _write(Path(path), text)
    for name in NAMES:
        _install(Path("/usr/local/sbin", name), settings["python"], name)
    for name in ("systemctl", "shutdown", "poweroff"):  # units must name programs by their whole paths
        for place in ("/usr/bin", "/usr/sbin"):
            _install(Path(place, name), settings["python"], name)


def _install(path: Path, python: str, *call: object) -> None:
    """Makes ``path`` a command that calls this program."""
    _write(path, f'#!/bin/sh\nSPOTCLOUD_PYTHON={python} exec {python} -I -S {PROGRAM} {shlex.join(map(str, call))} "$@"\n')
    path.chmod(0o755)


def _run_user_data() -> None:
    """As cloud-init does at the first boot of an instance: as root, without a home or a terminal."""
    data = (HOST / "user-data").read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if not data:
        return
    if not data.startswith(b"#!"):
        _say(f"cloud-init: user data that is no script: {data[:40]!r}")
        return
    USER_DATA.parent.mkdir(parents=True, exist_ok=True)
    USER_DATA.write_bytes(data)
    USER_DATA.chmod(0o700)
    with open(HOST / "console.log", "ab") as console:
        link = Path("/var/log/cloud-init-output.log")
        link.unlink(missing_ok=True)
        link.symlink_to(HOST / "console.log")
        program = [sys.executable, "-I", "-S", str(PROGRAM), "user-data"]
        subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=_default_environ(), cwd="/")


def user_data() -> int:
    """Runs the script, and says how it ended."""
    code = subprocess.run([USER_DATA], start_new_session=True).returncode
    _say(f"cloud-init: the user data ended with {code}")
    _write(HOST / "user-data.exit", str(code))
    return code


def _default_environ() -> dict[str, str]:
    """What systemd gives to each of its units, and so to cloud-init: no home, and what the image's settings say."""
    conf = configparser.ConfigParser(interpolation=None)
    conf.optionxform = str  # type: ignore[assignment,method-assign]
    conf.read(SYSTEM_CONF)
    words = shlex.split(conf.get("Manager", "DefaultEnvironment", fallback=""))
    return {"PATH": PATH, "LANG": "C.UTF-8", **dict(word.split("=", 1) for word in words)}


# -- shutdown, apt, journalctl ----------------------------------------------------------------------------------------


def shutdown(arguments: Sequence[str]) -> int:
    """``shutdown [-h|-P] now|+MINUTES``, ``shutdown -c``. Without a time it is in a minute, as with the real one."""
    if any(argument in ("-r", "--reboot") for argument in arguments):
        raise Unusable(f"shutdown {shlex.join(arguments)}: machines here don't reboot")
    _write(STATES / "shutdown", str(os.getpid()))  # whoever waits stops when his name is no longer there
    if "-c" in arguments:
        return 0
    when = next((argument for argument in arguments if not argument.startswith("-")), "+1")
    if when not in ("now", "+0"):
        if not re.fullmatch(r"\+\d+", when):
            raise Unusable(f"shutdown {when}: only now or +MINUTES")
        return _shutdown_in(float(when) * 60)
    os.kill(1, signal.SIGTERM)
    return 0


def _shutdown_in(seconds: float) -> int:
    _say(f"shutdown in {seconds:.0f} s")
    if os.fork() == 0:
        os.setsid()
        me = str(os.getpid())
        _write(STATES / "shutdown", me)
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        time.sleep(seconds)
        if (STATES / "shutdown").read_text() == me:
            os.kill(1, signal.SIGTERM)
        os._exit(0)
    return 0


def apt(arguments: Sequence[str]) -> int:
    """The machine's image has everything; names are checked, nothing is fetched."""
    words = [word for word in arguments if not word.startswith("-") and "::" not in word and "=" not in word]
    if words[:1] not in (["update"], ["install"], ["upgrade"]):
        raise Unusable(f"apt-get {shlex.join(arguments)}: only update and install")
    for name in words[1:]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise Unusable(f"E: Unable to locate package {name}")
    print(f"apt-get {shlex.join(words)}: done")
    return 0


def journalctl(arguments: Sequence[str]) -> int:
    """Prints what a unit said: ``journalctl -u NAME …``."""
    wanted = [one for flag, one in pairwise(arguments) if flag in ("-u", "--unit")]
    wanted += [one.partition("=")[2] for one in arguments if one.startswith("--unit=")]
    for name in wanted:
        path = _journal(_full(name))
        sys.stdout.write(path.read_text(errors="replace") if path.exists() else "-- No entries --\n")
    return 0


# -- python and pip ---------------------------------------------------------------------------------------------------


def python(arguments: Sequence[str]) -> int:
    """The image's Python has what the one has that runs the tests; a virtual environment of it is empty until pip fills it."""
    real = os.environ["SPOTCLOUD_PYTHON"]
    if list(arguments[:2]) == ["-m", "venv"]:
        [folder] = [word for word in arguments[2:] if not word.startswith("-")]
        bin_ = Path(folder, "bin").absolute()
        for name in ("python", "python3"):
            _install(bin_ / name, real, "venv-python", bin_)
        for name in ("pip", "pip3"):
            _install(bin_ / name, real, "venv-pip", bin_)
        _write(bin_ / "activate", f'VIRTUAL_ENV={folder}\nPATH="{bin_}:$PATH"\nexport VIRTUAL_ENV PATH\n')
        return 0
    if list(arguments[:2]) == ["-m", "pip"]:
        return pip("/usr/local/bin", arguments[2:])
    return _become(real, arguments)


def venv_python(bin_: str, arguments: Sequence[str]) -> int:
    """A virtual environment's Python."""
    if list(arguments[:2]) == ["-m", "pip"]:
        return pip(bin_, arguments[2:])
    return _become(os.environ["SPOTCLOUD_PYTHON"], arguments)


def _become(program: str, arguments: Sequence[str]) -> NoReturn:
    os.execv(program, [program, *arguments])


def pip(bin_: str, arguments: Sequence[str]) -> int:
    """``pip install NAME…``: what the tests' own environment has becomes usable in ``bin_``; anything else is not found."""
    if list(arguments[:1]) != ["install"]:
        raise Unusable(f"pip {shlex.join(arguments)}: only install")
    real = os.environ["SPOTCLOUD_PYTHON"]
    takes_value = {"-c", "--constraint", "-r", "--requirement", "--index-url", "--extra-index-url", "--timeout", "--retries"}
    words, skip = [], False
    for word in arguments[1:]:
        if not skip and not word.startswith("-"):
            words.append(word)
        skip = not skip and word in takes_value
    check = (
        "import sys, re, importlib.metadata as m\n"
        "for word in sys.argv[1:]:\n"
        "    name = re.match(r'[A-Za-z0-9._-]+', word)\n"
        "    path = word.startswith(('.', '/', 'git+', 'http'))\n"
        "    try: m.version(name[0]) if name and not path else None\n"
        "    except m.PackageNotFoundError: sys.exit(f'ERROR: No matching distribution found for {word}')\n"
        "print('Successfully installed', *sys.argv[1:])\n"
    )
    code = subprocess.run([real, "-I", "-c", check, *words]).returncode
    if code == 0:
        for name in ("hf-spot", "accelerate"):
            script = Path(real).parent / name
            if script.exists() and not Path(bin_, name).exists():
                Path(bin_).mkdir(parents=True, exist_ok=True)
                os.symlink(script, Path(bin_, name))
    return code


# -- systemctl --------------------------------------------------------------------------------------------------------


def systemctl(arguments: Sequence[str]) -> int:
    """daemon-reload, start, stop, restart, enable [--now], is-active, is-failed, show, status, poweroff."""
    flags = {word for word in arguments if word.startswith("-")}
    words = [word for word in arguments if not word.startswith("-")]
    verb, names = (words or [""])[0], [_full(name) for name in words[1:]]
    if verb in ("daemon-reload", "disable", "reset-failed", "mask"):
        return 0
    if verb in ("poweroff", "halt"):
        return shutdown(["now"])
    if verb in ("enable", "start", "restart", "stop", "try-restart"):
        for name in names:
            _parse(name)  # a unit that can't be used is refused now
            if verb in ("stop", "restart"):
                _stop(name)
            if verb in ("start", "restart") or (verb == "enable" and "--now" in flags):
                _start(name, wait="--no-block" not in flags)
        return 0
    if verb in ("is-active", "is-failed", "status", "show"):
        states = [_state(name) for name in names]
        for name, state in zip(names, states, strict=True):
            shown = "\n".join(f"{key}={value}" for key, value in state.items()) if verb == "show" else state["ActiveState"]
            print(f"{name}: {shown}" if verb == "status" else shown)
        wanted = "failed" if verb == "is-failed" else "active"
        return 0 if verb == "show" or all(state["ActiveState"] == wanted for state in states) else 3
    raise Unusable(f"systemctl {shlex.join(arguments)}: not here")


def _full(name: str) -> str:
    return name if name.rpartition(".")[2] in ("service", "timer", "target") else f"{name}.service"


def _state(name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((STATES / f"{name}.json").read_text()))
    except FileNotFoundError:
        return {"ActiveState": "inactive", "Result": "success", "MainPID": 0, "NRestarts": 0, "ExecMainStatus": 0}


def _tell(name: str, **changes: Any) -> None:
    _write(STATES / f"{name}.json", json.dumps(_state(name) | changes))


def _start(name: str, wait: bool = True) -> None:
    if name.endswith(".target") or _state(name)["ActiveState"] in ("active", "activating"):
        return
    _tell(name, ActiveState="activating", Supervisor=0)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    else:
        if os.fork() == 0:
            os.setsid()
            with open(HOST / "console.log", "ab") as console, open(os.devnull) as nothing:
                for number, file in enumerate((nothing, console, console)):
                    os.dup2(file.fileno(), number)
            program = [sys.executable, "-I", "-S", str(PROGRAM), "timer" if name.endswith(".timer") else "service", name]
            os.execve(program[0], program, {"PATH": PATH})
        os._exit(0)
    while wait and _state(name)["ActiveState"] == "activating":
        time.sleep(0.01)


def _stop(name: str) -> None:
    state = _state(name)
    if state["ActiveState"] in ("active", "activating") and state.get("Supervisor"):
        os.kill(state["Supervisor"], signal.SIGTERM)
        while _state(name)["ActiveState"] in ("active", "activating", "deactivating"):
            time.sleep(0.01)


def timer(name: str) -> int:
    """Starts a unit again and again."""
    unit = _parse(name)
    target = _full(unit.one("Unit", name.replace(".timer", ".service")))
    _tell(name, ActiveState="active", Supervisor=os.getpid())
    first = unit.one("OnActiveSec") or unit.one("OnBootSec") or unit.one("OnUnitActiveSec")
    time.sleep(_seconds(first))
    while True:
        _start(target)
        if not unit.one("OnUnitActiveSec"):
            return 0
        time.sleep(_seconds(unit.one("OnUnitActiveSec")))


def service(name: str) -> int:
    """Supervises one unit, until it is down for good."""
    unit = _parse(name)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a unit leaves behind is its cgroup's, ours to kill
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    burst, window_s = int(unit.one("StartLimitBurst", "5")), _seconds(unit.one("StartLimitIntervalSec", "10"))
    starts: list[float] = []
    while True:
        starts = [*(at for at in starts if time.monotonic() - at < window_s), time.monotonic()]
        if window_s and len(starts) > burst:
            _say(f"{name}: Start request repeated too quickly.")
            if unit.one("StartLimitAction").startswith("poweroff"):
                shutdown(["now"])
            return _down(name, unit, "start-limit-hit")
        _tell(name, ActiveState="activating", Supervisor=os.getpid())
        result, code = _once(name, unit, stopped)
        if stopped or not _restarts(unit, result, code):
            return _down(name, unit, result)
        _say(f"{name}: Scheduled restart job ({result}, {code})")
        _tell(name, NRestarts=_state(name).get("NRestarts", 0) + 1)
        time.sleep(_seconds(unit.one("RestartSec", "0.1")))
        if stopped:
            return _down(name, unit, "success")


def _down(name: str, unit: Unit, result: str) -> int:
    good = result == "success"
    stays = good and unit.one("RemainAfterExit") in ("yes", "true")
    state = "active" if stays else "inactive" if good else "failed"
    _tell(name, ActiveState=state, Result=result, MainPID=0, Supervisor=0)
    _say(f"{name}: {state} ({result})")
    for other in unit.all("OnSuccess" if good else "OnFailure"):
        for one in other.split():
            _start(_full(one), wait=False)
    if unit.one("SuccessAction" if good else "FailureAction").startswith("poweroff"):
        shutdown(["now"])
    return 0


def _once(name: str, unit: Unit, stopped: list[int]) -> tuple[str, int]:
    """One activation: ``success``, ``exit-code`` or ``signal``, and the number that goes with it."""
    environ = unit.environ()
    with _output(name, unit) as out:

        def run(line: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
            whole = {**environ, **(more or {})}
            return subprocess.Popen(
                _command(line, whole),
                env=whole,
                cwd=unit.one("WorkingDirectory", "/").lstrip("-"),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                user=unit.one("User") or None,
            )

        def finished(process: subprocess.Popen[bytes]) -> int:
            while process.poll() is None:
                if stopped:
                    _end(unit, process)
                time.sleep(0.01)
            return int(process.returncode)

        result, code = "success", 0
        oneshot = unit.one("Type", "simple") == "oneshot"
        for line in unit.all("ExecStartPre"):
            code = finished(run(line))
            if code and not line.startswith("-"):
                result = "exit-code" if code > 0 else "signal"
        for line in unit.all("ExecStart") if result == "success" else ():
            try:
                process = run(line)
            except OSError as error:
                _say(f"{name}: {error}")
                result, code = "exit-code", 203
                break
            _tell(name, MainPID=process.pid)
            for after in unit.all("ExecStartPost"):
                finished(run(after))
            if not oneshot:
                _tell(name, ActiveState="active")
            code = finished(process)
            good = code in (0, *unit.codes("SuccessExitStatus")) or line.startswith("-") or (stopped and code < 0)
            if not good:
                result = "exit-code" if code > 0 else "signal"
                break
        _kill_the_rest()
        _tell(name, ExecMainStatus=abs(code), Result=result)
        _say(f"{name}: main process ended with {code}")
        told = {
            "SERVICE_RESULT": result,
            "EXIT_CODE": "exited" if code >= 0 else "killed",
            "EXIT_STATUS": str(code) if code >= 0 else signal.Signals(-code).name.removeprefix("SIG"),
        }
        for line in unit.all("ExecStopPost"):
            run(line, told).wait()
        _kill_the_rest()
    return result, code


def _restarts(unit: Unit, result: str, code: int) -> bool:
    """https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html#Restart="""
    if code in unit.codes("RestartPreventExitStatus"):
        return False
    if code in unit.codes("RestartForceExitStatus"):
        return True
    policy = unit.one("Restart", "no")
    return policy == "always" or policy in {
        "success": ("on-success",),
        "exit-code": ("on-failure",),
        "signal": ("on-failure", "on-abnormal", "on-abort"),
    }.get(result, ())


def _end(unit: Unit, process: subprocess.Popen[bytes]) -> None:
    """KillSignal to the unit's processes, and SIGKILL to those that don't care."""
    number = signal.Signals[unit.one("KillSignal", "SIGTERM")]
    mixed = unit.one("KillMode", "control-group") in ("mixed", "process")
    for pid in [process.pid] if mixed else _descendants():
        _kill(pid, number)
    try:
        process.wait(_seconds(unit.one("TimeoutStopSec") or unit.one("TimeoutSec") or "90"))
    except subprocess.TimeoutExpired:
        process.kill()


def _kill_the_rest() -> None:
    while left := _descendants():
        for pid in left:
            _kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.005)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _descendants() -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


# -- units ------------------------------------------------------------------------------------------------------------


class Unit:
    """A unit file: its keys and values; a key may be there several times."""

    def __init__(self, values: Mapping[str, Sequence[str]]) -> None:
        self._values = values

    def one(self, key: str, default: str = "") -> str:
        """The last value."""
        return (self._values.get(key) or [default])[-1]

    def all(self, key: str) -> Sequence[str]:
        """Every value since the last empty one."""
        values: list[str] = []
        for value in self._values.get(key, ()):
            values = [*values, value] if value else []
        return values

    def codes(self, key: str) -> list[int]:
        """Exit codes; a signal's is negative."""
        words = " ".join(self.all(key)).split()
        return [int(word) if word.isdecimal() else -signal.Signals[f"SIG{word.removeprefix('SIG')}"] for word in words]

    def environ(self) -> dict[str, str]:
        """Of the unit's processes."""
        made = _default_environ()
        for line in self.all("Environment"):
            made.update(word.partition("=")[::2] for word in shlex.split(line))
        for path in self.all("EnvironmentFile"):
            try:
                lines = Path(path.lstrip("-")).read_text().splitlines()
            except FileNotFoundError:
                if path.startswith("-"):
                    continue
                raise
            words = [line.partition("=") for line in lines if line.strip() and line[0] not in "#;"]
            made.update({name: "".join(shlex.split(value)) for name, _, value in words})
        if user := self.one("User"):
            entry = pwd.getpwnam(user)
            made |= {"HOME": entry.pw_dir, "USER": user, "LOGNAME": user, "SHELL": entry.pw_shell}
        return made


def _parse(name: str) -> Unit:
    path = next((folder / name for folder in UNITS if (folder / name).exists()), None)
    if path is None:
        raise Unusable(f"Unit {name} not found.")
    values: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            section = line.strip("[]")
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        if key not in _KNOWN.get(section, ()) and key not in _WITHOUT_EFFECT:
            raise Unusable(f"{path}: this machine's systemd does not know {key}= in [{section}]")
        values.setdefault(key, []).append(_specifiers(value, name))
    if name.endswith(".service") and not values.get("ExecStart"):
        raise Unusable(f"{name}: Service has no ExecStart=. Refusing.")
    return Unit(values)


def _specifiers(value: str, name: str) -> str:
    known = {
        "%": "%",
        "n": name,
        "N": name.rpartition(".")[0],
        "p": name.rpartition(".")[0],
        "H": socket.gethostname(),
        "t": "/run",
    }
    return re.sub(r"%(.)", lambda found: known[found[1]], value)


def _command(line: str, environ: Mapping[str, str]) -> list[str]:
    words = []
    for word in shlex.split(line.lstrip("-+!@:")):
        alone = re.fullmatch(r"\$(\w+)", word)
        if alone:  # split into words, as systemd does
            words += environ.get(alone[1], "").split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: environ.get(found[1], ""), word).replace("$$", "$"))
    return words


def _seconds(text: str) -> float:
    units = {"": 1, "s": 1, "sec": 1, "ms": 0.001, "min": 60, "m": 60, "h": 3600, "infinity": 1e9}
    text = text.strip()
    if text == "infinity":
        return 1e9
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)\s*([a-z]*)", text))


def _journal(name: str) -> Path:
    return HOST / f"{name}.log"


def _output(name: str, unit: Unit) -> Any:
    where = unit.one("StandardOutput", "journal")
    kind, _, path = where.partition(":")
    return open(path if kind in ("append", "file") else _journal(name), "wb" if kind == "file" else "ab", buffering=0)


# -- small things -----------------------------------------------------------------------------------------------------


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _write(path: Path, text: str) -> None:
    """Readers see the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _say(line: str) -> None:
    with open(HOST / "console.log", "a") as console:
        console.write(f"[spotcloud] {line}\n")


_CALLS: dict[str, Callable[[list[str]], int]] = {
    "boot": lambda arguments: boot(arguments[0]),
    "user-data": lambda arguments: user_data(),
    "service": lambda arguments: service(arguments[0]),
    "timer": lambda arguments: timer(arguments[0]),
    "systemctl": systemctl,
    "journalctl": journalctl,
    "shutdown": shutdown,
    "poweroff": lambda arguments: shutdown(["now"]),
    "apt": apt,
    "apt-get": apt,
    "python": python,
    "python3": python,
    "pip": lambda arguments: pip("/usr/local/bin", arguments),
    "pip3": lambda arguments: pip("/usr/local/bin", arguments),
    "venv-python": lambda arguments: venv_python(arguments[0], arguments[1:]),
    "venv-pip": lambda arguments: pip(arguments[0], arguments[1:]),
}


def main(argv: Sequence[str]) -> int:
    try:
        return _CALLS[argv[1]](list(argv[2:]))
    except Unusable as error:
        print(error, file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
