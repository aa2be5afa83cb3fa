"""Write what was measured into README.md and pages of docs/.

    python benchmarks/table.py           rewrite them from results/*.json
    python benchmarks/table.py --check   change nothing; fail if they are not up to date

Only what stands between the marks `<!-- BEGIN NAME -->` and `<!-- END NAME -->` is replaced.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = {
    "speed": ROOT / "docs/performance.md",
    "speed in short": ROOT / "README.md",
    "growth": ROOT / "docs/scale.md",
    "learned": ROOT / "docs/learning.md",
    "learned in short": ROOT / "README.md",
    "faithful": ROOT / "docs/explanations.md",
}
FORMATTER = argparse.RawDescriptionHelpFormatter

Result = Mapping[str, Any]
"""Content of one of results/*.json."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A number that a script measures, and what it should be."""

    text: str
    script: str
    """The result is results/SCRIPT.json, on a GPU results/SCRIPT-gpu.json."""
    value: Callable[[Result], float]
    """Takes the number out of the result."""
    goal: float | None
    """None where only the number is wanted."""
    at_most: bool = False
    unit: str = "×"
    digits: int = 2
    """Behind the point, of what was measured."""
    on_gpu: bool = False

    @property
    def result(self) -> str:
        return self.script + ("-gpu" if self.on_gpu else "")

    @property
    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {self.goal:,g} {self.unit}".rstrip()

    def written(self, number: float) -> str:
        return f"{number:,.{self.digits}f} {self.unit}".rstrip()

    def is_met(self, number: float) -> bool:
        if self.goal is None:
            return True
        return number <= self.goal if self.at_most else number >= self.goal


def row(result: Result, **wanted: Any) -> Mapping[str, Any]:
    """Return the row of a result that has these values."""
    found = [r for r in result["rows"] if all(r.get(k) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}; this script and table.py disagree")
    return found[0]


def feed(column: str, path: str = "ours") -> Callable[[Result], float]:
    return lambda result: row(result, rand_augment="yes", path=path)[column]


def label_bytes(encoding: str, column: str = "mean_bytes") -> Callable[[Result], float]:
    return lambda result: row(result, encoding=encoding)[column]


def normaliser_bytes(bits: str) -> Callable[[Result], float]:
    with_it, without = label_bytes(f".tlm{bits}"), label_bytes(f".tlm{bits}, no normaliser")
    return lambda result: with_it(result) - without(result)


def faster_decoding(result: Result) -> float:
    torch_us = label_bytes("torch file, no normaliser", "decode_us")(result)
    return torch_us / label_bytes(".tlm", "decode_us")(result)


def pack(job: str, column: str) -> Callable[[Result], float]:
    return lambda result: row(result, job=job)[column]


def loss(batch: int, column: str) -> Callable[[Result], float]:
    return lambda result: row(result, batch=batch)[column]


def evaluation(result: Result) -> float:
    return max(r["times_faster"] for r in result["rows"] if r["job"].startswith("ours, folders"))


def step(job: str, column: str) -> Callable[[Result], float]:
    return lambda result: row(result, job=job)[column]


def best(column: str) -> Callable[[Result], float]:
    """Take the largest number of a column."""
    return lambda result: max(r[column] for r in result["rows"])


def startup(command: str) -> Callable[[Result], float]:
    return lambda result: row(result, command=f"{command} --help")["secs"]


def generation(teacher: str, column: str) -> Callable[[Result], float]:
    """Take the fastest of what the job does with a teacher, compiled or not."""

    def fastest(result: Result) -> float:
        jobs = [r for r in result["rows"] if r["job"].startswith("generate")]
        return max(r[column] for r in jobs if r["teacher"].startswith(teacher))

    return fastest


FEED = Claim(
    text="CPU feed with RandAugment and labels, against the published way",
    script="feed", value=feed("to_published"), goal=2.0,
)  # fmt: skip
FEED_PEERS = Claim(
    text="the same, against the fastest of timm, webdataset, torchvision v2",
    script="feed", value=feed("to_fastest_peer"), goal=1.2,
)  # fmt: skip
PACK = Claim(
    text="writing shards, against webdataset's TarWriter, CPU time",
    script="pack", value=pack("write, ours", "times_less_cpu"), goal=3,
)  # fmt: skip
LOSS = Claim(
    text="token targets and loss, forward and backward, batch 64, against dense ones",
    script="loss", value=loss(64, "times_faster"), goal=5,
)  # fmt: skip
GENERATION = Claim(
    text="label generation, of its dense teacher's forward pass alone, CPU time",
    script="generation", value=generation("tf_efficientnet_lite0", "of_dense"), goal=0.95,
    unit="",
)  # fmt: skip
EVALUATION = Claim(
    text="evaluation, against timm's validate on the same images",
    script="evaluation", value=evaluation, goal=1.3,
)  # fmt: skip

CLAIMS = [
    FEED,
    FEED_PEERS,
    Claim(
        text="CPU half of the GPU feed, per core, against the published way",
        script="feed", value=feed("to_published", "ours, for a GPU"), goal=5.5,
    ),
    Claim(
        text="label map, lossless: scores and classes", unit="B", digits=0,
        script="label_bytes", value=label_bytes(".tlm, no normaliser"), goal=3600, at_most=True,
    ),
    Claim(
        text="… its normaliser", unit="B", digits=0,
        script="label_bytes", value=normaliser_bytes(""), goal=350, at_most=True,
    ),
    Claim(
        text="label map, 8-bit: scores and classes", unit="B", digits=0,
        script="label_bytes", value=label_bytes(".tlm 8-bit, no normaliser"), goal=2400,
        at_most=True,
    ),
    Claim(
        text="… its normaliser", unit="B", digits=0,
        script="label_bytes", value=normaliser_bytes(" 8-bit"), goal=350, at_most=True,
    ),
    Claim(
        text="label decoding, a map in a batch of 256", unit="µs", digits=0,
        script="label_bytes", value=label_bytes(".tlm", "decode_us"), goal=25, at_most=True,
    ),
    Claim(
        text="… against torch.load of a file each",
        script="label_bytes", value=faster_decoding, goal=7,
    ),
    PACK,
    Claim(
        text="packing end to end, a core, `--check ends`", unit="img/s", digits=0,
        script="pack", goal=1900,
        value=lambda result: 1e6 / row(result, job="pack, ours, --check ends")["cpu_us"],
    ),
    Claim(
        text="packing end to end, a core, every image decoded", unit="img/s", digits=0,
        script="pack", goal=1900,
        value=lambda result: 1e6 / row(result, job="pack, ours")["cpu_us"],
    ),
    Claim(
        text="token targets and loss, batch 16, against dense ones",
        script="loss", value=loss(16, "times_faster"), goal=3,
    ),
    LOSS,
    Claim(
        text="… their extra memory, of that of dense ones", unit="",
        script="loss", value=loss(64, "memory"), goal=0.45, at_most=True,
    ),
    GENERATION,
    Claim(
        text="… of the model's own, one answer an image, CPU time",
        script="generation", value=generation("tf_efficientnet_lite0", "of_model"), goal=0.95,
        unit="",
    ),
    EVALUATION,
    Claim(
        text="training step, LV-ViT-S, batch 16: its peak of memory", unit="MiB", digits=0,
        script="training_step", value=step("sparse", "peak_mib"), goal=None,
    ),
    Claim(
        text="… with dense targets and loss", unit="MiB", digits=0,
        script="training_step", value=step("dense", "peak_mib"), goal=None,
    ),
    Claim(
        text="… what it allocates in all", unit="MiB", digits=0,
        script="training_step", value=step("sparse", "allocated_mib"), goal=None,
    ),
    Claim(
        text="start-up: `tl-label --help`", unit="s",
        script="startup", value=startup("tl-label"), goal=0.3, at_most=True,
    ),
    Claim(
        text="start-up: `tl-eval --help`", unit="s",
        script="startup", value=startup("tl-eval"), goal=0.3, at_most=True,
    ),
    Claim(
        text="token targets and loss, batch 256, forward and backward", unit="µs", digits=0,
        script="loss", value=lambda result: 1e3 * loss(256, "sparse_ms")(result), goal=120,
        at_most=True, on_gpu=True,
    ),
    Claim(
        text="… against dense ones",
        script="loss", value=loss(256, "times_faster"), goal=25, on_gpu=True,
    ),
    Claim(
        text="label generation, NFNet-F6 at 576, bf16", unit="img/s", digits=0,
        script="generation", value=generation("dm_nfnet_f6", "images_per_sec"), goal=350,
        on_gpu=True,
    ),
    Claim(
        text="… of its dense teacher's forward pass alone",
        script="generation", value=generation("dm_nfnet_f6", "of_dense"), goal=0.95, unit="",
        on_gpu=True,
    ),
    Claim(
        text="feed, end to end", unit="img/s", digits=0,
        script="training_step", value=best("feed_images_per_sec"), goal=6000, on_gpu=True,
    ),
    Claim(
        text="training step, LV-ViT-S, bf16, batch 256", unit="img/s", digits=0,
        script="training_step", value=best("synthetic_images_per_sec"), goal=5300, on_gpu=True,
    ),
    Claim(
        text="… with the feed, of synthetic input", unit="",
        script="training_step", value=best("of_synthetic"), goal=0.95, on_gpu=True,
    ),
]  # fmt: skip

SHORT: Sequence[tuple[str, Sequence[Claim]]] = [
    ("The feed with RandAugment and token labels on a CPU, against the published way and against "
     "the fastest of timm, webdataset and torchvision v2", [FEED, FEED_PEERS]),
    ("Token-label targets and loss at batch 64, against dense ones", [LOSS]),
    ("Writing shards, against webdataset's TarWriter, in CPU time", [PACK]),
    ("Making label maps from JPEG files, of the speed of the dense teacher alone, in CPU time",
     [GENERATION]),
    ("`tl-eval`, against timm's validate on the same images", [EVALUATION]),
]  # fmt: skip


def read_results(folder: Path) -> dict[str, Result]:
    """Return every result by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def measured(claim: Claim, results: Mapping[str, Result]) -> float | None:
    """Return a claim's number, None if it was not measured.

    Raises:
        LookupError: If the result is there, but not the number.
    """
    if claim.result not in results:
        return None
    try:
        return claim.value(results[claim.result])
    except (LookupError, ValueError) as error:
        raise LookupError(f"{claim.result}.json: {claim.text}: {error}") from error


def verdict(claim: Claim, results: Mapping[str, Result]) -> str:
    """Write a number; in bold, with the word, where the goal is missed."""
    number = measured(claim, results)
    if number is None:
        return "not measured"
    text = claim.written(number)
    return text if claim.is_met(number) else f"**{text}, missed**"


def speed(results: Mapping[str, Result]) -> str:
    """Write the tables of docs/performance.md."""
    parts = []
    for title, on_gpu in (("On a CPU", False), ("On a GPU", True)):
        claims = [claim for claim in CLAIMS if claim.on_gpu == on_gpu]
        lines = ["| claim | goal | measured | by | on |", "|---|---|---|---|---|"]
        for claim in claims:
            day = results.get(claim.result, {}).get("machine", {}).get("date", "")
            lines.append(
                f"| {claim.text} | {claim.goal_text} | {verdict(claim, results)} "
                f"| `{claim.script}.py` | {day} |"
            )
        machines = sorted({machine(results[c.result]) for c in claims if c.result in results})
        where = f"Measured on: {'; '.join(machines)}." if machines else "Nothing was measured yet."
        parts.append("\n".join([f"### {title}", "", where, "", *lines]))
    return "\n\n".join(parts)


def machine(result: Result) -> str:
    facts = result["machine"]
    gpu = f"{facts['gpu']}, " if facts.get("gpu") else ""
    return (
        f"{gpu}{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, "
        f"torch {facts['torch']}"
    )


def speed_in_short(results: Mapping[str, Result]) -> str:
    """Write README's five lines."""
    lines = []
    for text, claims in SHORT:
        numbers = " and ".join(verdict(claim, results) for claim in claims)
        goals = " and ".join(claim.goal_text for claim in claims)
        scripts = dict.fromkeys(claim.script for claim in claims)
        line = f"- {text}: {numbers} (goal {goals}; `{', '.join(scripts)}.py`)."
        lines.append(textwrap.fill(line, 104, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def growth(results: Mapping[str, Result]) -> str:
    """Write the table of docs/scale.md: constants, and what they come to."""
    found = [result for name, result in results.items() if name.partition("-")[0] == "scale"]
    lines = [
        "| step | of | built | CPU, a sample | memory, a sample | 14.2 M | 400 M |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in sorted(found, key=lambda r: r["samples"]):
        for r in result["rows"]:
            lines.append(
                f"| {r['step']} | {r['by']} | {result['samples']:,} | {r['us_a_sample']:.2g} µs "
                f"| {r['peak_bytes_a_sample']:,.0f} B | {extent(r, '21k')} | {extent(r, '400m')} |"
            )
    machines = sorted({f"{r['machine']['date']}, {machine(r)}" for r in found})
    return "\n".join([f"Measured on: {'; '.join(machines)}.", "", *lines])


def learned(results: Mapping[str, Result]) -> str:
    """Write the tables of docs/learning.md, one for each student."""
    if "learning" not in results:
        return "Nothing was measured yet."
    result, parts = results["learning"], []
    for student in dict.fromkeys(row["student"] for row in result["rows"]):
        lines = [f"| {student} learns from | top-1, % | gain | against | seeds |"]
        lines.append("|---|---|---|---|---|")
        for row in result["rows"]:
            if row["student"] != student:
                continue
            gain = "" if row["gain"] is None else f"{row['gain']:+.1f} ± {row['±']:.1f}"
            lines.append(
                f"| {row['learns from']} | {row['top-1']:.1f} | {gain} | {row['against'] or ''} "
                f"| {row['seeds']} |"
            )
        parts.append("\n".join(lines))
    where = f"Measured on: {result['machine']['date']}, {machine(result)}."
    return "\n\n".join([*parts, where])


def learned_in_short(results: Mapping[str, Result]) -> str:
    """Write README's line of what token labels bring."""
    if "learning" not in results:
        return "- What token labels bring a student: not measured (`learning.py`)."
    told = []
    for row in results["learning"]["rows"]:
        if row["learns from"] == "token labels with class label":
            told.append(
                f"{row['top-1']:.1f} % in place of {row['top-1'] - row['gain']:.1f} "
                f"({row['student']})"
            )
    seeds = results["learning"]["seeds"]
    line = (
        "- With token labels beside class labels students get more held-out scenes right than with "
        f"class labels alone, in as many steps: {' and '.join(told)} "
        f"(`learning.py`; digits, {seeds} seeds)."
    )
    return textwrap.fill(line, 104, subsequent_indent="  ", break_on_hyphens=False)


def faithful(results: Mapping[str, Result]) -> str:
    """Write the tables of docs/explanations.md, one for each question."""
    if "faithfulness" not in results:
        return "Nothing was measured yet."
    result, parts = results["faithfulness"], []
    for table, measures in result["tables"].items():
        heads = [f"{title} {'↑' if is_more else '↓'}" for title, is_more in measures.values()]
        lines = [f"| {table} | place | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
        for row in sorted(result["rows"], key=lambda row: row[f"place, {table}"]):
            cells = [row["method"], f"{row[f'place, {table}']:.1f}"]
            for name in measures:
                reach = (row[f"{name} high"] - row[f"{name} low"]) / 2
                mark = " ~" if row[f"{name} like random"] else ""
                cells.append(f"{row[name]:.1f} ± {reach:.1f}{mark}")
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    clean = [f"{run['clean'][0]:.1f}" for run in result["runs"]]
    where = f"{result['machine']['date']}, {machine(result)}"
    parts.append(f"Right on the scenes as they are: {', '.join(clean)} %. Measured on: {where}.")
    return "\n\n".join(parts)


def extent(row: Mapping[str, Any], size: str) -> str:
    mins, gib = row[f"mins_{size}"], row[f"peak_gib_{size}"]
    time = f"{mins:,.0f} min" if mins >= 2 else f"{60 * mins:,.0f} s"
    return f"{time}, {gib:,.1f} GiB" if gib < 10 else f"{time}, {gib:,.0f} GiB"


def replaced(page: str, name: str, content: str) -> str:
    """Put content between a page's marks.

    Raises:
        ValueError: If the page has no such marks, or several.
    """
    begin, end = f"<!-- BEGIN {name} -->", f"<!-- END {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"expected {begin} … {end} once")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", page)


def rewritten(results: Mapping[str, Result]) -> dict[Path, str]:
    """Return what the pages should say."""
    contents = {
        "speed": speed(results),
        "speed in short": speed_in_short(results),
        "growth": growth(results),
        "learned": learned(results),
        "learned in short": learned_in_short(results),
        "faithful": faithful(results),
    }
    pages: dict[Path, str] = {}
    for name, path in PAGES.items():
        page = pages.get(path) or path.read_text(encoding="utf-8")
        pages[path] = replaced(page, name, contents[name])
    return pages


def main() -> None:
    """Rewrite the pages, or look at them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in rewritten(read_results(RESULTS)).items():
        if text == path.read_text(encoding="utf-8"):
            continue
        if check:
            sys.exit(f"{path} is not what results/ say; run python benchmarks/table.py")
        path.write_text(text, encoding="utf-8")
        print(f"{path} is rewritten")


if __name__ == "__main__":
    main()
