"""A random training, interrupted at random steps by random kinds, and compared with the undisturbed one.

Each launch is forked from this process, which has imported the libraries and does nothing else with them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.matrix.compose import HAVE_DATA, LIBRARIES, Composition, build
from tests.matrix.ending import differences, ending, tracker_lines

TIMEOUT_S = 300.0
_FEW = 3  # hypothesis begins with the simplest one, and then varies one that it has drawn
_KINDS = ("term", "kill", "interrupt", "crash")
_ENDS = {"term": (75,), "kill": (-signal.SIGKILL,), "interrupt": (75,), "crash": (1,)}
_CRASH = "the adversary lets the script crash"
FAMILIES = tuple(LIBRARIES)
# What hf_spot says when something can't be the same; promises.md names each.
NAMED = (
    "can't be saved: it is reset in a resumed run",
    "not restored, because this launch does not have it",
    "other data than an uninterrupted one",
    "differ from those of an uninterrupted run",
    "it gives other samples",
    "a resumed run may differ there",
)


def compositions(families: tuple[str, ...] = FAMILIES) -> Any:
    """Return hypothesis' strategy for trainings and their interruptions."""
    from hypothesis import strategies as st

    @st.composite
    def compose(draw: Any) -> Composition:
        one = functools.partial(lambda *values: draw(st.sampled_from(values)))
        some = functools.partial(lambda strategy: draw(strategy))
        family = one(*families)
        made: Composition = {"family": family}
        streamed = False
        if family not in HAVE_DATA:
            made["data"] = one("rows", "own torch", "own numpy", "own python", "global", "levels", "stream", "shuffled stream")
            streamed = "stream" in made["data"]
            made["collator"] = one("padded", "counting", "masking")
            made["sampler"] = "default" if streamed else one("default", "own generator", "own class", "unseeded", "by length")
            made["loss"] = one("model", "learnt", "teacher", "averaging", "smoothed", *(["function"] * (family == "plain")))
            exact_in_workers = made["data"] in ("rows", "global", "stream") and made["collator"] in ("padded", "masking")
            made["workers"] = one(0, 0, 2) if exact_in_workers else 0
            made["persistent"] = bool(made["workers"]) and one(False, True)
        else:
            samplers = ("default",) if family in ("grpo", "sentences") else ("default", "own generator", "own class")
            made["sampler"], made["loss"] = one(*samplers), one("model", "model", "learnt")
            made["data"] = one("rows", "rows", "stream") if family == "sft" and made["sampler"] == "default" else "rows"
            made["workers"] = one(0, 0, 2)
            made["persistent"] = False
            streamed = made["data"] == "stream"
        made["optimizer"] = one(
            "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "own sgd", "lookahead", "own adam", "own with schedule"
        )
        evaluates = one("no", "steps", "steps", "epoch")
        made["eval"] = {"strategy": evaluates, "steps": one(2, 3, 4), "on_start": evaluates != "no" and one(False, True)}
        made["schedule"] = one(
            "linear",
            "cosine",
            "constant_with_warmup",
            "cosine_with_restarts",
            "polynomial",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            *(("reduce_lr_on_plateau", "greedy") if evaluates != "no" else ()),
        )
        made["best"] = (evaluates != "no" and one("", "loaded", "stopping", "saved")) or ""
        made["saves"] = {"strategy": one("steps", "steps", "epoch", "no"), "steps": one(2, 3, 4, 5), "limit": one(None, 1, 2)}
        made["log"] = {"strategy": one("steps", "steps", "epoch"), "steps": one(1, 2, 3, 5), "first": one(False, True)}
        made["accumulation"] = one(1, 1, 2, 3)
        made["batch"] = one(4, 2, 3)
        made["length"] = "steps" if streamed or family == "grpo" else one("epochs", "steps")
        made["more"] = sorted(
            some(st.sets(st.sampled_from(["neftune", "bf16", "tokens", "no clipping", "drop last", "seeds"]), max_size=2))
        )
        names = ["average", "thaws", "remembers", "draws", "rate", "watches", "swaps"]
        made["callbacks"] = sorted(some(st.sets(st.sampled_from(names), max_size=3)))
        if made["optimizer"] in ("own with schedule", "lookahead") and made["loss"] == "learnt":
            made["optimizer"] = "own adam"  # they don't know groups that are added after them
        if family == "sentences":
            made["more"] = [name for name in made["more"] if name != "neftune"]  # which needs input embeddings
        made["ahead"] = one(1, 2, 3)  # num_iterations of GRPO
        made["second"] = one("", "", "other data", "same folder", "same again", "no reseeding")
        made["same disk"] = one(False, True)
        event = st.fixed_dictionaries(
            {
                "kind": st.sampled_from(_KINDS),
                "at": st.integers(0, 99),
                "when": st.sampled_from(["begin", "begin", "end", "optimizer", "substep", "predict", "save", "log", "epoch"]),
                "advisory": st.sampled_from([None, None, 10, 50, 80]),
            }
        )
        made["launches"] = some(st.lists(event, min_size=1, max_size=3))
        return made

    return compose()


# -- one launch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a launch ended: what is not None is its ending."""

    code: int
    log: str
    found: Any = None


def _forked(act: Callable[[], None], log: Path) -> int:
    """Run ``act`` in a forked process whose output goes to a file; return its exit code, negative for a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(act, log)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -999
        time.sleep(0.01)


def _become(act: Callable[[], None], log: Path) -> NoReturn:
    code = 0
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    try:
        act()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        code = 2 if type(error).__name__ in ("ConfigError", "Refused") else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _train(made: Composition, folder: Path, out: Path, url: str | None, event: dict[str, Any] | None, steps: int) -> None:
    """Be the script: train, and leave what came of it."""
    import torch
    from transformers import TrainerCallback

    from tests.matrix import parts

    torch.set_num_threads(1)

    class Interrupts(TrainerCallback):
        """Acts once, at the step and moment of the event."""

        not_of_training = True
        per_launch = ("acted", "advised", "before", "callback", "reached")

        def __init__(self, before: int, callback: Any) -> None:
            self.acted = self.advised = self.reached = False
            self.before, self.callback = before, callback

        def heard(self) -> None:
            session = self.callback._session
            deadline = time.monotonic() + 60
            while session is not None and session.run_session.listener.newest is None and time.monotonic() < deadline:
                time.sleep(0.005)

        def settle(self) -> None:
            """Wait for the commits: so that a failure is the same when it is repeated."""
            session = self.callback._session
            if session is not None and session.run_session.uploader is not None:
                session.commits.behind.wait(60)
                session.run_session.uploader.drain(60)

        def at(self, moment: str, state: Any) -> None:
            if event is None or self.acted:
                return
            done = self.before + state.global_step
            if (
                event["advisory"] is not None
                and not self.advised
                and moment == "begin"
                and done >= event["advisory"] * steps // 100
            ):
                self.advised = True
                (folder / "advisory").write_text(json.dumps({"kind": "ADVISORY", "id": f"{folder.name}-{done}-{event['at']}"}))
                self.heard()
                (folder / "advisory").unlink()
            if done < event["at"] * steps // 100 or moment != event["when"]:
                return
            self.acted = True
            if event["kind"] == "term":
                os.kill(os.getpid(), signal.SIGTERM)
                self.heard()
            elif event["kind"] == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                self.heard()
            else:
                self.settle()
                if event["kind"] == "crash":
                    raise RuntimeError(_CRASH)
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("epoch", state)

        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("begin", state)

        def on_substep_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("substep", state)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("optimizer", state)

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("end", state)

        def on_prediction_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("predict", state)

        def on_log(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("log", state)

        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.at("save", state)

    before, left = 0, []
    known: list[Any] = []
    for number, trainer in enumerate(build(made, out)):
        again = any(trainer is one for one in known)
        known.append(trainer)
        for kind in (Interrupts, parts.Writes):
            trainer.remove_callback(kind)
        trainer.add_callback(parts.Writes(folder / f"lines-{number}.jsonl"))
        if url is not None:
            from hf_spot import SpotArguments, SpotCallback

            if not again:
                callback = SpotCallback(url, SpotArguments(notice=f"signal,file:{folder / 'advisory'}"))
                trainer.add_callback(callback)
            # Made to be seen by Trainer before the save of a step, and after it.
            if event is not None:
                trainer.add_callback(Interrupts(before, callback))
        result = trainer.train()
        trainer.remove_callback(Interrupts)
        left.append(ending(trainer, result, Path(trainer.args.output_dir)))
        before += trainer.state.global_step
    (folder / "ending.json").write_text(json.dumps({"steps": before, "left": left}))


# -- the comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a composition.

    Args:
        made: the composition.
        verdict: ``identical``; ``named`` or ``refused`` if hf_spot has said what can't be the same; ``SILENT``, or ``BROKEN``
            if a launch ended otherwise than it must.
        why: differences, or what was said.
    """

    made: Composition
    verdict: str
    why: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether it is as it must be."""
        return self.verdict in ("identical", "named", "refused")


def play(made: Composition, folder: Path) -> Outcome:
    """Train a composition undisturbed and interrupted, and compare the two.

    Args:
        made: from `compositions`.
        folder: for everything; must be new.
    """
    preload(made)
    folder.mkdir(parents=True)
    peace = folder / "peace"
    peace.mkdir()
    code = _forked(lambda: _train(made, peace, peace / "out", None, None, 0), peace / "log")
    if code:
        return Outcome(made, "BROKEN", [f"the undisturbed training ended with {code}", _tail(peace / "log")], [code])
    wanted = json.loads((peace / "ending.json").read_text())
    url, codes, launches = str(folder / "run"), [], []
    for event in [*made["launches"], None, None]:
        launch = folder / f"launch-{len(launches)}"
        launch.mkdir()
        launches.append(launch)
        out = (folder if made["same disk"] else launch) / "out"
        act = functools.partial(_train, made, launch, out, url, event, wanted["steps"])
        code = _forked(act, launch / "log")
        codes.append(code)
        if code == 0:
            break
        if code == 2 and event is None:
            return Outcome(made, "refused", [_tail(launch / "log")], codes)
        crashed = code == 1 and _CRASH not in (launch / "log").read_text(errors="replace")
        if event is None or code not in (*_ENDS[event["kind"]], 75) or crashed:
            return Outcome(made, "BROKEN", [f"launch {len(launches)} ended with {code}", _tail(launch / "log")], codes)
    if codes[-1] != 0:
        return Outcome(made, "BROKEN", ["it never ends", _tail(launches[-1] / "log")], codes)
    found = json.loads((launches[-1] / "ending.json").read_text())
    told = differences(wanted["left"], found["left"], "training")
    for number in range(len(wanted["left"])):
        lines = [tracker_lines([one / f"lines-{number}.jsonl" for one in which]) for which in ([peace], launches)]
        told += differences(*lines, f"tracker[{number}]")
    if not told:
        return Outcome(made, "identical", codes=codes)
    said = [line for one in launches for line in (one / "log").read_text(errors="replace").splitlines()]
    named = sorted({line for line in said if "hf-spot: " in line and any(part in line for part in NAMED)})
    return Outcome(made, "named" if named else "SILENT", [*named, *told], codes)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


def preload(made: Composition) -> None:
    """Import once what each launch would import."""
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    for name in (
        "torch",
        "transformers.trainer",
        "transformers.models.gpt2.modeling_gpt2",
        "tests.matrix.cases",
        "tests.matrix.parts",
        "hf_spot",
    ):
        importlib.import_module(name)
    for name in LIBRARIES[made["family"]]:
        importlib.import_module(name)
    special = {
        "sft": ["trl.trainer.sft_trainer"],
        "dpo": ["trl.trainer.dpo_trainer"],
        "grpo": ["trl.trainer.grpo_trainer"],
        "sentences": ["sentence_transformers.losses", "transformers.models.bert.modeling_bert"],
    }
    for name in special.get(made["family"].partition(",")[0], ()):
        importlib.import_module(name)
    importlib.import_module("hf_spot.training.callback")


def attack(count: int, seed: int, folder: Path, families: tuple[str, ...] = FAMILIES) -> Iterator[tuple[int, Outcome, float]]:
    """Play random compositions, the same ones for the same seed; yield the number, the outcome and the seconds of each.

    Args:
        count: how many.
        seed: of hypothesis.
        folder: for everything; that of a composition that passes is removed.
        families: what trains.
    """
    import shutil

    for number, made in enumerate(drawn(count, seed, families)):
        began = time.monotonic()
        outcome = play(made, folder / str(number))
        if outcome.passed:
            shutil.rmtree(folder / str(number))
        yield number, outcome, time.monotonic() - began


def drawn(count: int, seed: int, families: tuple[str, ...] = FAMILIES) -> list[Composition]:
    """Return compositions that hypothesis draws: of a few that resemble each other one."""
    return [_few(f"{seed} {number}", families)[-1] for number in range(count)]


def _few(seed: str, families: tuple[str, ...]) -> list[Composition]:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    found: list[Composition] = []
    quiet = list(HealthCheck)

    @seeded(seed)
    @settings(max_examples=_FEW, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=quiet)
    @given(compositions(families))
    def collect(made: Composition) -> None:
        found.append(made)

    collect()
    return found
