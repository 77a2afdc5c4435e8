"""Faults on purpose, for as long as you like: no traceback, no silent loss, no run that finishes with NaN.

    python benchmarks/faults.py --minutes 60
    python benchmarks/faults.py --minutes 5 --seed 7 --kinds kill damage

Each trial is a stage of two to six updates on a CPU, about two seconds. Kinds of trials:

- kill: SIGKILL at random writes to the run's folder, then the same command: files must equal those of an unkilled run
- damage: bits flipped, files cut, emptied, deleted or lengthened in a stopped run, then the same command
- settings: one to three keys of the recipe, with values that hypothesis draws; two updates if they are accepted
- reward: a reward function that reseeds, exits, sleeps, returns NaN or raises a BaseException, ...

The table at the end counts outcomes. Exit code 1 if any is wrong; each of those is printed with its case.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

from support import faults  # noqa: E402
from support.fork_server import Server, install  # noqa: E402
from support.odd_settings import try_settings  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=faults.KINDS, default=faults.KINDS)
    parser.add_argument("--verbose", action="store_true", help="print every case")
    given_arguments = parser.parse_args()
    server = Server()
    install(server.ask)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            return run(faults.Bench(Path(folder)), given_arguments)
        finally:
            server.stop()


def run(bench: faults.Bench, asked: argparse.Namespace) -> int:
    """Runs trials of each kind in turn until the time is over; returns the exit code."""
    found = {kind: Counter() for kind in asked.kinds}
    wrong, end, number = [], time.monotonic() + 60 * asked.minutes, 0
    while time.monotonic() < end:
        kind = asked.kinds[number % len(asked.kinds)]
        trials = (
            try_settings(bench, asked.seed + number, 10)
            if kind == "settings"
            else [one(bench, kind, asked.seed, number)]
        )
        for outcome, case in trials:
            if asked.verbose:
                print(f"{kind}: {outcome}: {case}", flush=True)
            found[kind][outcome] += 1
            if outcome in faults.WRONG:
                wrong.append(f"{kind}: {outcome}: {case}")
                print(wrong[-1], flush=True)
        number += 1
    print(f"\nseed {asked.seed}\n\n{faults.table(found)}")
    return 1 if wrong else 0


def one(bench: faults.Bench, kind: str, first: int, number: int) -> tuple[str, str]:
    trial = {"kill": faults.kill, "damage": faults.damage, "reward": faults.odd_reward}[kind]
    return trial(bench, random.Random(f"{kind} {first} {number}"))


if __name__ == "__main__":
    sys.exit(main())
