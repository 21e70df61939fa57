"""What a person reads of a run on two ranks whose script sets up logging as transformers' examples do: each line once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.conftest import PLAIN, Launcher

TWO_RANKS = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
EXAMPLE = f"""
import logging, runpy, sys
import transformers

form = "%(asctime)s - %(levelname)s - %(name)s -   %(message)s"
logging.basicConfig(format=form, datefmt="%H:%M:%S", handlers=[logging.StreamHandler(sys.stdout)])
logging.getLogger(__name__).setLevel(transformers.utils.logging.get_verbosity())
transformers.utils.logging.set_verbosity(transformers.utils.logging.get_verbosity())
transformers.utils.logging.enable_default_handler()
runpy.run_path({str(PLAIN)!r}, run_name="__main__")
"""


def count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.slow
def test_each_line_of_a_run_appears_once(launcher: Launcher, tmp_path: Path) -> None:
    script, store = tmp_path / "example.py", str(tmp_path / "run")
    script.write_text(EXAMPLE)

    def start(*more: str, number: int = 2) -> str:
        files = ["--output_dir", f"out-{number}", "--diary", f"diary-{number}", "--weights", f"weights-{number}"]
        launch = launcher.start(store, [script, *files, "--epochs", "1", *more], options=TWO_RANKS)
        if more:
            launch.wait_for_step(4)
            launch.process.terminate()
            launch.go_on_when_it_says(">>> TERMINATE")
        assert launch.wait() == (75 if more else 0), launch.text()
        return launch.text()

    preempted, finished, nothing_to_do = start("--hold_at", "4", number=1), start(), start()
    launches = {"launch 1 of": preempted, "launch 2 of": finished}
    for which, text in launches.items():
        assert count(text, which) == 1, text
        assert count(text, r"INFO - hf_spot -   checkpoint-\d+ committed to") == count(text, "committed to .* MB") > 0, text
        numbers = re.findall(r"checkpoint-(\d+) committed to", text)
        assert len(numbers) == len(set(numbers)), text
    assert count(preempted, r"WARNING - hf_spot -   preempted at step") == 1, preempted
    assert count(preempted, r">>> TERMINATE from signal <<<") == 1, preempted
    assert count(preempted, r"(?i)start the same command again") == 1, preempted
    assert count(finished, r"INFO - hf_spot -   \D+ from step \d+, committed by launch 1") == 1, finished
    assert count(finished, r"is finished at step 8") == 1, finished
    assert count(nothing_to_do, r"^hf-spot: \S+ is finished at step 8: nothing to do \(to train longer, .* --from \S+\)$") == 1
    assert len(nothing_to_do.splitlines()) == 1
    # accelerate's advice about its defaults: by the launcher of the first launch, and by no agent.
    assert [count(text, "values were not passed") for text in (preempted, finished)] == [1, 0]
