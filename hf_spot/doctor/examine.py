"""`hf-spot doctor`: all checks in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

from hf_spot.arguments import SpotArguments
from hf_spot.cloud.job import Job
from hf_spot.doctor.finding import FAIL, Finding
from hf_spot.doctor.store import examine as examine_store
from hf_spot.doctor.this_machine import disk, machine, notice_of
from hf_spot.errors import ConfigError, SpotError
from hf_spot.notices.detect import sources
from hf_spot.run.run import Run


def examine(
    environ: Mapping[str, str],
    *,
    store: str | None = None,
    job: Job | None = None,
    checkpoint_gb: float | None = None,
    grace_s: float | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Finding]:
    """Check this machine, then the store, then the account. Yield each finding as soon as it is known.

    Args:
        environ: the environment.
        store: URL of a run; None for that of the job.
        job: the job to run on EC2.
        checkpoint_gb: size of a checkpoint in 10^9 bytes; None for that of the run's newest.
        grace_s: seconds from a notice to the end; None for the known value of this platform.
        now: the wall clock.
        clock: monotonic seconds.

    Raises:
        ConfigError: immediately, for a value that can't be used.
    """
    if checkpoint_gb is not None and not checkpoint_gb > 0:
        raise ConfigError(f"--checkpoint-gb {checkpoint_gb:g} must be positive", hint="--checkpoint-gb 14")
    arguments = SpotArguments(grace_s=grace_s)
    url = store or (job.store if job else None)
    run = Run(url) if url else None
    found = sources(arguments, environ=environ)

    def findings() -> Iterator[Finding]:
        clouds = [source.name for source in found]
        notice = notice_of(environ, clouds, grace_s)
        yield from machine(environ, found, notice)
        if job is not None and notice.seconds is None:
            notice = notice_of({}, ["imds"], None)  # the job will run on EC2
        size_bytes = None if checkpoint_gb is None else int(checkpoint_gb * 1e9)
        if run is not None:
            home = job.region if job else None
            size_bytes = yield from examine_store(run, notice, size_bytes=size_bytes, home=home, now=now, clock=clock)
        yield disk(Path.cwd(), size_bytes)
        if job is not None or "imds" in clouds:
            yield from _account(job, now())

    return findings()


def _account(job: Job | None, now: datetime) -> Iterator[Finding]:
    from hf_spot.cloud.ec2 import Cloud
    from hf_spot.doctor.account import account  # importing boto3 is slow, and it is needed only here

    try:
        cloud = Cloud()
    except SpotError as error:
        yield Finding(FAIL, "credentials", str(error.args[0]), error.hint)
        return
    yield from account(cloud, job, now)
