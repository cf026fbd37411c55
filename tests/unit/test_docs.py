"""The documentation is kept true: its blocks run, its links resolve, its tables are what the code has.

In a page, an HTML comment right before a block says what the block is:

    <!-- not run: reason -->   a Python block that is not executed
    <!-- file: NAME -->        the content of a file, used by the test of that page
    <!-- suite -->             a suite of eval_harness, not a part of a stream
    <!-- sweep -->             a sweep
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tests.conftest import ROOT
from tests.plugins import SUMMARY

FOLDERS = (ROOT / "docs", ROOT / "launch")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for f in FOLDERS for page in f.rglob("*.md"))])
NOT_RUN = 0  # Python blocks that say they must not run; a new one is a decision, made here
NO_DEFAULT = object()


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks with the HTML comment before them, if any."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        before = lines[opened - 1] if opened else ""
        mark = re.fullmatch(r"<!-- (.*) -->", before)
        text = "\n".join(lines[opened + 1 : number]) + "\n"
        yield Block(page, opened + 1, lines[opened][3:].strip(), mark[1] if mark else "", text)
        opened = None
    assert opened is None, f"{page}:{opened}: the block has no end"


def every(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run to success where the page's own packages, then the checkout, are imported from."""
    path = os.pathsep.join(filter(None, [env.pop("site", ""), str(ROOT)]))
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in every("yaml") if not b.mark.startswith("file:")], ids=str)
def test_yaml_is_a_stream_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    from cpt.config import Stream
    from cpt.validate import problems

    content = yaml.safe_load(block.text)
    if block.mark == "suite":
        from eval_harness.suite import load_suite

        file = tmp_path / "suite.yaml"
        file.write_text(block.text)
        assert load_suite(str(file))
        return
    if block.mark == "sweep":
        from cpt.sweep import Sweep, plan

        (tmp_path / "sweep.yaml").write_text(block.text)
        assert plan(Sweep.from_yaml(str(tmp_path / "sweep.yaml")))
        return
    stream = Stream.parse({"name": "part", "model": "tiny-world"} | content)
    if "name" in content:
        assert Stream.parse(yaml.safe_load(stream.to_yaml())) == stream
    assert problems(stream) == []


def runnable() -> dict[Path, list[Block]]:
    """Python blocks by page, but for files and those that say why they do not run."""
    found: dict[Path, list[Block]] = {}
    for block in every("python"):
        if not block.mark.startswith(("file:", "not run:")):
            found.setdefault(block.page, []).append(block)
    return found


@pytest.mark.parametrize("page", runnable(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page as one script, top to bottom, in an empty folder."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(block.text for block in runnable()[page]))
    run(sys.executable, script, cwd=tmp_path)
    if page.name == "README.md":
        assert_layout_is_documented(next((tmp_path / "runs").glob("from_python-*")))


def assert_layout_is_documented(made: Path) -> None:
    """Every file that the run made stands in the listing of docs/run_directory.md."""
    listing = next(block.text for block in blocks(ROOT / "docs" / "run_directory.md") if block.language == "text")
    files = [path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()]
    assert "matrix.json" in files
    for file in files:
        name = re.sub(r"^stages/\d\d_\w+/", "", file)
        name = re.sub(r"^eval/\w+\.json$", "eval/SET.json", re.sub(r"^model/.*", "model/", name))
        assert re.search(rf"^\s+{re.escape(name)}(\s|$)", listing, re.MULTILINE), f"{file} is not in the listing"


def test_blocks_that_do_not_run_are_counted(record_property: Callable[[str, object], None]) -> None:
    skipped = [block for block in every("python") if block.mark.startswith("not run:")]
    ran = len(every("python")) - len(skipped)
    said = f"{ran} Python blocks run, {len(skipped)} marked as not run, {len(every('yaml'))} YAML blocks validated"
    record_property(SUMMARY, f"{'docs:':13}{said}, {len(commands())} commands checked")
    assert all(block.mark.removeprefix("not run:").strip() for block in skipped)
    assert len(skipped) == NOT_RUN, [str(block) for block in skipped]


def test_the_method_that_the_page_writes_runs(tmp_path: Path) -> None:
    """Its files as they stand, installed by pip, found by entry point, run by name."""
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    for block in blocks(ROOT / "docs" / "write_a_method.md"):
        if block.mark.startswith("file:"):
            (package / block.mark.removeprefix("file:").strip()).write_text(block.text)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--disable-pip-version-check", "--target", site, package, cwd=tmp_path)
    cpt = (sys.executable, "-m", "cpt.cli")
    assert "pull_back" in run(*cpt, "validate", "--schema", cwd=package, site=str(site))
    printed = run(*cpt, "run", "stream.yaml", cwd=package, site=str(site))
    assert "1/1" in printed
    made = next((package / "runs").glob("with_more_methods-*"))
    assert '"replay_mean/loss"' in (made / "stages" / "01_reverse" / "metrics.jsonl").read_text()
    assert '"anchored_elements": 541536' in (made / "stages" / "01_reverse" / "DONE").read_text()


# ---- commands ----------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """(place, words) of every console line that starts with `$ `, and of inline code that starts a command.

    What a launcher starts, `torchrun ... -m cpt run STREAM`, is the command `cpt run STREAM`.
    """
    found = []
    for page in PAGES:
        place = str(page.relative_to(ROOT))
        lines = [line[2:] for b in blocks(page) if b.language == "console" for line in b.text.splitlines()]
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        lines += [span for span in re.findall(r"`([^`]+)`", text) if re.match(r"(cpt|python -m|make) \w", span)]
        found += [(place, as_cpt(shlex.split(line, comments=True))) for line in lines]
    return found


def as_cpt(words: list[str]) -> list[str]:
    """Without the launcher before `-m cpt`; a file of ours that it names must be there."""
    at = next((i for i, pair in enumerate(pairwise(words)) if pair == ("-m", "cpt")), None)
    if at is None:
        return words
    ours = [word for word in words[:at] if word.startswith("launch/")]
    assert [file for file in ours if not (ROOT / file).is_file()] == []
    return words[at + 1 :]


def cpt_options() -> dict[str, set[str]]:
    """Command, or group and command, -> its long options."""
    import typer

    from cpt.cli import app

    group: Any = typer.main.get_command(app)
    ways = {name: getattr(command, "commands", {"": command}) for name, command in group.commands.items()}
    every = {f"{name} {part}".strip(): command for name, parts in ways.items() for part, command in parts.items()}
    return {name: {o for p in command.params for o in p.opts} for name, command in every.items()}


def harness_options() -> set[str]:
    from eval_harness.__main__ import _parser

    parser: argparse.ArgumentParser = _parser()
    return {option for action in parser._actions for option in action.option_strings}


def named(words: list[str], groups: set[str]) -> list[str]:
    """The commands of a line: one, one of a group, or a list of them. `cpt COMMAND` and a group alone name none."""
    if words[1].endswith(","):
        names = "".join(words[1:]).split(",")
    else:
        names = [" ".join(words[1:3]) if words[1] in groups else words[1]]
    return [name for name in names if not name.isupper() and name not in groups]


def test_commands_exist() -> None:
    known = cpt_options()
    groups = {name.split()[0] for name in known if " " in name}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for place, words in commands():
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "cpt" and len(words) > 1:
            for name in named(words, groups):
                assert name in known, f"{place}: cpt {name}"
                assert options <= known[name] | {"--help"}, f"{place}: {shlex.join(words)}"
                seen.add(name)
        elif words[:3] == ["python", "-m", "eval_harness"]:
            assert options <= harness_options(), f"{place}: {shlex.join(words)}"
        elif words[0] == "make":
            assert words[1] in targets, f"{place}: {shlex.join(words)}"
    assert seen == set(known), "every command is shown somewhere"


# ---- links -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def test_pages_name_no_machine() -> None:
    for page in PAGES:
        found = re.search(r"(/root/|/tmp/|/home/|\.\./shared)", page.read_text(encoding="utf-8"))
        assert not found, f"{page}: {found}"


# ---- tables ------------------------------------------------------------------------------------------


def table(text: str, heading: str) -> dict[str, str]:
    """First column -> second column of the first table under a heading, code marks removed."""
    section = re.split(r"^##? ", text, flags=re.MULTILINE)
    part = next((part for part in section if part.partition("\n")[0].strip() == heading), None)
    assert part is not None, f"no heading {heading!r}"
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", part, re.MULTILINE)
    return {name: value.strip().strip("`") for name, value in rows}


def defaults(model: Any) -> dict[str, Any]:
    """Field -> default as JSON; the first `type` of a method is its name and no setting."""
    found = {}
    for name, field in model.model_fields.items():
        value = field.get_default(call_default_factory=True)
        if field.is_required():
            value = NO_DEFAULT
        elif hasattr(value, "model_dump"):
            value = {}
        elif isinstance(value, list):
            value = [one.model_dump(exclude_defaults=True) if hasattr(one, "model_dump") else one for one in value]
        found[name] = str(value) if isinstance(value, Path) else value
    return found


def assert_table_is(text: str, heading: str, expected: dict[str, Any]) -> None:
    """The keys in their order, each with its default: a value, `required`, or words that say what null means."""
    documented = table(text, heading)
    assert list(documented) == list(expected), heading
    for name, value in expected.items():
        said = documented[name]
        shown: Any = None if " " in said else said if said == value else yaml.safe_load(said)  # `off` is a name here
        shown = NO_DEFAULT if said == "required" else shown
        assert shown == value, f"{heading}: {name} has the default {value!r}, the page says {said!r}"


SECTIONS = {  # of config.md, or (page, heading)
    "Stream": "cpt.config:Stream",
    "Model": "cpt.config:ModelSpec",
    "Tokenizer": "cpt.config:TokenizerSpec",
    "Stage": "cpt.config:Stage",
    "KL": "cpt.config:KL",
    "Template": "cpt.data.templates:Template",
    "Source": "cpt.config:Source",
    "Evaluation": "cpt.config:Evaluation",
    "Within": "cpt.config:Within",
    "Drift": "cpt.config:DriftSource",
    "Evaluation set": "cpt.config:EvalSource",
    "Generate": "cpt.config:Generate",
    "Retention": "cpt.config:Retention",
    ("adapters.md", "Fields"): "cpt.adapters.spec:Adapter",
    ("rewards.md", "Rewards"): "cpt.rewards.spec:Reward",
    ("schedules.md", "Fields"): "cpt.schedule:Schedule",
}


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_every_key_and_default_is_documented(section: str | tuple[str, str]) -> None:
    from cpt.config import Source

    page, heading = section if isinstance(section, tuple) else ("config.md", section)
    home, _, name = SECTIONS[section].partition(":")
    expected = defaults(getattr(import_module(home), name))
    if heading in ("Evaluation set", "Drift"):
        inherited = defaults(Source)
        expected = {name: value for name, value in expected.items() if inherited.get(name, NO_DEFAULT) != value}
    assert_table_is(page_text(page), heading, expected)


def models(of: Any) -> set[str]:
    """Names of the pydantic models that a model's fields are made of."""
    from pydantic import BaseModel

    found = set()
    for part in (of, *get_args(of)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            found |= {part.__name__}.union(*(models(f.annotation) for f in part.model_fields.values()))
        elif part is not of:
            found |= models(part)
    return found


def test_every_part_of_a_stream_has_a_section() -> None:
    from cpt.config import Stream

    assert models(Stream) - {"Method"} == {home.partition(":")[2] for home in SECTIONS.values()}


def test_fields_decided_elsewhere_are_documented() -> None:
    from cpt.trainer_fields import OWNED

    text = page_text("config.md")
    assert [name for name in OWNED if f"`{name}`" not in text] == []


def test_every_reward_and_its_arguments_are_documented() -> None:
    from cpt.rewards.spec import BUNDLED

    text = page_text("rewards.md")
    part = text.split("## Bundled rewards")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", part, re.MULTILINE)
    assert {name for name, _ in rows} == set(BUNDLED)
    for name, said in rows:
        options = [p.name for p in inspect.signature(BUNDLED[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [option for option in options if not re.search(rf"`{option}\b", said)] == []


def test_what_a_reward_is_given_is_documented() -> None:
    from cpt.train_stage import COLUMNS

    given = set(table(page_text("rft.md"), "Rows"))
    assert given == {"completions", "prompts"} | set(COLUMNS) - {"prompt"}


def test_every_launch_file_is_listed() -> None:
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    files = [file for kind in ("yaml", "json") for file in (ROOT / "launch").rglob(f"*.{kind}")]
    assert files
    assert [file.name for file in files if f"`{file.relative_to(ROOT / 'launch').as_posix()}`" not in text] == []


@cache
def our_methods() -> list[str]:
    from cpt.methods.registry import OURS

    return sorted(OURS)


@pytest.mark.parametrize("name", our_methods())
def test_every_field_of_a_method_is_documented(name: str) -> None:
    from cpt.methods.registry import find

    expected = {field: value for field, value in defaults(find(name)).items() if field != "type"}
    assert_table_is(page_text(f"methods/{name}.md"), "Fields", expected)
    assert f"methods/{name}.md" in page_text("config.md")


def test_the_contract_is_documented() -> None:
    from cpt.methods.base import CONTRACT, StageInfo, Term
    from cpt.methods.step import Step

    text = page_text("write_a_method.md")
    names = {*CONTRACT - {"type"}, *StageInfo.__dataclass_fields__, *Term.__dataclass_fields__}
    names |= set(Step.__dataclass_fields__)
    assert sorted(name for name in names if not re.search(rf"`{name}(\(.*?\))?`", text)) == []


def test_every_measure_is_documented_with_its_definition() -> None:
    from eval_harness.measure import MEASURES, EvalSet, Measured

    text = page_text("measures.md")
    assert list(table(text, "Measures")) == list(MEASURES)
    for name, known in MEASURES.items():
        empty = Measured(EvalSet("empty", []), [], "PROMPTING")
        definition = known.function(empty).definition.replace("window=0", "window=W").replace("greedy", "WRITING")
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        assert f"`{definition}`" in section
    directions = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (higher|lower) \|", text, re.MULTILINE))
    assert {name: way == "higher" for name, way in directions.items()} == {
        name: known.higher_is_better for name, known in MEASURES.items()
    }


def returning(module: Any, what: str) -> set[str]:
    """Public functions of a module that are annotated to return this."""
    functions = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")}
    return {name for name, f in functions.items() if f.__annotations__.get("return") == what}


def test_every_continual_metric_is_documented_with_its_formula() -> None:
    from eval_harness.hf import metric_names
    from eval_harness.metrics import continual, stability

    R, curve = [[0.1, 0.2], [0.9, 0.2], [0.5, 0.8]], [(0, {"a": 1.0}), (1, {"a": 1.0})]
    given: dict[str, Any] = {
        "fwt_sapt": {"single": [0.9, 0.9]},
        "intransigence": {"reference": [0.9, 0.9], "against": "joint"},
        "f1_average": {"general": 0.5},
    }
    over_matrix = returning(continual, "Summary") - {"general_delta", "hars"}
    formulas = {name: getattr(continual, name)(R, **given.get(name, {})).formula for name in over_matrix}
    formulas["general_delta"] = continual.general_delta([{"a": 1.0}]).formula
    formulas["hars"] = continual.hars(0.5, 0.5).formula
    within = {
        "min_acc": stability.min_acc(curve, ["a"]).formula,
        "wc_acc": stability.wc_acc(curve, ["a"], "b").formula,
        "windowed_forgetting": stability.windowed_forgetting(curve, 10).formula,
        "windowed_plasticity": stability.windowed_plasticity(curve, 10).formula,
    }
    text = page_text("continual_metrics.md")
    assert table(text, "Over the matrix") == formulas
    assert table(text, "While a stage trains") == within
    assert set(within) == returning(stability, "Summary")
    assert set(metric_names()) == set(formulas) | set(table(text, "Hugging Face evaluate"))


def test_the_ledgers_events_and_checks_are_documented() -> None:
    from cpt.ledger.requests import FOLLOWS, REQUIRED

    text = page_text("ledger.md")
    assert set(table(text, "States")) == {"requested", *FOLLOWS}
    needed = text.split("\n## What verified means\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", needed, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(REQUIRED)


def test_exit_codes_are_documented() -> None:
    from cpt import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CptError)]
    codes = {kind.exit_code for kind in kinds}
    text = page_text("run_directory.md")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == codes | {0, 1}


def test_every_public_name_is_documented() -> None:
    import cpt
    import eval_harness

    text = page_text("python_api.md")
    for package in (cpt, eval_harness):
        part = text.split(f"\n## `{package.__name__}`\n")[1].split("\n## ")[0]
        assert [name for name in package.__all__ if f"`{name}`" not in part] == []
