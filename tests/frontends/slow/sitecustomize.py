"""Slow a training down, and let a rank fail; also the user's own ``sitecustomize``, which hf_spot's must not hide."""

import os
import sys
import time


class Slower:
    """Makes each optimizer step wait, once transformers is imported."""

    is_done = False

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Find nothing."""
        if name == "transformers.trainer" and not self.is_done:
            self.is_done = True
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            register_optimizer_step_pre_hook(before_step)


def before_step(*_):  # type: ignore[no-untyped-def]
    """Wait, and raise once in rank 1 if a file asks for it."""
    time.sleep(float(os.environ["FRONTENDS_STEP_S"]))
    if os.environ.get("RANK") == "1" and os.path.exists("raise-once"):
        os.unlink("raise-once")
        raise RuntimeError("this rank fails once")


if "FRONTENDS_STEP_S" in os.environ:
    sys.meta_path.insert(0, Slower())  # type: ignore[arg-type]
