"""The wait for the last commit, behind the last step: all ranks listen, and rank 0 knows what any of them hears."""

from __future__ import annotations

import logging
from datetime import timedelta

from hf_spot.notices.notice import NoticeKind, PreemptionNotice
from hf_spot.policy.preemption import Action, Decision, gives_way
from hf_spot.policy.restarts import patience_s
from hf_spot.run.progress import alert
from hf_spot.run.upload import Uploader
from hf_spot.training.session.run_session import RunSession, as_value, from_value

log = logging.getLogger("hf_spot")


class FinalDrain:
    """Rank 0 calls `wait`, the others `listen_on`; both return when rank 0 waits no longer.

    Args:
        tenure: of the run.
    """

    def __init__(self, tenure: RunSession) -> None:
        self._tenure = tenure
        self._elsewhere: PreemptionNotice | None = None
        self._parted = False

    def wait(self) -> bool:
        """Whether everything is committed. A notice that comes too late for that makes the training a preempted one."""
        uploader = self._tenure.uploader
        try:
            return uploader is not None and uploader.fenced is None and self._drain(uploader)
        finally:
            self._meet(waits=False)  # the others wait for this word

    def listen_on(self) -> None:
        """While rank 0 waits for the last commit, the others tell what they hear: files of theirs may be on their way, too."""
        tenure, hurried = self._tenure, False
        while self._meet(waits=False):
            if tenure.uploader is not None and self._elsewhere is not None and not hurried:
                tenure.uploader.hurry(give_way=gives_way(self._elsewhere.seconds_left(tenure.now()), tenure.measured()))
                hurried = True

    def _meet(self, *, waits: bool) -> bool:
        """One round after the last step, of all ranks: what was heard anywhere, and whether rank 0 waits any longer."""
        agreement, now = self._tenure.agreement, self._tenure.now
        if agreement.alone or self._parted:
            return False
        notice = self._hear_end()
        left = notice.seconds_left(now()) if notice else None
        agreement.ask(float(notice is not None), 0.0, 0.0, as_value(left), float(waits))
        try:
            terminate, _, _, soonest, waiting = agreement.answer()
        except RuntimeError as error:
            log.warning("a rank is gone, and the last commit is waited for without it: %s", error)
            self._parted = True
            return False
        if terminate and notice is None and self._elsewhere is None:
            seconds_left = from_value(soonest)
            deadline = None if seconds_left is None else now() + timedelta(seconds=seconds_left)
            self._elsewhere = PreemptionNotice(NoticeKind.TERMINATE, "another rank", "after the last step", deadline)
        return bool(waiting)

    def _drain(self, uploader: Uploader) -> bool:
        """Waits for the last commit, as long as the machine lives, if a notice says how long; whether it came."""
        tenure = self._tenure

        def patience() -> float:
            notice = self._hear_end()
            left = notice.seconds_left(tenure.now()) if notice else None
            return patience_s(left, training=True, drain_timeout_s=tenure.arguments.drain_timeout_s)

        if tenure.preempted is not None:
            return uploader.drain(patience())

        def is_heard() -> bool:
            self._meet(waits=True)
            return self._hear_end() is not None

        if uploader.drain(patience(), is_heard):
            return True
        notice = self._hear_end()
        if notice is None:
            return False
        # It came after the last step: nothing is left to stop, and nobody else waits for it.
        alert(f"{notice.kind.value} from {notice.source}: the last upload is finished")
        uploader.hurry(give_way=gives_way(notice.seconds_left(tenure.now()), tenure.measured()))
        drained = uploader.drain(patience())
        if not drained and uploader.fenced is None:
            tenure.preempted = Decision(Action.FINISH_UPLOAD_AND_STOP, "after the last step; its upload did not end in time")
        return drained

    def _hear_end(self) -> PreemptionNotice | None:
        """The termination that was heard on this node and still holds, or by another rank."""
        return self._tenure.listener.heard_end() or self._elsewhere
