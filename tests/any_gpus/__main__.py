"""``python -m tests.any_gpus``: trains on 1, 2, 3 and 4 ranks, and prints the digest of each result.

Each row is trained on each number of ranks, and once more on changing numbers, interrupted by notices and by ``kill -9``: with
``--exact-on-any-gpus`` one digest per row, of the weights, the optimizer's states, and of each loss, norm and count that a user
reads. Without the option the digests differ, or the table would prove nothing.

The ranks are forked from this process once it has imported everything: importing takes much longer than training. A training on
one rank has no process group, and the threads that a user's Python would have.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.any_gpus.rows import ROWS
from tests.any_gpus.train import train

TIMEOUT_S = 240.0
RANKS = (1, 2, 3, 4)
# Ranks of each launch, and what ends it. On five ranks a step's micro-batches can't be divided equally.
CHANGES = ((2, "notice@2"), (3, "kill@5"), (1, "notice@5"), (5, "kill@7"), (4, "notice@8"), (2, ""))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _rank(name: str, folder: Path, stop: str, rank: int, ranks: int, port: int, *, exact: bool) -> None:
    """Be a rank, and end this process."""
    code = 1
    with (folder / f"log-{rank}.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.environ["WORLD_SIZE"] = str(ranks)
        if ranks > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        try:
            faulthandler.enable()
            faulthandler.dump_traceback_later(TIMEOUT_S * 0.9, exit=False)
            code = train(name, folder, stop, exact=exact)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes abort a process whose interpreter is ending


def launch(name: str, folder: Path, stop: str, ranks: int, *, exact: bool) -> list[int]:
    """Train a row on some ranks, and return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notice").unlink(missing_ok=True)
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(name, folder, stop, rank, ranks, port, exact=exact)
        children.append(child)
    codes, deadline_s = {}, time.monotonic() + TIMEOUT_S
    while len(codes) < ranks:
        for child in children:
            if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > deadline_s or any(code not in (0, 75, -signal.SIGKILL) for code in codes.values()):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.05)
    return [codes[child] for child in children]


def result(name: str, folder: Path, launches: tuple[tuple[int, str], ...], *, exact: bool) -> dict[str, str]:
    """Train a row in some launches, and return the digests of its end.

    Args:
        name: of the row.
        folder: for everything that is written.
        launches: number of ranks and what ends it, for each launch.
        exact: with the option.

    Raises:
        RuntimeError: a launch ended in another way, or its ranks ended with different results.
    """
    for ranks, stop in launches:
        expected = {"": 0, "notice": 75, "kill": -signal.SIGKILL}[stop.partition("@")[0]]
        codes = launch(name, folder, stop, ranks, exact=exact)
        if codes != [expected] * ranks:
            raise RuntimeError(f"{ranks} ranks ended with {codes} instead of {expected}: {folder}")
    endings = [json.loads((folder / f"ending-{rank}.json").read_text()) for rank in range(launches[-1][0])]
    if exact and any(one["weights"] != endings[0]["weights"] for one in endings):
        raise RuntimeError(f"ranks ended with different weights: {folder}")
    found: dict[str, str] = endings[0]
    return found


def _play(name: str, folder: Path, played: list[tuple[tuple[int, str], ...]], *, exact: bool) -> bool:
    """Print the digests of a row; return whether they are all the same."""
    results = []
    for launches in played:
        shown = " ".join(f"{ranks}{'!' if 'kill' in stop else ''}" for ranks, stop in launches)
        told = result(name, folder / shown.replace(" ", "-").replace("!", "k"), launches, exact=exact)
        print(f"{name:38} {shown:16} {told['weights'][:16]} {told['optimizer'][:12]} {told['lines'][:12]}", flush=True)
        results.append(told)
    return all(len({one[kind] for one in results}) == 1 for kind in ("weights", "optimizer", "lines"))


def main() -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of rows, or parts of them")
    parser.add_argument("--quick", action="store_true", help="one row, on one rank and on two, and from two to one")
    parser.add_argument("--folder", type=Path, help="where to train; it is kept (default: a temporary one)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hf_spot-any-gpus-"))
    if options.quick:
        os.environ["STEPS"] = "6"
    alone: list[tuple[tuple[int, str], ...]] = [((ranks, ""),) for ranks in RANKS]
    played = [alone[0], ((2, "kill@5"), (1, ""))] if options.quick else [*alone, CHANGES]
    names = [name for name in ROWS if not options.only or any(part in name for part in options.only)]
    rows, wrong = 0, []
    for name in names[:1] if options.quick else names:
        needs = ROWS[name].needs
        if needs and importlib.util.find_spec(needs) is None:
            print(f"{name:38} skipped: {needs} is not installed")
            continue
        if needs:
            importlib.import_module(needs)
        rows += 1
        if not _play(name, folder / f"row-{rows}", played, exact=True):
            wrong.append(f"{name}: results differ")
    if not options.only and not options.quick and _play(names[0], folder / "without", alone, exact=False):
        wrong.append("without the option the results are the same, too: the table proves nothing")
    for one in wrong:
        print(one)
    print(f"{rows} row{'' if rows == 1 else 's'}, {len(wrong)} with different results")
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
