"""Free text against references: strictly, leniently, by overlap; and what is cut off an answer before that.

A score that is not defined is None and never 0: of a reference of which the normalisation leaves nothing, say. Several
references are alternatives, the best counts; those that are not defined are left out of them.

The normalisation is SQuAD's and knows English: articles are "a", "an" and "the", punctuation is ASCII's. Other
languages keep their articles, their quotation marks and their full stops, and tokens are what white space separates,
so that a sentence of Chinese or Thai is one token. For those take `contains_answer`, which looks for the reference
anywhere where words are written without spaces.

Sources: Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822): normalisation, exact match, F1, the
empty answer; Liang et al. 2022 (arXiv 2211.09110): the name quasi-exact match; Lin 2004: ROUGE-L.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

MATCH_SECONDS = 1.0  # looked at now and then: a search over 10 MB has taken 3.6 s to notice

_TAG = "(?:think|thinking|thought|reasoning)>"
_UNTAGGED = rf"(?:[^<]++|<(?!/?{_TAG}))*+"
REASONING = (
    rf"(?i)\A(?:{_UNTAGGED}</{_TAG})++"  # opened by the template, in the prompt
    rf"|<{_TAG}(?:[^<]++|<(?!/{_TAG}))*+(?:\Z|</{_TAG}(?:{_UNTAGGED}</{_TAG})*+)"
    r"|</?answer>"
)
"""What `strip_reasoning` cuts out by default: blocks of <think>, <thinking>, <thought>, <reasoning>, and the tags of
<answer>. A block goes on to the last closing tag before the next opening one, or to the end where it is not closed;
everything up to a closing tag that nothing opened is reasoning, as chat templates put the opening one into the prompt.
Linear in the text."""

ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts that write no space between words.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


class Rouge(NamedTuple):
    """ROUGE-L of one pair, each from 0 to 1: LCS over the prediction's tokens, over the reference's, their F1."""

    precision: float
    recall: float
    fmeasure: float


# ---- what is cut off --------------------------------------------------------------------------------


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings; all of it where none occurs.

    Raises ValueError for an empty stop string, which would stop before anything is written.
    """
    if "" in stops:
        raise ValueError(f"stops = {list(stops)!r}: must not be empty strings; leave the empty one out")
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def strip_reasoning(text: str, pattern: str = REASONING) -> str:
    """The text without every match of `pattern` (syntax of the `regex` module), no white space around it.

    With the default, "<think>a</think><answer>B</answer>" and "B" are one answer, and an answer that is still
    reasoning where it ends is empty. Tags that a tokenizer holds as special tokens must be decoded to be seen.

    Raises TimeoutError where the pattern is not decided within about a second, regex.error for no pattern.
    """
    return _in_time("sub", pattern, "", text).strip()


# ---- strict, lenient, overlap -----------------------------------------------------------------------


def squad_normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words one space apart (SQuAD).

    Differs from SQuAD in one place: a text of nothing but articles keeps them, so that the choice "A" is an answer.
    """
    words = text.lower().translate(_PUNCTUATION).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def quasi_exact_match(prediction: str, references: Sequence[str]) -> float | None:
    """1.0 where prediction and a reference are equal once normalised, else 0.0.

    The reference "" is SQuAD 2.0's "no answer": right is a prediction of which nothing is left. None where nothing is
    left of any reference that had some text. Raises ValueError without references.
    """
    given = squad_normalise(prediction)
    return _best(references, lambda reference: float(given == reference))


def contains_answer(prediction: str, references: Sequence[str]) -> float | None:
    """1.0 where a normalised reference stands in the normalised prediction as whole words, else 0.0.

    Lenient: "yes" stands in "yes and no". Between letters of scripts without spaces any place is whole words.
    The reference "", None and ValueError as in `quasi_exact_match`.
    """
    given = squad_normalise(prediction)
    return _best(references, lambda reference: float(_holds(given, reference) if reference else not given))


def f1(prediction: str, references: Sequence[str]) -> float | None:
    """F1 of the normalised tokens as bags, from 0 to 1 (SQuAD).

    Where prediction or reference is empty ("no answer"), 1.0 if both are, else 0.0. None and ValueError as in
    `quasi_exact_match`.
    """
    given = squad_normalise(prediction).split()
    return _best(references, lambda reference: _token_f1(given, reference.split()))


def _best(references: Sequence[str], score: Callable[[str], float]) -> float | None:
    """The best score over normalised references, without those that normalisation emptied."""
    if isinstance(references, str) or not references:
        raise ValueError(f"references = {references!r}: must be a list of at least one string")
    normalised = [(squad_normalise(reference), reference) for reference in references]
    return max((score(short) for short, reference in normalised if short or not reference.strip()), default=None)


def _holds(text: str, words: str) -> bool:
    return next(_places(text, words), None) is not None


def _places(text: str, words: str) -> Iterator[int]:
    """Where the words start in the text, as whole words."""
    at = text.find(words)
    while at >= 0:
        after = at + len(words)
        if not (_joined(text[at - 1 : at], words[0]) or _joined(words[-1], text[after : after + 1])):
            yield at
        at = text.find(words, at + 1)


def _joined(left: str, right: str) -> bool:
    """Whether two characters side by side belong to one word, as far as scripts with spaces tell."""
    import regex

    return regex.fullmatch(rf"(?V1)[\w--[{_UNSPACED}]]{{2}}", left + right) is not None


def _token_f1(given: list[str], reference: list[str]) -> float:
    if not given or not reference:
        return float(given == reference)
    shared = (Counter(given) & Counter(reference)).total()
    return 2 * shared / (len(given) + len(reference))


def rouge_l(prediction: str, reference: str, *, stemmer: bool) -> Rouge | None:
    """ROUGE-L by the rouge-score package, whose tokens are runs of a-z and 0-9 in lower case.

    `stemmer` (Porter's, words of more than three letters) has no default, as published figures differ in it: TOFU
    measures recall with it, MUSE F1 without. A prediction without tokens scores 0. None where the reference has no
    tokens: other scripts leave none, and accented letters split words, see `rouge_coverage`. Costs the product of
    both lengths: 1.3 ms for 100 tokens each.
    """
    scorer = _rouge_scorer(stemmer)
    if not _rouge_tokens(reference):
        return None
    return Rouge(*map(float, scorer.score(reference, prediction)["rougeL"]))


def rouge_coverage(text: str) -> float | None:
    """Share of the letters and digits of a text that ROUGE's tokenizer keeps; None where it has none.

    1.0 for English, 0.0 for Chinese: what `rouge_l` says of a text in between is said of this share of it.
    """
    characters = [one for one in text if one.isalnum()]
    return sum(map(len, _rouge_tokens(text))) / len(characters) if characters else None


def _rouge_tokens(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


@cache
def _rouge_scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stemmer)


# ---- which choice a free answer names ---------------------------------------------------------------

LETTERS = string.ascii_uppercase
_ENDS = r"(?:[)\].,:;!]|\*\*|\s*\Z|\s*\n)"
_LETTER = rf"[(\[]?\*{{0,2}}(?P<letter>[A-Za-z])\*{{0,2}}{_ENDS}"
# From the plainest announcement to the weakest: the first form that occurs decides.
_FORMS = (
    r"\\boxed\{(?:\\text\{)?[(\[]?(?P<letter>[A-Za-z])[)\].]?\}",
    rf"(?i:answer)(?:\s+is)?\s*:?\s*\*{{0,2}}{_LETTER}",
    rf"\A\s*{_LETTER}",
    r"(?<![\w\\])[(\[](?P<letter>[A-Za-z])[)\]]",
    r"(?m)^\s*\*{0,2}(?P<letter>[A-Za-z])[).:]",
)


def named_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a free answer names, by letter or by text; None where it names none or several.

    The first of these forms that occurs decides: a letter in "\\boxed{B}"; one announced by "the answer is B" or
    "Answer: (B)"; one at the start, "B", "B." or "(B) ..."; one in brackets; one at the start of a line, "B) ..."; the
    normalised text of a choice as whole words. Where it names two choices the answer is ambiguous, and no weaker form
    is asked. Letters may be small; one beyond the choices is none, nor are the words "a" and "I". Of choices that
    hold one another the longest counts at its place: "New York City" does not name "New York".

    Raises ValueError for fewer than two choices and for more than the alphabet has letters.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices = {len(choices)} strings: must be 2 to {len(LETTERS)}, one letter each")
    for form in _FORMS:
        if found := set(_letters(form, answer, len(choices))):
            return found.pop() if len(found) == 1 else None
    named = set(_named_by_text(squad_normalise(answer), [squad_normalise(choice) for choice in choices]))
    return named.pop() if len(named) == 1 else None


def _letters(form: str, answer: str, count: int) -> Iterator[int]:
    import regex

    for match in regex.finditer(form, answer):
        if (index := LETTERS.index(match["letter"].upper())) < count:
            yield index


def _named_by_text(answer: str, choices: list[str]) -> Iterator[int]:
    """Every choice whose text occurs where no longer one covers it; of equal texts every one."""
    for text in sorted({choice for choice in choices if choice}, key=len, reverse=True):
        if found := list(_places(answer, text)):
            yield from (index for index, choice in enumerate(choices) if choice == text)
        for start in found:
            answer = answer[:start] + "\0" * len(text) + answer[start + len(text) :]


# ---- patterns of users ------------------------------------------------------------------------------


def find(pattern: str, text: str, whole: bool = False) -> Any:
    """The first match of a pattern in a text, or of all of it where `whole`; None where there is none.

    The syntax is the `regex` module's, which extends `re`'s and can be told to give up: a pattern with a repetition
    inside a repetition takes exponential time on some texts. Raises TimeoutError after about MATCH_SECONDS, so that
    a slow pattern is seen rather than a quiet "no", and regex.error for no pattern.
    """
    return _in_time("fullmatch" if whole else "search", pattern, text)


def _in_time(method: str, pattern: str, *texts: str) -> Any:
    import regex

    try:
        return getattr(regex.compile(pattern), method)(*texts, timeout=MATCH_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(
            f"the pattern {pattern!r} was undecided after {MATCH_SECONDS:g} s on {len(texts[-1]):,} characters: "
            "give it no repetition inside a repetition, as (a+)+ has"
        ) from error
