"""`cpt ledger list | show | verify | certificate`, and certificates held against a ledger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cpt import ConfigError, DataError
from cpt.cli import app
from cpt.errors import RunDirError
from cpt.ledger import Ledger, certificate
from cpt.run_dir import Run
from tests.conftest import ROOT
from tests.unit.cpt.ledgers import AFTER, BEFORE, LATER, NAMES, STAGE, apply, check, done, edit, rehash, row, written


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """R1 verified, R2 applied, R3 requested."""
    return written(Run.create(tmp_path / "runs", "forgetful", "0" * 16).path)


@pytest.fixture
def file(run: Path, tmp_path: Path) -> Path:
    """The certificate of R1."""
    said("certificate", run, "R1", "--to", tmp_path / "R1.json")
    return tmp_path / "R1.json"


def said(*arguments: Any) -> str:
    """What `cpt ledger` prints; its errors come through."""
    return CliRunner().invoke(app, ["ledger", *map(str, arguments)], catch_exceptions=False).stdout


def test_list_has_a_line_a_request(run: Path) -> None:
    lines = said("list", run).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["R1", "verified", "1"],
        ["R2", "applied", "2"],
        ["R3", "requested", "1"],
    ]
    assert "ticket 2" in lines[2]
    found = json.loads(said("list", run, "--json"))
    assert [(one["id"], one["state"], len(one["rows"])) for one in found] == [
        ("R1", "verified", 1),
        ("R2", "applied", 2),
        ("R3", "requested", 1),
    ]


def test_a_run_without_requests_says_so(tmp_path: Path) -> None:
    folder = Run.create(tmp_path, "plain", "0" * 16).path
    assert "nobody asked to forget anything" in said("list", folder)
    assert "nobody asked to forget anything" in said("verify", folder)
    assert json.loads(said("list", folder, "--json")) == []
    assert json.loads(said("verify", folder, "--json"))["head"] is None
    with pytest.raises(ConfigError, match="has no request 'R1'; it has none"):
        said("show", folder, "R1")
    assert not list(folder.glob("ledger*"))


def test_show_says_what_was_done_and_measured(run: Path) -> None:
    text = said("show", run, "R1")
    for part in (STAGE, BEFORE, AFTER, "ticket 1", '"divergence": "tv"', "kl_nats 0.01", "retrained, seeds 0, 1, 2"):
        assert part in text
    for name in NAMES:
        assert f"{name} v1" in text
    events = [line.split()[4] for line in text.split("\n\n")[-1].splitlines()[1:]]
    assert events == ["requested", "applied", "verified"]
    assert "no relearning" in said("show", run, "R2")
    found = json.loads(said("show", run, "R1", "--json"))
    assert found["request"]["checks"][0]["passed"] is True
    assert [entry["event"] for entry in found["history"]] == ["requested", "applied", "verified"]


def test_show_says_what_failed_and_what_could_not_be_measured(run: Path) -> None:
    with Ledger.open(run) as ledger:
        given = [check("extraction", 0.4), check("relearning", None)]
        ledger.verify_request("R2", given, stage=STAGE, model=AFTER)
    text = said("show", run, "R2")
    assert "extraction (extraction v1) = 0.4, must be at most 0.2" in text
    rows = {line.split()[0]: line for line in text.splitlines() if " v1 " in line}
    assert rows["extraction"].endswith("failed")
    assert rows["relearning"].endswith("not measured")


def test_verify_says_what_it_agrees_with(run: Path) -> None:
    assert "no head was written elsewhere" in said("verify", run)
    done(run, "02_next")
    text = said("verify", run)
    with Ledger.open(run) as ledger:
        head = ledger.head()
    assert head is not None
    assert f"verifies: 7 entries, 3 requests, head {head.hash}" in text
    assert "agrees with the heads written in stages/02_next/DONE" in text
    found = json.loads(said("verify", run, "--json"))
    assert found["problems"] == []
    assert found["head"] == {"number": 7, "hash": head.hash}
    assert found["agrees_with"] == ["stages/02_next/DONE"]


def test_verify_of_a_changed_ledger_ends_with_3(run: Path) -> None:
    edit(run, "UPDATE entries SET request = 'R2' WHERE number = 3")
    command = [sys.executable, "-m", "cpt", "ledger", "verify", str(run), "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 3
    assert "error: " in ended.stderr
    assert "entry 3 was changed" in ended.stderr
    assert "entry 3 was changed" in json.loads(ended.stdout)["problems"][0]
    for command_name in ("list", "show", "certificate"):
        rest = {"list": [], "show": ["R1"], "certificate": ["R1", "--to", run / "R1.json"]}[command_name]
        with pytest.raises(RunDirError, match="entry 3 was changed"):
            said(command_name, run, *rest)


# ---- certificates -------------------------------------------------------------------------------------


def test_a_certificate_names_what_was_checked(run: Path, file: Path) -> None:
    found = json.loads(file.read_text())
    with Ledger.open(run) as ledger:
        head, entries, mark = ledger.head(), ledger.entries(), ledger.mark(row(1))
    assert head is not None
    assert found["head"] == {"number": 7, "hash": head.hash}
    assert found["entry"] == {"number": 4, "hash": entries[3].hash}
    assert found["request"]["rows"] == [mark]
    assert (found["model_before"], found["model"], found["verified"]) == (BEFORE, AFTER, entries[3].at)
    assert {one["name"]: (one["value"], one["high"], one["n"], one["passed"]) for one in found["checks"]} == {
        name: (0.1, 0.2, 40, True) for name in NAMES
    }
    assert found["checks"][0]["reference"] == {"kind": "retrained", "n": 40, "seeds": [0, 1, 2]}
    assert "torch" in found["versions"]
    assert "still hold" in found["not_said"]


def test_only_a_verified_request_has_a_certificate(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="R2: is applied; missing: no forget_quality or reference_distance, no extr"):
        said("certificate", run, "R2", "--to", tmp_path / "R2.json")
    with Ledger.open(run) as ledger:
        ledger.fail("R1", "a gate")
    with pytest.raises(ConfigError, match="R1: is failed: a gate"):
        said("certificate", run, "R1", "--to", tmp_path / "R1.json")
    assert not list(tmp_path.glob("*.json"))


def test_a_certificate_is_not_written_over(run: Path, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        said("certificate", run, "R1", "--to", file)
    said("certificate", run, "R1", "--to", file, "--force")
    assert file.read_bytes() == before  # equal ledgers give equal bytes
    with pytest.raises(ConfigError, match="cannot be written"):
        said("certificate", run, "R1", "--to", tmp_path / "nowhere" / "R1.json")


def test_a_true_certificate_stays_true_and_says_what_came_after(run: Path, file: Path) -> None:
    assert said("verify", run, "--certificate", file).splitlines()[-1] == f"{file}: is what the ledger says of R1"
    with Ledger.open(run) as ledger:
        ledger.request([row(7)], "ticket 7")
    assert said("verify", run, "--certificate", file).splitlines()[-1] == f"{file}: is what the ledger says of R1"
    with Ledger.open(run) as ledger:
        ledger.reopen("02_next", LATER)
    last = said("verify", run, "--certificate", file).splitlines()[-1]
    assert "since then it became applied (" in last
    assert "stage 02_next trained after it" in last
    found = json.loads(said("verify", run, "--certificate", file, "--json"))
    assert found["certificates"] == {str(file): {"request": "R1", "state": "applied", "is_outdated": True}}


@pytest.mark.parametrize(
    "name",
    ["request", "verified", "entry", "stage", "method", "model_before", "model", "measurements", "checks", "versions"],
)
def test_a_changed_certificate_shows(run: Path, file: Path, name: str) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {name: "something else" if name != "request" else found[name] | {"who": "me"}}))
    with pytest.raises(RunDirError, match=f"what it says of {name} is not what the ledger says"):
        said("verify", run, "--certificate", file)


def test_a_certificate_with_more_in_it_shows(run: Path, file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"and": "all copies"}))
    with pytest.raises(RunDirError, match="what it says of and is not what the ledger says"):
        said("verify", run, "--certificate", file)


def test_a_certificate_of_a_request_that_was_not_verified_shows(run: Path, file: Path) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"request": found["request"] | {"id": "R2"}}))
    with pytest.raises(RunDirError, match="at entry 7 the ledger has no verified request 'R2'"):
        said("verify", run, "--certificate", file)


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("DELETE FROM entries WHERE number > 6", "was shortened: it ends at entry 6, .* names entry 7"),
        ("UPDATE entries SET at = '2020' || substr(at, 5)", "was written anew: entry 7 is not the one"),
    ],
)
def test_a_changed_ledger_shows_against_a_certificate(run: Path, file: Path, statement: str, why: str) -> None:
    edit(run, statement)
    rehash(run)
    assert "verifies" in said("verify", run)
    with pytest.raises(RunDirError, match=why):
        said("verify", run, "--certificate", file)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no JSON", "cannot be read as JSON"),
        ("[]", "is no certificate of a ledger"),
        ('{"kind": "a letter"}', "is no certificate of a ledger"),
        (json.dumps({"kind": certificate.KIND}), "names no head"),
        (json.dumps({"kind": certificate.KIND, "head": {"number": "x"}}), "names no head"),
    ],
)
def test_what_is_no_certificate_is_said(run: Path, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=why):
        said("verify", run, "--certificate", tmp_path / "x.json")


def test_a_request_that_was_applied_again_keeps_its_earlier_certificate(run: Path, file: Path) -> None:
    with Ledger.open(run) as ledger:
        apply(ledger, "R1", stage="03_redone", model_after="another")
    assert "since then it became applied" in said("verify", run, "--certificate", file)
