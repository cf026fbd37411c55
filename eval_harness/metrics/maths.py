r"""Mathematical results: strictly, in the form that was asked for; leniently, wherever and however they are written.

A result is announced as `\boxed{...}`, after "####" (GSM8K), or by "the answer is" (chain-of-thought prompts), in this
order of precedence; of several of one form the last counts. A reference is a bare result or a solution that announces
it. The difference of both scores is format drift: solved, and no longer said as asked.

math_strict compares notation, math_lenient values: by math-verify (Kydlíček 2025, Apache-2.0; SymPy underneath), with
the last number where that finds nothing. SymPy can be made to compute for years (9^{9^{9^9}}, which a policy finds),
and math-verify's own limits are signals, which work in a main thread only and between two bytecodes only. So it runs
in a process of its own that the kernel ends after CPU_SECONDS of an item; it starts with the first item that needs it,
about a second, and is shared by the threads of a process.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import cache, lru_cache
from typing import Any

CPU_SECONDS = 3.0  # for one item: parsing both sides and comparing them
WALL_SECONDS = 60.0  # the same where the machine is too busy to give it that
MEMORY_BYTES = 4 << 30
RESULT_CHARACTERS = 1_000  # a longer announcement is none
TAIL_CHARACTERS = 2_000  # of a text that announces nothing, its end is looked at

logger = logging.getLogger(__name__)

# ---- numbers ----------------------------------------------------------------------------------------

# Linear on any text: what repeats is possessive, and a group of thousands decides by itself whether it is one.
# A sign after a digit, a letter or a closing bracket is an operator or a hyphen: 10-3 holds 10 and 3.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z.)\]])[-+−])?[$€£]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?:[eE][-+]?[0-9]++)?"
)
# Rounds differences, never operands; an exponent beyond the limits becomes NaN or infinity instead of an error.
EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
NEAR = Decimal("1e-6")  # of the last number, where it decides


def numbers(text: str) -> Iterator[str]:
    """The numbers of a text as they are written, in order: 1,234.5, -7, .5, 2e-3, $12. Words are none."""
    return (found[0] for found in NUMBER.finditer(text))


def decimal(written: str) -> Decimal | None:
    """The value of one of `numbers`, to its last digit; None where its exponent is beyond 10**18."""
    number = Decimal(re.sub("[,$€£]", "", written).replace("−", "-"), EXACT)
    return number if number.is_finite() else None


def difference(one: Decimal, other: Decimal) -> Decimal:
    """|one - other|, rounded to 50 digits."""
    return EXACT.subtract(one, other).copy_abs()


def _only_number(text: str) -> Decimal | None:
    """The value where the whole text is one number."""
    return decimal(text) if NUMBER.fullmatch(text) else None


def _last_number(text: str) -> Decimal | None:
    last = _last(NUMBER, text)
    return None if last is None else decimal(last[0])


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


# ---- what is announced ------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no bracket
_ANSWER_IS = re.compile(r"(?i)\banswer\s+is\b[ \t]*:?[ \t]*")
_END_OF_SENTENCE = re.compile(r"\.?\s*(?:\n|\Z)|[.!?]\s+(?=[A-Z])")


def announced(text: str) -> str | None:
    r"""The result that a text announces, without the announcement; None where it announces none.

    `\boxed{...}` (or \fbox) with its braces in balance, else what follows the last "####" on its line, else what
    follows the last "answer is" in its sentence. Longer than RESULT_CHARACTERS is no result.
    """
    found = next((one for one in (_boxed(text), _marked(text), _said(text)) if one), None)
    return found if found is not None and len(found) <= RESULT_CHARACTERS else None


def _boxed(text: str) -> str | None:
    opening = _last(_BOX, text)
    if opening is None:
        return None
    depth = 1
    for brace in _BRACES.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[opening.end() : brace.start()].strip()
    return None


def _marked(text: str) -> str | None:
    _, marker, after = text.rpartition("####")
    return after.lstrip(" \t").partition("\n")[0].strip() if marker else None


def _said(text: str) -> str | None:
    opening = _last(_ANSWER_IS, text)
    if opening is None:
        return None
    rest = text[opening.end() : opening.end() + 2 * RESULT_CHARACTERS]
    end = _END_OF_SENTENCE.search(rest)
    return (rest[: end.start()] if end else rest).strip().strip("*")  # bold


def _reference(reference: str) -> str | None:
    """The result of a reference, which announces it or is it; None where there is none."""
    if "####" in reference or _BOX.search(reference):
        return announced(reference)
    return announced(reference) or reference.strip()[:RESULT_CHARACTERS] or None


# ---- strict -----------------------------------------------------------------------------------------


def math_strict(prediction: str, reference: str) -> float | None:
    r"""1.0 where the prediction announces the reference's result in the reference's notation, else 0.0.

    Notation is compared without what typesetting alone asks for: $ signs, spaces, \left and \right, \dfrac for
    \frac, \frac12, \text, degrees, a final full stop. Plain numbers are compared as such: 5.0 is 5, 1,234 is 1234,
    and 0.5 is not \frac{1}{2}. None where the reference is blank or what it announces is.
    """
    expected, given = _reference(reference), announced(prediction)
    if expected is None:
        return None
    return float(given is not None and _same_notation(given, expected))


def _same_notation(given: str, expected: str) -> bool:
    given, expected = _notation(given), _notation(expected)
    if given == expected:
        return True
    one, other = _only_number(given), _only_number(expected)
    return one is not None and one == other


_TYPESETTING = (
    (r"(\\\\)|\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])|\\[,;:!$ ]|[\s$~]|\{,\}", r"\1"),  # a new row stays
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\^(?:\\circ|\{\\circ\})|°", ""),
    (r"\\%", "%"),
    (r"−", "-"),
    (r"\.\Z", ""),
)


def _notation(text: str) -> str:
    for pattern, replacement in _TYPESETTING:
        text = re.sub(pattern, replacement, text)
    return text


# ---- lenient ----------------------------------------------------------------------------------------


def math_lenient(prediction: str, reference: str) -> float | None:
    r"""1.0 where the prediction's result equals the reference's in value, else 0.0; never below `math_strict`.

    The prediction's result is what it announces, else what all of it says where it is a formula alone, else what
    math-verify finds in its last TAIL_CHARACTERS, or the last number there. Floats are compared to six places, so
    that 0.333333 is 1/3; units and dollars are ignored, 50\% is 1/2 and 50.

    None where the reference holds nothing that can be read. An item that is not decided within CPU_SECONDS is 0.0,
    or None where its reference alone takes that long, and is logged as a warning. Raises ImportError without
    math-verify, and no error for any text.
    """
    expected = _reference(reference)
    if expected is None:
        return None
    alone = prediction.strip()
    if math_strict(prediction, reference) or (len(alone) <= RESULT_CHARACTERS and _same_notation(alone, expected)):
        return 1.0
    return _decided(expected, *_candidates(prediction))


@lru_cache(maxsize=4096)  # a set's lenient and drift measures ask alike
def _decided(expected: str, *candidates: str) -> float | None:
    verdict = _process().ask(_boxed_again(expected), *candidates)
    if verdict in (UNREADABLE, NOTHING_FOUND):
        reference = _last_number(expected)
        given = next((number for one in candidates if (number := _last_number(one)) is not None), None)
        if reference is None:
            return None if verdict == UNREADABLE else 0.0
        return float(given is not None and difference(given, reference) <= NEAR)
    return None if verdict is None else float(verdict == EQUAL)


_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2}")


def _candidates(prediction: str) -> list[str]:
    """Texts that may hold the result, the surest first: the first of which something can be read decides."""
    marked = _boxed(prediction) or _marked(prediction)
    result, tail = marked or _said(prediction) or prediction.strip(), prediction[-TAIL_CHARACTERS:]
    if not result or len(result) > RESULT_CHARACTERS:
        return [tail]
    is_sentence = not marked and ("\n" in result or _WORD.search(_COMMAND.sub("", result)))
    return [result if is_sentence else _boxed_again(result), tail]


def _boxed_again(result: str) -> str:
    r"""A result as math-verify reads it surely; words in \text, or they would be products of their letters."""
    result = result.strip().rstrip(".").strip("$") or result
    words = re.fullmatch(r"[^\W\d_]{3,}(?:\s[^\W\d_]+)*", result)
    return rf"\boxed{{\text{{{result}}}}}" if words else rf"\boxed{{{result}}}"


# ---- the process of math-verify ---------------------------------------------------------------------

EQUAL, UNEQUAL, NOTHING_FOUND, UNREADABLE = "equal", "unequal", "nothing found", "reference unreadable"


class Verifier:
    """A process that answers one item after the other, and is started anew when one has ended it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, reference: str, *candidates: str) -> str | None:
        """EQUAL, UNEQUAL, NOTHING_FOUND (in the candidates) or UNREADABLE; None where the reference takes too long."""
        with self._lock:
            verdict = self._answer([reference, *candidates])
            if verdict is None:
                logger.warning("not decided within %g s: %.80r against %.80r", CPU_SECONDS, candidates, reference)
                verdict = UNEQUAL if self._answer([reference]) else None
            return verdict

    def close(self) -> None:
        """End the process, where this one started it."""
        if self._process is not None and self.pid == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _answer(self, texts: list[str]) -> str | None:
        """What the process says; None where it ended instead."""
        process = self._running()
        return self._within(process, json.dumps(texts))

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            # Without the folder of this file on its path, whose `statistics` is not the standard library's; in a
            # session of its own, so that a signal to the parent's group is not taken for a verdict.
            command = [sys.executable, "-P", __file__, str(CPU_SECONDS), str(MEMORY_BYTES)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8", start_new_session=True)
            hello = self._within(self._process)
            if hello != "ready":
                self.close()
                raise ImportError(f"math-verify does not load ({hello}): install it with pip install math-verify")
        return self._process

    def _within(self, process: subprocess.Popen[str], question: str | None = None) -> str | None:
        """One line of answer; None where the process ended or had to be."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            if question is not None:
                process.stdin.write(f"{question}\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # a stop: the answer under way must not be taken for the next one
            self.close()
            raise
        finally:
            timer.cancel()
        if line:
            return str(json.loads(line))
        self.close()
        return None


@cache
def _verifier(pid: int) -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def _process() -> Verifier:
    return _verifier(os.getpid())  # a fork must not share its parent's pipes


def _serve(cpu_seconds: float, memory_bytes: int) -> None:
    """The other side: a line of JSON in, [reference, candidate, ...]; a line out."""
    import resource

    say = sys.stdout
    sys.stdout = sys.stderr  # where libraries print
    try:
        from math_verify import parse, verify
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=say, flush=True)
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes if most == resource.RLIM_INFINITY else most, most))

    def verdict(reference: str, *candidates: str) -> str:
        expected = parse(reference, parsing_timeout=None)
        if not expected:
            return UNREADABLE
        given: list[Any] = next((found for one in candidates if (found := parse(one, parsing_timeout=None))), [])
        if not given:
            return NOTHING_FOUND
        return EQUAL if verify(expected, given, timeout_seconds=None) else UNEQUAL

    print(json.dumps("ready"), file=say, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal ends the process, within one bytecode too
        try:
            said = verdict(*json.loads(line))
        except Exception:  # math-verify catches what it knows; nothing it meets may end the rest
            said = UNEQUAL
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(said), file=say, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
