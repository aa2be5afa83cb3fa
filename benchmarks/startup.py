"""Claim: help comes at once: no command waits for torch before it knows what to do.

    python benchmarks/startup.py        half a minute

Wall time of each command's --help in a new process, in turn with that of `import torch`, with which
most trainers' command lines begin.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import markdown, write

COMMANDS = ("tl-label", "tl-shard", "tl-train", "tl-eval", "tl-seg", "tl-explain")
REPEATS = 9


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    folder = Path(sys.executable).parent
    baseline = "python -c 'import torch'"
    commands = {baseline: [sys.executable, "-c", "import torch"]}
    commands |= {f"{name} --help": [str(folder / name), "--help"] for name in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + REPEATS):
        for name, command in commands.items():
            times[name].append(seconds(command))
    kept = {name: values[1:] for name, values in times.items()}  # the first reads from the disk
    rows = [
        {
            "command": name,
            "secs": statistics.median(values),
            "spread_secs": max(values) - min(values),
            "times_faster": statistics.median(a / b for a, b in zip(kept[baseline], values)),
        }
        for name, values in kept.items()
    ]
    print(markdown(rows))
    print(f"written to {write('startup', rows)}")


if __name__ == "__main__":
    main()
