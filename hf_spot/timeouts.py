"""All timeouts with which one part of hf_spot waits for another. Polling intervals are defined next to the code that polls."""

from __future__ import annotations

# -- the end of a launch ----------------------------------------------------------------------------------------------

JOURNAL_LAST_WORD_S = 5.0  # for an entry of the journal when the machine is about to go
LOCAL_RECORD_LAST_WORD_S = 1.0  # for the record of a checkpoint on this disk, which a commit makes needless
PEER_LAST_WORD_S = 3.0  # a training that failed because of another machine may end before that machine's launcher says so
WEBHOOK_LAST_WORD_S = 2.0  # for events that are still on their way when a launch ends
FAILED_DRAIN_S = 60.0  # for the upload under way when the training raised an error
IDLE_GRACE_S = 10.0  # for a script that is not training, after a notice without a deadline: it may be about to begin or end
LEFT_BEHIND_S = 60.0  # for processes that a command has left behind, to begin a training
LATE_S = 30.0  # past a deadline: machines sometimes live a little longer than announced
NEIGHBOUR_FAILED_S = 5.0  # for the ranks of this machine after those of another machine have failed

# -- before a launch --------------------------------------------------------------------------------------------------

FIRST_CONTACT_S = 300.0  # for a store or cloud service to answer: a machine's network may come up after the command has begun

# -- between launches -------------------------------------------------------------------------------------------------

SHORT_PAUSE_S = 0.1  # before a training that crashed is started again, if it has committed something
FIRST_PAUSE_S = 1.0  # if it has not; twice as long after each further fruitless launch
LONGEST_PAUSE_S = 60.0
MEETING_S = 1800.0  # for the other machines: it may take long to get a replacement
LAST_CALL_S = 3.0  # for more machines, once enough are there: those of one order seldom start in the same second
UNHOSTED_S = 5.0  # for a machine that has claimed the run to say where the others can reach it

# -- between ranks ----------------------------------------------------------------------------------------------------

RANKS_S = 7200.0  # for another rank: rank 0 may be restoring or uploading a large checkpoint meanwhile
HASTE_S = 5.0  # a step may still take this long after a notice without a deadline; Kubernetes on spot nodes gives 15 s in all
