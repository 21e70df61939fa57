"""Fetches the newest checkpoint while the training process still starts Python and imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_spot.errors import SpotError
from hf_spot.run.journal import CheckpointRef
from hf_spot.run.progress import Bar
from hf_spot.run.run import Run
from hf_spot.runtime import Runtime
from hf_spot.storage.threads import Workers

log = logging.getLogger("hf_spot")


class _NotNeeded(SpotError):
    """The machine is going, or the launch has ended: nobody trains with it."""


class Ahead:
    """One download, verified as every restore is, to the disk of the folder that the checkpoint came from. The training process
    moves it to where it wants it (`hf_spot.run.restore.take`); where it can't, it fetches the checkpoint itself.

    Args:
        run: that is trained.
        runtime: of the launch; through it the training process learns of the download.
        needed: asked again and again; False ends the download.
    """

    def __init__(self, run: Run, runtime: Runtime, needed: Callable[[], bool]) -> None:
        self._run = run
        self._runtime = runtime
        self._needed = needed
        self._ended = False
        self._folder: Path | None = None
        self._worker = Workers(1, "hf_spot-ahead")
        newest = run.journal.state.latest()
        if newest is not None:
            runtime.expect_restore()
            self._worker.submit(self._fetch, newest)

    def close(self) -> None:
        """The launch has ended; what nobody has moved away is deleted."""
        self._ended = True
        self._worker.shutdown(wait=False)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fetch(self, ref: CheckpointRef) -> None:
        folder: Path | None = None
        try:
            folder = self._try(ref)
        except _NotNeeded:
            log.info("the download of checkpoint-%d was given up", ref.step)
        except (SpotError, OSError) as error:
            log.debug("checkpoint-%d is left to the training process: %s", ref.step, error)
        finally:
            with contextlib.suppress(OSError):  # the folder has gone with its launch
                self._runtime.tell_restore(ref.entry, folder)

    def _try(self, ref: CheckpointRef) -> Path | None:
        checkpoint = self._run.checkpoint(ref)
        output_dir = checkpoint.details.get("output_dir")
        if not isinstance(output_dir, str) or (Path(output_dir) / checkpoint.name).exists():
            return None
        # Not into output_dir itself: scripts look whether it is empty, and what is in it.
        beside = next(folder for folder in Path(output_dir).absolute().parents if folder.is_dir())
        name = hashlib.sha256(self._run.url.encode()).hexdigest()[:12]
        self._folder = beside / f".hf_spot-restore-{name}"
        shutil.rmtree(self._folder, ignore_errors=True)  # of a launch that was killed
        with Bar("restore", ref.size_bytes) as bar:

            def moved(count: int) -> None:
                if self._ended or not self._needed():
                    raise _NotNeeded("nobody needs it any more")
                bar(count)

            return self._run.fetch(checkpoint, self._folder, progress=moved)
