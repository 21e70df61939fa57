"""What is heard on this node: by a watcher of this process, or by that of `hf-spot launch`, through a file."""

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
    """Listens from the start, until `close`.

    Args:
        arguments: which sources.
        runtime: of the launch, which then listens itself.
        on_notice: called by a thread with each new notice that a watcher of this process hears.
        keyboard: Ctrl-C is heard, too, where anything is.
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
        self.newest: PreemptionNotice | None = None  # that held when somebody looked last
        self._mtime_ns = 0
        self.watcher: Watcher | None = None
        if runtime is None:
            listened_to = sources(arguments, environ=os.environ)
            if listened_to and keyboard:
                listened_to.append(KeyboardSource())
            self.watcher = Watcher(listened_to, self._hears)
            self.watcher.start()

    def _hears(self, notice: PreemptionNotice) -> None:
        self.newest = None if notice.kind is NoticeKind.CANCELLED else notice
        self._on_notice(notice)

    def heard(self) -> PreemptionNotice | None:
        """What holds now. Under a launch it costs one stat of a file that is usually absent."""
        if self._runtime is not None:
            try:
                mtime_ns = os.stat(self._runtime.notice_path).st_mtime_ns
            except OSError:  # nothing was heard, or somebody has emptied the folder since: the launcher fills it again
                return self.newest
            if mtime_ns != self._mtime_ns:
                self._mtime_ns = mtime_ns
                notice = self._runtime.read_notice()
                self.newest = None if notice is None or notice.kind is NoticeKind.CANCELLED else notice
        return self.newest

    def heard_end(self) -> PreemptionNotice | None:
        """The termination that holds now."""
        notice = self.heard()
        return notice if notice is not None and notice.kind is NoticeKind.TERMINATE else None

    def close(self) -> None:
        """Stops listening."""
        if self.watcher is not None:
            self.watcher.stop()
