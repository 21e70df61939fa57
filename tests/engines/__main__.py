"""``python -m tests.engines``: trains with engines that divide a model among ranks, and prints one line for each row.

Each row is trained on the CPU, over gloo: undisturbed, then interrupted by a notice and by ``kill -9``, then started again when
it is finished. Compared are each rank's part of the weights, the losses and learning rates of each step, and ``train_loss``.

The ranks are forked from this process once it has imported everything: importing takes much longer than training.
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

from hf_spot import Run
from tests.engines.rows import ROWS, Row, import_deepspeed
from tests.engines.train import train

TIMEOUT_S = 180.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _rank(row: Row, folder: Path, stop: str | None, rank: int, ranks: int, port: int, *, added: bool) -> None:
    """Be a rank, and end this process."""
    code = 1
    with (folder / f"log-{rank}.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        try:
            faulthandler.dump_traceback_later(TIMEOUT_S * 0.9, exit=False)
            code = train(row, folder, stop, added=added)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes abort a process whose interpreter is ending


def launch(row: Row, folder: Path, stop: str | None, ranks: int, *, added: bool = False) -> list[int]:
    """Train on some ranks, and return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notice").unlink(missing_ok=True)
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(row, folder, stop, rank, ranks, port, added=added)
        children.append(child)
    deadline, codes = time.monotonic() + TIMEOUT_S, dict.fromkeys(children, 124)
    waiting = list(children)
    while waiting and time.monotonic() < deadline:
        for child in list(waiting):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                waiting.remove(child)
        time.sleep(0.02)
    for child in waiting:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return list(codes.values())


def endings(folder: Path, ranks: int) -> list[object]:
    return [json.loads((folder / f"ending-{rank}.json").read_text()) for rank in range(ranks)]


def told(folder: Path) -> dict[int, dict[str, float]]:
    """Return the newest log line of each step."""
    return {line["step"]: line for line in map(json.loads, (folder / "told.jsonl").read_text().splitlines())}


def files(folder: Path) -> list[str]:
    """Return the names of the files of a checkpoint that was written while training continued, without those of hf_spot."""
    checkpoint, ours = folder / "out" / "checkpoint-9", ("hf_spot_state", "log_window", "random_states")
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(str(name) for name in names if name.parts[0] not in ours)


def last_words(folder: Path) -> str:
    lines = [line for log in sorted(folder.glob("log-*.txt")) for line in log.read_text().splitlines() if "Error" in line]
    return lines[-1][:200] if lines else "no error"


def play(name: str, folder: Path, *, added: bool = False) -> str:
    """Train a row, and return what is wrong with it; empty if nothing is.

    Args:
        name: of the row.
        folder: for everything that is written.
        added: the cadence adds a save after each step.
    """
    row = ROWS[name]
    spot, later = folder / "spot", row.later_ranks or row.ranks
    if row.refused:
        ranks = row.ranks
        if row.later_ranks:
            codes = launch(row, spot, "notice@5", row.ranks)
            if codes != [75] * row.ranks:
                return f"the first launch ended with {codes}: {last_words(spot)}"
            ranks = later
        codes = launch(row, spot, "", ranks)
        said = "".join(log.read_text() for log in spot.glob("log-*.txt"))
        if codes != [2] * ranks or row.refused not in said:
            return f"it is not refused: {codes}, {last_words(spot)}"
        commits = list((spot / "run").glob("**/*.safetensors")) if not row.later_ranks else []
        return f"refused, but committed {commits}" if commits else ""
    if row.says:
        codes = launch(row, spot, row.stops[0], row.ranks)
        said = "".join(log.read_text() for log in spot.glob("log-*.txt"))
        return "" if codes == [0] * row.ranks and row.says in said else f"it does not say so: {codes}, {last_words(spot)}"
    if codes := [one for one in launch(row, folder / "plain", None, row.ranks) if one]:
        return f"undisturbed it ended with {codes}: {last_words(folder / 'plain')}"
    for stop in (*row.stops, "", ""):
        wanted = 0 if not stop else 75 if stop.startswith("notice") else -9
        codes = launch(row, spot, stop, row.ranks, added=added)
        if codes != [wanted] * row.ranks:
            return f"the launch with {stop or 'no stop'} ended with {codes}: {last_words(spot)}"
        if wanted == 0 and endings(spot, row.ranks) != endings(folder / "plain", row.ranks):
            return f"it ends with {endings(spot, row.ranks)}, not {endings(folder / 'plain', row.ranks)}"
    if files(spot) != files(folder / "plain"):
        return f"its checkpoint has the files {files(spot)}, not {files(folder / 'plain')}"
    reasons = [entry.data["reason"] for entry in Run(str(spot / "run")).events() if entry.kind == "commit"]
    if ("cadence" in reasons) != added:
        return f"its commits have the reasons {reasons}"
    if left := [path.name for path in (spot / "out" / ".hf_spot").glob("saves/*/*")]:
        return f"added saves are left: {left}"
    return "" if told(spot) == told(folder / "plain") else "its log lines differ"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of rows (all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything that was written there")
    parser.add_argument("--added", action="store_true", help="a save after each step, of which only hf_spot learns")
    options = parser.parse_args()
    chosen = [name for name in ROWS if not options.names or any(part in name for part in options.names)]
    if importlib.util.find_spec("deepspeed") is not None:
        import_deepspeed()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="hf_spot-engines-"))
    wrong = 0
    print(f"{'row':44} {'stops':18} {'result':10} seconds", flush=True)
    for number, name in enumerate(chosen):
        row, began = ROWS[name], time.monotonic()
        if row.needs and importlib.util.find_spec(row.needs) is None:
            result, why = "skipped", f"needs {row.needs}: see CONTRIBUTING.md"
        else:
            why = play(name, folder / str(number), added=options.added)
            result = "WRONG" if why else "refused" if row.refused else "named" if row.says else "identical"
        wrong += result == "WRONG"
        shown = "" if row.refused and not row.later_ranks else " ".join(row.stops)
        print(f"{name:44} {shown:18} {result:10} {time.monotonic() - began:7.0f}  {why}", flush=True)
    if options.keep is None:
        shutil.rmtree(folder)
    print(f"{len(chosen)} rows, {wrong} not as they must be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
