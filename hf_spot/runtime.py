"""Exchange messages between `hf-spot launch` and the processes that it starts: a few variables, and files in one folder of the
machine."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import shutil
import signal
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from hf_spot.arguments import SpotArguments
from hf_spot.notices.notice import PreemptionNotice
from hf_spot.process_guard import ENDED

_STEP = struct.Struct("<q")
_PHASE = struct.Struct("<5q")
_RESERVE_BYTES = 64 << 10
_LOOK_S = 0.02
STORE_VARIABLE = "HF_SPOT_STORE"
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h, of a process of a launch: the store did not answer it
SIGNALS_VARIABLE = "HF_SPOT_ANSWERED_SIGNALS"  # the numbers of the signals that mean a notice
WAITS_ON = "HF_SPOT_WAITS_ON"  # in a warm spare: the socket by which it is told that it is needed, and its priority
_LAUNCH_VARIABLE = "HF_SPOT_LAUNCH"
_DIRECTORY_VARIABLE = "HF_SPOT_RUNTIME_DIR"
_LAUNCHER_VARIABLE = "HF_SPOT_LAUNCHER_PID"
_CLAIMED_VARIABLE = "HF_SPOT_CLAIMED_AT"
_ARGUMENTS_VARIABLE = "HF_SPOT_ARGUMENTS"
_FULL_RANKS_VARIABLE = "HF_SPOT_FULL_RANKS"
_MEMORY_VARIABLE = "HF_SPOT_MEMORY"


def to_system(text: str) -> str:
    """Return the text that this system encodes as UTF-8, whatever the locale: for file names and environment variables."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def from_system(text: str) -> str:
    """Return the intended text of a command-line argument or variable: read as UTF-8 if possible, whatever the locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def make_private(folder: Path) -> None:
    """Create a folder, and its missing parents, with access for this user only."""
    for one in (*reversed(folder.parents), folder):
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)


def held_folder() -> tuple[Path, int]:
    """Create a folder for temporary files that only this user can access. Return it, and a descriptor that holds it by a lock.

    systemd-tmpfiles skips locked folders. Folders of this user that no living process holds are deleted first: their processes
    were killed.

    Raises:
        OSError: it can't be created.
    """
    parent = Path(tempfile.gettempdir())
    for path in parent.glob(f"{_HELD}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                _delete_unless_held(path)
    while True:
        path = Path(tempfile.mkdtemp(prefix=_HELD, dir=parent))
        # Another process may have found it before it was held, and delete it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return path, hold(path)


def hold(folder: Path) -> int:
    """Lock a folder against deletion, until the returned descriptor is closed.

    Raises:
        FileNotFoundError: it has been deleted.
        BlockingIOError: another process is deleting it.
        OSError: it can't be opened.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network filesystems have no locks: there nobody deletes it either
            pass
        _check_still_at(folder, held)
    except OSError:
        os.close(held)
        raise
    return held


def _check_still_at(folder: Path, held: int) -> None:
    if not os.path.samestat(folder.lstat(), os.fstat(held)):
        raise FileNotFoundError(errno.ENOENT, "deleted, and created again", str(folder))


def _delete_unless_held(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_still_at(path, handle)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


_HELD = "hf_spot-held-"
_TRAINING = ""
_TRAINED = "ended"
# Names of files, each with a process id behind it. `hf_spot.every_python.sitecustomize` writes and reads them, too.
_REPORT, _LEFT, _MET, _FAILED, _GONE = "training-", "left-", "met-", "failed-", "gone-"
_ENDS = "ends-"  # the process, or the negative number of the group, that a program of the launch has ended
_PHASES, _STACKS = "phase-", "stacks-"  # likewise


_at_training: list[Callable[[], None]] = []


def at_training(act: Callable[[], None]) -> None:
    """Have a function called whenever a training begins, in this process or in one that is forked from it."""
    _at_training.append(act)


def is_running(process: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new one, never a part. There is no fsync, because these files need
    not survive the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Prefetched:
    """The checkpoint that the launcher has downloaded in advance.

    Args:
        entry: number of the commit; None while the download is under way.
        folder: the verified folder; None if the download failed.
        ranks: whose files were downloaded; None for all ranks.
        world_size: of the launch that these ranks were thought to be in; None if it does not matter.
    """

    entry: int | None = None
    folder: Path | None = None
    ranks: tuple[int, ...] | None = None
    world_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a training of the launch is about to do.

    Args:
        max_steps: optimizer steps to its end.
        samples: of one optimizer step.
    """

    max_steps: int
    samples: int


@dataclass(frozen=True)
class Runtime:
    """One launch, as its workers see it.

    A cleanup of /tmp may empty or delete its folder. The messages in it are then lost, and the next message creates the folder
    again. `hf_spot.launch.folder` keeps the folder from being deleted, and restores its contents.

    Args:
        store: URL of the run.
        launch: the number of the claim under which this launch writes.
        directory: a folder on the machine's own disk, shared by the launcher and its workers, deleted after the launch.
        arguments: the settings given to the launcher.
        launcher: process id of the launcher.
        claimed_at: when it made the claim; None on machines that joined the claim of another machine.
        full_ranks: ranks whose samples make an optimizer step, if machines come and go; 0 for those of this launch.
        memory: descriptors of the launcher, of memory for copies of checkpoints; none without such copies.
    """

    store: str
    launch: int
    directory: Path
    arguments: SpotArguments
    launcher: int = field(default_factory=os.getpid)
    claimed_at: datetime | None = None
    full_ranks: int = 0
    memory: tuple[int, ...] = ()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Runtime | None:
        """Return the launch that started this process, or None if `hf-spot launch` did not start it."""
        if _DIRECTORY_VARIABLE not in environ:
            return None
        return cls(
            store=from_system(environ[STORE_VARIABLE]),
            launch=int(environ[_LAUNCH_VARIABLE]),
            directory=Path(environ[_DIRECTORY_VARIABLE]),
            arguments=SpotArguments(**json.loads(environ[_ARGUMENTS_VARIABLE])),
            launcher=int(environ[_LAUNCHER_VARIABLE]),
            claimed_at=datetime.fromisoformat(environ[_CLAIMED_VARIABLE]) if environ.get(_CLAIMED_VARIABLE) else None,
            full_ranks=int(environ.get(_FULL_RANKS_VARIABLE) or 0),
            memory=tuple(map(int, filter(None, environ.get(_MEMORY_VARIABLE, "").split(",")))),
        )

    def to_environ(self) -> dict[str, str]:
        """Return the variables that `from_environ` reads."""
        return {
            STORE_VARIABLE: to_system(self.store),
            _LAUNCH_VARIABLE: str(self.launch),
            _DIRECTORY_VARIABLE: str(self.directory),
            _LAUNCHER_VARIABLE: str(self.launcher),
            _CLAIMED_VARIABLE: self.claimed_at.isoformat() if self.claimed_at else "",
            _ARGUMENTS_VARIABLE: json.dumps(dataclasses.asdict(self.arguments)),
            **({_FULL_RANKS_VARIABLE: str(self.full_ranks)} if self.full_ranks else {}),
            **({_MEMORY_VARIABLE: ",".join(map(str, self.memory))} if self.memory else {}),
        }

    @property
    def memory_paths(self) -> list[Path]:
        """Return the paths of the launcher's memory for copies of checkpoints: accelerate and torchrun close descriptors."""
        return [Path(f"/proc/{self.launcher}/fd/{one}") for one in self.memory]

    @property
    def notice_path(self) -> Path:
        """Return the path of the notice. Every rank checks for it once a step; it is missing while there is no notice."""
        return self.directory / "notice.json"

    @property
    def step_path(self) -> Path:
        """Return the path of the step counter: eight bytes, the last finished optimizer step (see `StepCounter`)."""
        return self.step_path_of(1)

    def step_path_of(self, training: int) -> Path:
        """Return the path of the step counter of a training of the run, by its number from 1."""
        return self.directory / ("step" if training == 1 else f"step-{training}")

    def read_steps(self) -> dict[int, int]:
        """Return the last finished step of each training of this launch that has told one, by the number of the training."""
        paths = {int(path.name.partition("-")[2] or 1): path for path in self.directory.glob("step*")}
        return {training: step for training, path in sorted(paths.items()) if (step := StepCounter.read(path)) is not None}

    @property
    def training_path(self) -> Path:
        """Return the path of the file that says whether a training runs in this process (see `tell_training`)."""
        return self.directory / f"{_REPORT}{os.getpid()}"

    def tell_training(self, is_training: bool) -> None:
        """Tell the launcher that a training of this process begins or has ended. A notice can lead to a checkpoint only between
        the two."""
        for act in _at_training if is_training else ():
            act()
        self._with_room(lambda: write_atomically(self.training_path, _TRAINING if is_training else _TRAINED))

    def tell_stopped(self, exit_code: int) -> None:
        """Tell the launcher that the training of this process was stopped, and that nothing of the command may run after it.

        Args:
            exit_code: that the launch should end with.
        """
        self._with_room(lambda: write_atomically(self.training_path, str(exit_code)))

    def tell_left(self) -> None:
        """Tell the launcher that this process, whose training was stopped, waits to be ended."""
        with contextlib.suppress(OSError):  # its folder was deleted: the launch is over
            (self.directory / f"{_LEFT}{os.getpid()}").touch()

    def read_training(self) -> bool | None:
        """Return whether a training is running in any process, by the processes' reports; None if there is no report.

        A process that has died trains no longer, whatever it reported.
        """
        reports = self._reports()
        return any(told == _TRAINING and is_running(process) for process, told in reports.items()) if reports else None

    def tell_failed(self) -> None:
        """Tell the other processes of the launch that this one, which may have trained, ends with an exception."""
        with contextlib.suppress(OSError):  # its folder was deleted, or the disk is full
            (self.directory / f"{_FAILED}{os.getpid()}").touch()

    def mark_gone(self) -> None:
        """Mark the processes that have died while they trained, so that it is known later when that was."""
        for process, told in self._reports().items():
            if told == _TRAINING and not is_running(process):
                with contextlib.suppress(OSError):
                    (self.directory / f"{_GONE}{process}").touch(exist_ok=False)

    def read_lost(self) -> list[int]:
        """Return the processes that died while they trained, without a word: killed by the system, or by somebody outside.

        Left out are those that a program of the launch has ended itself, and those whose training another process has brought
        to its end since, as torchrun does when it starts its ranks again.
        """
        reports = self._reports()
        ended = {self._training_of(process) for process, told in reports.items() if told == _TRAINED}
        return [
            process
            for process, told in sorted(reports.items())
            if told == _TRAINING
            and not is_running(process)
            and not (self.directory / f"{_FAILED}{process}").exists()
            and not (self.directory / f"{_ENDS}{process}").exists()
            and not any(True for _ in self.directory.glob(f"{_ENDS}-*"))  # nobody knows any more which group it was in
            and ((training := self._training_of(process)) is None or training not in ended)
        ]

    def _training_of(self, process: int) -> int | None:
        told = PhaseTeller.read(self.directory / f"{_PHASES}{process}")
        return None if told is None else told[-1]

    def read_stopped(self) -> int | None:
        """Return the exit code for the launch once a training was stopped, its process waits at its end, and no other is still
        training or on its way out; None until then."""
        reports = self._reports()
        living = {process: told for process, told in reports.items() if is_running(process)}
        left = {process for process in living if (self.directory / f"{_LEFT}{process}").exists()}
        if not left or any(told == _TRAINING or (told.isdigit() and process not in left) for process, told in living.items()):
            return None
        return max(int(reports[process]) for process in left if reports[process].isdigit())

    def _reports(self) -> dict[int, str]:
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.glob(f"{_REPORT}[0-9]*"):
                with contextlib.suppress(OSError):
                    found[int(path.name[len(_REPORT) :])] = path.read_text()
        return found

    @property
    def has_command_ended(self) -> bool:
        """Return whether the command of the launch has ended with 0, and has left processes behind."""
        return (self.directory / ENDED).exists()

    def has_failed_since_the_command(self) -> bool:
        """Return whether a process that may train has failed after the command has ended: nobody else can have seen that."""
        try:
            ended_at = (self.directory / ENDED).stat().st_mtime
            return any(one.stat().st_mtime >= ended_at for one in self.directory.glob(f"{_FAILED}[0-9]*"))
        except OSError:
            return False

    def meet(self) -> None:
        """Tell the launcher that this process carries hf_spot's hook, and would report a training."""
        with contextlib.suppress(OSError):  # its folder was deleted, or the disk is full
            (self.directory / f"{_MET}{os.getpid()}").touch()

    def has_met(self, process: int) -> bool:
        """Return whether a process has called `meet`."""
        return (self.directory / f"{_MET}{process}").exists()

    @property
    def phase_path(self) -> Path:
        """Return the path of the file that says what this process is doing (see `PhaseTeller`)."""
        return self.directory / f"{_PHASES}{os.getpid()}"

    def read_phases(self) -> dict[int, tuple[int, int, int, int, int]]:
        """Return what the living processes of the launch have told about what they are doing, by their ids."""
        found = {}
        with contextlib.suppress(OSError):
            for path in self.directory.glob(f"{_PHASES}[0-9]*"):
                process = int(path.name[len(_PHASES) :])
                if (told := PhaseTeller.read(path)) is not None and is_running(process):
                    found[process] = told
        return found

    def stacks_path(self, process: int) -> Path:
        """Return the file to which a process, and those that it has forked, write their stacks on a `STACKS_SIGNAL`."""
        return self.directory / f"{_STACKS}{process}"

    def has_met_any(self) -> bool:
        """Return whether any process has called `meet`."""
        return any(True for _ in self.directory.glob(f"{_MET}*"))

    def is_trusted(self) -> bool:
        """Return whether the folder belongs to this user. In a parent that all may write to, another user could have created it
        after it was deleted."""
        try:
            is_shared = self.directory.parent.stat().st_mode & stat.S_IWOTH
            return not is_shared or self.directory.lstat().st_uid == os.geteuid()
        except OSError:
            return False

    def _with_room(self, write: Callable[[], None]) -> None:
        try:
            write()
        except FileNotFoundError:
            make_private(self.directory)
            if not self.is_trusted():
                raise
            write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._reserve_path.unlink(missing_ok=True)
            write()
            with contextlib.suppress(OSError):  # for the next message
                self.reserve()

    @property
    def _reserve_path(self) -> Path:
        return self.directory / "reserve"

    @property
    def _prefetched_path(self) -> Path:
        return self.directory / "restore.json"

    @property
    def _exit_code_path(self) -> Path:
        return self.directory / "exit_code"

    def reserve(self) -> None:
        """Reserve some space, which is released when the disk is full: a notice must still reach the workers, and their exit
        code the launcher. Raises OSError if the disk is already full."""
        self._reserve_path.write_bytes(bytes(_RESERVE_BYTES))

    def write_exit_code(self, code: int) -> None:
        """Record the exit code of a worker, which torchrun's agent would turn into 1. Only the first code is kept."""

        def write() -> None:
            with contextlib.suppress(FileExistsError), self._exit_code_path.open("xb", buffering=0) as file:
                try:
                    file.write(str(code).encode())
                except OSError:
                    self._exit_code_path.unlink()
                    raise

        self._with_room(write)

    def read_exit_code(self) -> int | None:
        """Return the first code that a worker wrote, or None."""
        try:
            return int(self._exit_code_path.read_text()) if self.is_trusted() else None
        except (OSError, ValueError):
            return None

    def expect_prefetch(self) -> None:
        """Announce the download of a checkpoint: workers that need one now wait until `tell_prefetched` is called."""
        self._prefetched_path.touch()

    def tell_prefetched(self, restore: Prefetched) -> None:
        """Announce the end of the download, with a folder or without."""
        folder = None if restore.folder is None else str(restore.folder)
        write_atomically(self._prefetched_path, json.dumps([restore.entry, folder, restore.ranks, restore.world_size]))

    def tell_prefetching(self) -> None:
        """Give a sign that the download makes progress."""
        with contextlib.suppress(OSError):  # the folder was deleted
            os.utime(self._prefetched_path)

    def prefetched_at_ns(self) -> int:
        """Return when the download last gave a sign, by the clock of the file system; 0 if there is none."""
        try:
            return self._prefetched_path.stat().st_mtime_ns
        except OSError:
            return 0

    def read_prefetched(self) -> Prefetched | None:
        """Return the state of the download; None if there is none."""
        if not self.is_trusted():
            return None
        try:
            text = self._prefetched_path.read_text()
        except FileNotFoundError:
            return None
        if not text:
            return Prefetched()
        entry, folder, ranks, world_size = json.loads(text)
        return Prefetched(entry, None if folder is None else Path(folder), None if ranks is None else tuple(ranks), world_size)

    def wait_for_prefetched(self, look: Callable[[], None]) -> Prefetched | None:
        """Wait for the launcher's download to end, and return its result; None if there is no download.

        Args:
            look: called repeatedly while waiting; an exception that it raises ends the wait.
        """
        while (prefetched := self.read_prefetched()) is not None and prefetched.entry is None:
            look()
            time.sleep(_LOOK_S)
        return prefetched

    def tell_plan(self, plan: Plan) -> None:
        """Tell the launcher what the training is about to do."""
        self._with_room(lambda: write_atomically(self._plan_path, json.dumps(dataclasses.asdict(plan))))

    def read_plan(self) -> Plan | None:
        """Return what the newest training is about to do, or None."""
        try:
            return Plan(**json.loads(self._plan_path.read_text())) if self.is_trusted() else None
        except FileNotFoundError:
            return None

    @property
    def _plan_path(self) -> Path:
        return self.directory / "plan.json"

    def write_notice(self, notice: PreemptionNotice) -> None:
        """Write the notice, in place of an earlier one."""
        self._with_room(lambda: write_atomically(self.notice_path, notice.to_json()))

    def read_notice(self) -> PreemptionNotice | None:
        """Return the last notice, or None."""
        try:
            return PreemptionNotice.from_json(self.notice_path.read_text()) if self.is_trusted() else None
        except FileNotFoundError:
            return None


class StepCounter:
    """The last finished optimizer step, in a memory-mapped file: writing it costs no system call, and it survives the death of
    the process that wrote it.

    Args:
        path: created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            # Writing to memory mapped over a hole in a file would be a bus error on a full disk.
            os.posix_fallocate(file.fileno(), 0, _STEP.size)
            self._memory = mmap.mmap(file.fileno(), _STEP.size)

    def tell(self, step: int) -> None:
        """Write the last finished step."""
        _STEP.pack_into(self._memory, 0, step)

    @staticmethod
    def read(path: Path) -> int | None:
        """Return the step that was written last, or None."""
        try:
            step: int = _STEP.unpack(path.read_bytes())[0]
        except (FileNotFoundError, struct.error):
            return None
        return step


STACKS_SIGNAL = int(signal.SIGRTMAX) - 3  # to a process of a training: write the stacks of all threads


class PhaseTeller:
    """What a rank is doing, in a memory-mapped file: telling it costs no system call, and takes about a microsecond.

    Args:
        path: created if it does not exist.
        rank: number of the rank.
        training: number of its training in the run.

    Raises:
        OSError: it can't be created.
    """

    def __init__(self, path: Path, rank: int, training: int) -> None:
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, _PHASE.size)
            self._memory = mmap.mmap(file.fileno(), _PHASE.size)
        self._rank, self._training = rank, training
        self._signs = _PHASE.unpack_from(self._memory)[0]
        self._phase = self._step = 0

    def enter(self, training: int) -> None:
        """Tell of another training from now on."""
        self._training = training

    @property
    def phase(self) -> int:
        """Return the phase that was told last."""
        return self._phase

    def tell(self, phase: int, step: int | None = None) -> None:
        """Tell the phase that begins or goes on, and the last finished step if it has changed."""
        self._signs += 1
        self._phase = phase
        if step is not None:
            self._step = step
        _PHASE.pack_into(self._memory, 0, self._signs, phase, self._step, self._rank, self._training)

    @staticmethod
    def read(path: Path) -> tuple[int, int, int, int, int] | None:
        """Return signs, phase, step, rank and training as told last; None if nothing was."""
        try:
            told: tuple[int, int, int, int, int] = _PHASE.unpack(path.read_bytes())
        except (OSError, struct.error):
            return None
        return told if told[0] else None
