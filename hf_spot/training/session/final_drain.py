"""The wait for the last commit, behind the last step: all ranks listen, and rank 0 knows what any of them hears."""

from __future__ import annotations

import logging
from datetime import timedelta

from hf_spot.log import alert
from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.preemption import Action, Decision, gives_way
from hf_spot.policy.restarts import patience_s
from hf_spot.run.upload import Uploader
from hf_spot.training.session.run_session import RunSession

log = logging.getLogger("hf_spot")


class FinalDrain:
    """Rank 0 calls `wait`, the others `listen_on`; both return when rank 0 waits no longer.

    Args:
        session: of the run.
    """

    def __init__(self, session: RunSession) -> None:
        self._session = session
        self._elsewhere: PreemptionNotice | None = None
        self._parted = False

    def wait(self) -> bool:
        """Whether everything is committed. A notice that comes too late for that makes the training a preempted one."""
        uploader = self._session.uploader
        try:
            return uploader is not None and self._session.fenced is None and self._drain(uploader)
        finally:
            self._meet(is_draining=False)  # the others wait for this word

    def listen_on(self) -> None:
        """While rank 0 waits for the last commit, the others tell what they hear: files of theirs may be on their way, too."""
        session, hurried = self._session, False
        while self._meet(is_draining=False):
            if session.uploader is not None and self._elsewhere is not None and not hurried:
                session.uploader.hurry(give_way=gives_way(self._elsewhere.seconds_left(session.now()), session.measured()))
                hurried = True

    def _meet(self, *, is_draining: bool) -> bool:
        """One round after the last step, of all ranks: what was heard anywhere, and whether rank 0 waits any longer."""
        agreement, now = self._session.agreement, self._session.now
        if agreement.alone or self._parted:
            return False
        notice = self._hear_end()
        agreement.ask(self._session.ballot(notice, is_draining=is_draining))
        try:
            merged = agreement.answer()
        except RuntimeError as error:
            log.warning("a rank is gone, and the last commit is waited for without it: %s", error)
            self._parted = True
            return False
        assert merged is not None
        if merged.terminate and notice is None and self._elsewhere is None:
            left = merged.seconds_left
            deadline = None if left is None else now() + timedelta(seconds=left)
            self._elsewhere = PreemptionNotice(NoticeKind.TERMINATE, "another rank", "after the last step", deadline)
        return merged.is_draining

    def _drain(self, uploader: Uploader) -> bool:
        """Waits for the last commit, as long as the machine lives, if a notice says how long; whether it came."""
        session = self._session

        def patience() -> float:
            notice = self._hear_end()
            left = notice.seconds_left(session.now()) if notice else None
            return patience_s(left, training=True, drain_timeout_s=session.arguments.drain_timeout_s)

        if session.preempted is not None:
            return uploader.drain(patience())

        def is_heard() -> bool:
            self._meet(is_draining=True)
            return self._hear_end() is not None

        if uploader.drain(patience(), is_heard):
            return True
        notice = self._hear_end()
        if notice is None:
            return False
        # It came after the last step: nothing is left to stop, and nobody else waits for it.
        alert(f"{notice.kind.value} from {notice.source}: the last upload is finished")
        uploader.hurry(give_way=gives_way(notice.seconds_left(session.now()), session.measured()))
        drained = uploader.drain(patience())
        if not drained and session.fenced is None:
            why = "after the last step; its upload did not end in time"
            session.stop(Decision(Action.FINISH_UPLOAD_AND_STOP, why), notice.seconds_left(session.now()))
        return drained

    def _hear_end(self) -> PreemptionNotice | None:
        """The termination that was heard on this node and still holds, or by another rank."""
        return self._session.listener.heard_end() or self._elsewhere
