"""Scripts of several trainings, longer trainings, and runs that start from others: under ``hf-spot launch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_spot.run.run import Run
from tests.launch.conftest import Launcher
from tests.zygote import SCRIPTS_FORK, Zygote

SETUP = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

def make_trainer(out, data, *callbacks, **settings):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    rows = torch.randint(64, (36, 16), generator=torch.Generator().manual_seed(data))
    arguments = TrainingArguments(out, per_device_train_batch_size=4, save_steps=3, logging_steps=1, report_to="none",
                                  use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **settings)
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))

class Stop(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(int(os.environ["HF_SPOT_LAUNCHER_PID"]), signal.SIGTERM)
            while not Path(os.environ["HF_SPOT_RUNTIME_DIR"], "notice.json").exists(): time.sleep(0.01)

def digest(model):
    import hashlib
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()): whole.update(value.numpy().tobytes())
    return whole.hexdigest()
"""

FOLDS = (
    SETUP
    + """
out, stop_in = sys.argv[1], int(sys.argv[2])
for fold in range(3):
    if (done := Path(f"fold-{fold}.json")).exists():
        continue
    trainer = make_trainer(f"{out}/fold-{fold}", fold, *([Stop(5)] if fold == stop_in else []), num_train_epochs=1)
    trainer.train()
    done.write_text(json.dumps([trainer.state.global_step, digest(trainer.model)]))
"""
)

LONGER = (
    SETUP
    + """
trainer = make_trainer(sys.argv[1], 0, **json.loads(Path(sys.argv[2]).read_text()))
trainer.train()
print("DONE", trainer.state.global_step, digest(trainer.model), flush=True)
"""
)


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def folds(folder: Path) -> list[list[object]]:
    return [json.loads((folder / f"fold-{number}.json").read_text()) for number in range(3)]


def test_folds_that_are_there_already_are_left_out_and_each_other_meets_its_own_checkpoints(
    launcher: Launcher, tmp_path: Path
) -> None:
    path = script(tmp_path, FOLDS)
    assert launcher.start(str(tmp_path / "peace"), [path, "peace", "-1"]).wait() == 0
    undisturbed = folds(tmp_path)
    for number in range(3):
        (tmp_path / f"fold-{number}.json").unlink()
    first = launcher.start(str(tmp_path / "run"), [path, "out", "1"])
    assert first.wait() == 75, first.text()
    second = launcher.start(str(tmp_path / "run"), [path, "another-machine", "-1"])
    assert second.wait() == 0, second.text()
    assert "resuming from step 5" in second.text()
    assert "this is another training than number 1 of this run" in second.text()
    assert folds(tmp_path) == undisturbed
    assert {ref.training for ref in Run(str(tmp_path / "run")).state().checkpoints} == {1, 2, 3}


IN_A_THREAD = (
    SETUP
    + """
import threading
thread = threading.Thread(target=make_trainer("out", 0, Stop(5), num_train_epochs=1).train)
thread.start()
thread.join()
Path("after").touch()
"""
)


def test_nothing_runs_after_a_training_that_was_stopped_in_a_thread(launcher: Launcher, tmp_path: Path) -> None:
    launch = launcher.start(str(tmp_path / "run"), [script(tmp_path, IN_A_THREAD)])
    assert launch.wait() == 75, launch.text()
    assert not (tmp_path / "after").exists()
    assert Run(str(tmp_path / "run")).state().latest() is not None


def done(text: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith("DONE")).split()[1:]


def test_a_finished_run_trains_on_when_a_file_that_the_command_names_says_so(launcher: Launcher, tmp_path: Path) -> None:
    path, store, config = script(tmp_path, LONGER), str(tmp_path / "run"), tmp_path / "settings.json"
    command: list[str | Path] = [path, "out", config]
    config.write_text('{"max_steps": 6}')
    first = launcher.start(store, command)
    assert first.wait() == 0, first.text()
    again = launcher.start(store, command)
    assert again.wait() == 0, again.text()
    assert f"{store} is finished at step 6: nothing to do" in again.text()
    assert f"--store ANOTHER-RUN --from {store}" in again.text()
    assert "DONE" not in again.text()
    config.write_text('{"max_steps": 9}')
    longer = launcher.start(store, command)
    assert longer.wait() == 0, longer.text()
    assert "the command or a file that it names has changed: starting it" in longer.text()
    assert "max_steps was 6 and is 9: the schedule from step 7 on is the one for the new length" in longer.text()
    assert "resuming from step 6" in longer.text()
    assert done(longer.text())[0] == "9"
    # The same from another run's checkpoint: one more way to the same model.
    other = launcher.start(str(tmp_path / "other"), [path, "other", config], options=["--from", f"{store}@6"])
    assert other.wait() == 0, other.text()
    assert done(other.text()) == done(longer.text())


@pytest.mark.parametrize(
    ("name", "told"), [("nowhere", "neither a run nor a checkpoint"), ("{store}@4", "no checkpoint of step 4")]
)
def test_a_start_that_is_not_there_ends_the_launch_at_once(launcher: Launcher, tmp_path: Path, name: str, told: str) -> None:
    path, store = script(tmp_path, "open('ran', 'w')"), str(tmp_path / "old")
    Run(store).claim({})
    launch = launcher.start(str(tmp_path / "run"), [path], options=["--from", name.format(store=store)])
    assert launch.wait() != 0, launch.text()
    assert told in launch.text() and "Traceback" not in launch.text()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run" / "journal").exists()


PAIR = (
    """
import subprocess, sys
out, stop, *names = sys.argv[1:]
if not names:
    children = [subprocess.Popen([sys.executable, *sys.argv, name]) for name in ("a", "b")]
    sys.exit(max(child.wait() for child in children))
"""
    + SETUP
    + """
for name in names:
    from hf_spot import SpotCallback
    callbacks = [Stop(int(stop))] if name == "a" and stop.isdigit() else []
    callbacks += [SpotCallback()] * (stop != "plain")
    trainer = make_trainer(f"{out}/{name}", ord(name), *callbacks, num_train_epochs=2)
    trainer.train()
    Path(f"model-{name}.json").write_text(json.dumps([trainer.state.global_step, digest(trainer.model)]))
"""
)


def test_two_trainings_side_by_side_in_one_launch_each_resume_their_own(
    launcher: Launcher, tmp_path: Path, zygote: Zygote
) -> None:
    path = script(tmp_path, PAIR)

    def models() -> list[list[object]]:
        return [json.loads((tmp_path / f"model-{name}.json").read_text()) for name in "ab"]

    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with zygote.forking():
        subprocess.run([sys.executable, str(path), "peace", "plain", "a", "b"], check=True, cwd=tmp_path, env=environ)
    undisturbed = models()
    for name in "ab":
        (tmp_path / f"model-{name}.json").unlink()
    first = launcher.start(str(tmp_path / "run"), [path, "out", "5"], env={SCRIPTS_FORK: "1"})
    assert first.wait() == 75, first.text()
    assert len(Run(str(tmp_path / "run")).state().trainings) in (1, 2)  # the other may not have begun
    second = launcher.start(str(tmp_path / "run"), [path, "out", "-1"], env={SCRIPTS_FORK: "1"})
    assert second.wait() == 0, second.text()
    assert models() == undisturbed
    assert {ref.training for ref in Run(str(tmp_path / "run")).state().checkpoints} == {1, 2}
