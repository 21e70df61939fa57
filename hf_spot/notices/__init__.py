"""Sources of preemption notices: one module per kind of source, `detect` to choose among them, `watcher` to poll them."""

from hf_spot.notices.notice import NoticeKind, NoticeSource, PreemptionNotice

__all__ = ["NoticeKind", "NoticeSource", "PreemptionNotice"]
