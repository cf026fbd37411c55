"""Measure any checkpoint: python -m eval_harness --model PATH_OR_ID --suite NAME[,NAME] | FILE.yaml

Exit codes: 0 measured, 2 bad input (one line per problem on stderr), 130 interrupted. With --out every
set's file is written as soon as it is measured, and results.json at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_harness.errors import ScoringError
from eval_harness.loading import LoadError, load
from eval_harness.measure import EvalSet, MeasureError, check, measure
from eval_harness.prompts import PromptError
from eval_harness.results import Result, to_document, write_json
from eval_harness.suite import SuiteError, load_suite, shipped


class UsageError(ValueError):
    """An argument, or two of them, that cannot be."""


BAD_INPUT = (UsageError, SuiteError, MeasureError, PromptError, LoadError, ScoringError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:<16} {description}" for name, description in shipped().items()))
        return 0
    try:
        _run(options)
    except KeyboardInterrupt:
        print("interrupted; the sets measured so far are written", file=sys.stderr)
        return 130
    except BAD_INPUT as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if not options.model or not options.suite:
        raise UsageError("--model and --suite are needed; --list shows the shipped suites")
    sets = _sets(options.suite.split(","), options.limit)
    check(sets)  # before the model is loaded
    out = _folder(options.out, [one.name for one in sets])
    loaded = load(options.model, device=options.device, base=options.base, quantization=options.quantization)
    results: dict[str, dict[str, Result]] = {}
    for one in sets:
        results |= measure(loaded.model, loaded.tokenizer, [one], batch_tokens=options.batch_tokens)
        if out:
            write_json(out / f"{one.name}.json", _document(options, {one.name: results[one.name]}))
    if out:
        write_json(out / "results.json", _document(options, results))
    print(table(results))


def table(results: Mapping[str, Mapping[str, Result]]) -> str:
    """A plain table: set, measure, value ± standard error, n, definition; notes and exclusions below it."""
    head = ("set", "measure", "value", "n", "definition")
    rows = [
        (name, kind, _value(result), str(result.n), result.definition)
        for name, by_measure in results.items()
        for kind, result in by_measure.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join([*lines, *_remarks(results)])


def _remarks(results: Mapping[str, Mapping[str, Result]]) -> Iterable[str]:
    for name, by_measure in results.items():
        for kind, result in by_measure.items():
            said = [f"{count} excluded: {reason}" for reason, count in result.excluded.items()]
            said += [result.note] if result.note else []
            if said:
                yield f"{name} {kind}: {'; '.join(said)}"


def _value(result: Result) -> str:
    if result.value is None:
        return "undefined"
    return f"{result.value:.4f}" + ("" if result.stderr is None else f" ± {result.stderr:.4f}")


def _sets(names: Sequence[str], limit: int | None) -> list[EvalSet]:
    problems: list[str] = []
    sets: list[EvalSet] = []
    for name in names:
        try:
            sets += load_suite(name, limit=limit)
        except SuiteError as error:
            problems.append(str(error))
    if problems:
        raise SuiteError("\n".join(problems))
    return sets


def _folder(out: str | None, names: Sequence[str]) -> Path | None:
    if out is None:
        return None
    bad = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in ("results", ".", "..")]
    if bad:
        raise UsageError(f"--out: set names become file names; not possible: {', '.join(map(repr, bad))}")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from error
    return folder


def _document(options: argparse.Namespace, results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    return to_document(results, model=options.model, suite=options.suite, limit=options.limit)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval_harness", description="Measure a checkpoint on suites.")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a folder of save_pretrained or of an adapter, or a hub name"
    )
    parser.add_argument("--base", metavar="PATH_OR_ID", help="an adapter's base, when it is not where the folder says")
    parser.add_argument(
        "--quantization",
        choices=("trained", "none", "4bit", "8bit"),
        default="trained",
        help="how weights are held; default: as an adapter was trained, plain weights as they are",
    )
    parser.add_argument("--suite", metavar="NAME[,NAME]", help="shipped suites, or YAML files")
    parser.add_argument("--out", metavar="DIR", help="where results.json and a file per set are written")
    parser.add_argument("--limit", type=_positive, metavar="N", help="at most N rows of each set")
    parser.add_argument("--list", action="store_true", help="show the shipped suites and stop")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--batch-tokens", type=_positive, default=8192, metavar="N", help="padded tokens of a batch")
    return parser


if __name__ == "__main__":
    sys.exit(main())
