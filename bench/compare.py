"""Changes between two results that exceed the noise: python bench/compare.py old.json new.json.

Compares times relative to F.linear in the same round, so that the speed of the machine has no effect. The exit status
is 1 if a peer of the new results is slower, refused, or can no longer run.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median, quantiles

from scipy.stats import mannwhitneyu

from smile_kernels.benchmark.command import describe
from smile_kernels.benchmark.measure import Record
from smile_kernels.benchmark.peers import BASELINE

# A change counts if it is at least this large, larger than both spreads, and as improbable under one distribution.
LEAST, PROBABILITY = 0.05, 0.01


def compare(old: Record, new: Record) -> tuple[list[str], list[str]]:
    """(worse, better): a line for each case and peer in both results that changed."""
    worse, better = [], []
    before = {_key(record): record["peers"] for record in old["records"]}
    for record in new["records"]:
        for name, peer in record["peers"].items():
            then = before.get(_key(record), {}).get(name)
            if name == BASELINE or then is None or "wall_us" not in then:
                continue
            if "wall_us" not in peer:
                reason = peer.get("refused") or peer["cannot_run"]
                worse.append(f"{name}, {describe(record)}: no longer runs: {reason}")
                continue
            ratios = [_over_linear(peers, name) for peers in (before[_key(record)], record["peers"])]
            change = median(ratios[1]) / median(ratios[0]) - 1
            noise = max(LEAST, sum(map(_spread, ratios)))
            if abs(change) >= noise and mannwhitneyu(*ratios).pvalue <= PROBABILITY:
                line = f"{change:+.0%} {name}, {describe(record)}: {median(ratios[0]):.2f} to {median(ratios[1]):.2f}"
                (worse if change > 0 else better).append(line)
    return worse, better


def _key(record: Record) -> str:
    return describe(record) + record["device"]


def _over_linear(peers: Record, name: str) -> list[float]:
    return [a / b for a, b in zip(peers[name]["wall_us"], peers[BASELINE]["wall_us"])]


def _spread(values: list[float]) -> float:
    """Half the interquartile range, relative to the median."""
    low, middle, high = quantiles(values, n=4)
    return (high - low) / 2 / middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = (json.loads(file.read_text()) for file in (options.old, options.new))
    for key in ("device", "commit", "versions"):
        if old["machine"][key] != new["machine"][key]:
            print(f"{key}: {old['machine'][key]} then, {new['machine'][key]} now")
    worse, better = compare(old, new)
    for title, lines in (("slower", worse), ("faster", better)):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
