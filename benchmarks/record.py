"""What every benchmark does with its numbers: print a table, keep them as JSON with the machine."""

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Say what the numbers were measured on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    """Write results/NAME.json: the machine, facts about the inputs, one record per row.

    With a GPU it is NAME-gpu.json, so that the rows of two machines lie side by side.
    """
    path = RESULTS / f"{name}{'-gpu' if torch.cuda.is_available() else ''}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"machine": machine(), **facts, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Turn rows of equal keys into a Markdown table; floats keep four digits."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def memory_mib(name: str) -> float:
    """Tell of this process what Linux calls VmRSS (resident now) or VmHWM (its peak)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
