"""A model writes answers to rows, part by part: what a method may ask of the weights that a stage starts from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cpt.errors import DataError
from cpt.processes import Processes
from eval_harness.errors import Interrupted, ScoringError
from eval_harness.generation import Generation, end_ids, generate
from eval_harness.prompts import ChatTemplate, PromptError, prompt_ids
from eval_harness.rows import Row

if TYPE_CHECKING:
    from cpt.data.rewritten import Generate, Written
    from cpt.signals import StopRequest


@dataclass(frozen=True)
class Writer:
    """Called with the settings of a `Generation` it gives a `cpt.data.rewritten.Generate`.

    opening: loads the model, once somebody takes the first part; it is let go after the last. context: tokens that a
    prompt and its answer may have together; a prompt that leaves less room than asked for is answered by None.
    """

    opening: Callable[[], Any]
    tokenizer: Any
    chat_template: ChatTemplate
    context: int | None
    processes: Processes
    stage: str
    stop: "StopRequest | None" = None
    batch_tokens: int | None = None
    progress: Callable[[int, int], None] | None = None

    def __call__(self, **how: Any) -> "Generate":
        """max_new_tokens, temperature, stop, seed, ... as in `eval_harness.generation.Generation`."""
        return partial(self._parts, Generation(**how))

    def _parts(self, how: Generation, parts: Sequence[Sequence[Row]]) -> "Iterator[list[Written | None]]":
        model, done, total = self.opening(), 0, sum(map(len, parts))
        for part in parts:
            yield self._part(model, how, part)
            done += len(part)
            if self.progress is not None:
                self.progress(done, total)

    def _part(self, model: Any, how: Generation, rows: Sequence[Row]) -> "list[Written | None]":
        where = f"stage {self.stage!r}, writing answers"
        try:
            prompts = [prompt_ids(self.tokenizer, row, self.chat_template) for row in rows]
            most = None if self.context is None else self.context - (how.max_new_tokens or 0)
            fits = [i for i, prompt in enumerate(prompts) if most is None or len(prompt) <= most]
            new = generate(
                model,
                self.tokenizer,
                [prompts[i] for i in fits],
                how,
                batch_tokens=self.batch_tokens,
                should_stop=self.stop.here if self.stop is not None else None,
                shard=self.processes if self.processes.world > 1 else None,
            )
        except Interrupted as error:
            assert self.stop is not None
            raise self.stop.error(f"in {where}") from error
        except (PromptError, ScoringError) as error:
            raise DataError(f"{where}: {error}") from error
        ends = set(end_ids(model, self.tokenizer, how.stop))
        found = dict(zip(fits, new, strict=True))
        return [self._written(found[i], ends, how) if i in found else None for i in range(len(rows))]

    def _written(self, ids: list[int], ends: set[int], how: Generation) -> "Written":
        from cpt.data.rewritten import Written
        from eval_harness.metrics.text import until_stop

        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        short = until_stop(text, how.stop)
        return Written(short, ended=ids[-1] in ends or short != text)
