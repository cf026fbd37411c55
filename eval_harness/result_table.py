"""Results as text of at most 80 columns: values by set, then what was excluded or noted, then the definitions."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from eval_harness.results import Result

WIDTH = 80
NAME = 37  # columns of a measure's name; a longer one gets a line of its own

Results = Mapping[str, Mapping[str, Result]]


def table(results: Results) -> str:
    """Set, measure, value ± standard error, n; every remark and definition once, with the sets that it is of."""
    blocks = [[_line("set, measure", "value", "n"), *_values(results)], list(_remarks(results)), _definitions(results)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _values(results: Results) -> Iterator[str]:
    for name, by_measure in results.items():
        yield from textwrap.wrap(name, WIDTH)
        for measure, result in by_measure.items():
            label = f"  {measure}"
            if len(label) > NAME:
                yield from textwrap.wrap(label, WIDTH, subsequent_indent="  ")
                label = ""
            yield _line(label, _value(result), str(result.n))


def _line(name: str, value: str, n: str) -> str:
    return f"{name:<{NAME}} {value:<28} {n:>12}"


def _value(result: Result) -> str:
    if result.value is None:
        return "undefined"
    return _digits(result.value) + ("" if result.stderr is None else f" ± {_digits(result.stderr)}")


def _digits(value: float) -> str:
    """Four decimals, or four digits where those would say nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def _remarks(results: Results) -> Iterator[str]:
    where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, by_measure in results.items():
        for measure, result in by_measure.items():
            for remark in _of_result(result):
                where[remark][name].append(measure)
    for remark, by_set in where.items():
        yield from _listed(remark, (f"{name} ({', '.join(measures)})" for name, measures in by_set.items()))


def _of_result(result: Result) -> Iterator[str]:
    note = result.note or ""
    yield from (f"{count} excluded, {why}" for why, count in result.excluded.items() if f"{count} {why}" not in note)
    if note:
        yield note


def _definitions(results: Results) -> list[str]:
    of_sets: dict[str, list[str]] = defaultdict(list)
    for name, by_measure in results.items():
        for result in by_measure.values():
            of_sets[result.definition].append(name)
    lines = [line for definition, names in of_sets.items() for line in _listed(definition, names)]
    return ["definitions", *lines] if lines else []


def _listed(what: str, where: Iterable[str]) -> list[str]:
    return textwrap.wrap(
        f"{what}: {', '.join(where)}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
