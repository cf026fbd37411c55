"""The command line: `cpt ls`, `run`, `report`, `compare` and the others that `cpt --help` lists.

Exit codes: 0 done; 1 a defect of ours (a traceback is shown); 2 what you wrote: configuration, data,
tokenizer; 3 the run directory: another stream's, in use, damaged; 4 training could not go on: a loss that is
not a number, a full disk; 75 stopped by SIGTERM, 130 by Ctrl-C: the same command goes on from there.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.command import as_command
from cpt.errors import ConfigError, RunDirError, TrainingError, UserStopped
from cpt.terminal import speaking

if TYPE_CHECKING:
    from cpt.config import Stream

# Before any library reads them: nothing is sent anywhere, and tokenizers do not fork.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    help="Continual post-training of language models: a stream of stages, measured after each.",
    epilog="Exit codes: 0 done, 2 your input, 3 the run directory, 4 training failed, 75 or 130 stopped: run again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ledger = typer.Typer(
    help="Forget requests of a run: who asked, what was done, what was measured.", no_args_is_help=True
)
app.add_typer(ledger, name="ledger")

GOES_ON = {"run", "resume", "eval", "sweep", "draw"}  # started again, they go on from where they were stopped

StreamFile = Annotated[str, typer.Argument(metavar="STREAM", help="YAML file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. training.max_steps=10 seed=1")
]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help="run directory, or runs/NAME for the newest of a name")]


@app.command()
def run(
    stream: StreamFile,
    overrides: Overrides = None,
    new: Annotated[bool, typer.Option("--new", help="start another run directory")] = False,
    run_dir: Annotated[str | None, typer.Option("--run", metavar="DIR", help="go on in this run")] = None,
) -> None:
    """Run a stream; goes on with the newest run of its name as far as nothing changed."""
    from cpt.config import Stream

    parsed = Stream.from_yaml(stream, overrides)
    _run(parsed, new=new, run_dir=run_dir)


@app.command()
def resume(run_dir: RunDir) -> None:
    """Go on with an interrupted run, by the stream.yaml it holds."""
    from cpt.config import Stream
    from cpt.run_dir import Run

    found = Run.open(run_dir)
    _run(Stream.stored(found.path / "stream.yaml"), new=False, run_dir=str(found.path))


@app.command()
def validate(
    stream: Annotated[str | None, typer.Argument(metavar="STREAM", help="YAML file or shipped recipe")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of a stream instead")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="print the stream with every default")] = False,
) -> None:
    """Check a stream without loading a model: keys, values, files, columns, all problems at once."""
    from cpt.config import read_raw, refuse_sweep
    from cpt.validate import examine, json_schema, unchecked

    if schema:
        typer.echo(json.dumps(json_schema(), indent=1))
        return
    if stream is None:
        raise ConfigError("validate needs a stream: a YAML file or the name of a shipped recipe")
    raw = read_raw(stream, overrides)
    refuse_sweep(raw, stream)
    parsed = examine(raw)
    typer.echo(parsed.to_yaml() if resolved else f"{parsed.name}: {_counted(parsed.stages)}, nothing wrong")
    for name in unchecked(parsed):
        typer.echo(f"not checked, a name on the Hub: {name}")


@app.command(name="eval")
def evaluate(
    run_dir: RunDir,
    stream: Annotated[str | None, typer.Option("--stream", help="measure by this stream's evaluation plan")] = None,
) -> None:
    """Measure every finished stage of a run again by a changed evaluation plan; trains nothing."""
    from cpt.config import Stream
    from cpt.run_dir import Run
    from cpt.stream import measure_again

    found = Run.open(run_dir)
    plan = Stream.from_yaml(stream) if stream else Stream.stored(found.path / "stream.yaml")
    with speaking() as say:
        measure_again(found, plan, say)
    _show(found.path)


@app.command()
def export(
    run_dir: RunDir,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="folder to write")],
    stage: Annotated[str, typer.Option("--stage", help="name or number")],
    merge: Annotated[bool, typer.Option("--merge", help="merge adapters into plain weights")] = False,
) -> None:
    """Copy a stage's model, with a model card of how it was made and what it scores."""
    from cpt.export import export as write
    from cpt.run_dir import Run

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("export writes one folder: start it in one process, without a launcher")

    typer.echo(f"wrote {write(Run.open(run_dir), stage, to, merge)}")


@app.command()
def ask(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    stages: Annotated[str, typer.Option("--stages", help="names or numbers, e.g. 0,2,3; default: all")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
) -> None:
    """Show the answers of several stages to one prompt, side by side."""
    from cpt.ask import answers
    from cpt.report.summary import aligned
    from cpt.run_dir import Run

    found = answers(Run.open(run_dir), prompt, [part for part in stages.split(",") if part], max_new_tokens)
    typer.echo(aligned([["stage", "answer"], *([name, text] for name, text in found)], left=True))


@app.command()
def draw(
    stream: StreamFile,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="the .jsonl to write")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", help="how many")] = 1000,
    chat: Annotated[bool, typer.Option("--chat", help="conversations of one turn by its template, not texts")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="of a text, a turn, an answer")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="1: as the base would say it")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="other rows")] = 0,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Have a stream's base write general rows itself, to be replayed where there are no others of its kind."""
    from cpt import draw as drawing
    from cpt.config import Stream

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("draw writes one file: start it in one process, without a launcher")
    how = drawing.Drawing(rows, chat, max_new_tokens, temperature, seed)
    with speaking() as say:
        found = drawing.draw(Stream.from_yaml(stream, overrides), how, to, say, force=force)
    left = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in found.items() if n and name != "rows")
    typer.echo(f"wrote {to}: {found['rows']:,} rows{left and f' ({left})'}")


@app.command()
def memory(
    run_dir: RunDir,
    forget: Annotated[
        Path | None, typer.Option("--forget", metavar="FILE", help="rows (.jsonl, as data) that must leave it")
    ] = None,
) -> None:
    """Show what a run keeps of its rows for later stages; --forget takes rows out, and what was computed of them."""
    from cpt.memory_table import forget_rows, text
    from cpt.run_dir import Run

    found = Run.open(run_dir)
    if forget is not None:
        with found.lock():
            typer.echo("\n".join(forget_rows(found.path / "memory", forget)))
    typer.echo(text(found.path / "memory"))


RequestId = Annotated[str, typer.Argument(metavar="REQUEST", help="its id, as `cpt ledger list` shows it")]
AsJson = Annotated[bool, typer.Option("--json", help="everything as JSON")]


@ledger.command(name="list")
def list_requests(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List the requests of a run with their states, a line each."""
    from cpt.ledger import Ledger
    from cpt.ledger.table import listed
    from cpt.run_dir import Run

    with Ledger.open(Run.open(run_dir).path) as found:
        requests = [request.to_json() for request in found.requests()] if as_json else []
        typer.echo(json.dumps(requests, indent=1) if as_json else listed(found))


@ledger.command(name="show")
def show_request(run_dir: RunDir, request: RequestId, as_json: AsJson = False) -> None:
    """Show what is recorded of one request: stage, method, models, checks with thresholds, every entry."""
    from cpt.ledger import Ledger, table
    from cpt.run_dir import Run

    with Ledger.open(Run.open(run_dir).path) as found:
        shown = json.dumps(table.as_json(found, request), indent=1) if as_json else table.shown(found, request)
    typer.echo(shown)


@ledger.command(name="verify")
def verify_ledger(
    run_dir: RunDir,
    certificates: Annotated[
        list[Path] | None, typer.Option("--certificate", metavar="FILE", help="hold it against the ledger; repeatable")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for entries that were changed, removed or moved; exit 3 when there are any."""
    from cpt.ledger.table import verified
    from cpt.run_dir import Run

    facts, said = verified(Run.open(run_dir).path, certificates or [])
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    if facts["problems"]:
        raise RunDirError(*facts["problems"])
    if not as_json:
        typer.echo(said)


@ledger.command()
def certificate(
    run_dir: RunDir,
    request: RequestId,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="the JSON file to write")],
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Write what the ledger says of a verified request, with its head, for whoever asked."""
    from cpt.ledger import Ledger
    from cpt.ledger.certificate import write
    from cpt.run_dir import Run

    with Ledger.open(Run.open(run_dir).path) as found:
        write(found, request, to, force=force)
    typer.echo(f"wrote {to}")


@app.command()
def report(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run directories, or runs/NAME")],
    as_json: Annotated[bool, typer.Option("--json", help="matrix and facts of every stage as JSON")] = False,
) -> None:
    """Write RUN/report/report.html and report.md, finished or not, and show the scores; several runs side by side."""
    from cpt.report import page, summary
    from cpt.run_dir import Run

    # A run whose run.json is damaged has a report too.
    paths = [Path(path) if (Path(path) / "stages").is_dir() else Run.open(path).path for path in run_dirs]
    if as_json:
        typer.echo(json.dumps(summary.as_json(paths), indent=1))
        return
    pages = [page.write(path) for path in paths]
    try:
        typer.echo(summary.text(paths))
    except RunDirError as error:
        typer.echo(f"no table: {error}")
    typer.echo("")
    for written in pages:
        typer.echo(f"wrote {written}")
    if len(paths) > 1:
        typer.echo(f"with intervals: cpt compare {' '.join(run_dirs)}")


@app.command()
def compare(
    run_dirs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="run directories, or runs/NAME; the first is A")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="NAME=RUN,RUN", help="runs that differ in seed or order, pooled; repeatable"),
    ] = None,
    measure: Annotated[str | None, typer.Option("--measure", help="read every set by this one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="every estimate, both intervals, as JSON")] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page with plots too")] = None,
) -> None:
    """Compare finished runs with the first one: scores, AP, BWT, forgetting, with intervals over items."""
    from cpt.report import compare as comparison
    from cpt.report import compare_table
    from cpt.run_dir import Run

    groups = comparison.labels([Run.open(path).path for path in run_dirs or []])
    for given in group or []:
        name, is_pair, paths = given.partition("=")
        if not (name and is_pair and paths) or name in groups:
            raise ConfigError(f"--group {given}: must be NAME=RUN,RUN with a name that is not taken")
        groups[name] = [Run.open(path).path for path in paths.split(",")]
    found = comparison.compare(groups, measure=measure)
    typer.echo(json.dumps(compare_table.as_json(found), indent=1) if as_json else compare_table.text(found))
    if page is not None:
        from cpt.report import compare_page

        typer.echo(f"\nwrote {compare_page.write(found, page, measure)}", err=as_json)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="YAML file, or shipped recipe")],
    list_only: Annotated[bool, typer.Option("--list", help="show the runs and which are done; train nothing")] = False,
) -> None:
    """Run a stream under several methods, learning rates and seeds, with baselines, at equal budget; then compare."""
    from cpt import sweep as sweeps
    from cpt import sweep_run

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "sweep: start it in one process. It writes every run's stream to NAME.sweep/streams: start those under the "
            "launcher, then `cpt sweep` finds them done and compares"
        )
    parsed = sweeps.Sweep.from_yaml(file)
    planned = sweeps.plan(parsed)
    if list_only:
        typer.echo(sweeps.listed(planned))
        return
    folder = sweeps.folder(parsed, planned)
    sweeps.to_yaml(planned, folder)
    with speaking() as say:
        failed = sweep_run.run_sweep(planned, folder, say)
    typer.echo(f"\n{sweep_run.finish(planned, failed, folder)}\n\nwrote {folder}")
    if failed:
        raise typer.Exit(4)


@app.command()
def ls() -> None:
    """List the recipes that ship with cpt, a line each."""
    from cpt import recipe_book

    typer.echo(recipe_book.text(recipe_book.recipes()))


@app.command()
def cp(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="its name, as `cpt ls` shows it, or a file")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file to write")],
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Copy a recipe, with its comments, to a file of yours."""
    from cpt import recipe_book

    written = recipe_book.copy(recipe, target, force)
    typer.echo(f"wrote {written}; edit it, then: {recipe_book.next_step(written)}")
    typer.echo("runs of one `name:` go on where the last one stopped: give the copy a name of its own")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, with every field")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="the page docs/methods/index.md")] = False,
) -> None:
    """Every method: what it does, its fields, what it costs, where it works."""
    from cpt import method_table

    found = [method_table.one(name)] if name else method_table.every()
    if as_json:
        typer.echo(json.dumps(method_table.as_json(found), indent=1))
    elif as_markdown:
        typer.echo(method_table.markdown([method for method in found if method.page]))
    else:
        typer.echo(method_table.page(found[0]) if name else method_table.text(found))


@app.command()
def doctor(
    stream: Annotated[
        str | None, typer.Option("--for", metavar="STREAM", help="what this YAML file or shipped recipe needs")
    ] = None,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="leave out what takes more than seconds")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="every line as JSON")] = False,
) -> None:
    """Try what this machine can do: devices, precisions, processes, disk, compilers; exit 2 when nothing can run."""
    from cpt.config import Stream
    from cpt.doctor import Examination, show

    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("doctor looks at one machine: start it in one process, without a launcher")
    if overrides and stream is None:
        raise ConfigError(f"doctor {overrides[0]}: changes a stream, and none is given. Write --for STREAM before it.")
    examination = Examination(Stream.from_yaml(stream, overrides) if stream else None, quick)
    if as_json:
        list(examination)
        typer.echo(json.dumps(show.as_json(examination), indent=1))
    else:
        show.shown(examination, examination)
    if examination.reasons():
        raise typer.Exit(2)


def _run(stream: "Stream", new: bool, run_dir: str | None) -> None:
    from cpt.stream import run as run_stream

    try:
        with speaking() as say:
            done = run_stream(stream, new=new, run_dir=run_dir, say=say)
    except SystemExit as end:  # typer would take it for an orderly end
        raise TrainingError(
            f"something in the run called sys.exit({end.code!r}); nothing of its stage is kept"
        ) from end
    _show(done.path)
    if int(os.environ.get("RANK") or 0) == 0:
        typer.echo(f"\nas a page: cpt report {done.path}")


def _counted(stages: list[Any]) -> str:
    return f"{len(stages)} stage{'s' * (len(stages) != 1)}"


def _show(path: Path) -> None:
    from cpt.report.summary import text

    if int(os.environ.get("RANK") or 0) == 0:  # the first process speaks for all
        typer.echo("")
        typer.echo(text([path]))


def main() -> None:
    """Entry point."""
    as_command(_command)


def _command() -> None:
    """The command that was asked for; one that trains and measures nothing has nothing to go on from when stopped."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:  # 130 is what typer makes of the first
        is_stopped = isinstance(end, KeyboardInterrupt) or end.code == 130
        if is_stopped and not GOES_ON.intersection(sys.argv[1:2]):
            raise UserStopped("stopped by Ctrl-C") from end
        raise


if __name__ == "__main__":
    main()
