"""``python -m tests.accounts``: a hundred launches on one machine, each disturbed in some way, and an account of what is left.

A run is launched again and again, with one rank or two, until it is finished; then the next run begins. Every launch is
interrupted: by a notice, a signal, Ctrl-C, kill -9 of the launcher, of a rank, of a helper or of everything, also in the middle
of an upload in parts, or by a full disk. When its processes have gone, these are counted:

- processes that are left;
- files in the temporary folder and segments of shared memory;
- files beside the checkpoints in the output folder;
- keys of the store that no journal entry names, and unfinished uploads in parts.

None may be left by a launch that ended by itself and committed something, nor what a killed one before it had left. (A launch
whose training was killed, and which heard a notice before it had started it again, counts as killed.) Ends with 1
when something is left, when an exit code is none that the documentation names, or when a model is not that of a training in
peace, to the bit. It needs root, for disks that it can fill and for shared memory of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from hf_spot import process_guard
from hf_spot.run.run import TOLD_STEPS, Run
from tests import small_disk
from tests.launch.conftest import PLAIN, Launch, Launcher
from tests.servers import SeaweedFS
from tests.small_disk import SmallDisk
from tests.soak import ranks
from tests.waiting import wait_for
from tests.zygote import Zygote

BUCKET = "tests"
MEMORY = Path("/dev/shm")
TEMPORARY_KB, OUTPUT_KB = 16 << 10, 400 << 10
BALLAST_MB = 65  # more than the 64 MB from which a file goes in parts
KILLED = -signal.SIGKILL
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 0x4000, 1 << 18  # <sched.h>, <sys/mount.h>
_CACHE = re.compile(r"torchinductor_\w+(/.*)?")  # of torch's compiler, for all trainings
_PYTHONS_OWN = re.compile(
    r"pymp-\w+(/.*)?"
)  # multiprocessing's, of processes that were killed: Python itself deletes none of them
_OF_A_RUN = re.compile(r"tip\.json$|journal/")
_LOCAL = re.compile(
    r"(torn-)?checkpoint-\d+|\.hf_spot|\.hf_spot/run|\.hf_spot/steps-[\w-]+\.jsonl|\.hf_spot/whole-[\d-]+\.json"
    r"|\.hf_spot/restored(/.*)?"
)


class Accounts:
    """Launches, and what they have left.

    Args:
        launcher: starts them.
        server: has the bucket.
        temporary: the disk of temporary files, small.
        output: the disk that checkpoints are written to.
        seed: of what is random.
    """

    def __init__(self, launcher: Launcher, server: SeaweedFS, temporary: SmallDisk, output: SmallDisk, seed: int) -> None:
        self.launcher, self.server, self.temporary, self.output = launcher, server, temporary, output
        self.chance = random.Random(seed)
        self.notice = launcher.tmp_path / "notice"
        self.known = set(psutil.Process().children(recursive=True))
        self.runs, self.finished, self.two = 0, 0, False
        self.weights: dict[bool, set[bytes]] = {False: set(), True: set()}
        self.done: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.left_by_killed: Counter[str] = Counter()
        self.left_by_python: set[str] = set()
        self.wrong: list[str] = []
        self.kinds: dict[str, Callable[[Launch], int]] = {
            "a notice": self.give_notice,
            "SIGTERM": lambda launch: self.end(launch, signal.SIGTERM),
            "SIGHUP to all": self.hang_up,
            "Ctrl-C": lambda launch: self.end(launch, signal.SIGINT),
            "Ctrl-C twice": self.press_twice,
            "kill -9 of the launcher": self.kill_launcher,
            "kill -9 of a rank": self.kill_rank,
            "kill -9 of a helper": self.kill_helper,
            "kill -9 of everything": self.kill_all,
            "kill -9 of everything in an upload": self.kill_in_upload,
            "a full temporary disk": self.fill_temporary,
            "a full output disk": self.fill_output,
            "nothing": lambda launch: launch.wait(),
        }
        self.begin_run()

    def begin_run(self) -> None:
        self.runs += 1
        self.url = f"s3://{BUCKET}/run-{self.runs}"
        self.two = self.chance.random() < 0.4

    def launch(self) -> None:
        """One launch, disturbed, and accounted for."""
        name = self.chance.choice(sorted(self.kinds))
        if self.done.total() < len(self.kinds):  # each once, first
            name = sorted(self.kinds)[self.done.total()]
        self.done[name] += 1
        self.notice.unlink(missing_ok=True)
        options = ["--notice", f"signal,file:{self.notice}", "--max-restarts", "3"]
        options += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"] if self.two else []
        number = len(self.launcher.launches) + 1
        folder = self.output.path / f"run-{self.runs}"
        script: list[str | Path] = [
            PLAIN,
            "--output_dir",
            folder,
            "--diary",
            f"diary-{number}",
            "--weights",
            f"weights-{number}",
        ]
        more = ["--step_s", "0.05", "--epochs", "3", "--workers", str(self.chance.choice([0, 1]))]
        more += ["--ballast_mb", str(BALLAST_MB)] if "upload" in name else []
        launch = self.launcher.start(self.url, [*script, *more], options=options)
        try:
            # Not at once: what a signal does while Python starts is for `tests.signals`, whose Pythons are not forked.
            wait_for(lambda: launch.text() or launch.process.poll() is not None, f"for a line of {launch.log}")
            self.advance(launch, self.chance.randint(0, 14))
            code = self.kinds[name](launch)
        finally:
            if launch.process.poll() is None:
                launch.kill_tree()
        self.codes[code] += 1
        self.account(launch, name, code, folder)
        if code == 0:
            self.finished += 1
            self.weights[self.two].add(self.launcher.weights())
            subprocess.run(["rm", "-rf", folder], check=True)
            self.begin_run()

    # -- disturbances -------------------------------------------------------------------------------------------------

    def advance(self, launch: Launch, steps: int) -> bool:
        """Waits until so many more steps are done; False when the launch ended before."""
        wanted = len(launch.lines()) + steps
        wait_for(lambda: len(launch.lines()) >= wanted or launch.process.poll() is not None, f"for steps: {launch.log}")
        return launch.process.poll() is None

    def give_notice(self, launch: Launch) -> int:
        self.notice.write_text(json.dumps({"kind": "TERMINATE", "deadline_s": 60}))
        return launch.wait()

    def end(self, launch: Launch, number: int) -> int:
        self.send(launch.process, number)
        return launch.wait()

    def hang_up(self, launch: Launch) -> int:
        for one in reversed(launch.tree()):
            self.send(one, signal.SIGHUP)
        return launch.wait()

    def press_twice(self, launch: Launch) -> int:
        self.send(launch.process, signal.SIGINT)
        wait_for(lambda: "interrupted by Ctrl-C" in launch.text() or launch.process.poll() is not None, "for the first one")
        self.send(launch.process, signal.SIGINT)
        return launch.wait()

    def kill_launcher(self, launch: Launch) -> int:
        return self.end(launch, signal.SIGKILL)

    def kill_rank(self, launch: Launch) -> int:
        for one in ranks(launch)[-1:]:
            self.send(one, signal.SIGKILL)
        self.advance(launch, self.chance.randint(0, 6))
        return self.end(launch, signal.SIGTERM)

    def kill_helper(self, launch: Launch) -> int:
        others = [one for one in launch.tree()[1:] if one not in ranks(launch)]
        helper = self.chance.choice(others or [launch.process])
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
            print(f"{launch.log}: kill -9 of {helper.pid} {' '.join(helper.cmdline()[:6])}", file=sys.stderr, flush=True)
        self.send(helper, signal.SIGKILL)
        self.advance(launch, self.chance.randint(0, 6))
        return self.end(launch, signal.SIGTERM)

    def kill_all(self, launch: Launch) -> int:
        launch.kill_tree()
        return launch.wait()

    def kill_in_upload(self, launch: Launch) -> int:
        wait_for(lambda: self.uploads() or launch.process.poll() is not None, f"for an upload: {launch.log}", 0.01)
        self.left_by_killed["uploads in parts"] += len(self.uploads())
        launch.kill_tree()
        return launch.wait()

    def fill_temporary(self, launch: Launch) -> int:
        self.fill(self.temporary)
        try:
            self.advance(launch, 4)
            return self.end(launch, signal.SIGTERM)
        finally:
            self.temporary.empty()

    def fill_output(self, launch: Launch) -> int:
        self.fill(self.output)
        try:
            self.advance(launch, 6)
            self.send(launch.process, signal.SIGTERM)
            return launch.wait()
        finally:
            self.output.empty()

    @staticmethod
    def fill(disk: SmallDisk) -> None:
        for _ in range(100):
            try:
                return disk.fill()
            except OSError as error:  # somebody has taken some of it meanwhile
                if error.errno != errno.ENOSPC:
                    raise
        raise TimeoutError(f"{disk.path} can't be filled")

    @staticmethod
    def send(process: psutil.Process, number: int) -> None:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return

    # -- what is left -------------------------------------------------------------------------------------------------

    def account(self, launch: Launch, name: str, code: int, folder: Path) -> None:
        """Enter what a launch has left."""
        try:
            wait_for(lambda: not self.processes(), "for its processes to end")
        except AssertionError:
            self.wrong.append(f"{launch.log}: {name}: processes {self.processes()}")
            for one in psutil.Process().children(recursive=True):
                if one not in self.known:
                    self.send(one, signal.SIGKILL)
        allowed = {0, 75, KILLED} | ({130} if "Ctrl-C" in name else set()) | ({1, 2} if "full" in name else set())
        if code not in allowed:
            self.wrong.append(f"{launch.log}: {name}: ended with {code}")
        temporary = [one for one in self.files(self.temporary.path) if not _CACHE.fullmatch(one)]
        self.left_by_python |= {one for one in temporary if _PYTHONS_OWN.fullmatch(one)}
        left = {"files in the temporary folder": sorted({*temporary} - self.left_by_python), "segments": self.files(MEMORY)}
        run = Run(self.url)
        committed = any(entry.kind == "commit" and entry.launch == run.state().launch for entry in run.events())
        if committed or code == 0:
            left |= {"keys": self.orphans(run), "uploads in parts": self.uploads()}
        left["files beside the checkpoints"] = [one for one in self.files(folder) if not _LOCAL.fullmatch(one)]
        # Hard links of uploads are in a folder that only the training knows: where it was killed, the next launch removes them.
        clean = code == 0 or (code == 75 and "before it had saved" not in launch.text())
        for what, found in left.items():
            if found and clean:
                self.wrong.append(f"{launch.log}: {name}: {what}: {found[:5]}")
            elif found:
                self.left_by_killed[what] += len(found)

    def processes(self) -> list[str]:
        found = []
        for one in psutil.Process().children(recursive=True):
            try:
                if one.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(one.pid, os.WNOHANG)
                elif one not in self.known:
                    found.append(f"{one.pid} {' '.join(one.cmdline()[:5])}")
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
        return found

    @staticmethod
    def files(folder: Path) -> list[str]:
        """All below it but checkpoints' own files, relative."""
        found = []
        for above, folders, files in os.walk(folder):
            folders[:] = [one for one in folders if not re.fullmatch(r"(torn-)?checkpoint-\d+", one)]
            found += [os.path.relpath(os.path.join(above, one), folder) for one in (*folders, *files)]
        return sorted(one for one in found if one != "filler")

    def orphans(self, run: Run) -> list[str]:
        """The keys that nothing names."""
        named = {f"{one.ref.prefix}/{file.path}" for one in run.checkpoints() for file in one.files}
        keys = [info.key for info in run.store.list("")]
        return [key for key in keys if key not in named and not _OF_A_RUN.match(key) and not TOLD_STEPS.match(key)]

    def uploads(self) -> list[str]:
        found = self.server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        return [str(one["Key"]) for one in found]


def accounts(folder: Path, launches: int, seed: int) -> dict[str, Any]:
    """Make them; the counts."""
    began = time.monotonic()
    process_guard.adopt_orphans()
    with (
        SeaweedFS() as server,
        SmallDisk(folder / "temporary", TEMPORARY_KB) as temporary,
        SmallDisk(folder / "output", OUTPUT_KB) as output,
    ):
        server.make_bucket(BUCKET)
        os.environ.update({**server.env(), "TMPDIR": str(temporary.path)})
        zygote = Zygote({"HF_HUB_OFFLINE": "1"})
        try:
            launcher = Launcher(folder, zygote=zygote)
            peace = {}
            for two in (False, True):
                options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"] if two else []
                launch = launcher.plain(f"s3://{BUCKET}/peace-{two}", "--epochs", "3", options=options)
                assert launch.wait() == 0, launch.text()
                peace[two] = launcher.weights()
            one = Accounts(launcher, server, temporary, output, seed)
            for _ in tqdm(range(launches), desc="launches", disable=None):
                told = len(one.wrong)
                one.launch()
                print(*one.wrong[told:], sep="\n", end="\n" * (len(one.wrong) > told), file=sys.stderr, flush=True)
            for two, weights in one.weights.items():
                if weights - {peace[two]}:
                    one.wrong.append(f"a model of {2 if two else 1} ranks is not that of a training in peace")
            damaged = [Run(f"s3://{BUCKET}/run-{number}").verify() for number in range(1, one.runs + 1)]
        finally:
            zygote.close()
    return {
        "launches": one.done.total(),
        "disturbances": dict(one.done),
        "exit codes": {str(code): count for code, count in sorted(one.codes.items())},
        "runs finished": one.finished,
        "damaged checkpoints": sum(bool(problems) for run in damaged for problems in run.values()),
        "left by killed launches, and removed by the next": dict(one.left_by_killed),
        "files that multiprocessing has left in killed processes": len(one.left_by_python),
        "Pythons that were not forked": len(zygote.refusals),
        "left over, or wrong": one.wrong,
        "seconds": round(time.monotonic() - began),
    }


def have_memory_of_our_own() -> None:
    """Mount shared memory that no other process of this machine has. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for result in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(b"tmpfs", os.fsencode(MEMORY), b"tmpfs", 0, None),
    ):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.accounts", description=__doc__)
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    options = parser.parse_args()
    if reason := small_disk.why_not():
        print(reason, file=sys.stderr)
        return 2
    have_memory_of_our_own()
    for one, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(one, usual)  # a shell and nohup ignore them in what they run in the background
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hf_spot-accounts-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        found = accounts(folder, options.launches, options.seed)
    print(json.dumps(found, indent=1))
    return int(bool(found["left over, or wrong"] or found["damaged checkpoints"]))


if __name__ == "__main__":
    sys.exit(main())
