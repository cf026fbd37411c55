"""What a run's stages write into its ledger: who asked, what was made, what failed, that a later stage trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.errors import TrainingError
from cpt.ledger import HEAD_FACT, Ledger
from eval_harness.rows import Row


def ask(run_dir: Path, rows: Sequence[Row], who: str, stage: str) -> str:
    """Remember the request that a stage is there for; its id. Said again by a resumed stage, it is the same."""
    with Ledger.open(run_dir) as ledger:
        return ledger.request(rows, who, stage=stage)


@contextmanager
def failing(run_dir: Path, request: str | None, stage: str) -> Iterator[None]:
    """Say so where training breaks off for good: a loss that is no number. A stop is none."""
    try:
        yield
    except TrainingError as error:
        if request is not None:
            with Ledger.open(run_dir) as ledger:
                ledger.fail(request, error.problems[0], stage=stage)
        raise


def trained(
    run_dir: Path, stage: str, before: str, after: str, request: str | None, method: Mapping[str, Any]
) -> dict[str, Any]:
    """Record that a stage made a model of another (identities), and give what its DONE says of the ledger.

    Earlier requests stand on the new model from here on: those that were verified are to be verified again.
    """
    with Ledger.open(run_dir) as ledger:
        ledger.reopen(stage, after)
        if request is not None:
            ledger.apply(request, stage=stage, method=method, model_before=before, model_after=after)
        head = ledger.head()
        return {HEAD_FACT: asdict(head)} if head else {}


def left(run_dir: Path, stages: Sequence[str]) -> list[str]:
    """Supersede the requests of stages that left the stream, or are made anew; their ids."""
    with Ledger.open(run_dir) as ledger:
        gone = [one for one in ledger.requests() if one.stage in stages and one.state != "superseded"]
        for request in gone:
            ledger.supersede(request.id, f"stage {request.stage} belongs to another version of the stream")
        return [request.id for request in gone]
