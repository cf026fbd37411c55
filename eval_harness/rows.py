"""One form for every row: what the model is asked, what it should answer, by which id it is known.

A raw row (a JSON object, a line of CSV, a record of a hub data set) is recognised by its fields:

    {instruction, input?, answer | output | response, choices?}   instruction tuning
    {question, choices, answer_index}                             multiple choice
    {question, answer, choices?}                                  question and answer
    {prompt, completion, choices?}                                TRL: two strings, or two lists of messages
    {messages}                                                    a conversation
    {text}                                                        plain text

A question's row may bring `paraphrased_answer` and `perturbed_answer` (or `perturbed_answers`): the right answer in
other words and a list of wrong ones of its form, as TOFU's sets do. Any row with one answer may bring `references`, or
`answers` as a list: further right answers. Measures that compare with a reference take the best.

Nothing is added to what a row says: no "Question:", no "Answer:". Without a chat template a space
stands between the question and its answer; TRL's two strings are joined literally, as TRL does.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ANSWER_NAMES = ("answer", "output", "response")
FIELDS = (
    *("instruction", "input", "question", *ANSWER_NAMES, "choices", "answer_index"),
    *("prompt", "completion", "messages", "text", "paraphrased_answer", "perturbed_answer", "perturbed_answers"),
    *("references", "answers"),
)
FORMS = (
    "{instruction, input?, answer|output|response, choices?}, {question, choices, answer_index}, "
    "{question, answer, choices?}, {prompt, completion, choices?}, {messages}, {text}"
)

Message = dict[str, str]


class RowError(ValueError):
    """A row that cannot be used; says which fields it has and what is missing."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row in canonical form.

    kind         "completion": a prompt and its answer; "chat": a whole conversation; "text": plain text
    prompt       the prompt of a completion row given as a string, else None
    messages     chat: the whole conversation; completion in conversational form: the prompt's messages
    completion   the answer of a completion row
    text         the text of a text row
    choices      the possible answers, the right one among them; empty where the answer is free
    separator    what stands between prompt and completion where no chat template is used
    paraphrase   the answer in other words
    perturbed    wrong answers of the same form
    references   further right answers
    id           first 16 hex digits of the SHA-256 of everything above but the separator
    """

    kind: Literal["completion", "chat", "text"]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    completion: str | None = None
    text: str | None = None
    choices: tuple[str, ...] = ()
    separator: str = ""
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            content: list[Any] = [self.kind, self.prompt, self.messages, self.completion, self.text, self.choices]
            content += [self.paraphrase, self.perturbed] if self.paraphrase or self.perturbed else []
            content += [self.references] if self.references else []
            object.__setattr__(self, "id", _sha256(json.dumps(content, sort_keys=True))[:16])


def canonical(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Row:
    """Recognise a raw row by its fields.

    Args:
        raw: the row; fields that no form knows are ignored.
        fields: canonical field -> this row's own field, e.g. {"prompt": "q", "completion": "a"}.
            An explicit mapping wins over a field of the same name.

    Raises:
        RowError: no form fits, the answer is missing, empty or not among the choices, answer_index is
            out of range, or a field named in `fields` is absent.
    """
    row = _renamed(raw, fields or {})
    if "messages" in row:
        return _conversation(row)
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row)
    if "instruction" in row:
        return _instruction(row)
    if "question" in row:
        return _question(row)
    if "text" in row:
        return Row("text", text=_string(row, "text"))
    if "prompt" in row:
        raise RowError(
            f"row without an answer: it has a prompt and no `completion` ({_found(row)}). "
            f"{_use_fields('{completion: answer}')}"
        )
    raise RowError(f"no known form: {_found(row)}. Known: {FORMS}. {_use_fields()}")


def normalise(text: str) -> str:
    """NFKC, case folded, every run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_key(row: Row) -> str:
    """SHA-256 of the normalised content: the key by which a test row is found in training rows.

    A question and its answer have the same key as two strings, as two lists of messages, and as a
    conversation of two turns. Choices do not enter.
    """
    if row.kind == "text":
        return _sha256(normalise(row.text or ""))
    asked = [row.prompt] if row.prompt is not None else [message["content"] for message in row.messages]
    answered = [] if row.completion is None else [row.completion]
    return _sha256("\n".join(normalise(part) for part in [*asked, *answered]))


def _conversation(row: Mapping[str, Any]) -> Row:
    messages = _messages(row, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("row without an answer: `messages` has no message of role 'assistant'")
    return Row("chat", messages=messages)


def _prompt_completion(row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and not _is_list(completion):
        answer = _string(row, "completion", "answer")
        choices = _among(row, answer)
        return Row(
            "completion",
            prompt=_string(row, "prompt"),
            completion=answer,
            choices=choices,
            references=_references(row, answer, choices),
        )
    if not (_is_list(prompt) and _is_list(completion)):
        raise RowError(
            f"`prompt` is {type(prompt).__name__} and `completion` is {type(completion).__name__}: "
            "both must be strings, or both lists of {role, content}"
        )
    answer_messages = _messages(row, "completion")
    if [message["role"] for message in answer_messages] != ["assistant"]:
        raise RowError("`completion` must be one message of role 'assistant'; for more turns use {messages}")
    answer = answer_messages[0]["content"]
    if not answer.strip():
        raise RowError("row with an empty answer: `completion` has no text")
    choices = _among(row, answer)
    return Row(
        "completion",
        messages=_messages(row, "prompt"),
        completion=answer,
        choices=choices,
        references=_references(row, answer, choices),
    )


def _instruction(row: Mapping[str, Any]) -> Row:
    prompt = _string(row, "instruction")
    if row.get("input") is not None and str(row["input"]).strip():
        prompt = f"{prompt}\n{_string(row, 'input')}"
    return _answered(row, prompt, ANSWER_NAMES)


def _question(row: Mapping[str, Any]) -> Row:
    return _answered(row, _string(row, "question"), ("answer",))


def _answered(row: Mapping[str, Any], prompt: str, names: Sequence[str]) -> Row:
    choices = _choices(row)
    if choices and row.get("answer_index") is not None:
        answer = choices[_index(row["answer_index"], len(choices))]
    else:
        answer = _answer(row, names)
    _among(row, answer)
    return Row(
        "completion",
        prompt=prompt,
        completion=answer,
        choices=choices,
        separator=" ",
        paraphrase=_string(row, "paraphrased_answer") if row.get("paraphrased_answer") is not None else None,
        perturbed=_perturbed(row),
        references=_references(row, answer, choices),
    )


def _among(row: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    """The row's choices. Raises RowError where the answer is none of them."""
    choices = _choices(row)
    if choices and answer not in choices:
        hint = " If it is a position, map it: `fields: {answer_index: answer}`." if answer.isdigit() else ""
        raise RowError(f"answer {answer!r} is not among the choices {list(choices)}.{hint}")
    return choices


def _references(row: Mapping[str, Any], answer: str, choices: Sequence[str] = ()) -> tuple[str, ...]:
    """Each once, without the answer itself. An `answers` that is no list is another field (SQuAD's is a mapping)."""
    listed = [one for one in ("references", "answers") if row.get(one) is not None]
    name = next((one for one in listed if one == "references" or _is_list(row[one])), None)
    if name is None:
        return ()
    given = row[name]
    if not _is_list(given) or not all(_is_scalar(one) and str(one).strip() for one in given):
        raise RowError(f"{name} = {_short(given)}: must be a list of strings that are not empty")
    others = tuple(dict.fromkeys(text for text in map(str, given) if text != answer))
    wrong = next((one for one in others if one in choices), None)
    if wrong is not None:
        raise RowError(f"{name}: {wrong!r} is one of the choices and not the answer {answer!r}: it cannot be right too")
    return others


def _perturbed(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = next((one for one in ("perturbed_answer", "perturbed_answers") if row.get(one) is not None), None)
    if name is None:
        return ()
    if not _is_list(row[name]) or not row[name] or not all(isinstance(one, str) and one.strip() for one in row[name]):
        raise RowError(f"{name} = {_short(row[name])}: must be a list of strings that are not empty")
    return tuple(row[name])


def _answer(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return _string(row, name, "answer")
    raise RowError(f"row without an answer: no {' or '.join(names)} ({_found(row)}). {_use_fields()}")


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    raw = row.get("choices")
    if raw is None:
        return ()
    if not _is_list(raw) or len(raw) < 2 or not all(_is_scalar(choice) for choice in raw):
        raise RowError(f"choices = {_short(raw)}: must be a list of at least two strings")
    choices = tuple(str(choice) for choice in raw)
    if not all(choice.strip() for choice in choices):
        raise RowError(f"choices = {_short(raw)}: an empty choice cannot be scored")
    return choices


def _index(raw: Any, count: int) -> int:
    text = str(raw).strip()
    if isinstance(raw, bool) or not text.isdecimal() or int(text) >= count:
        raise RowError(f"answer_index = {raw!r}: must be a whole number from 0 to {count - 1} ({count} choices)")
    return int(text)


def _messages(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    if not _is_list(row[name]) or not row[name]:
        raise RowError(f"{name} = {_short(row[name])}: must be a non-empty list of {{role, content}}")
    messages = []
    for position, message in enumerate(row[name]):
        known = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not known:
            raise RowError(f"{name}[{position}] = {_short(message)}: must have `role` and `content`, both strings")
        messages.append({"role": message["role"], "content": message["content"]})
    return tuple(messages)


def _string(row: Mapping[str, Any], name: str, meaning: str | None = None) -> str:
    value = row[name]
    if not _is_scalar(value):
        raise RowError(f"{name} = {_short(value)}: must be a string, is {type(value).__name__}")
    if not str(value).strip():
        raise RowError(f"row with an empty {meaning or name}: `{name}` has no text")
    return str(value)


def _renamed(raw: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    for name, own in fields.items():
        if name not in FIELDS:
            raise RowError(f"fields.{name}: not a field of any form. Allowed: {', '.join(FIELDS)}")
        if own not in raw:
            raise RowError(f"fields.{name} = {own!r}: no such field in the row ({_found(raw)})")
    # A field that was mapped no longer counts under its own name: {answer_index: answer} must not
    # leave an `answer` behind.
    rest = {name: value for name, value in raw.items() if name not in fields.values()}
    return {**rest, **{name: raw[own] for name, own in fields.items()}}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _found(row: Mapping[str, Any]) -> str:
    return f"fields found: {', '.join(map(str, row)) or 'none'}"


def _use_fields(example: str = "{question: q, answer: a}") -> str:
    return f"If it is there under another name, map it with `fields:`, e.g. {example}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
