"""What a run of the tests may demand of its machine, and what it tells at the end.

A test that cannot run here skips and says why. CPT_REQUIRE names, comma-separated, what must not be
missing: there the same test fails, so that CI cannot turn green by losing its data or its second rank.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

KINDS = ("unit", "contract", "parity", "distributed", "e2e", "browser")
OUTCOMES = ("passed", "failed", "skipped")
SUMMARY = "summary"  # record_property(SUMMARY, line): a test's own line at the end

REQUIREMENTS = {
    "shared": "the research data beside the checkout, or where CPT_SHARED points",
    "bitsandbytes": "the package bitsandbytes: pip install cpt[quant]",
    "browser": "chromium and chromedriver of one version on PATH, and the package selenium",
    "deepspeed": "the package deepspeed, g++ and ninja: pip install cpt[deepspeed]",
    "lm_eval": "the package lm-eval: pip install cpt[lm-eval]",
    "two_ranks": "torch.distributed with gloo, two processes on this machine",
}


def required() -> frozenset[str]:
    """Names in CPT_REQUIRE. Raises pytest.UsageError for a name that is no requirement."""
    names = frozenset(filter(None, (name.strip() for name in os.environ.get("CPT_REQUIRE", "").split(","))))
    if unknown := sorted(names - REQUIREMENTS.keys()):
        raise pytest.UsageError(f"CPT_REQUIRE names {unknown}; requirements are {sorted(REQUIREMENTS)}")
    return names


def require(name: str, present: bool, reason: str) -> None:
    """Go on if `present`; else skip with `reason`, or fail where CPT_REQUIRE names this requirement."""
    if name not in REQUIREMENTS:
        raise ValueError(f"{name!r} is no requirement; add it to REQUIREMENTS (has {sorted(REQUIREMENTS)})")
    if present:
        return
    if name in required():
        pytest.fail(f"{reason}; CPT_REQUIRE says {name} must be here: {REQUIREMENTS[name]}", pytrace=False)
    pytest.skip(f"{reason} (needs {name}: {REQUIREMENTS[name]})", allow_module_level=True)


def kind_of(nodeid: str) -> str:
    """The directory under tests/ that a test lies in; "other" for a test that lies in none of KINDS."""
    parts = nodeid.split("::")[0].split("/")
    return next((part for part in parts if part in KINDS), "other")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a misspelt CPT_REQUIRE before any test runs."""
    required()
    config.addinivalue_line("markers", "browser: opens pages in the system's Chromium")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """After everything else: a line per kind. Works under xdist, whose reports reach the controller."""
    result = yield
    counts = {outcome: tally(terminalreporter, outcome) for outcome in OUTCOMES}
    for kind in (*KINDS, "other"):
        numbers = [counts[outcome][kind] for outcome in OUTCOMES]
        if kind in KINDS or any(numbers):
            line = ", ".join(f"{n} {outcome}" for n, outcome in zip(numbers, OUTCOMES, strict=True))
            terminalreporter.write_line(f"{kind + ':':13}{line}")
    for report in terminalreporter.stats.get("passed", []):
        for line in (text for name, text in report.user_properties if name == SUMMARY):
            terminalreporter.write_line(line)
    return result


def tally(reporter: pytest.TerminalReporter, outcome: str) -> Counter[str]:
    """How many tests of each kind ended so; an error in set-up or tear-down counts as failed."""
    stats = {
        "passed": ("passed", "xpassed"),
        "failed": ("failed", "error"),
        "skipped": ("skipped", "xfailed"),
    }
    reports = [report for key in stats[outcome] for report in reporter.stats.get(key, [])]
    return Counter(kind_of(nodeid) for nodeid in {report.nodeid for report in reports})
