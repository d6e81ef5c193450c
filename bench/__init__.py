"""Measurements of this repository, and the folders of their results."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def folder_of(device_name: str) -> Path:
    """bench/results/cpu for "cpu", else a folder named after the GPU."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
