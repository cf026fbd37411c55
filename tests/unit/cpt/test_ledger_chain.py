"""A ledger that somebody edited with sqlite is found out, and a write that was cut off leaves one that verifies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, RunDirError
from cpt.ledger import Asked, Head, Ledger, certificate, stage_heads
from cpt.ledger.chain import BEGINNING
from tests.conftest import ROOT
from tests.unit.cpt.ledgers import (
    AFTER,
    COLUMNS,
    STAGE,
    apply,
    check,
    checks,
    done,
    edit,
    hash_of,
    rehash,
    row,
    stored,
    verified,
    written,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path)


def problem(folder: Path, **heads: Head) -> str:
    """The one thing that is wrong; that nothing can be added then, too."""
    if not heads:
        with pytest.raises(RunDirError):
            Ledger.open(folder).request([row(9)], "ticket 9")
    found = Ledger.problems(folder, heads)
    assert len(found) == 1, found
    return found[0].removeprefix(f"{folder / 'ledger.sqlite'}: ")


def test_the_hash_is_what_the_page_says(run: Path) -> None:
    entries = stored(run)
    assert [entry["number"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["hash"] for entry in entries] == [hash_of(entry) for entry in entries]
    assert [entry["previous"] for entry in entries] == [BEGINNING, *(entry["hash"] for entry in entries[:-1])]
    with Ledger.open(run) as ledger:
        assert ledger.head() == Head(7, entries[-1]["hash"])
    before = [entry["hash"] for entry in entries]
    rehash(run)  # what is hashed anew without a change is the same chain
    assert [entry["hash"] for entry in stored(run)] == before
    assert Ledger.problems(run) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("at", "'2020-01-01T00:00:00.000+00:00'"),
        ("request", "'R2'"),
        ("event", "'verified'"),
        ("body", "replace(body, 'flat', 'npo')"),
        ("body", "'not JSON'"),
        ("body", "'[]'"),
        ("at", "x'00'"),
        ("previous", "hash"),
        ("hash", "previous"),
    ],
)
def test_a_changed_field(run: Path, column: str, value: str) -> None:
    edit(run, f"UPDATE entries SET {column} = {value} WHERE number = 3")
    found = Ledger.problems(run)
    assert any("entry 3 was changed" in one for one in found), found
    with pytest.raises(RunDirError, match="entry 3 was changed"):
        Ledger.open(run)


def test_a_removed_row(run: Path) -> None:
    edit(run, "DELETE FROM entries WHERE number = 4")
    assert problem(run) == "entry 5 stands behind entry 3: what was between them was removed"


def test_a_removed_row_whose_gap_was_closed(run: Path) -> None:
    edit(run, "DELETE FROM entries WHERE number = 4", "UPDATE entries SET number = number - 1 WHERE number > 4")
    assert "entry 4 was changed" in Ledger.problems(run)[0]


def test_a_shortened_chain_shows_against_a_stage(run: Path) -> None:
    done(run, "02_next")
    edit(run, "DELETE FROM entries WHERE number > 5")
    assert problem(run) == "was shortened: it ends at entry 5, stages/02_next/DONE names entry 7"


def test_a_shortened_chain_shows_against_a_certificate(run: Path, tmp_path: Path) -> None:
    with Ledger.open(run) as ledger:
        certificate.write(ledger, "R1", tmp_path / "R1.json")
    edit(run, "DELETE FROM entries WHERE number > 5")
    assert Ledger.problems(run) == []  # nothing was written elsewhere: by itself it is whole
    head = certificate.head_of(tmp_path / "R1.json")
    assert "was shortened: it ends at entry 5, mine names entry 7" in problem(run, mine=head)


def test_an_emptied_ledger_shows_against_a_stage(run: Path) -> None:
    done(run, "02_next")
    (run / "ledger.sqlite").unlink()
    assert problem(run) == "was shortened: it ends at entry 0, stages/02_next/DONE names entry 7"
    (run / "ledger.sqlite").touch()
    assert problem(run) == "was shortened: it ends at entry 0, stages/02_next/DONE names entry 7"


def test_a_chain_written_anew_with_consistent_hashes(run: Path) -> None:
    with Ledger.open(run) as ledger:
        head = ledger.head()
    assert head is not None
    edit(run, "UPDATE entries SET body = replace(body, 'ticket 2', 'ticket 7')")
    rehash(run)
    assert Ledger.problems(run) == []
    assert problem(run, mine=head) == "was written anew: entry 7 is not the one that mine names"


def test_re_dated_entries(run: Path) -> None:
    done(run, "02_next")
    edit(run, "UPDATE entries SET at = '2020' || substr(at, 5) WHERE number > 4")
    assert "entry 5 was changed: its hash is not that of its content" in Ledger.problems(run)[0]
    rehash(run)
    assert problem(run) == "was written anew: entry 7 is not the one that stages/02_next/DONE names"


def test_a_swapped_order(run: Path) -> None:
    done(run, "02_next")
    swap = "UPDATE entries SET number = CASE number WHEN -5 THEN 7 WHEN -7 THEN 5 ELSE -number END"
    edit(run, "UPDATE entries SET number = -number", swap)
    found = Ledger.problems(run)
    assert "entry 5 was changed" in found[0]
    assert "entry 7 was changed" in found[-2] + found[-1]


def test_a_swapped_order_with_consistent_hashes(run: Path) -> None:
    """R3 was asked for before R2, it says now: every entry follows from the others, and the stage's head is gone."""
    with Ledger.open(run) as ledger:
        ledger.fail("R2", "a gate")
    done(run, "02_next")
    swap = "UPDATE entries SET number = CASE number WHEN -7 THEN 8 WHEN -8 THEN 7 ELSE -number END"
    edit(run, "UPDATE entries SET number = -number", swap)
    rehash(run)
    assert problem(run) == "was written anew: entry 8 is not the one that stages/02_next/DONE names"


def test_an_order_that_cannot_have_been_shows_by_itself(run: Path) -> None:
    swap = "UPDATE entries SET number = CASE number WHEN -2 THEN 3 WHEN -3 THEN 2 ELSE -number END"
    edit(run, "UPDATE entries SET number = -number", swap)
    rehash(run)
    assert problem(run) == "entry 2 does not follow from the others: R1: was never requested"


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE entries SET at = '' WHERE number = 2", "never changed"),
        ("UPDATE OR REPLACE entries SET number = 1 WHERE number = 2", "never changed"),
        ("DELETE FROM entries WHERE number = 7", "never removed"),
        (
            "INSERT OR REPLACE INTO entries SELECT 3, at, request, event, body, previous, hash FROM entries",
            "at the end",
        ),
        ("INSERT INTO entries SELECT 99, at, request, event, body, previous, hash FROM entries LIMIT 1", "at the end"),
    ],
)
def test_triggers_refuse(run: Path, statement: str, why: str) -> None:
    before = stored(run)
    with (
        closing(sqlite3.connect(run / "ledger.sqlite", isolation_level=None)) as connection,
        pytest.raises(sqlite3.IntegrityError, match=why),
    ):
        connection.execute(statement)
    assert stored(run) == before


def test_a_missing_trigger_shows(run: Path) -> None:
    with closing(sqlite3.connect(run / "ledger.sqlite", isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER no_delete")
    assert problem(run) == "its table or triggers were changed (no_delete)"


def test_an_entry_that_claims_what_was_not_measured_shows(run: Path) -> None:
    """Hashes that fit are no proof: the state follows from the checks."""
    last = stored(run)[-1]
    body = json.dumps({"checks": [], "missing": [], "model": AFTER, "reason": "", "stage": STAGE, "versions": {}})
    forged = last | {"number": 8, "request": "R2", "event": "verified", "body": body, "previous": last["hash"]}
    forged["hash"] = hash_of(forged)
    with closing(sqlite3.connect(run / "ledger.sqlite", isolation_level=None)) as connection:
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", [forged[name] for name in COLUMNS])
    # Canonical JSON has no spaces, so what was hashed is not what is stored.
    assert "entry 8 was changed" in problem(run)
    rehash_last(run)
    assert problem(run).startswith("entry 8 does not follow from the others: R2: is said to be verified, its checks")


def rehash_last(folder: Path) -> None:
    """The body as canonical JSON: a chain without a seam."""
    body = json.dumps(json.loads(stored(folder)[-1]["body"]), sort_keys=True, separators=(",", ":"))
    edit(folder, f"UPDATE entries SET body = '{body}' WHERE number = 8")


def test_what_was_changed_while_a_ledger_is_open_refuses_the_next_entry(run: Path) -> None:
    with Ledger.open(run) as ledger:
        ledger.request([row(5)], "ticket 5")  # connected, and read
        edit(run, "UPDATE entries SET request = 'R2' WHERE number = 2")
        with pytest.raises(RunDirError, match="entry 2 was changed"):
            ledger.fail("R3", "a gate")
        assert len(ledger.entries()) == 8
        assert ledger.get("R3").state == "requested"
    assert len(stored(run)) == 8


def test_a_chain_exchanged_while_a_ledger_is_open_refuses_the_next_entry(run: Path) -> None:
    with Ledger.open(run) as ledger:
        edit(run, "UPDATE entries SET at = '2020' || substr(at, 5)")
        rehash(run)
        with pytest.raises(RunDirError, match="written anew: entry 7 is not the one that what this process read names"):
            ledger.fail("R3", "a gate")


def test_a_file_that_went_away_refuses_the_next_entry(run: Path) -> None:
    with Ledger.open(run) as ledger:
        (run / "ledger.sqlite").unlink()
        with pytest.raises(RunDirError, match="was shortened: it ends at entry 0"):
            ledger.reopen("02_next", "model-later")


def test_a_file_put_in_its_place_refuses_the_next_entry(run: Path, tmp_path: Path) -> None:
    with Ledger.open(run) as ledger:
        ledger.request([row(5)], "ticket 5")
        copy = tmp_path / "copy.sqlite"
        shutil.copy(run / "ledger.sqlite", copy)
        copy.replace(run / "ledger.sqlite")
        with pytest.raises(RunDirError, match="put aside or replaced"):
            ledger.request([row(6)], "ticket 6")


def test_what_is_no_database_is_said(run: Path) -> None:
    (run / "ledger.sqlite").write_bytes(b"no database at all" * 500)
    assert "cannot be used (file is not a database). Restore it from a copy." in problem(run)


def test_two_writers_make_one_chain(run: Path) -> None:
    with Ledger.open(run) as one, Ledger.open(run) as other:
        for i in range(5):
            assert one.request([row(10 + i)], "one") == f"R{4 + 2 * i}"
            assert other.request([row(20 + i)], "other") == f"R{5 + 2 * i}"
        one.fail("R13", "a gate")  # asked by the other
        assert one.get("R13").who == "other"
    assert Ledger.problems(run) == []
    assert len(stored(run)) == 18


AT_ONCE = """
import sys
from cpt.ledger import Ledger
from tests.unit.cpt.ledgers import row

with Ledger.open(sys.argv[1]) as ledger:
    for i in range(10):
        ledger.request([row(100 * int(sys.argv[2]) + i)], f"process {sys.argv[2]}")
"""


def test_processes_that_make_a_ledger_at_once_make_one(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", AT_ONCE, str(tmp_path), str(i)] for i in range(3)]
    children = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [(child.communicate(timeout=120)[1], child.returncode) for child in children] == [("", 0)] * 3
    assert Ledger.problems(tmp_path) == []
    with Ledger.open(tmp_path) as ledger:
        assert sorted(one.who for one in ledger.requests()) == sorted(f"process {i % 3}" for i in range(30))
        assert {one.id for one in ledger.requests()} == {f"R{i + 1}" for i in range(30)}


def test_a_file_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "nowhere") as ledger, pytest.raises(RunDirError, match="cannot be read or written"):
        ledger.request([row(1)], "ticket 1")


def test_an_error_in_a_transaction_leaves_nothing_of_it(run: Path) -> None:
    with Ledger.open(run) as ledger:
        with pytest.raises(ConfigError, match="who"):
            ledger.request_many([Asked([row(5)], "ticket 5"), Asked([row(6)], " ")])
        assert [request.id for request in ledger.requests()] == ["R1", "R2", "R3"]
        assert ledger.request([row(7)], "ticket 7") == "R4"
    assert Ledger.problems(run) == []


# ---- cut off ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from cpt.ledger import Asked, Ledger
from tests.unit.cpt.ledgers import row

def asked():
    for i in range(100, 5000):
        if i == 3000:
            print(os.path.getsize(sys.argv[1] + "/ledger.sqlite-wal"), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield Asked([row(i)], f"ticket {i} " + "of a long story " * 50)

with Ledger.open(sys.argv[1]) as ledger:
    ledger.request_many(asked())
"""


def test_a_kill_in_the_middle_of_an_append(run: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(run)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert int(child.stdout) > 100_000, "part of the transaction was in the file when it was killed"
    assert Ledger.problems(run) == []
    with Ledger.open(run) as ledger:
        assert len(ledger.entries()) == 7
        assert ledger.request([row(3000)], "ticket 3000") == "R4"
    assert Ledger.problems(run) == []


def test_a_log_cut_off_at_any_byte_leaves_whole_entries(tmp_path: Path) -> None:
    """As after a power cut: of the write-ahead log only a beginning is on the disk."""
    run = tmp_path / "run"
    run.mkdir()
    with Ledger.open(run) as ledger:
        for i in range(4):
            verified(ledger, i)
        kept = {file.name: file.read_bytes() for file in run.iterdir()}
    log, found = kept["ledger.sqlite-wal"], set()
    for number, end in enumerate([*range(0, len(log), len(log) // 60), len(log)]):
        cut = tmp_path / str(number)
        cut.mkdir()
        (cut / "ledger.sqlite").write_bytes(kept["ledger.sqlite"])
        (cut / "ledger.sqlite-wal").write_bytes(log[:end])
        (cut / "ledger.key").write_bytes(kept["ledger.key"])
        assert Ledger.problems(cut) == []
        with Ledger.open(cut) as ledger:
            found.add(len(ledger.entries()))
            assert ledger.request([row(50)], "ticket") == f"R{len(ledger.requests())}"
        assert Ledger.problems(cut) == []
    assert {0, 2, 13} <= found <= {0, *range(2, 14)}  # the first transaction opens the ledger, too


def test_a_killed_first_request_leaves_a_key_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "ledger.key").write_text("ab" * 32 + "\n")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert Ledger.problems(tmp_path) == []
    with Ledger.open(tmp_path) as ledger:
        ledger.request([row(1)], "ticket")
    assert (tmp_path / "ledger.key").read_text() == "ab" * 32 + "\n"
    assert Ledger.problems(tmp_path) == []


def test_durability_is_what_was_asked_of_sqlite(run: Path) -> None:
    with Ledger.open(run) as ledger:
        ledger.request([row(5)], "ticket 5")
        connection = ledger._chain._connection
        assert connection is not None
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_folder_that_cannot_be_written_is_verified(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive, another user's run. (Root may write everywhere, so the answer of the system is faked.)"""
    opened = list[str]()
    connect = sqlite3.connect

    def recorded(place: str, **how: Any) -> sqlite3.Connection:
        opened.append(place)
        return connect(place, **how)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(sqlite3, "connect", recorded)
    assert Ledger.problems(run) == []
    assert opened[0].endswith("ledger.sqlite?immutable=1")
    (run / "ledger.sqlite-wal").touch()  # another process is at work: what it wrote counts
    assert Ledger.problems(run) == []
    assert opened[1].endswith("ledger.sqlite?mode=rw")


# ---- heads --------------------------------------------------------------------------------------------


def test_heads_are_read_from_every_stage(run: Path) -> None:
    done(run, "02_next")
    with Ledger.open(run) as ledger:
        verified(ledger, 8)
    done(run, "03_last")
    (run / "stages" / "02_next").rename(run / "stages" / "02_next.superseded-1")
    plain = run / "stages" / "01_forget" / "DONE"
    plain.parent.mkdir()
    plain.write_text('{"identity": "x", "facts": {}}')
    heads = stage_heads(run)
    assert {name: head.number for name, head in heads.items()} == {
        "stages/02_next.superseded-1/DONE": 7,
        "stages/03_last/DONE": 10,
    }
    assert Ledger.problems(run) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"facts": {"ledger_head": {"number": 3}}}'])
def test_a_damaged_done_is_said(run: Path, text: str) -> None:
    file = run / "stages" / "02_next" / "DONE"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert Ledger.problems(run)[0].startswith(f"{file}: is damaged")


def test_a_verdict_is_durable_when_the_call_returns(run: Path) -> None:
    """A second reader sees it at once, without the first being closed."""
    with Ledger.open(run) as ledger:
        ledger.verify_request("R2", checks(extraction=0.5), stage=STAGE, model=AFTER)
        with Ledger.open(run) as other:
            assert other.get("R2").state == "failed"
        apply(ledger, "R2")
        ledger.verify_request("R2", [check("extraction")], stage=STAGE, model=AFTER)
        assert ledger.verify() == []
