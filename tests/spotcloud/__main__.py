"""``python -m tests.spotcloud``: a training on a spot cloud of this machine's own, told line by line, and its bill.

Six interruptions by EC2 in two regions and one by a person, a fallback to another type and one to the full price; ``--watch``
is killed twice.
Ends with 1 unless the model is the undisturbed one to the bit, and nothing was left running, untagged or unwritten.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.servers import SeaweedFS
from tests.spotcloud.machine import why_not
from tests.spotcloud.machines_story import MachinesStory
from tests.spotcloud.market import Change, Pool, weather
from tests.spotcloud.story import DEMO, LARGE, PLAIN, SHORT, SMALL, Outcome, Story, long_story


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.spotcloud", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which machines go, and of who hears of it (0)")
    parser.add_argument("--short", action="store_true", help="two interruptions, as in the tests")
    parser.add_argument("--weather", action="store_true", help="machines come and go by the clock, and not by steps")
    parser.add_argument("--speed", type=float, default=10.0, help="so many times shorter are the waits of --watch (10)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder that keeps every log")
    parser.add_argument(
        "--machines", type=int, metavar="N", help="three machines of one job, really training, and N interruptions"
    )
    options = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hf_spot-spotcloud-") as folder, SeaweedFS() as s3:
        if options.machines:
            with MachinesStory(options.keep or Path(folder), s3, options.machines, options.seed, say) as several:
                found = several.play_machines()
                print("\n".join(["", *several.bill, ""]))
            print("\n".join(f"{name:<26}{value}" for name, value in found.items()))
            bad = ("left running", "not in the journal", "without tags", "security groups left", "wrong by a cent")
            clean = not any(found[name] for name in bad)
            return 0 if clean and found["rates are equal"] and found["losses differ by"] < 1e-3 else 1
        script, acts = (PLAIN, SHORT) if options.short else (DEMO, long_story(options.seed))
        with Story(options.keep or Path(folder), s3, script, acts, speed=options.speed, say=say) as story:
            outcome = story.play_weather(storms(options.seed)) if options.weather else story.play()
            print("\n".join(["", *story.cloud.bill.lines(story.cloud.now())]))
    tell(outcome)
    return 0 if outcome.is_good else 1


def storms(seed: int) -> list[Change]:
    """Pools that have machines for a third of a minute and then none for half of that; prices move every ten seconds."""
    pools = [Pool(LARGE, "us-east-1a"), Pool(LARGE, "us-east-1b"), Pool(LARGE, "us-west-2a"), Pool(SMALL, "us-west-2b")]
    return weather(seed, pools, lasts_s=3600.0, up_s=20.0, down_s=10.0, price_s=10.0, notice_s=8.0, without_notice=0.4)


def tell(outcome: Outcome) -> None:
    rows = [
        ("sha256, on the cloud", outcome.sha256),
        ("sha256, undisturbed", outcome.sha256_twin),
        ("loss of every step", "equal" if outcome.losses_equal else "DIFFERENT"),
        ("optimizer steps", outcome.final_step),
        ("interruptions", len(outcome.lost)),
        ("steps trained again", ", ".join(map(str, outcome.lost))),
        ("regions", ", ".join(sorted({pool.region for pool in outcome.pools}))),
        ("left running", outcome.left_running or "nothing"),
        ("without tags", outcome.untagged or "nothing"),
        ("not in the journal", outcome.unwritten or "nothing"),
        ("launch templates left", outcome.templates),
        ("spent by the journal", f"${sum(outcome.spent_usd):.4f}"),
        ("charged by the cloud", f"${sum(outcome.charged_usd):.4f}"),
    ]
    print("\n" + "\n".join(f"{name:<24}{value}" for name, value in rows))
    print(f"\n{'The same model, bit for bit.' if outcome.identical else 'The two models DIFFER.'}")


if __name__ == "__main__":
    sys.exit(main())
