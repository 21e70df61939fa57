"""What runs in the container of a job of Hugging Face Jobs: the training, with a notice before the service ends it.

``python -m hf_spot.cloud.hub_machine SCRIPT --timeout-s S`` runs a shell script. A SIGTERM, and the end of the timeout, become
a notice file for ``hf-spot launch``, which saves and ends with 75. The service makes another attempt after every failure, so an
ending that another attempt can't mend is written into the run: the next attempt reads it, and ends at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from hf_spot.errors import EXIT_FINISHED, EXIT_PREEMPTED, ObjectNotFound, SpotError
from hf_spot.notices.detect import GRACE_VARIABLE
from hf_spot.notices.file import FILE_VARIABLE
from hf_spot.runtime import STORE_VARIABLE
from hf_spot.storage.open import open_store
from hf_spot.storage.store import ObjectStore

JOB_VARIABLE = "JOB_ID"  # set by the service
MACHINE_VARIABLE = "HF_SPOT_MACHINE"
GRACE_S = 30.0  # after a SIGTERM, which is Kubernetes' default: the service documents none
_LEAD_S = 600.0  # from the notice to the timeout
_MARGIN_S = 60.0  # the service's clock may have begun before this process
_LOOK_S = 0.5


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the script. Return its exit code, that of an earlier attempt which is final, or 128 + N if signal N ended it."""
    parser = argparse.ArgumentParser(prog="python -m hf_spot.cloud.hub_machine")
    parser.add_argument("script", type=Path)
    parser.add_argument("--timeout-s", type=float, required=True, metavar="S")
    args = parser.parse_args(argv)
    store, job = open_store(environ[STORE_VARIABLE]), environ.get(JOB_VARIABLE, "")
    if (code := _earlier(store, job)) is not None:
        print(
            f"hf-spot: an earlier attempt of job {job} ended with {code}, which another one can't mend; its log says why. "
            "Then: hf-spot jobs run",
            file=sys.stderr,
        )
        return code
    code = _run(args.script, args.timeout_s, _for_launch(environ, args.script.parent, job), clock)
    if code not in (EXIT_FINISHED, EXIT_PREEMPTED) and code < 128:
        _write_ending(store, job, code)
    return code


def _key(job: str) -> str:
    return f".hf-spot-jobs/{job}.json"


def _earlier(store: ObjectStore, job: str) -> int | None:
    """Return the exit code of an earlier attempt of this job that was final, or None."""
    if not job:
        return None
    try:
        return int(json.loads(store.get(_key(job)))["exit_code"])
    except ObjectNotFound:
        return None
    except SpotError as error:  # the launch will find out, and say how to repair it
        print(f"hf-spot: how an earlier attempt of this job ended is unknown: {error}", file=sys.stderr)
        return None


def _write_ending(store: ObjectStore, job: str, code: int) -> None:
    if not job:
        return
    try:
        store.create(_key(job), json.dumps({"exit_code": code}).encode())
    except SpotError as error:
        print(f"hf-spot: another attempt will repeat this one, because it can't be told: {error}", file=sys.stderr)


def _for_launch(environ: Mapping[str, str], folder: Path, job: str) -> dict[str, str]:
    machine = json.loads(environ.get(MACHINE_VARIABLE) or "{}")
    made = {**environ, FILE_VARIABLE: str(folder / "notice"), GRACE_VARIABLE: environ.get(GRACE_VARIABLE, f"{GRACE_S:g}")}
    return made | ({MACHINE_VARIABLE: json.dumps({**machine, "instance_id": job})} if machine and job else {})


def _run(script: Path, timeout_s: float, environ: Mapping[str, str], clock: Callable[[], float]) -> int:
    """Run the script until it ends, with a notice after a SIGTERM or before the timeout."""
    ends_at = clock() + max(timeout_s - _MARGIN_S, timeout_s / 2)
    lead_s = min(_LEAD_S, timeout_s / 4)
    asked: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(float(environ[GRACE_VARIABLE]))

    previous = signal.signal(signal.SIGTERM, ask)
    try:
        with subprocess.Popen(["bash", "-euo", "pipefail", script], env=environ) as process:
            given: float | None = None  # when the deadline is
            while True:
                try:
                    code = process.wait(_LOOK_S)
                    return code if code >= 0 else 128 - code
                except subprocess.TimeoutExpired:
                    now = clock()
                if asked and (given is None or now + asked[0] < given):
                    given = now + asked[0]
                    _notice(Path(environ[FILE_VARIABLE]), asked[0])
                elif given is None and now >= ends_at - lead_s:
                    given = ends_at
                    _notice(Path(environ[FILE_VARIABLE]), max(0.0, ends_at - now))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _notice(path: Path, deadline_s: float) -> None:
    whole = path.with_name(f".{path.name}")
    whole.write_text(json.dumps({"deadline_s": round(deadline_s, 1), "source": "hf-jobs"}))
    whole.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
