"""Measure any checkpoint: python -m eval_harness --model PATH_OR_ID --suite NAME[,NAME] | FILE.yaml --out DIR

Alone, or on several processes under torchrun or accelerate launch. With --out every set's file is written as soon as
it is measured, results.json at the end; the same command again keeps what is there of this model, set and settings.
`python -m eval_harness compare A.json B.json` sets two measurements side by side.

Exit codes: 0 measured, 1 another process of the launch is gone, 2 bad input (one line per problem on stderr),
130 interrupted, 143 terminated; in the last two cases what was measured is kept. torchrun makes 1 of all but 0.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eval_harness import launched, lm_eval_adapter
from eval_harness.cache import CacheError
from eval_harness.checkpoint import Checkpoint
from eval_harness.combine import CombineError
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.launched import LaunchError, Ranks, Stop
from eval_harness.lineage import LoadError
from eval_harness.lm_eval_adapter import LmEvalError
from eval_harness.measure import MeasureError
from eval_harness.progress import Progress, Silent
from eval_harness.prompts import PromptError
from eval_harness.result_table import WIDTH, table
from eval_harness.results import ResultError
from eval_harness.run import FolderError, Run
from eval_harness.suite import Suite, SuiteError, load_suite, outline, shipped


class UsageError(ValueError):
    """An argument, or two of them, that cannot be."""


BAD_INPUT = (
    *(UsageError, SuiteError, MeasureError, PromptError, LoadError, ScoringError),
    *(LmEvalError, CombineError, CacheError, ResultError, FolderError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["compare"]:
        from eval_harness.compare import main as compare

        return compare(words[1:])
    options = _parser().parse_args(words)
    try:
        if options.list:
            print("\n\n".join(_listed(name, options.limit) for name in _names(options.suite) or shipped()))
            return 0
        return _launched(options)
    except BAD_INPUT as error:
        return _said(error)


def _launched(options: argparse.Namespace) -> int:
    """Measure as one of the processes of this launch; the first one says what went wrong."""
    try:
        ranks = launched.start((*BAD_INPUT, Interrupted))
    except LaunchError as error:
        return _said(error, code=1)
    with launched.stop_requests() as stop:
        try:
            code = _measured(options, ranks, stop)
        except BAD_INPUT as error:
            code = _said(error, 2, ranks)
        except LaunchError as error:  # the others are gone: nothing to part from
            return _said(error, 1, ranks)
        except (KeyboardInterrupt, Interrupted):
            code = 143 if stop.signal == signal.SIGTERM else 130
            kept = (
                f"; what was measured is in {options.out}: the same command goes on from there" if options.out else ""
            )
            _said(Interrupted(f"interrupted{kept}"), code, ranks, "")
    ranks.end()
    return code


def _said(error: Exception, code: int = 2, ranks: Ranks | None = None, label: str = "error: ") -> int:
    if ranks is None or ranks.is_main:
        for line in str(error).splitlines():
            print(f"{label}{line}", file=sys.stderr)
    return code


def _measured(options: argparse.Namespace, ranks: Ranks, stop: Stop) -> int:
    suite = ranks.on_main(lambda: _suite(options))
    out = ranks.on_main(lambda: _folder(options.out, [*suite.names, *suite.combined]))
    _quiet()
    checkpoint = ranks.together(lambda: Checkpoint.of(options.model, base=options.base, revision=options.revision))
    with Progress() if ranks.is_main else Silent() as progress:
        run = Run(
            checkpoint,
            ranks,
            stop,
            progress,
            out,
            {name: getattr(options, name) for name in ("model", "suite", "limit")},
            dtype=options.dtype,
            quantization=options.quantization,
            device=options.device,
            batch_tokens=options.batch_tokens,
        )
        results = run.results(suite)
    if ranks.is_main:
        print(table(results))
    return 0


def _quiet() -> None:
    """No bars of transformers: they would tear the line of progress; in a file none of the Hub's either."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _listed(name: str, limit: int | None) -> str:
    """A suite: its description, then its sets with their rows and origins."""
    sets = outline(name, limit=limit)
    rows = ["?" if count is None else f"{count:,}" for _, _, count in sets]
    wide = max(len(one) for one, _, _ in sets)
    lines = [f"  {one:<{wide}} {count:>7} rows  {origin}" for (one, origin, _), count in zip(sets, rows, strict=True)]
    about = textwrap.wrap(shipped().get(name, ""), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([name, *about, *lines])


def _names(suites: str | None) -> list[str]:
    return [one for one in (suites or "").split(",") if one]


def _suite(options: argparse.Namespace) -> Suite:
    """All suites as one, read and checked before a model is loaded."""
    names = _names(options.suite)
    if not options.model or not names:
        raise UsageError("--model and --suite are needed; --list shows the shipped suites")
    if options.data and not Path(options.data).is_dir():
        raise UsageError(f"--data {options.data}: no such folder")
    whole, problems, given = Suite(""), [], Counter[str]()
    for name in names:
        try:
            one = load_suite(name, limit=options.limit, data=options.data, seed=options.seed)
        except SuiteError as error:
            problems.append(str(error))
            continue
        whole.sets += one.sets
        whole.lm_eval += one.lm_eval
        whole.combined |= one.combined
        given.update([*one.names, *one.combined])
    twice = [name for name, count in given.items() if count > 1]
    problems += [
        f"--suite {options.suite}: {name!r} is the name of two sets; rename one, or give the suites one by one"
        for name in twice
    ]
    try:
        lm_eval_adapter.check(whole.lm_eval)
    except LmEvalError as error:
        problems.append(str(error))
    if problems:
        raise SuiteError("\n".join(problems))
    return whole


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


def _number(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval_harness",
        description="Measure a checkpoint on suites. `compare A.json B.json` compares two measurements.",
    )
    add, positive = parser.add_argument, partial(_number, 1)
    add("--model", metavar="PATH_OR_ID", help="a folder of save_pretrained or of an adapter, or a hub name")
    add("--revision", metavar="COMMIT", help="branch, tag or commit of a hub name")
    add("--base", metavar="PATH_OR_ID", help="an adapter's base, when it is not where the folder says")
    add(
        "--quantization",
        choices=("trained", "none", "4bit", "8bit"),
        default="trained",
        help="how weights are held; default: as an adapter was trained, plain weights as they are",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as saved")
    add("--suite", metavar="NAME[,NAME]", help="shipped suites, or YAML files")
    add("--data", metavar="DIR", help="files NAME.SPLIT.jsonl that win over the hub for tasks")
    add("--limit", type=positive, metavar="N", help="at most N rows of each set")
    add("--seed", type=partial(_number, 0), metavar="N", help="of shots and sampled text, where a set names none")
    add("--out", metavar="DIR", help="where results.json and a file per set are written, and found again")
    add("--list", action="store_true", help="show suites with their sets and rows, and stop; needs no network")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--batch-tokens", type=positive, metavar="N", help="padded tokens of a batch; default: what fits in memory")
    return parser


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # A gloo thread that is still alive when the interpreter goes may abort it, after success.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
