"""Run a sweep, one run after the other, and keep what came of it: sweep.json after every run, the rest at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from cpt.checkpoints import write_json, write_text
from cpt.errors import CptError, Stopped
from cpt.report import compare_page, compare_table
from cpt.sweep import Planned, done, file_of, newest, tokens
from cpt.sweep_results import compared, references, results, text, wrapped

Say = Callable[[str], None]


def run_sweep(planned: Sequence[Planned], folder: Path, say: Say) -> dict[str, str]:
    """Run what is not finished, in order; one that cannot go on is recorded and the others go on. Why, by name.

    Raises Stopped when a signal asked for it; the same command goes on.
    """
    from cpt.stream import run

    failed: dict[str, str] = {}
    for number, one in enumerate(planned, start=1):
        name, is_done = one.stream.name, done(one) is not None
        say(f"sweep: {number} of {len(planned)}, {name}")
        try:
            if (one.stream.processes or 1) == 1:
                run(one.stream, say=_briefly(say) if is_done else say)
            elif is_done:
                say(f"finished, by a launch of {one.stream.processes} processes")
            else:
                failed[name] = f"takes {one.stream.processes} processes: start {file_of(folder, one)} under a launcher"
        except Stopped:
            raise
        except CptError as error:
            failed[name] = "; ".join(error.problems)
        except (Exception, SystemExit) as error:  # one run's end is not the sweep's
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            failed[name] = f"{said} (where it arose: cpt run {file_of(folder, one)})"
        if name in failed:
            say(f"failed: {failed[name]}")
        _keep(planned, failed, folder)
    return failed


def _briefly(say: Say) -> Say:
    """Of a run that is finished: that it is, not its tables and notes once more."""

    def heard(line: str) -> None:
        if not line.startswith((" ", "note: ")):
            say(line)

    return heard


def _keep(planned: Sequence[Planned], failed: Mapping[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = {}
    for one in planned:
        path, found = done(one), newest(one)
        runs[one.stream.name] = {
            "label": one.label,
            "method": one.method,
            "learning_rate": one.learning_rate,
            "seed": one.seed,
            "state": "failed" if one.stream.name in failed else "to do" if path is None else "done",
            "why": failed.get(one.stream.name),
            "run": str(found.path) if found else None,
            "tokens": asdict(tokens(path)) if path else None,
        }
    of_methods, of_baselines = results(planned, failed), references(planned, failed)
    rows = {"results": [asdict(row) for row in of_methods], "references": [asdict(one) for one in of_baselines]}
    write_json(folder / "sweep.json", {"runs": runs, **rows})


def finish(planned: Sequence[Planned], failed: Mapping[str, str], folder: Path) -> str:
    """Write sweep.txt and, of several methods, compare.html; what sweep.txt holds."""
    said = text(planned, failed)
    try:
        if found := compared(planned, failed):
            compare_page.write(found, folder / "compare.html")
            said += f"\n\n{compare_table.text(found)}"
    except CptError as error:  # the tables above stand without
        said = "\n".join([said, "", *(wrapped(f"not compared: {problem}") for problem in error.problems)])
    write_text(folder / "sweep.txt", f"{said}\n")
    return said
