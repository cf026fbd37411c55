"""How much of an answer or a text is held word for word, and how it compares with its rivals.

What is not defined for an item (an empty answer, no rival) is excluded and counted. `probability`, the truth ratios
and `normalised_probability` follow TOFU (Maini et al. 2024): tokens with the end token, means per token.
"""

from __future__ import annotations

from collections.abc import Callable

from eval_harness.items import Answer, Ask, Item, Measured
from eval_harness.measures.base import COMPLETION, TEXT, Measure, mean_of, window
from eval_harness.metrics import forgetting, membership
from eval_harness.results import Result

UNDEFINED = "undefined_for_this_item"


def probability(measured: Measured) -> Result:
    """Mean over rows of the answer's probability to the power 1 / tokens."""
    return _mean(measured, ("answer",), "probability@1(per_token,with_end", lambda i: _likely(i.own))


def normalised_probability(measured: Measured) -> Result:
    """Mean over rows of p(answer) / (p(answer) + sum of p(perturbed)), each to the power 1 / tokens."""

    def value(item: Item) -> float | None:
        wrong = [one.log_probs for one in item.answers("perturbed")]
        return forgetting.choice_probability(item.own.log_probs, wrong)

    return _mean(measured, ("answer", "perturbed"), "normalised_probability@1(per_token,with_end", value)


def exact_memorisation(measured: Measured) -> Result:
    """Mean over rows of the share of the text's tokens that are the arg max under the true tokens before them."""
    return _held(measured, "exact_memorisation@1(no_end", forgetting.exact_memorisation)


def extraction_strength(measured: Measured) -> Result:
    """Mean over rows of the longest share of the text's end that greedy decoding completes; 0 where it never does."""
    return _held(measured, "extraction_strength@1(no_end", forgetting.extraction_strength)


def loss_score(measured: Measured) -> Result:
    """Mean negative log-probability per token: the LOSS membership score (Yeom et al. 2018); lower for members."""
    return _attack(measured, "loss_score@1(nats_per_token", lambda one, text: membership.loss(one.log_probs))


def zlib_score(measured: Measured) -> Result:
    """Loss over the bytes of the compressed text (Carlini et al. 2021); lower for members."""
    return _attack(measured, "zlib_score@1(nats_per_token", lambda one, text: membership.zlib(one.log_probs, text))


def min_k(measured: Measured) -> Result:
    """Min-K% (Shi et al. 2024), k = 0.4: minus the mean of the lowest log-probabilities; lower for members."""
    return _attack(measured, "min_k@1(k=0.4", lambda one, text: membership.min_k(one.log_probs))


def min_k_plus_plus(measured: Measured) -> Result:
    """Min-K%++ (Zhang et al. 2024), k = 0.4: of the log-probabilities standardised by the distribution's own mean and
    variance at their position; lower for members."""

    def value(one: Answer, text: str) -> float | None:
        return membership.min_k_plus_plus(one.log_probs, one.means or [], one.variances or [])

    return _attack(measured, "min_k_plus_plus@1(k=0.4", value)


def _truth_ratio(form: str, aggregate: str) -> Callable[[Measured], Result]:
    """TOFU's truth ratio R = p(perturbed) / p(paraphrase), per token; without a paraphrase of the plain answer."""
    ratio = {"geometric": forgetting.truth_ratio_geometric, "arithmetic": forgetting.truth_ratio_arithmetic}[form]
    aggregates: dict[str, Callable[[float], float]] = {
        "": lambda r: r,
        "_closeness": forgetting.closeness,
        "_true_better": forgetting.true_better,
    }
    of = aggregates[aggregate]

    def value(item: Item) -> float | None:
        right = item.answers("paraphrase")[0] if item.row.paraphrase else item.own
        found = ratio(right.log_probs, [one.log_probs for one in item.answers("perturbed")])
        return None if found is None else of(found)

    def measure(measured: Measured) -> Result:
        name = f"truth_ratio_{form}{aggregate}@1(with_end"
        asks: tuple[Ask, ...] = ("answer", "paraphrase", "perturbed")
        return _mean(measured, asks, name, value, higher_is_better=aggregate == "_true_better")

    return measure


def _likely(answer: Answer) -> float | None:
    return forgetting.probability(answer.log_probs)


def _mean(
    measured: Measured,
    asks: tuple[Ask, ...],
    definition: str,
    value: Callable[[Item], float | None],
    higher_is_better: bool = True,
) -> Result:
    def defined(item: Item) -> float | str:
        found = value(item)
        return UNDEFINED if found is None else found

    return mean_of(measured, asks, defined, f"{definition},{measured.prompting})", higher_is_better=higher_is_better)


def _held(measured: Measured, definition: str, value: Callable[[list[bool]], float | None]) -> Result:
    ask = _ask(measured)
    return _mean(measured, (ask,), _windowed(measured, definition), lambda item: value(_joined(item, ask).hits))


def _attack(measured: Measured, definition: str, value: Callable[[Answer, str], float | None]) -> Result:
    ask = _ask(measured)

    def score(item: Item) -> float | None:
        return value(_joined(item, ask), item.row.text or item.row.completion or "")

    return _mean(measured, (ask,), _windowed(measured, definition), score, higher_is_better=False)


def _ask(measured: Measured) -> Ask:
    return "text" if measured.items and measured.items[0].row.kind == "text" else "answer"


def _windowed(measured: Measured, definition: str) -> str:
    """A long text is read in windows, so that their size decides what each token is predicted from."""
    return f"{definition},window={window(measured)}" if _ask(measured) == "text" else definition


def _joined(item: Item, ask: Ask) -> Answer:
    """The tokens of the answer's text, or of all windows of a text."""
    parts = item.answers("text") if ask == "text" else [item.own]
    return Answer(
        [one for part in parts for one in part.log_probs[part.of_text]],
        [one for part in parts for one in part.hits[part.of_text]],
        means=[one for part in parts for one in (part.means or [])[part.of_text]],
        variances=[one for part in parts for one in (part.variances or [])[part.of_text]],
    )


_HELD = {"exact_memorisation": exact_memorisation, "extraction_strength": extraction_strength}
_ATTACKS = {"loss_score": loss_score, "zlib_score": zlib_score, "min_k": min_k}

MEASURES = {
    "probability": Measure(probability, ("answer",), COMPLETION),
    "normalised_probability": Measure(
        normalised_probability, ("answer", "perturbed"), COMPLETION, needs=("perturbed",)
    ),
    **{
        f"truth_ratio_{form}{aggregate}": Measure(
            _truth_ratio(form, aggregate),
            ("answer", "paraphrase", "perturbed"),
            COMPLETION,
            needs=("perturbed",),
            higher_is_better=aggregate == "_true_better",
        )
        for form in ("geometric", "arithmetic")
        for aggregate in ("", "_closeness", "_true_better")
    },
    **{name: Measure(function, ("answer",), COMPLETION | TEXT) for name, function in _HELD.items()},
    **{
        name: Measure(function, ("answer",), COMPLETION | TEXT, higher_is_better=False)
        for name, function in _ATTACKS.items()
    },
    "min_k_plus_plus": Measure(
        min_k_plus_plus, ("answer",), COMPLETION | TEXT, higher_is_better=False, statistics=True
    ),
}
