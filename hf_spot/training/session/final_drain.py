"""The wait for the last commit, after the last step: all ranks watch for notices, and rank 0 learns of each of them."""

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
    """Waits for the last commit. Rank 0 calls `wait`, the others `wait_for_main`; both return when rank 0 stops waiting.

    Args:
        session: the training's connection to its run.
    """

    def __init__(self, session: RunSession) -> None:
        self._session = session
        self._notice_elsewhere: PreemptionNotice | None = None
        self._disconnected = False

    def wait(self) -> bool:
        """Return whether everything was committed. The training counts as preempted if a notice arrives and time runs out."""
        uploader = self._session.uploader
        try:
            return uploader is not None and self._session.fenced is None and self._drain(uploader)
        finally:
            self._exchange(is_draining=False)  # the others wait for this message

    def wait_for_main(self) -> None:
        """Report notices to rank 0 while it waits for the last commit, and hurry this machine's own uploads."""
        session, hurried = self._session, False
        while self._exchange(is_draining=False):
            if session.uploader is not None and self._notice_elsewhere is not None and not hurried:
                session.uploader.hurry(
                    give_way=gives_way(self._notice_elsewhere.seconds_left(session.now()), session.measured())
                )
                hurried = True

    def _exchange(self, *, is_draining: bool) -> bool:
        """Exchange notices with all ranks once, after the last step; return whether rank 0 is still waiting."""
        agreement, now = self._session.agreement, self._session.now
        if agreement.alone or self._disconnected:
            return False
        notice = self._termination()
        agreement.ask(self._session.ballot(notice, is_draining=is_draining))
        try:
            merged = agreement.answer()
        except RuntimeError as error:
            log.warning("a rank has ended; waiting for the last commit without it: %s", error)
            self._disconnected = True
            return False
        assert merged is not None
        if merged.terminate and notice is None and self._notice_elsewhere is None:
            left = merged.seconds_left
            deadline = None if left is None else now() + timedelta(seconds=left)
            self._notice_elsewhere = PreemptionNotice(NoticeKind.TERMINATE, "another rank", "after the last step", deadline)
        return merged.is_draining

    def _drain(self, uploader: Uploader) -> bool:
        """Wait for the last commit until the drain timeout or the deadline of a notice; return whether it was made."""
        session = self._session

        def patience() -> float:
            notice = self._termination()
            left = notice.seconds_left(session.now()) if notice else None
            return patience_s(left, training=True, drain_timeout_s=session.arguments.drain_timeout_s)

        if session.preempted is not None:
            return uploader.drain(patience())

        def has_notice() -> bool:
            self._exchange(is_draining=True)
            return self._termination() is not None

        if uploader.drain(patience(), has_notice):
            return True
        notice = self._termination()
        if notice is None:
            return False
        # The notice came after the last step: there is no training left to stop.
        alert(f"{notice.in_words()}: finishing the last upload")
        uploader.hurry(give_way=gives_way(notice.seconds_left(session.now()), session.measured()))
        drained = uploader.drain(patience())
        if not drained and session.fenced is None:
            why = "after the last step; the upload did not finish in time"
            session.stop(Decision(Action.FINISH_UPLOAD_AND_STOP, why), notice.seconds_left(session.now()))
        return drained

    def _termination(self) -> PreemptionNotice | None:
        """Return the termination notice that is in force, from this machine or another rank."""
        return self._session.listener.termination() or self._notice_elsewhere
