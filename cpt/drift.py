"""How far a stage's model is from the stream's start: in what it says, in what it holds, in its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import DriftSource, Stream
from cpt.data.sources import Loaded
from cpt.errors import DataError
from cpt.models import is_start_beneath, lineage_of, open_model
from cpt.processes import Processes
from cpt.run_dir import digest
from cpt.signals import StopRequest
from eval_harness.cache import VERSION, Cache, tokenizer_digest, versions
from eval_harness.drift import DriftError, drift
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.lineage import LoadError
from eval_harness.prompts import PromptError, Prompting, encode, one_of_each_form
from eval_harness.results import SCHEMA_VERSION
from eval_harness.rows import Row
from eval_harness.weights import weight_distance, weight_results

NAME = "drift"  # of its file among the sets: eval/drift.json


@dataclass(frozen=True)
class DriftPlan:
    """The rows that every stage's model and the start both read.

    base: identity of the start. id: changes with everything that decides the values, but for the models.
    """

    rows: list[Row]
    prompting: Prompting
    weights: bool
    base: str
    id: str

    @classmethod
    def of(cls, source: DriftSource, loaded: Loaded, stream: Stream, base: str, tokenizer: Any) -> "DriftPlan":
        """Raises DataError for a row of a form that the tokenizer cannot render."""
        prompting = Prompting(stream.evaluation.chat_template)
        try:
            for row in one_of_each_form(loaded.rows):
                encode(tokenizer, row, prompting.chat_template)
        except PromptError as error:
            raise DataError(f"evaluation.drift: {error}") from error
        said = [loaded.fingerprint, prompting.definition(tokenizer), tokenizer_digest(tokenizer), source.weights, base]
        return cls(loaded.rows, prompting, source.weights, base, digest([*said, VERSION, SCHEMA_VERSION]))

    def measure(
        self,
        folder: Path,
        identity: str,
        opening: Callable[[], Any],
        stream: Stream,
        tokenizer: Any,
        cache: Cache,
        stop: StopRequest,
        processes: Processes,
    ) -> dict[str, Any]:
        """The results of one stage's model, from the cache where they are known. Raises DataError, Stopped.

        identity: of the model in `folder`; the base's own drift is measured too, and is zero.
        """
        # Versions are no part of the plan: with weights that are gone, a new torch must not undo what was measured.
        key = digest([NAME, self.id, identity, versions()])
        known = processes.on_main(lambda: cache.get([key]).get(key))
        if known is not None:
            return known
        name = self.base[:8]
        try:
            model = opening()
            base = self._base(folder, model, stream)
            shard = processes if processes.world > 1 else None
            found = drift(
                model,
                base,
                tokenizer,
                self.rows,
                self.prompting,
                base_name=name,
                batch_tokens=stream.evaluation.batch_tokens,
                should_stop=stop.here,
                shard=shard,
            )
            if self.weights:
                found |= processes.on_main(lambda: self._weights(folder, stream, name))
        except Interrupted as error:
            raise stop.error(f"while measuring drift of {folder.parent.name}") from error
        except (DriftError, LoadError, PromptError, ScoringError) as error:
            raise DataError(f"measuring drift of {folder.parent.name}: {error}") from error
        results = {key: result.to_json() for key, result in found.items()}
        processes.on_main(lambda: cache.put({key: results}))
        return results

    def _base(self, folder: Path, model: Any, stream: Stream) -> Any | None:
        if is_start_beneath(folder, stream.model):
            return None  # the model's own weights, its adapters off: no second one in memory
        return open_model(None, stream.model)

    def _weights(self, folder: Path, stream: Stream, name: str) -> dict[str, Any]:
        trust = stream.model.trust_remote_code
        ours, start = lineage_of(folder, stream.model), lineage_of(None, stream.model)
        return weight_results(weight_distance(ours, start, trust_remote_code=trust), name)
