"""What a ledger says of a request: its states, what verifies it, whose rows they are, and that no text is kept."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt import ConfigError, DataError, RunDirError
from cpt.ledger import Asked, Check, Ledger, Reference
from cpt.ledger.requests import FOLLOWS, REQUIRED, STATES
from eval_harness.rows import Row, content_key
from tests.unit.cpt.ledgers import AFTER, BEFORE, LATER, NAMES, REFERENCE, STAGE, apply, check, checks, row, verified


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path)


def again(ledger: Ledger) -> Ledger:
    """What another process reads."""
    return Ledger.open(ledger.run_dir)


# ---- what is kept -------------------------------------------------------------------------------------


def test_a_run_without_requests_has_no_files(ledger: Ledger) -> None:
    assert ledger.reopen("02_next", LATER) == []
    assert ledger.head() is None
    assert ledger.requests() == []
    assert ledger.verify() == []
    assert list(ledger.run_dir.iterdir()) == []


def test_no_text_and_no_guessable_hash_is_kept(ledger: Ledger) -> None:
    verified(ledger, 1)
    content = b"".join(file.read_bytes() for file in ledger.run_dir.iterdir())
    given = row(1)
    for trace in (given.prompt, given.completion, given.id, content_key(given), "village", "person"):
        assert trace is not None
        assert trace.encode() not in content
    assert ledger.mark(given).encode() in content


def test_another_run_has_another_key(tmp_path: Path) -> None:
    marks = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with Ledger.open(tmp_path / name) as ledger:
            verified(ledger, 1)
            marks.append(ledger.mark(row(1)))
            assert Ledger.open(tmp_path / name).mark(row(1)) == marks[-1]
    assert marks[0] != marks[1]


def test_the_key_is_for_its_owner_alone(ledger: Ledger) -> None:
    verified(ledger, 1)
    assert stat.S_IMODE((ledger.run_dir / "ledger.key").stat().st_mode) == 0o600


def test_a_row_is_known_by_its_normalised_content(ledger: Ledger) -> None:
    verified(ledger, 1)
    same = Row("completion", prompt="  WHERE does person 1\nlive? ", completion="in the village number 1.")
    assert same.id != row(1).id
    assert ledger.mark(same) == ledger.mark(row(1))
    assert ledger.mark(row(2)) != ledger.mark(row(1))


def test_without_its_key_a_ledger_verifies_and_takes_no_request(ledger: Ledger) -> None:
    verified(ledger, 1)
    (ledger.run_dir / "ledger.key").unlink()
    other = again(ledger)
    assert other.verify() == []
    assert other.reopen("02_next", LATER) == ["R1"]
    with pytest.raises(RunDirError, match=r"ledger\.key: is missing\. Restore it"):
        other.request([row(2)], "ticket 2")


@pytest.mark.parametrize(("text", "why"), [("ab" * 32, "is not the key"), ("ab", "32 bytes"), ("no hex", "is damaged")])
def test_a_wrong_key_is_said(ledger: Ledger, text: str, why: str) -> None:
    verified(ledger, 1)
    (ledger.run_dir / "ledger.key").write_text(text)
    with pytest.raises(RunDirError, match=why):
        again(ledger)


# ---- requests -----------------------------------------------------------------------------------------


def test_a_request_says_who_asked_when_and_for_what(ledger: Ledger) -> None:
    rows = [row(1), row(2), row(1)]
    assert ledger.request(rows, "ticket 12", stage=STAGE, note="by letter") == "R1"
    one = again(ledger).get("R1")
    assert (one.state, one.who, one.stage, one.note) == ("requested", "ticket 12", STAGE, "by letter")
    assert one.rows == tuple(sorted({ledger.mark(row(1)), ledger.mark(row(2))}))
    assert one.asked == one.since
    assert one.asked.endswith("+00:00")


def test_a_request_without_rows_or_without_anybody_is_refused(ledger: Ledger) -> None:
    with pytest.raises(DataError, match="has no rows"):
        ledger.request([], "ticket 1")
    with pytest.raises(ConfigError, match="who = ''"):
        ledger.request([row(1)], "")
    assert ledger.requests() == []


def test_rows_that_were_forgotten_already_are_refused_with_the_earlier_request(ledger: Ledger) -> None:
    id = ledger.request([row(1), row(2)], "ticket 1")
    apply(ledger, id)
    asked = ledger.get(id).asked[:10]
    said = rf"these 2 rows are applied by stage {STAGE} already \(R1, asked by ticket 1 on {asked}\)"
    for who in ("ticket 1", "ticket 2"):
        with pytest.raises(DataError, match=said):
            again(ledger).request([row(2), row(1)], who)
    assert ledger.request([row(1)], "ticket 1") == "R2"  # other rows
    ledger.supersede("R1", "by R2")
    assert again(ledger).request([row(1), row(2)], "ticket 1") == "R3"


def test_a_resumed_stage_asks_and_applies_again_and_nothing_is_added(ledger: Ledger) -> None:
    for _ in range(2):
        assert again(ledger).request([row(1)], "ticket 1", stage=STAGE) == "R1"
    for _ in range(2):
        other = again(ledger)
        assert other.request([row(1)], "ticket 1", stage=STAGE) == "R1"
        apply(other, "R1", method={"type": "flat", "layers": (1, 2)})
    assert [entry.event for entry in again(ledger).entries()] == ["opened", "requested", "applied"]
    apply(other, "R1", model_after="another")
    assert again(ledger).get("R1").model == "another"


def test_an_open_request_of_somebody_else_is_named(ledger: Ledger) -> None:
    ledger.request([row(1)], "ticket 1")
    with pytest.raises(DataError, match=r"requested already \(R1, asked by ticket 1 on .*\)\. Carry R1 out"):
        ledger.request([row(1)], "ticket 2")


def test_a_failed_request_is_tried_again_under_its_id(ledger: Ledger) -> None:
    id = ledger.request([row(1)], "ticket 1")
    ledger.fail(id, "the loss is no number", stage=STAGE)
    assert ledger.request([row(1)], "ticket 1", stage="03_again") == id
    apply(ledger, id, stage="03_again")
    assert again(ledger).get(id).state == "applied"
    assert again(ledger).get(id).reason == ""


def test_many_requests_are_one_transaction(ledger: Ledger) -> None:
    many = [Asked([row(i)], f"ticket {i}") for i in range(300)]
    with pytest.raises(DataError, match="has no rows"):
        ledger.request_many([*many, Asked([], "ticket")])
    assert again(ledger).requests() == []
    assert ledger.request_many(many) == [f"R{i + 1}" for i in range(300)]
    assert [one.who for one in again(ledger).requests()] == [f"ticket {i}" for i in range(300)]


def test_an_unknown_request_is_said_with_the_nearest(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match=r"has no request 'R1'; it has none"):
        ledger.get("R1")
    verified(ledger, 1)
    with pytest.raises(ConfigError, match=r"has no request 'r1'; it has R1"):
        ledger.get("r1")
    with pytest.raises(ConfigError, match="R7: was never requested"):
        ledger.fail("R7", "a gate")


# ---- verdicts -----------------------------------------------------------------------------------------


def test_all_checks_verify(ledger: Ledger) -> None:
    verified(ledger, 1)
    one = again(ledger).get("R1")
    assert (one.state, one.missing, one.reason) == ("verified", (), "")
    assert one.checks == tuple(checks())
    assert (one.stage, one.model_before, one.model) == (STAGE, BEFORE, AFTER)
    assert one.method == {"type": "flat", "divergence": "tv"}
    assert one.measurements == {"kl_nats": 0.01}
    assert "torch" in one.versions
    assert [again(ledger).entries()[number - 1].event for number in one.entries] == ["requested", "applied", "verified"]


def test_a_distance_to_a_reference_stands_for_forget_quality(ledger: Ledger) -> None:
    id = ledger.request([row(1)], "ticket 1")
    apply(ledger, id)
    given = [check("reference_distance"), *checks()[1:]]
    assert ledger.verify_request(id, given, stage=STAGE, model=AFTER).state == "verified"


@pytest.mark.parametrize("left_out", NAMES)
def test_with_one_missing_it_is_applied(ledger: Ledger, left_out: str) -> None:
    id = ledger.request([row(1)], "ticket 1")
    apply(ledger, id)
    given = [one for one in checks() if one.name != left_out]
    one = ledger.verify_request(id, given, stage=STAGE, model=AFTER)
    assert one.state == "applied"
    (gap,) = again(ledger).get(id).missing
    assert left_out in gap
    one = ledger.verify_request(id, checks(**{left_out: None}), stage=STAGE, model=AFTER)
    assert (one.state, one.missing) == ("applied", (f"{left_out} was not measured",))
    assert ledger.verify_request(id, checks(), stage=STAGE, model=AFTER).state == "verified"


@pytest.mark.parametrize("reference", [None, Reference((0,), 40), Reference((3, 3), 40)])
def test_a_threshold_without_two_seeds_behind_it_verifies_nothing(ledger: Ledger, reference: Reference | None) -> None:
    id = ledger.request([row(1)], "ticket 1")
    apply(ledger, id)
    given = [check("relearning", reference=reference) if one.name == "relearning" else one for one in checks()]
    one = ledger.verify_request(id, given, stage=STAGE, model=AFTER)
    assert (one.state, one.missing) == ("applied", ("relearning has no reference of 2 seeds or more",))


@pytest.mark.parametrize("name", NAMES)
def test_one_outside_its_interval_fails(ledger: Ledger, name: str) -> None:
    id = verified(ledger, 1)
    one = ledger.verify_request(id, checks(**{name: 0.3}), stage=STAGE, model=AFTER)
    assert (one.state, one.reason) == ("failed", f"{name} ({name} v1) = 0.3, must be at most 0.2")
    with pytest.raises(ConfigError, match="is failed; it can be verified when it is applied or verified"):
        ledger.verify_request(id, checks(), stage=STAGE, model=AFTER)  # not until it is applied again
    assert again(ledger).get(id).state == "failed"


def test_over_forgetting_fails_as_under_forgetting_does(ledger: Ledger) -> None:
    id = verified(ledger, 1)
    given = [*checks(), check("option_probability", 0.02, low=0.2, high=0.3)]
    assert ledger.verify_request(id, given, stage=STAGE, model=AFTER).reason == (
        "option_probability (option_probability v1) = 0.02, must be 0.2 to 0.3"
    )


def test_a_failing_check_beside_a_missing_one_fails(ledger: Ledger) -> None:
    id = verified(ledger, 1)
    one = ledger.verify_request(id, [check("extraction", 0.9)], stage=STAGE, model=AFTER)
    assert one.state == "failed"
    assert "no relearning" in one.missing


def test_only_the_model_that_the_request_stands_on_is_judged(ledger: Ledger) -> None:
    id = ledger.request([row(1)], "ticket 1")
    with pytest.raises(ConfigError, match="R1: is requested; it can be verified when it is applied or verified"):
        ledger.verify_request(id, checks(), stage=STAGE, model=AFTER)
    with pytest.raises(ConfigError, match=f"model {AFTER} was measured"):
        ledger.verify_request(id, checks(extraction=0.9), stage=STAGE, model=AFTER)
    apply(ledger, id)
    with pytest.raises(ConfigError, match=f"model {LATER} was measured, and the request stands on {AFTER}"):
        ledger.verify_request(id, checks(), stage=STAGE, model=LATER)
    assert again(ledger).get(id).state == "applied"


def test_what_is_no_number_is_not_recorded(ledger: Ledger) -> None:
    id = ledger.request([row(1)], "ticket 1")
    with pytest.raises(
        ConfigError, match=r"R1, measurements: loss = nan: must be a finite number\. Say that it failed"
    ):
        apply(ledger, id, measurements={"loss": math.nan})
    with pytest.raises(ConfigError, match="R1: cannot be recorded"):
        apply(ledger, id, method={"type": object()})
    with pytest.raises(ConfigError, match="model_after = ''"):
        apply(ledger, id, model_after="")
    assert again(ledger).get(id).state == "requested"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"value": math.nan}, "value = nan: must be a finite number; None says that it could not be measured"),
        ({"high": math.inf}, "high = inf: must be a finite number"),
        ({"high": None}, "has no threshold: give `low`, `high` or both"),
        ({"low": 0.3}, "low = 0.3 is above high = 0.2: nothing could pass"),
        ({"n": 0, "reference": None}, "n = 0: must be at least 1"),
        ({"reference": Reference((0, 1), 39)}, "its reference was measured on 39 items, the model on 40"),
    ],
)
def test_a_check_that_could_show_nothing_is_refused(given: dict[str, Any], why: str) -> None:
    said: dict[str, Any] = {"value": 0.1, "n": 40, "high": 0.2, "reference": REFERENCE} | given
    with pytest.raises(ConfigError) as refused:
        Check("extraction", "extraction v1", **said)
    assert refused.value.problems[0].startswith(f"check 'extraction': {why}")


def test_bounds_belong_to_the_interval() -> None:
    assert check("a", 0.2).passed
    assert not check("a", math.nextafter(0.2, 1)).passed
    assert check("a", 0.1, low=0.1).passed
    assert not check("a", math.nextafter(0.1, 0), low=0.1).passed
    assert not check("a", None).passed
    assert check("a", 0.3, low=0.1, high=None).allowed == "at least 0.1"


def test_the_checks_that_the_tests_know_are_the_required_ones() -> None:
    assert [names[0] for names in REQUIRED] == list(NAMES)


# ---- later stages -------------------------------------------------------------------------------------


def test_a_later_stage_re_opens_until_it_is_verified_again(ledger: Ledger) -> None:
    verified(ledger, 1)
    apply(ledger, ledger.request([row(2)], "ticket 2"))
    ledger.request([row(3)], "ticket 3")
    before = len(ledger.entries())
    assert ledger.reopen("02_next", LATER) == ["R1"]
    assert len(again(ledger).entries()) == before + 1
    assert {one.id: (one.state, one.model) for one in again(ledger).requests()} == {
        "R1": ("applied", LATER),
        "R2": ("applied", LATER),
        "R3": ("requested", ""),
    }
    one = again(ledger).get("R1")
    assert one.reason == "stage 02_next trained after it"
    assert one.checks == ()
    assert len(one.missing) == len(REQUIRED)
    with pytest.raises(ConfigError, match="stands on model-later"):
        ledger.verify_request("R1", checks(), stage=STAGE, model=AFTER)
    ledger.verify_request("R1", checks(), stage="02_next", model=LATER)
    head = ledger.head()
    assert again(ledger).reopen("02_next", LATER) == []  # a resumed stage: the same model
    assert again(ledger).head() == head
    assert again(ledger).get("R1").state == "verified"
    assert again(ledger).get("R1").reason == ""


def test_failed_and_superseded_requests_are_not_re_opened(ledger: Ledger) -> None:
    ledger.fail(verified(ledger, 1), "rolled back", stage="02_gate")
    ledger.supersede(verified(ledger, 2), "its stage left the stream")
    head = ledger.head()
    assert ledger.reopen("03_next", LATER) == []
    assert ledger.head() == head
    assert (ledger.get("R1").state, ledger.get("R1").reason) == ("failed", "rolled back")
    with pytest.raises(ConfigError, match="is superseded; it can be applied when it is"):
        apply(ledger, "R2")


# ---- every way through --------------------------------------------------------------------------------

STEPS = ("request", "apply", "pass", "miss", "break", "fail", "supersede", "reopen")


def step(ledger: Ledger, what: str, i: int) -> None:
    """One event, or its refusal."""
    id, model = f"R{i + 1}", next((one.model for one in ledger.requests() if one.id == f"R{i + 1}"), "") or AFTER
    measured = {"pass": checks(), "miss": checks(extraction=None), "break": checks(extraction=1.0)}
    try:
        if what == "request":
            ledger.request([row(i)], "ticket")
        elif what == "apply":
            apply(ledger, id)
        elif what in measured:
            ledger.verify_request(id, measured[what], stage=STAGE, model=model)
        elif what == "reopen":
            ledger.reopen("later", LATER)
        else:
            getattr(ledger, what)(id, "a reason")
    except (ConfigError, DataError):
        pass


def expected(state: str | None, what: str, model: str) -> str | None:
    """The state machine as the page draws it, written down a second time."""
    if what == "reopen":
        return "applied" if state == "verified" and model != LATER else state
    if what == "request":
        return state or "requested"
    if state is None or state == "superseded":
        return state
    if what in ("fail", "supersede"):
        return {"fail": "failed", "supersede": "superseded"}[what]
    if what == "apply":
        return "applied"
    if what == "break":
        return "failed" if state != "requested" else state
    return {"pass": "verified", "miss": "applied"}[what] if state in ("applied", "verified") else state


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1)), max_size=14))
def test_every_way_through_the_states(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    with Ledger.open(tmp_path_factory.mktemp("run")) as ledger:
        states: dict[int, str | None] = {}
        for what, i in steps:
            i = min(i, len(ledger.requests()))  # R2 is asked for after R1
            models = {int(one.id[1:]) - 1: one.model for one in ledger.requests()}
            step(ledger, what, i)
            touched = [i] if what != "reopen" else [0, 1]
            states |= {one: expected(states.get(one), what, models.get(one, "")) for one in touched}
            if what == "request" and states[i] == "superseded":
                return  # a third request; another example goes on
            found = {int(one.id[1:]) - 1: one.state for one in ledger.requests()}
            assert found == {one: state for one, state in states.items() if state}
        assert again(ledger).requests() == ledger.requests()
        assert ledger.verify() == []


def test_every_state_is_reached_and_left_as_documented() -> None:
    assert {state for states in FOLLOWS.values() for state in states} == set(STATES) - {"superseded"}
