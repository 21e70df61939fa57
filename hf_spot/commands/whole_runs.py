"""``hf-spot runs``: list, follow, copy, move, delete and fork whole runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from hf_spot.commands.common import (
    add_command,
    megabytes,
    open_run,
    print_json,
    print_table,
    progress_bar,
    takes_json,
    takes_run,
    takes_unfenced,
)
from hf_spot.errors import ConfigError, SpotError
from hf_spot.policy.words import counted
from hf_spot.run.order import SORTS, age_in_words, sorted_runs

if TYPE_CHECKING:
    from hf_spot.run.below import Summary
    from hf_spot.run.journal import RunState
    from hf_spot.run.run import Run

FOLLOW_INTERVAL_S = 5.0


def add_to(commands: Any) -> None:
    """Add ``runs``."""
    runs = commands.add_parser("runs", help="list, follow, copy, move, delete and fork runs", allow_abbrev=False)
    actions = runs.add_subparsers(title="actions", metavar="ACTION", required=True)
    ls = add_command(actions, "ls", _ls, "list the runs at and below a URL")
    ls.add_argument("url", metavar="URL", help="s3://bucket/prefix, gs://…, az://…, hf://…, or a directory")
    ls.add_argument("--sort", choices=SORTS, default="name", help="order of the rows (default: name; age: the newest first)")
    ls.add_argument("--cost", action="store_true", help="add the cost of each run; this reads their whole journals")
    takes_json(ls)

    follow = add_command(actions, "follow", _follow, "show a run while it trains: a picture in a terminal, otherwise lines")
    takes_run(follow)
    follow.add_argument(
        "--interval-s", type=float, default=FOLLOW_INTERVAL_S, metavar="S", help="seconds between two looks (default: 5)"
    )
    follow.add_argument("--once", action="store_true", help="show it once and exit")
    takes_json(follow)

    cp = add_command(actions, "cp", _cp, "copy a run with its checkpoints and its history; a launch of it may be running")
    mv = add_command(actions, "mv", _mv, "move a run")
    rm = add_command(actions, "rm", _rm, "delete a run, and nothing else at its place")
    fork = add_command(actions, "fork", _fork, "begin a new run from a checkpoint of another one")
    for command in (cp, mv, rm):
        takes_run(command)
    fork.add_argument(
        "start", metavar="RUN[@STEP]", help="a run, for its newest checkpoint or that of STEP, or a checkpoint folder"
    )
    for command in (cp, mv, fork):
        command.add_argument("new", metavar="NEW", help="URL of the new run")
        takes_unfenced(command)
    for command in (cp, mv, rm, fork):
        command.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        takes_json(command)
    for command in (mv, rm):
        command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument(
            "--not-running",
            action="store_true",
            help="you know that the newest launch, which has not said how it ended, is dead",
        )


# -- ls ---------------------------------------------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> int:
    from hf_spot.run.below import find_runs, what_is_there

    found = sorted_runs(find_runs(args.url), args.sort)
    costs = {one.url: _cost(one) for one in found} if args.cost else {}
    if args.json:
        print_json([_told(one, costs.get(one.url), with_cost=args.cost) for one in found])
        return 0
    if not found:
        words, hint = what_is_there(args.url)
        print(f"{args.url}: {words}\n  Try: {hint}")
        return 0
    now = datetime.now(timezone.utc)
    rows = [["run", "state", "step", "committed", "launches", "size", *(["cost"] if args.cost else [])]]
    for one in found:
        of = f" of {one.max_steps}" if one.max_steps else ""
        launches = str(one.state.launch) if one.state else "?"
        cost = costs.get(one.url)
        committed = age_in_words(now, one.committed) if one.committed else "never"
        row = [one.name or ".", one.in_words, f"{one.step}{of}", committed, launches, megabytes(one.size_bytes)]
        rows.append([*row, *(["?" if cost is None else f"${cost:,.2f}"] if args.cost else [])])
    print_table(rows, right=("step", "launches", "size", "cost"))
    for one in found:
        if one.problem:
            print(f"{one.name or '.'}: {one.problem}", file=sys.stderr)
    return 0


def _told(one: Summary, cost: float | None, *, with_cost: bool) -> dict[str, Any]:
    told = {name: value for name, value in dataclasses.asdict(one).items() if name not in ("state", "committed", "heard")}
    times = {name: value.isoformat() if value else None for name, value in (("committed", one.committed), ("heard", one.heard))}
    told |= {"state": one.in_words, "launches": one.state.launch if one.state else None, **times}
    return {**told, "cost_usd": cost} if with_cost else told


def _cost(one: Summary) -> float | None:
    from hf_spot.economics.report import summarise

    if one.state is None:
        return None
    report = summarise(open_run(one.url).events())
    return None if report.unpriced_s and not report.cost_usd else report.cost_usd


# -- cp, mv, rm, fork -------------------------------------------------------------------------------------------------


def _cp(args: argparse.Namespace) -> int:
    source, target = open_run(args.run), open_run(args.new, allow_unfenced_store=args.allow_unfenced_store)
    return _copy(args, source, target, "copied")


def _copy(args: argparse.Namespace, source: Run, target: Run, done: str) -> int:
    from hf_spot.run.copies import check_source, check_target, copy_run, files_to_copy

    if args.dry_run:
        state = check_source(source)
        check_target(source, target)
        files = files_to_copy(source, state)
        told = {"run": source.url, "new": target.url, "entries": state.number, "files": len(files)}
        size_bytes = sum(info.size for info in files)
        _tell(
            args,
            {**told, "size_bytes": size_bytes},
            f"{source.url} would be {done} to {target.url}: {_contents(state, len(files), size_bytes)}; nothing was done",
        )
        return 0
    state = copy_run(source, target, progress=lambda size_bytes: progress_bar(args, "copy", size_bytes))
    told = {"run": source.url, "new": target.url, "entries": state.number, "checkpoints": len(state.checkpoints)}
    _tell(args, told, f"{source.url} {done} to {target.url}: {counted(len(state.checkpoints), 'checkpoint')}")
    return 0


def _mv(args: argparse.Namespace) -> int:
    from hf_spot.run.copies import check_source, check_target, copy_run, delete_run

    source, target = open_run(args.run), open_run(args.new, allow_unfenced_store=args.allow_unfenced_store)
    check_target(source, target)
    state = _check_ended(args, source, check_source(source))
    if args.dry_run:
        return _copy(args, source, target, "moved")
    _ask(
        args,
        f"move {source.url} to {target.url}, and delete it where it was ({counted(len(state.checkpoints), 'checkpoint')})?",
    )
    copied = copy_run(source, target, progress=lambda size_bytes: progress_bar(args, "move", size_bytes))
    if source.state() != copied:
        raise SpotError(
            f"{source.url} has changed while it was copied to {target.url}: it was not deleted",
            hint=f"hf-spot report {source.url}",
        )
    _, others = delete_run(source)
    _tell(args, {"run": source.url, "new": target.url}, f"{source.url} moved to {target.url}{_others(others)}")
    return 0


def _rm(args: argparse.Namespace) -> int:
    from hf_spot.run.copies import belongs, check_source, delete_run

    run = open_run(args.run)
    own = [info for info in run.store.list() if belongs(info.key)]
    state = run.state() if own else check_source(run)  # of an interrupted deletion only files may be left
    state = _check_ended(args, run, state)
    size_bytes = sum(info.size for info in own)
    contents = _contents(state, len(own), size_bytes)
    if args.dry_run:
        told = {"run": run.url, "objects": len(own), "size_bytes": size_bytes, "deleted": False}
        _tell(args, told, f"{run.url} would be deleted: {contents}; nothing was done")
        return 0
    _ask(args, f"delete {run.url} ({contents})?")
    count, others = delete_run(run)
    told = {"run": run.url, "objects": count, "size_bytes": size_bytes, "deleted": True}
    _tell(args, told, f"{run.url} deleted: {contents}{_others(others)}")
    return 0


def _fork(args: argparse.Namespace) -> int:
    from hf_spot.run.copies import fork_run
    from hf_spot.run.start_from import find_start

    target = open_run(args.new, allow_unfenced_store=args.allow_unfenced_store)
    if args.dry_run:
        start = find_start(args.start)
        _tell(args, {"new": target.url, "step": start.step}, f"{target.url} would begin at step {start.step}; nothing was done")
        return 0
    step = fork_run(args.start, target)
    told = {"new": target.url, "step": step}
    _tell(args, told, f"{target.url} begins at step {step} of {args.start}: hf-spot launch --store {target.url} train.py")
    return 0


def _check_ended(args: argparse.Namespace, run: Run, state: RunState) -> RunState:
    """Refuse to take a run away from a launch that may be running."""
    from hf_spot.run.copies import has_ended

    if not args.not_running and not has_ended(run, state):
        raise ConfigError(
            f"launch {state.launch} of {run.url} has not ended: it may be running",
            hint="end it (Ctrl-C, SIGTERM, hf-spot terminate), or add --not-running if it has died without a word",
        )
    return state


def _ask(args: argparse.Namespace, question: str) -> None:
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can answer: standard input is not a terminal", hint="--yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was done", hint="--yes does not ask")


def _contents(state: RunState, count: int, size_bytes: int) -> str:
    counts = (len(state.checkpoints), "checkpoint"), (state.launch, "launch"), (count, "object")
    return ", ".join([*(counted(*one) for one in counts), megabytes(size_bytes)])


def _others(keys: Sequence[str]) -> str:
    return f"; {len(keys)} other objects stay there, such as {keys[0]}" if keys else ""


def _tell(args: argparse.Namespace, told: dict[str, Any], text: str) -> None:
    if args.json:
        print_json(told)
    else:
        print(text)


# -- follow -----------------------------------------------------------------------------------------------------------


def _follow(args: argparse.Namespace) -> int:
    return follow_run(args.run, interval_s=args.interval_s, once=args.once, as_json=args.json)


def follow_run(url: str, *, interval_s: float, once: bool, as_json: bool) -> int:
    """Show a run until it is finished, or Ctrl-C.

    Args:
        url: of the run.
        interval_s: seconds between two looks.
        once: show it once.
        as_json: print it once, as JSON.

    Raises:
        ConfigError: there is no run.
    """
    from hf_spot.economics.follow import Follower, lines_of, picture_of
    from hf_spot.run.below import what_is_there

    if not interval_s > 0:
        raise ConfigError(f"--interval-s {interval_s:g} must be positive", hint="--interval-s 5")
    run = open_run(url)
    if not run.state().number:
        words, hint = what_is_there(url)
        raise ConfigError(f"{url}: {words}", hint=hint)
    follower = Follower(run)
    if as_json:
        print_json(follower.look(datetime.now(timezone.utc)).to_dict())
        return 0
    if not sys.stdout.isatty():
        while True:
            before = follower.number
            view = follower.look(datetime.now(timezone.utc))
            for line in lines_of(follower.new_entries(before)):
                print(line, flush=True)
            if once or view.ended == "finished":
                return 0
            time.sleep(interval_s)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            view = follower.look(datetime.now(timezone.utc))
            live.update(picture_of(view), refresh=True)
            if once or view.ended == "finished":
                return 0
            time.sleep(interval_s)
