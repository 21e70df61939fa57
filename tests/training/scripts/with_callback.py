"""`plain.py` with the one line that makes it preemptible without `hf-spot launch`."""

from __future__ import annotations

import os

import plain

from hf_spot import SpotArguments, SpotCallback

if __name__ == "__main__":
    plain_trainer = plain.Trainer

    def with_callback(*args, callbacks, **kwargs):  # type: ignore[no-untyped-def]
        settings = SpotArguments(notice=os.environ.get("TEST_NOTICE", "signal"))
        return plain_trainer(*args, callbacks=[*callbacks, SpotCallback(os.environ.get("TEST_STORE"), settings)], **kwargs)

    plain.Trainer = with_callback
    plain.main()
