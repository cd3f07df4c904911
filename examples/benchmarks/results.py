"""What a benchmark leaves behind: a JSON file with every single value, and a Markdown table."""

import dataclasses
import datetime
import json
import os
import platform
import statistics
from importlib import metadata

PACKAGES = (
    "torch",
    "numpy",
    "gymnasium",
    "mujoco",
    "stable-baselines3",
    "skrl",
    "rsl-rl-lib",
    "tianshou",
    "torchrl",
)


@dataclasses.dataclass
class Row:
    """One measured thing.

    `values` holds one number per repetition; `ratios` what each is of the reference's number in the
    same repetition, which is what can be compared between machines. `higher` says what is better.
    A row that could not be measured has a reason in `skipped` and no values.
    """

    table: str
    name: str
    unit: str
    higher: bool
    values: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)
    ratio_to: str = ""
    skipped: str = ""
    more: dict[str, float] = dataclasses.field(default_factory=dict)

    def relate(self, reference, name):
        """Fill `ratios` from the reference's values, one per repetition."""
        if self.values and reference:
            self.ratio_to = name
            self.ratios = [own / other for own, other in zip(self.values, reference, strict=True)]


def machine():
    """Cores, versions and the date: what the numbers depend on, and nothing that names anybody."""
    can_ask = hasattr(os, "sched_getaffinity")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cores": len(os.sched_getaffinity(0)) if can_ask else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def save(benchmark, settings, rows, out):
    """Write a JSON file, and the tables beside it; without a path, nothing."""
    if out is None:
        return
    facts = machine()
    document = {
        "benchmark": benchmark,
        "machine": facts,
        "settings": settings,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    described = ", ".join(f"{key} {value}" for key, value in (facts | settings).items())
    out.with_suffix(".md").write_text(f"{described}\n\n{markdown(rows)}", encoding="utf-8")


def markdown(rows):
    """One table per `table`, in the order of the rows: median, spread, and ratio to a reference."""
    lines = []
    for table in dict.fromkeys(row.table for row in rows):
        own = [row for row in rows if row.table == table]
        more = list(dict.fromkeys(name for row in own for name in row.more))
        reference = next((row.ratio_to for row in own if row.ratio_to), "")
        head = [table, own[0].unit, "lowest to highest"]
        head += [f"ratio to {reference}"] * bool(reference) + more
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for row in own:
            if row.skipped:
                cells = [row.name, f"– ({row.skipped})"] + [""] * (len(head) - 2)
            else:
                spread = f"{number(min(row.values))} – {number(max(row.values))}"
                cells = [row.name, number(statistics.median(row.values)), spread]
                if reference:
                    cells.append(number(statistics.median(row.ratios)) if row.ratios else "")
                cells += [number(row.more[name]) if name in row.more else "" for name in more]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def number(value):
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
