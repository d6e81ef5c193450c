"""Measure the data of the tables: python -m bench.run [layers models construction ...] [--device cpu|cuda].

Every record is written to bench/results/<device>/<part>.json as soon as it is measured. An interrupted run resumes,
unless the commit or the machine has changed: then everything is measured again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from smile_kernels.benchmark.command import write_json
from smile_kernels.benchmark.measure import Record, limits, machine

from . import construction, folder_of, merged, models, problems, routing, streaming, svd

PARTS = {"models": models.plan, "construction": construction.plan}
# On a GPU bench.gpu measures the layers. The parts after the default ones take longer, and run only by name.
PARTS_ON_CPU = {
    "layers": problems.plan,
    "svd": svd.plan,
    "streaming": streaming.plan,
    "routing": routing.plan,
    "windows": routing.plan_windows,
    "routing_costs": routing.plan_costs,
    "merged": merged.plan,
}


def measure_all(
    plan: dict[str, Callable[[], Record]], file: Path, device: str, rates: Callable[[], list[Record]]
) -> None:
    """Measure the records that are missing in `file`, and write after each record.

    Args:
        plan: name -> the function that measures it.
        file: the results.
        device: "cpu" or "cuda".
        rates: measures the machine's limits, once per file.
    """
    result = {"machine": machine(device), "limits": [], "records": []}
    if file.exists():
        found = json.loads(file.read_text())
        if all(found["machine"][key] == result["machine"][key] for key in ("device", "commit", "versions")):
            result = found
        else:
            print(f"{file}: from another commit or machine; is measured again")
    start, threads = time.monotonic(), torch.get_num_threads()
    result["limits"] = result["limits"] or rates()
    held = {record["name"] for record in result["records"]}
    for i, (name, run) in enumerate(plan.items(), 1):
        if name in held:
            continue
        begun = time.monotonic()
        torch.set_num_threads(threads)
        result["records"].append({"name": name, **run()})
        write_json(file, result)
        now = time.monotonic()
        print(f"{file.stem} {i}/{len(plan)} {name}: {now - begun:.1f} s, {now - start:.0f} s so far", flush=True)
    write_json(file, result)


def measure_limits() -> list[Record]:
    """The limits of a CPU, with one thread and with two."""
    measured = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        measured.append(limits("cpu", (torch.float32, torch.bfloat16)))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = f"{', '.join(PARTS)}, which is the default; on a CPU {', '.join(PARTS_ON_CPU)} too, the first by default"
    parser.add_argument("parts", nargs="*", help=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    plans = PARTS | PARTS_ON_CPU if on_cpu else PARTS
    parts = options.parts or [*(["layers"] if on_cpu else []), *PARTS]
    for part in parts:
        if part not in plans:
            parser.error(f"parts: {part!r} is unknown on {options.device}; expected some of {', '.join(plans)}")
    if os.getloadavg()[0] > 0.5:
        print(f"the load is {os.getloadavg()[0]:.1f}: other work on this machine affects the results")
    folder = folder_of("cpu" if on_cpu else torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        file = folder / f"{part}.json"
        # Only the layers have a floor.
        measure_all(plans[part](options.device), file, options.device, measure_limits if part == "layers" else list)


if __name__ == "__main__":
    main()
