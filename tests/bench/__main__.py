"""`python -m tests.bench`: every cost that has a bound, beside its bound, as ratios within one run.

Exits 0 whether or not the bounds hold: figures of a shared machine are for reading, not for a gate.
"""

import argparse
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from cpt.run_dir import libraries, machine
from tests.bench import commands, two_ranks
from tests.bench.figures import Figure, table

OUT = commands.ROOT / "docs" / "evidence" / "bench.json"


Measure = Callable[[int], list[Figure]]


def late(module: str, name: str) -> Measure:
    """`tests.bench.module.name`, imported when it is measured: torch must not be here before, see ITEMS."""

    def measure(repeats: int) -> list[Figure]:
        return getattr(import_module(f"tests.bench.{module}"), name)(repeats)

    return measure


# In this order: what measures a child's memory comes before what makes this process large.
ITEMS: dict[str, Measure] = {
    "start_up": commands.start_up,
    "quickstart": commands.quickstart,
    "two_ranks": two_ranks.two_ranks,
    "ledger": late("ledger", "ledger"),
    "sft_no_methods": late("training", "sft_no_methods"),
    "lora": late("training", "lora"),
    "rft_no_methods": late("rewarded", "rft_no_methods"),
    "hft": late("training", "half_fine_tuning"),
    "gere": late("retention", "gere"),
    "distill": late("retention", "distill"),
    "on_adapters": late("retention", "on_adapters"),
    "recording": late("retention", "recording"),
    "forgetting": late("forgetting", "forgetting"),
    "multiple_choice": late("evaluation", "multiple_choice"),
    "measured_again": late("evaluation", "measured_again"),
    "memory_of_the_head": late("evaluation", "memory_of_the_head"),
    "within": late("within", "within"),
}


def main() -> None:
    """Measure, print the table, write the JSON."""
    asked = arguments()
    figures: list[Figure] = []
    load: dict[str, tuple[float, float]] = {}
    for name in [name for name in ITEMS if name in (asked.only or ITEMS)]:
        print(f"measuring {name} ...", flush=True)
        before = os.getloadavg()[0]
        figures += ITEMS[name](asked.repeats)
        load[name] = (before, os.getloadavg()[0])
        warn_if_busy(name, *load[name])
    print(f"\n{table(figures)}")
    out = asked.out or (None if asked.only else OUT)
    if out is not None:
        write(out, figures, asked.repeats, load)
        print(f"\nwrote {out}")


def arguments() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=ITEMS, help="one item (repeat it for several)")
    parser.add_argument("--repeats", type=positive, default=15, help="interleaved pairs, default 15")
    parser.add_argument("--out", type=Path, help=f"default {OUT.relative_to(commands.ROOT)}; with --only: none")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def warn_if_busy(name: str, before: float, after: float) -> None:
    """Say that others worked too: the bench itself adds a load of one per core, whatever is above is theirs."""
    cores = os.cpu_count() or 1
    if after > cores + 0.5:
        print(f"note: {name}: load {before:.1f} before, {after:.1f} after, on {cores} cores: others were at work")


def write(out: Path, figures: list[Figure], repeats: int, load: dict[str, tuple[float, float]]) -> None:
    """Figures with all samples, and on what they were measured (no host name)."""
    record: dict[str, Any] = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"processor": processor(), "memory_gib": memory_gib()},
        "load_before_and_after": load,
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "libraries": libraries(),
        "repeats": repeats,
        "figures": [figure.to_json() for figure in figures],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(record["measured"], table(figures), out.name), encoding="utf-8")


def page(measured: str, shown: str, data: str) -> str:
    """The table as a page beside its data."""
    return f"""# What it costs

Made by `make bench` on {measured[:10]}: interleaved pairs, medians of ratios within one run, 95 % bootstrap intervals.
All samples, the machine and the versions are in [{data}]({data}). A shared machine is noisy: no test asserts a time.

```
{shown}
```
"""


def processor() -> str:
    """The processor's model name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def memory_gib() -> float:
    """Physical memory."""
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


if __name__ == "__main__":
    main()
