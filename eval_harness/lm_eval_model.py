"""lm-evaluation-harness's model interface over our engine: its requests, encoded as its Hugging Face model does.

Imports lm_eval at its top: `eval_harness.lm_eval_adapter` imports this where a task is run.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval_harness.errors import ScoringError
from eval_harness.generation import Generation, generate
from eval_harness.lm_eval_adapter import SEED, LmEvalError
from eval_harness.prompts import Encoded
from eval_harness.scoring import Score, score

READ = ("do_sample", "temperature", "top_p", "top_k")  # generation settings that we honour
IDLE = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}  # these change nothing


class EngineLM(TemplateLM):
    """A model in memory as lm-eval sees one: a single process, whatever the number of ranks that share the work.

    truncated         task -> ids of the documents whose context was cut on the left to fit, as lm-eval does
    left_out_system   a chat template refused the system message, which was left out, as lm-eval does
    """

    max_gen_toks = 256  # where a task does not say

    def __init__(self, model: Any, tokenizer: Any, **engine: Any):
        """`engine`: batch_tokens, should_stop, progress and shard, as in `eval_harness.scoring.score`.

        Raises:
            LmEvalError: the tokenizer has neither bos nor eos, with which an empty context starts.
        """
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise LmEvalError("the tokenizer has neither bos nor eos, and lm-eval starts an empty context with one")
        self.model, self.tokenizer, self.engine = model, tokenizer, engine
        self.max_length = resolve_max_length(model.config, tokenizer)
        self.truncated: dict[str, set[int]] = defaultdict(set)
        self.left_out_system = False

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """bos, else eos: what stands before the first scored token where there is no context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokenizer's own special tokens, unless the text already starts with bos."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; a template that refuses the system message gets it without."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            self.left_out_system = True
            return render(rest)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats of the continuation given its context, whether greedy decoding writes it) per request."""
        pairs = [self._pair(request) for request in requests]
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self._truncate(request)
        return self._loglikelihood_tokens(
            [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)]
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in windows of the context that do not overlap."""
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        found = iter(self._score([pair for one in windows for pair in one]))
        return [math.fsum(next(found).log_prob for _ in one) for one in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text up to the first of the `until` strings, per request.

        Requests of equal settings are written together. A request that comes again (a task's `repeats`) draws anew.
        """
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        times: Counter[tuple[str, str]] = Counter()
        alike: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place, (request, said) in enumerate(zip(requests, settings, strict=True)):
            asked = (request.args[0], said)
            alike[said, times[asked]].append(place)
            times[asked] += 1
        out = [""] * len(requests)
        for (said, draw), places in alike.items():
            texts = self._write([requests[place] for place in places], json.loads(said), draw)
            for place, text in zip(places, texts, strict=True):
                out[place] = text
        return out

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._score([(context, continuation) for _, context, continuation in requests])
        return [(one.log_prob, one.is_greedy) for one in found]

    def _pair(self, request: Instance) -> tuple[list[int], list[int]]:
        """Ids of context and continuation; white space at the context's end belongs to the continuation."""
        context, continuation = request.args[:2]
        if context:
            pair = self._encode_pair(context, continuation)
        else:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            pair = (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
        if not all(pair):
            raise ScoringError(
                f"task {request.task_name}, document {request.doc_id}: the tokenizer makes no token of "
                f"{continuation if pair[0] else context!r}; it cannot be scored"
            )
        return pair

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """What does not fit is cut on the left. The last token is only predicted: one more than the context fits."""
        room = self.max_length + 1
        sequences = []
        for context, continuation in pairs:
            targets = [False] * len(context) + [True] * len(continuation)
            sequences.append(Encoded((context + continuation)[-room:], targets[-room:]))
        found = score(self.model, sequences, context=self.max_length, **self.engine)
        return [one for one in found if one is not None]  # none is: all fit

    def _write(self, requests: Sequence[Instance], settings: dict[str, Any], draw: int) -> list[str]:
        how = self._generation(requests[0].task_name, settings, draw)
        room = self.max_length - (how.max_new_tokens or 0)
        if room < 1:
            raise ScoringError(
                f"task {requests[0].task_name}: max_gen_toks = {how.max_new_tokens}: must be below the model's "
                f"context of {self.max_length} tokens"
            )
        prompts = []
        for request in requests:
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            if len(ids) > room:
                self._truncate(request)
            prompts.append(ids[-room:])
        return [self._text(ids, how.stop) for ids in generate(self.model, self.tokenizer, prompts, how, **self.engine)]

    def _generation(self, task: str | None, settings: dict[str, Any], draw: int) -> Generation:
        """lm-eval's generation settings as ours; what we would have to ignore is refused."""
        asked: Mapping[str, Any] = normalize_gen_kwargs(settings, self.max_gen_toks)
        for name, value in asked.items():
            if name not in (*READ, "until", "max_gen_toks") and (name not in IDLE or value != IDLE[name]):
                raise LmEvalError(
                    f"task {task}: generation_kwargs.{name} = {value!r}: not supported; "
                    f"allowed: until, max_gen_toks, {', '.join(READ)}"
                )
        stop = handle_stop_sequences(list(asked["until"]), eos=self.tokenizer.eos_token)
        base = Generation(max_new_tokens=asked["max_gen_toks"], stop=tuple(filter(None, stop)))
        if not asked["do_sample"]:
            return base
        warped = {name: asked[name] for name in READ[1:] if asked.get(name) is not None}
        if not warped.get("temperature"):
            raise LmEvalError(f"task {task}: generation_kwargs.do_sample needs a temperature above 0")
        return Generation(base.max_new_tokens, base.stop, seed=SEED + draw, **warped)

    def _text(self, ids: list[int], stop: Sequence[str]) -> str:
        """What was written before the first stop string; special tokens among those are no text, but end it too."""
        ends = {self.tokenizer.convert_tokens_to_ids(one) for one in stop if one in self.tokenizer.all_special_tokens}
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return postprocess_generated_text(text, list(stop), think_end_token=None)

    def _truncate(self, request: Instance) -> None:
        self.truncated[request.task_name or ""].add(request.doc_id or 0)
