"""Notices for this machine, from a watcher in this process or from that of `hf-spot launch`, through a file."""

from __future__ import annotations

import os
from collections.abc import Callable

from hf_spot.arguments import SpotArguments
from hf_spot.notices.detect import sources
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.notices.signals import KeyboardSource
from hf_spot.notices.watcher import Watcher
from hf_spot.runtime import Runtime


class NoticeListener:
    """Receives notices from construction until `close`.

    Args:
        arguments: name the sources.
        runtime: of the launch, if one started this process; its watcher is then used.
        on_notice: called from a thread with each new notice that a watcher of this process receives.
        keyboard: treat Ctrl-C as a notice too, if any source is active.
    """

    def __init__(
        self,
        arguments: SpotArguments,
        runtime: Runtime | None,
        on_notice: Callable[[PreemptionNotice], None] = lambda notice: None,
        *,
        keyboard: bool = False,
    ) -> None:
        self._runtime = runtime
        self._on_notice = on_notice
        self.newest: PreemptionNotice | None = None  # as of the last call
        self._mtime_ns = 0
        self.watcher: Watcher | None = None
        if runtime is None:
            active = sources(arguments, environ=os.environ)
            if active and keyboard:
                active.append(KeyboardSource())
            self.watcher = Watcher(active, self._receive)
            self.watcher.start()

    def _receive(self, notice: PreemptionNotice) -> None:
        self.newest = None if notice.kind is NoticeKind.CANCELLED else notice
        self._on_notice(notice)

    def current(self) -> PreemptionNotice | None:
        """Return the notice in force, if any. Under a launch this costs one stat of a file that is usually absent."""
        if self._runtime is not None:
            try:
                mtime_ns = os.stat(self._runtime.notice_path).st_mtime_ns
            except OSError:  # no notice yet, or the folder was emptied since: the launcher writes it again
                return self.newest
            if mtime_ns != self._mtime_ns:
                self._mtime_ns = mtime_ns
                notice = self._runtime.read_notice()
                self.newest = None if notice is None or notice.kind is NoticeKind.CANCELLED else notice
        return self.newest

    def termination(self) -> PreemptionNotice | None:
        """Return the termination notice in force, if any."""
        notice = self.current()
        return notice if notice is not None and notice.kind is NoticeKind.TERMINATE else None

    def close(self) -> None:
        """Stop receiving notices."""
        if self.watcher is not None:
            self.watcher.stop()
