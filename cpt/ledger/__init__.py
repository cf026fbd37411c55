"""The ledger of forget requests: RUN/ledger.sqlite says who asked for what, what was done and what was measured.

It is only ever added to, and each entry's hash covers the one before (`chain`). What a request's state is follows from
its entries (`requests`). Rows are held as keyed hashes, their key in RUN/ledger.key; their text is nowhere here.
Neither file is made before the first request.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cpt.checkpoints import write_text
from cpt.errors import ConfigError, DataError, RunDirError
from cpt.ledger.chain import Chain, Entry, Head, canonical
from cpt.ledger.requests import STATES, Check, Reference, Refused, Request, State, advance, failing, missing, verdict
from cpt.run_dir import libraries
from eval_harness.rows import Row, content_key

__all__ = ["HEAD_FACT", "STATES", "Asked", "Check", "Head", "Ledger", "Reference", "Request", "State", "stage_heads"]

LEDGER, KEY = "ledger.sqlite", "ledger.key"
HEAD_FACT = "ledger_head"  # of a stage's DONE: {"number", "hash"} of the head that it saw
SCHEMA_VERSION = 1
versions = cache(libraries)
Add = Callable[[str, str, Mapping[str, Any]], None]  # request, event, body


@dataclass(frozen=True)
class Asked:
    """One request to forget: the rows, who asked, for which stage, and what else is to be remembered of it.

    `who` and `note` stay readable for ever: a ticket's number rather than a name, and never a row's text.
    """

    rows: Sequence[Row]
    who: str
    stage: str = ""
    note: str = ""


class Ledger:
    """The requests of a run directory; one process of a launch writes. `with Ledger.open(run_dir) as ledger`.

    What it says is as of opening, or of the last write. Every write is one transaction, on the disk when the call
    returns, and raises RunDirError where the chain is broken.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._chain = Chain(run_dir / LEDGER)
        self._requests: dict[str, Request] = {}
        self._newest: dict[str, str] = {}  # digest of a request's rows -> the id that asked for them last
        self._read = 0
        self._key: bytes | None = None

    @classmethod
    def open(cls, run_dir: str | os.PathLike[str]) -> "Ledger":
        """A run's ledger, verified against itself and the heads in its stages' DONE; it need not be there.

        Raises RunDirError with everything that is wrong with it.
        """
        ledger = cls(Path(run_dir))
        if problems := ledger._load({}):
            raise RunDirError(*problems)
        return ledger

    @classmethod
    def problems(cls, run_dir: str | os.PathLike[str], known_heads: Mapping[str, Head] | None = None) -> list[str]:
        """Everything that is wrong with a run's ledger, a sentence each; empty where it verifies.

        known_heads: where a head was written down -> the head, besides those in the stages' DONE.
        """
        return cls(Path(run_dir))._load(known_heads or {})

    def verify(self, known_heads: Mapping[str, Head] | None = None) -> list[str]:
        """`problems` of the file as it is now. 10,000 requests take less than a second."""
        return self.problems(self.run_dir, known_heads)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go."""
        self._chain.close()

    # ---- what it says ---------------------------------------------------------------------------------

    def head(self) -> Head | None:
        """Where the chain ends: what a stage writes into its DONE as `HEAD_FACT`. None before the first request."""
        return self._chain.head()

    def entries(self) -> list[Entry]:
        """Every entry, in order."""
        return list(self._chain.entries)

    def requests(self, *states: State) -> list[Request]:
        """Requests in these states, or all, in the order in which they were asked."""
        return [request for request in self._requests.values() if not states or request.state in states]

    def get(self, id: str) -> Request:
        """A request by its id. Raises ConfigError."""
        if id not in self._requests:
            ids = list(self._requests)
            known = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}" if ids else "none"
            raise ConfigError(f"{self._chain.path}: has no request {id!r}; it has {known}")
        return self._requests[id]

    def mark(self, row: Row) -> str:
        """What the ledger holds of a row: HMAC-SHA256 (hex) of its normalised content, under the run's key.

        Raises RunDirError where the key is gone or another one.
        """
        if self._key is None:
            self._key = self._kept_key()
        return hmac.digest(self._key, content_key(row).encode(), "sha256").hex()

    # ---- what is added --------------------------------------------------------------------------------

    def request(self, rows: Sequence[Row], who: str, *, stage: str = "", note: str = "") -> str:
        """Remember that somebody asked to forget these rows; gives the request's id.

        The same person's open request for the same rows, or one that the same stage applied, is given again: a stage
        that is resumed may ask again. Raises DataError for no rows, or rows that an earlier request has.
        """
        return self.request_many([Asked(rows, who, stage, note)])[0]

    def request_many(self, asked: Iterable[Asked]) -> list[str]:
        """Many requests in one transaction, all or none; their ids. As `request` for each."""
        with self._writing() as add:
            return [self._asked(add, one) for one in asked]

    def apply(
        self,
        id: str,
        *,
        stage: str,
        method: Mapping[str, Any],
        model_before: str,
        model_after: str,
        measurements: Mapping[str, float] | None = None,
    ) -> Request:
        """Say that a stage made a model that is meant to have forgotten. Said again in the same words, it adds nothing.

        method: its name and settings, JSON; model_before, model_after: hashes; measurements: of the stage itself.
        Raises ConfigError where the request was superseded, or for what JSON cannot hold: a loss that is no number.
        """
        _named(stage=stage, model_before=model_before, model_after=model_after)
        body = {"stage": stage, "method": dict(method), "model_before": model_before, "model_after": model_after}
        body = _recordable(id, body | {"measurements": _finite(id, measurements or {})})
        with self._writing() as add:
            if not self._is_last(id, "applied", body):
                add(id, "applied", body)
        return self.get(id)

    def verify_request(self, id: str, checks: Sequence[Check], *, stage: str, model: str) -> Request:
        """Record a verdict; gives the request, whose state follows from the checks and from nothing else.

        `failed` where one lies outside its interval, `verified` where all that `REQUIRED` names are there and passed,
        `applied` with what is `missing` otherwise. model: the hash of the model that was measured.
        Raises ConfigError for another model than the request stands on, and for a request that is not applied.
        """
        _named(stage=stage, model=model)
        body: dict[str, Any] = {"stage": stage, "model": model, "checks": [asdict(check) for check in checks]}
        body |= {"missing": missing(checks), "reason": "; ".join(failing(checks)), "versions": versions()}
        with self._writing() as add:
            add(id, verdict(checks), body)
        return self.get(id)

    def fail(self, id: str, reason: str, *, stage: str = "") -> Request:
        """Say that it did not work: a loss that is no number, a collapse, a gate. reason: never a row's text."""
        _named(reason=reason)
        with self._writing() as add:
            add(id, "failed", {"reason": reason, "stage": stage})
        return self.get(id)

    def supersede(self, id: str, reason: str) -> Request:
        """Say that it does not count any more: another request covers it, its stage left the stream."""
        _named(reason=reason)
        with self._writing() as add:
            add(id, "superseded", {"reason": reason})
        return self.get(id)

    def reopen(self, stage: str, model: str) -> list[str]:
        """Say that a later stage trained the model; gives the ids that were verified and are applied again.

        One entry for all. Requests that are applied stand on the new model from here on, too. Those that stand on this
        very model already are left as they are: a resumed stage adds nothing.
        """
        _named(stage=stage, model=model)
        with self._writing(create=False) as add:
            moved = [request for request in self.requests("verified", "applied") if request.model != model]
            if moved:
                ids = [request.id for request in moved]
                add("", "reopened", {"stage": stage, "model": model, "requests": ids})
        return [request.id for request in moved if request.state == "verified"]

    # ---- how --------------------------------------------------------------------------------------------

    def _load(self, known_heads: Mapping[str, Head]) -> list[str]:
        try:
            found = self._chain.load({**stage_heads(self.run_dir), **known_heads}) or self._follow()
            if not found and self.head() and (self.run_dir / KEY).is_file():
                self._kept_key()
        except RunDirError as error:
            return error.problems
        return [f"{self._chain.path}: {problem}" for problem in found]

    def _follow(self) -> list[str]:
        """Read what the chain has more; gives the first entry that does not follow from the ones before."""
        for entry in self._chain.entries[self._read :]:
            try:
                self._take(entry)
            except Refused as error:
                return [f"entry {entry.number} does not follow from the others: {error}"]
        return []

    def _take(self, entry: Entry) -> None:
        changed = advance(self._requests, entry)
        self._requests |= changed
        if entry.event == "requested":
            self._newest[_digest(changed[entry.request].rows)] = entry.request
        self._read = entry.number

    @contextmanager
    def _writing(self, create: bool = True) -> Iterator[Add]:
        """A transaction; what it adds is taken as read, and what it does not end with is read again."""
        if not create and not self._chain.entries and not self._chain.path.exists():
            yield _nothing
            return
        try:
            with self._chain.writing() as append:
                if problems := self._follow():
                    raise RunDirError(*(f"{self._chain.path}: {problem}" for problem in problems))
                if not self._chain.entries and create:
                    self._take(append("", "opened", {"schema": SCHEMA_VERSION, "key": _fingerprint(self._made_key())}))
                yield lambda request, event, body: self._take(append(request, event, body))
        except Refused as error:
            self._forget_read()
            raise ConfigError(f"{self._chain.path}: {error}") from error
        except BaseException:
            self._forget_read()
            raise

    def _forget_read(self) -> None:
        """After a write that did not end: what this object took as read may not be there."""
        self._requests, self._newest, self._read = {}, {}, 0
        self._follow()

    def _asked(self, add: Add, asked: Asked) -> str:
        if not asked.rows:
            raise DataError("a request to forget: has no rows. Give at least one.")
        _named(who=asked.who)
        rows = sorted({self.mark(row) for row in asked.rows})
        if (found := self._newest.get(_digest(rows))) and self._requests[found].state != "superseded":
            return self._again(self._requests[found], asked)
        id = f"R{len(self._requests) + 1}"
        add(id, "requested", {"who": asked.who, "rows": rows, "stage": asked.stage, "note": asked.note})
        return id

    def _again(self, earlier: Request, asked: Asked) -> str:
        is_done = earlier.state in ("applied", "verified")
        if earlier.who == asked.who and (not is_done or (asked.stage and asked.stage == earlier.stage)):
            return earlier.id
        by = f"{earlier.id}, asked by {earlier.who} on {earlier.asked[:10]}"
        where = f" by stage {earlier.stage}" if is_done else ""
        step = "Nothing is left to do" if is_done else f"Carry {earlier.id} out"
        raise DataError(
            f"{self._chain.path}: these {len(earlier.rows)} rows are {earlier.state}{where} already ({by}). {step}, or "
            f"supersede {earlier.id} first."
        )

    def _is_last(self, id: str, event: str, body: Mapping[str, Any]) -> bool:
        if id not in self._requests:
            return False
        last = self._chain.entries[self._requests[id].entries[-1] - 1]
        return last.event == event and last.body == body

    def _made_key(self) -> bytes:
        """The run's key, made where there is none; called inside a transaction, so by one process at a time."""
        file = self.run_dir / KEY
        if not file.is_file():
            write_text(file, secrets.token_hex(32) + "\n", mode=0o600)
        self._key = _key_of(file)
        return self._key

    def _kept_key(self) -> bytes:
        file, first = self.run_dir / KEY, self._chain.entries[0] if self._chain.entries else None
        if not file.is_file():
            raise RunDirError(f"{file}: is missing. Restore it: without it nobody can tell which rows were forgotten.")
        key = _key_of(file)
        if first and first.body.get("key") != _fingerprint(key):
            raise RunDirError(f"{file}: is not the key that {LEDGER} was made with. Restore that one.")
        return key


def stage_heads(run_dir: Path) -> dict[str, Head]:
    """The heads that stages wrote into their DONE, superseded ones too: file -> head. Raises RunDirError."""
    found = {}
    for file in sorted((run_dir / "stages").glob("*/DONE")):
        try:
            head = json.loads(file.read_text(encoding="utf-8")).get("facts", {}).get(HEAD_FACT)
            if head is not None:
                found[file.relative_to(run_dir).as_posix()] = Head(int(head["number"]), str(head["hash"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirError(f"{file}: is damaged ({error}). Restore it, or delete the folder it is in.") from error
    return found


def _nothing(request: str, event: str, body: Mapping[str, Any]) -> None:
    """Where there is no ledger there is nothing to add to."""


def _named(**given: str) -> None:
    if empty := [name for name, value in given.items() if not value.strip()]:
        raise ConfigError(*(f"{name} = '': must say something; the ledger keeps it" for name in empty))


def _finite(id: str, measurements: Mapping[str, float]) -> dict[str, float]:
    if wrong := [f"{name} = {value}" for name, value in measurements.items() if not math.isfinite(value)]:
        step = f"Say that it failed: Ledger.fail({id!r}, ...)."
        raise ConfigError(*(f"{id}, measurements: {one}: must be a finite number. {step}" for one in wrong))
    return dict(measurements)


def _recordable(id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """As an entry will hold it. Raises ConfigError."""
    try:
        return json.loads(canonical(body))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{id}: cannot be recorded: {error}. Give text and finite numbers.") from error


def _digest(rows: Iterable[str]) -> str:
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def _key_of(file: Path) -> bytes:
    try:
        key = bytes.fromhex(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{file}: is damaged ({error}). Restore it.") from error
    if len(key) != 32:
        raise RunDirError(f"{file}: is damaged (32 bytes as hex digits are expected). Restore it.")
    return key


def _fingerprint(key: bytes) -> str:
    """Tells one key from another without telling the key."""
    return hashlib.sha256(b"cpt ledger key" + key).hexdigest()
