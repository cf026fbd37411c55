"""Rows to token ids, once, for training and evaluation alike.

chat_template: "auto" renders with the tokenizer's template where it has one, and "none" joins prompt, separator and
completion, which "auto" does too without a template. What is learned and scored (the target):

    completion, chat    everything after the generation prompt up to the template's last end token. White
                        space that a template writes after it ("<|im_end|>\\n") stays in the input and is
                        no target. A template that writes no end token gets the eos token, or the
                        model would never learn to stop.
    completion, plain   the completion's tokens and eos. A token that holds characters of both prompt and
                        completion belongs to the completion.
    chat                the assistant's tokens, as the template's {% generation %} blocks mark them
    text                every token but the first (bos where the tokenizer has one), and eos
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NoReturn

from eval_harness.rows import Row

ChatTemplate = Literal["auto", "none"]
SHOT_GAP = "\n\n"  # between shots where no chat template is used


class PromptError(ValueError):
    """A row that this tokenizer cannot render; says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Prompting:
    """How rows become prompts: part of what a measure means, and so of its definition.

    chat_template     auto: the tokenizer's, where it has one; none: never
    system            a system message, or without a template a paragraph put first
    num_fewshot       solved rows put before each row, the same for all rows of a set
    fewshot_seed      of the draw of those rows
    strip_reasoning   pattern of what is cut out of generated text before it is compared; None cuts nothing
    """

    chat_template: ChatTemplate = "auto"
    system: str | None = None
    num_fewshot: int = 0
    fewshot_seed: int = 0
    strip_reasoning: str | None = None

    def definition(self, tokenizer: Any, shots: Sequence[Row] = ()) -> str:
        """ "plain" or "chat:" and the template's hash; then system, shots and reasoning pattern where there are any."""
        said = [definition(tokenizer, self.chat_template)]
        said += [f"system:{_hash(self.system)}"] if self.system is not None else []
        said += [f"{len(shots)}-shot:{_hash(''.join(shot.id for shot in shots))}"] if shots else []
        said += [f"reasoning:{_hash(self.strip_reasoning)}"] if self.strip_reasoning is not None else []
        return ",".join(said)

    def problems(self) -> Iterator[str]:
        """A reasoning pattern that is none, as `field = value: what is allowed`."""
        if self.strip_reasoning is None:
            return
        import regex

        try:
            regex.compile(self.strip_reasoning)
        except regex.error as error:
            yield f"strip_reasoning = {self.strip_reasoning!r}: must be a regular expression ({error})"


@dataclass(slots=True)
class Encoded:
    """Token ids of one row.

    input_ids    the ids
    is_target    of the same length: True where the token is learned and scored
    end_tokens   how many of the last target tokens end the answer and are no part of its text
    """

    input_ids: list[int]
    is_target: list[bool]
    end_tokens: int = 0

    @property
    def start(self) -> int:
        """Position of the first target token; what lies before it is what generation starts from."""
        return self.is_target.index(True)

    def without_end(self) -> Encoded:
        """The same with its end tokens no targets."""
        if not self.end_tokens:
            return self
        targets = [i for i, is_target in enumerate(self.is_target) if is_target]
        ends = set(targets[-self.end_tokens :])
        return Encoded(self.input_ids, [is_target and i not in ends for i, is_target in enumerate(self.is_target)])


def encode(
    tokenizer: Any,
    row: Row,
    chat_template: ChatTemplate = "auto",
    *,
    completion: str | None = None,
    system: str | None = None,
    shots: Sequence[Row] = (),
) -> Encoded:
    """Encode a row.

    Args:
        tokenizer: a transformers tokenizer.
        row: a canonical row.
        chat_template: see the module.
        completion: taken instead of the row's own completion (to score a choice).
        system: a system message put first (chat), or a paragraph put first (plain).
        shots: solved completion rows put before a completion row: turns of the conversation, or paragraphs.

    Raises:
        PromptError: a conversation where no chat template is used, a template without {% generation %} for a
            chat row, messages that a template refuses, a prompt that it does not render as a prefix, or no eos token.
    """
    if row.kind == "text":
        return _text(tokenizer, row.text or "")
    if row.kind == "chat":
        _require_template(tokenizer, chat_template, "a conversation (`messages`)")
        return _conversation(tokenizer, _messages(row, system))
    answer = row.completion if completion is None else completion
    if answer is None:
        raise PromptError(f"row {row.id}: a completion row without a completion cannot be encoded")
    return encode_answers(tokenizer, row, [answer], chat_template, system=system, shots=shots)[0]


def one_of_each_form(rows: Sequence[Row]) -> list[Row]:
    """The first row of each form that is rendered in a way of its own: what the others of it need is known by it."""
    first: dict[tuple[str, bool], Row] = {}
    for row in rows:
        first.setdefault((row.kind, row.prompt is None), row)
    return list(first.values())


def encode_answers(
    tokenizer: Any,
    row: Row,
    answers: Sequence[str],
    chat_template: ChatTemplate = "auto",
    *,
    system: str | None = None,
    shots: Sequence[Row] = (),
) -> list[Encoded]:
    """Encode a completion row with each of several answers: the prompt is rendered and tokenized once.

    Raises:
        PromptError: as `encode`.
    """
    if not answers:
        return []
    if resolve(tokenizer, chat_template) == "chat":
        return _chat_completions(tokenizer, row, answers, _messages(row, system, shots))
    return _plain_completions(tokenizer, row, answers, _plain_prompt(row, system, shots))


def prompt_ids(
    tokenizer: Any,
    row: Row,
    chat_template: ChatTemplate = "auto",
    *,
    system: str | None = None,
    shots: Sequence[Row] = (),
) -> list[int]:
    """The ids that generation starts from: the prompt of a completion row, a conversation up to its last
    assistant turn, or a whole text.

    Raises:
        PromptError: as `encode`.
    """
    if row.kind == "text":
        return _with_bos(tokenizer, _ids(tokenizer, row.text or "", special=False))
    if row.kind == "chat":
        _require_template(tokenizer, chat_template, "a conversation (`messages`)")
        messages = _messages(row, system)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return _ids(tokenizer, _render(tokenizer, messages[:last], generation=True), special=False)
    if resolve(tokenizer, chat_template) == "chat":
        return _ids(tokenizer, _render(tokenizer, _messages(row, system, shots), generation=True), special=False)
    return _without_eos(tokenizer, _ids(tokenizer, _plain_prompt(row, system, shots), special=True))


def text_start(tokenizer: Any) -> list[int]:
    """The ids that a text of its own starts from: bos, where there is none eos.

    Raises:
        PromptError: a tokenizer that has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [_eos(tokenizer) if start is None else start]


def user_turn(tokenizer: Any) -> tuple[list[int], tuple[str, ...]]:
    """The ids behind which a user's first turn stands, and strings that end it: what the template puts after it, and
    the special tokens among that.

    Raises:
        PromptError: no chat template, or one that changes what a user says.
    """
    _require_template(tokenizer, "auto", "a user's turn")
    mark = "the words of a user"
    before, found, after = _render(tokenizer, [{"role": "user", "content": mark}], generation=True).partition(mark)
    if not (found and after.strip()):
        raise PromptError(
            "the chat template shows no user's turn with an end, so none can be drawn: draw texts instead"
        )
    ends = [token for token in tokenizer.all_special_tokens if token in after]
    return _ids(tokenizer, before, special=False), (after, *ends)


def resolve(tokenizer: Any, chat_template: ChatTemplate) -> Literal["chat", "plain"]:
    """What `chat_template` means for this tokenizer.

    Raises:
        PromptError: a word that it cannot be.
    """
    if chat_template not in ("auto", "none"):
        raise PromptError(f"chat_template = {chat_template!r}: must be auto or none")
    return "chat" if chat_template == "auto" and tokenizer.chat_template else "plain"


def definition(tokenizer: Any, chat_template: ChatTemplate) -> str:
    """ "plain", or "chat:" and the first 6 hex digits of the template's SHA-256: part of a measure's id."""
    if resolve(tokenizer, chat_template) == "plain":
        return "plain"
    return f"chat:{_hash(tokenizer.get_chat_template())}"


def _hash(text: str | None) -> str:
    return hashlib.sha256((text or "").encode()).hexdigest()[:6]


def _chat_completions(
    tokenizer: Any, row: Row, answers: Sequence[str], messages: list[dict[str, str]]
) -> list[Encoded]:
    prompt = _render(tokenizer, messages, generation=True)
    wholes = [
        _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False)
        for answer in answers
    ]
    if not all(whole.startswith(prompt) for whole in wholes):
        raise PromptError(
            f"row {row.id}: the chat template does not render the prompt as a prefix of the conversation, so "
            f"the answer has no place to start: prompt ends {prompt[-40:]!r}. Give a template whose "
            "add_generation_prompt writes exactly what stands before an assistant's answer"
        )
    before, *encoded = _all_ids(tokenizer, [prompt, *wholes], special=False)
    return [
        _ended(tokenizer, ids, _boundary(tokenizer, prompt, whole, before, ids, special=False))
        for whole, ids in zip(wholes, encoded, strict=True)
    ]


def _ended(tokenizer: Any, ids: list[int], start: int) -> Encoded:
    """Target from `start` to the last end token; white space behind it is no target."""
    special = set(tokenizer.all_special_ids)
    end = max((i + 1 for i in range(start, len(ids)) if ids[i] in special), default=start)
    if end == start or tokenizer.decode(ids[end:]).strip():
        ids = [*ids, _eos(tokenizer)]
        end = len(ids)
    end_tokens = sum(1 for _ in takewhile(special.__contains__, reversed(ids[start:end])))
    return Encoded(ids, [start <= i < end for i in range(len(ids))], end_tokens)


def _plain_completions(tokenizer: Any, row: Row, answers: Sequence[str], prompt: str) -> list[Encoded]:
    wholes = [prompt + row.separator + answer for answer in answers]
    before, *encoded = (_without_eos(tokenizer, ids) for ids in _all_ids(tokenizer, [prompt, *wholes], special=True))
    eos = _eos(tokenizer)
    starts = [
        _boundary(tokenizer, prompt, whole, before, ids, special=True)
        for whole, ids in zip(wholes, encoded, strict=True)
    ]
    return [
        Encoded([*ids, eos], [i >= start for i in range(len(ids) + 1)], end_tokens=1)
        for ids, start in zip(encoded, starts, strict=True)
    ]


def _boundary(tokenizer: Any, prompt: str, whole: str, before: list[int], ids: list[int], *, special: bool) -> int:
    """Index of the first token that holds a character of the completion."""
    if ids[: len(before)] == before:
        return len(before)
    # The prompt's end and the completion's beginning were merged into other tokens: ask where each
    # token ends in the text, or, where the tokenizer cannot say, take the first that differs.
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in offsets["offset_mapping"]]
        return next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))


def _conversation(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Encoded:
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        raise PromptError(
            "a conversation is learned by its assistant tokens, which this chat template does not mark: put "
            "{% generation %} ... {% endgeneration %} around the assistant's content and end token in "
            "tokenizer.chat_template, or give rows as {prompt, completion}"
        )
    with _in_words(messages):
        out = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    ids, is_target = list(out["input_ids"]), [bool(mask) for mask in out["assistant_masks"]]
    if not any(is_target):
        raise PromptError(
            "the chat template marks no token of this conversation as the assistant's: its {% generation %} "
            "block is not reached by any message"
        )
    return Encoded(ids, is_target)


def _text(tokenizer: Any, text: str) -> Encoded:
    ids = [*_with_bos(tokenizer, _ids(tokenizer, text, special=False)), _eos(tokenizer)]
    return Encoded(ids, [i > 0 for i in range(len(ids))], end_tokens=1)


def _messages(row: Row, system: str | None, shots: Sequence[Row] = ()) -> list[dict[str, str]]:
    asked = [message for shot in shots for message in (*_asked(shot), _said(shot))]
    messages = [*asked, *_asked(row)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _asked(row: Row) -> list[dict[str, str]]:
    return list(row.messages) or [{"role": "user", "content": row.prompt or ""}]


def _said(row: Row) -> dict[str, str]:
    return {"role": "assistant", "content": row.completion or ""}


def _plain_prompt(row: Row, system: str | None, shots: Sequence[Row] = ()) -> str:
    if any(one.prompt is None for one in (row, *shots)):
        _refuse_messages("a prompt given as messages")
    solved = [f"{shot.prompt}{shot.separator}{shot.completion}" for shot in shots]
    return SHOT_GAP.join([*([] if system is None else [system]), *solved, row.prompt or ""])


def _require_template(tokenizer: Any, chat_template: ChatTemplate, what: str) -> None:
    if resolve(tokenizer, chat_template) == "plain":
        _refuse_messages(what)


def _refuse_messages(what: str) -> NoReturn:
    raise PromptError(
        f"{what} needs a chat template, and none is used here: set tokenizer.chat_template and "
        "chat_template: auto, or give rows whose prompt and completion are plain strings"
    )


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], *, generation: bool) -> str:
    with _in_words(messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)


@contextmanager
def _in_words(messages: Sequence[dict[str, str]]) -> Iterator[None]:
    """What a template raises (some take no system message, or want user and assistant in turns) as PromptError."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise PromptError(
            f"the chat template refuses a conversation of {roles}: {error}. Leave out the message that it does not "
            "take (`system`, shots), or give the tokenizer another template"
        ) from error


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: transformers warns of lengths beyond model_max_length; the scorer counts those.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _all_ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise PromptError("the tokenizer has no eos token, so an answer has no end: set tokenizer.eos_token")
    return tokenizer.eos_token_id
