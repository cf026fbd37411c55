"""The row's own answer under the model: written greedily, how likely, one word (cloze)."""

from __future__ import annotations

import math

from eval_harness.items import Ask, Measured
from eval_harness.measures.base import ANSWERED, COMPLETION, Measure, best_of, mean_of
from eval_harness.results import Result


def exact_match(measured: Measured) -> Result:
    """Share of rows whose answer tokens and first end token are all what the model writes greedily.

    In one pass: greedy decoding writes an answer if and only if each of its tokens is the arg max given those
    before it. A set's `exact_match: generate` decodes instead; a test holds the two equal. Of a row's right answers
    any counts.
    """
    if measured.eval_set.exact_match == "generate":
        settings = f"generate{best_of(measured)},{measured.generation},{measured.prompting}"
        return mean_of(
            measured,
            ("generation",),
            lambda item: float(item.records["generation"].exact or False),
            f"exact_match@1({settings})",
        )
    definition = f"exact_match@1(one_pass{best_of(measured)},{measured.prompting})"
    return mean_of(measured, with_references(measured, "answer"), lambda item: float(item.is_exact), definition)


def with_references(measured: Measured, ask: Ask) -> tuple[Ask, ...]:
    """An ask, and that about further right answers where any row has some."""
    return (ask, "references") if measured.has_references else (ask,)


def answer_loss(measured: Measured) -> Result:
    """Nats per answer token (end tokens included) of each row, averaged over rows."""
    return mean_of(
        measured,
        ("answer",),
        lambda item: -item.own.log_prob / len(item.own.log_probs),
        f"answer_loss@1(nats_per_token,with_end,{measured.prompting})",
        higher_is_better=False,
    )


def cloze_accuracy(measured: Measured) -> Result:
    """Share of rows whose answer text is all arg max; the end is not asked for (LAMBADA, Paperno et al. 2016)."""
    return mean_of(
        measured,
        ("answer",),
        lambda item: float(all(item.own.hits[item.own.of_text])),
        f"cloze_accuracy@1(no_end,{measured.prompting})",
    )


def cloze_perplexity(measured: Measured) -> Result:
    """exp of the mean over rows of minus the answer text's summed log-probability: perplexity per answer, LAMBADA's.

    Per item that sum, in nats; the standard error is the delta method's, value times that of the mean.
    """
    definition = f"cloze_perplexity@1(per_answer,no_end,{measured.prompting})"
    found = mean_of(measured, ("answer",), lambda item: -item.own.text_log_prob, definition, higher_is_better=False)
    if found.value is not None:
        found.value = math.exp(found.value) if found.value < 700 else math.inf
        found.stderr = None if found.stderr is None else found.stderr * found.value
    return found


MEASURES = {
    "exact_match": Measure(exact_match, ("answer", "references"), ANSWERED),
    "answer_loss": Measure(answer_loss, ("answer",), ANSWERED, higher_is_better=False),
    "cloze_accuracy": Measure(cloze_accuracy, ("answer",), COMPLETION),
    "cloze_perplexity": Measure(cloze_perplexity, ("answer",), COMPLETION, higher_is_better=False),
}
