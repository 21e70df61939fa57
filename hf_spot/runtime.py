"""What `hf-spot launch` and the processes it starts tell each other: a few variables, and files in one folder of the node."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hf_spot.arguments import SpotArguments
from hf_spot.notices.notice import PreemptionNotice

_STEP = struct.Struct("<q")
_RESERVE_BYTES = 64 << 10
_LOOK_S = 0.02
STORE_VARIABLE = "HF_SPOT_STORE"
_LAUNCH_VARIABLE = "HF_SPOT_LAUNCH"
_DIRECTORY_VARIABLE = "HF_SPOT_RUNTIME_DIR"
_LAUNCHER_VARIABLE = "HF_SPOT_LAUNCHER_PID"
_CLAIMED_VARIABLE = "HF_SPOT_CLAIMED_AT"
_ARGUMENTS_VARIABLE = "HF_SPOT_ARGUMENTS"


def to_system(text: str) -> str:
    """Return the text that this system's encoding makes UTF-8 of: for names of files and for variables, whatever the locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def from_system(text: str) -> str:
    """Return what was meant by a word of the command line, or a variable: UTF-8, if it can be, whatever the locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone."""
    for one in (*reversed(folder.parents), folder):
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)


_TRAINING = ""
_TRAINED = "ended"


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new, never a part. No fsync: these files need not survive the machine."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Prefetched:
    """What the launcher has fetched before anybody asked.

    Args:
        entry: number of the commit; None while it is under way.
        folder: where it stands, verified; None when it could not be fetched.
        ranks: whose files are there; None for those of all.
    """

    entry: int | None = None
    folder: Path | None = None
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Runtime:
    """One launch, as its workers see it.

    Its folder may be emptied, or be deleted, by those who clean /tmp: what was told is then unknown again, and the next word
    makes the folder anew. `hf_spot.launch.folder` keeps it alive and fills it again.

    Args:
        store: URL of the run.
        launch: the number of the claim under which this launch writes.
        directory: a folder on the node's own disk, shared by the launcher and its workers, gone after the launch.
        arguments: the settings given to the launcher.
        launcher: process id of the launcher.
        claimed_at: when it made the claim; None on machines that follow another's.
    """

    store: str
    launch: int
    directory: Path
    arguments: SpotArguments
    launcher: int = field(default_factory=os.getpid)
    claimed_at: datetime | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Runtime | None:
        """The launch that started this process, or None when `hf-spot launch` didn't."""
        if _DIRECTORY_VARIABLE not in environ:
            return None
        return cls(
            store=from_system(environ[STORE_VARIABLE]),
            launch=int(environ[_LAUNCH_VARIABLE]),
            directory=Path(environ[_DIRECTORY_VARIABLE]),
            arguments=SpotArguments(**json.loads(environ[_ARGUMENTS_VARIABLE])),
            launcher=int(environ[_LAUNCHER_VARIABLE]),
            claimed_at=datetime.fromisoformat(environ[_CLAIMED_VARIABLE]) if environ.get(_CLAIMED_VARIABLE) else None,
        )

    def to_environ(self) -> dict[str, str]:
        """The variables that `from_environ` reads."""
        return {
            STORE_VARIABLE: to_system(self.store),
            _LAUNCH_VARIABLE: str(self.launch),
            _DIRECTORY_VARIABLE: str(self.directory),
            _LAUNCHER_VARIABLE: str(self.launcher),
            _CLAIMED_VARIABLE: self.claimed_at.isoformat() if self.claimed_at else "",
            _ARGUMENTS_VARIABLE: json.dumps(dataclasses.asdict(self.arguments)),
        }

    @property
    def notice_path(self) -> Path:
        """Every rank stats this file once a step; a missing file means that nothing was heard."""
        return self.directory / "notice.json"

    @property
    def step_path(self) -> Path:
        """Eight bytes, the last optimizer step in progress (see `StepCounter`)."""
        return self.directory / "step"

    @property
    def training_path(self) -> Path:
        """Says whether `trainer.train()` is running (see `tell_training`)."""
        return self.directory / "training"

    def tell_training(self, is_training: bool) -> None:
        """Tell the launcher that a training begins, or has ended: only between the two can a notice become a checkpoint."""
        self._with_room(lambda: write_atomically(self.training_path, _TRAINING if is_training else _TRAINED))

    def read_training(self) -> bool | None:
        """Return what a worker told last; None when none has told anything, or the file is gone."""
        try:
            return self.training_path.read_text() == _TRAINING
        except OSError:
            return None

    def is_trusted(self) -> bool:
        """Tell whether the folder is this user's: where everybody may write, another may make it after it was deleted."""
        try:
            everybody_s = self.directory.parent.stat().st_mode & stat.S_IWOTH
            return not everybody_s or self.directory.lstat().st_uid == os.geteuid()
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
            with contextlib.suppress(OSError):  # for the next word
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
        """Takes a little space, which is given back when the disk has become full: what was heard must reach the workers, and
        their word the launcher. Raises OSError when there is no room already."""
        self._reserve_path.write_bytes(bytes(_RESERVE_BYTES))

    def write_exit_code(self, code: int) -> None:
        """What a worker ends with: torchrun's agent would make 1 of it. The first worker's word stands."""

        def write() -> None:
            with contextlib.suppress(FileExistsError), self._exit_code_path.open("xb", buffering=0) as file:
                try:
                    file.write(str(code).encode())
                except OSError:
                    self._exit_code_path.unlink()
                    raise

        self._with_room(write)

    def read_exit_code(self) -> int | None:
        """The first code that a worker wrote, or None."""
        try:
            return int(self._exit_code_path.read_text()) if self.is_trusted() else None
        except (OSError, ValueError):
            return None

    def expect_prefetch(self) -> None:
        """A checkpoint is about to be fetched: whoever wants one waits for `tell_prefetched`."""
        self._prefetched_path.touch()

    def tell_prefetched(self, restore: Prefetched) -> None:
        """The download has ended, with a folder or without."""
        folder = None if restore.folder is None else str(restore.folder)
        write_atomically(self._prefetched_path, json.dumps([restore.entry, folder, restore.ranks]))

    def read_prefetched(self) -> Prefetched | None:
        """What is being fetched or has been; None when nothing is."""
        if not self.is_trusted():
            return None
        try:
            text = self._prefetched_path.read_text()
        except FileNotFoundError:
            return None
        if not text:
            return Prefetched()
        entry, folder, ranks = json.loads(text)
        return Prefetched(entry, None if folder is None else Path(folder), None if ranks is None else tuple(ranks))

    def wait_for_prefetched(self, look: Callable[[], None]) -> Prefetched | None:
        """Return what the launcher has fetched, once it has; None when it fetches nothing.

        Args:
            look: called again and again meanwhile; what it raises ends the wait.
        """
        while (prefetched := self.read_prefetched()) is not None and prefetched.entry is None:
            look()
            time.sleep(_LOOK_S)
        return prefetched

    def write_notice(self, notice: PreemptionNotice) -> None:
        """Replaces what was heard before."""
        self._with_room(lambda: write_atomically(self.notice_path, notice.to_json()))

    def read_notice(self) -> PreemptionNotice | None:
        """What was heard last, or None."""
        try:
            return PreemptionNotice.from_json(self.notice_path.read_text()) if self.is_trusted() else None
        except FileNotFoundError:
            return None


class StepCounter:
    """The last finished optimizer step in a file mapped into memory: telling costs no system call, and what was told
    survives the death of the process that told it.

    Args:
        path: made when it does not exist.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            # Memory over a hole of a file on a full disk is a bus error when it is written to.
            os.posix_fallocate(file.fileno(), 0, _STEP.size)
            self._memory = mmap.mmap(file.fileno(), _STEP.size)

    def tell(self, step: int) -> None:
        """Replaces what was told before."""
        _STEP.pack_into(self._memory, 0, step)

    @staticmethod
    def read(path: Path) -> int | None:
        """What was told last, or None."""
        try:
            step: int = _STEP.unpack(path.read_bytes())[0]
        except (FileNotFoundError, struct.error):
            return None
        return step
