"""What the file of a suite may say of a set: every key, and what is wrong with a value, before any row is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval_harness.generation import Generation
from eval_harness.sources import SourceError, find_task
from eval_harness.suggest import did_you_mean

ORIGINS = ("task", "file", "hub")
WORDS: dict[str, tuple[str, ...]] = {
    "group": ("task", "general"),
    "exact_match": ("one_pass", "generate"),
    "chat_template": ("auto", "none"),
}
TEXTS = (*ORIGINS, "lm_eval", "config", "revision", "split", "system", "fewshot_split", "fewshot_file", "include_path")
COUNTS = {"limit": 1, "num_fewshot": 0, "fewshot_seed": 0}  # key -> the least it may be
KEYS = (
    *(*ORIGINS, "config", "revision", "split", "fields", "limit", "shuffle", "measures", *WORDS, "system"),
    *("strip_reasoning", "num_fewshot", "fewshot_split", "fewshot_file", "fewshot_seed", "generate"),
)
LM_EVAL_KEYS = ("lm_eval", "num_fewshot", "include_path", "limit", "group", "chat_template", "system")
GENERATE: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "stop": (list,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "seed": (int,),
}


def problems(place: str, spec: Any) -> Iterator[str]:
    """Of a set's keys and values, as `place.key = value: what is allowed`."""
    if not isinstance(spec, dict):
        yield f"{place} = {spec!r}: must be a mapping, e.g. {{task: tiny_world/facts, split: test}}"
        return
    yield from _unknown(place, spec, LM_EVAL_KEYS if "lm_eval" in spec else KEYS)
    if "lm_eval" not in spec and sum(key in spec for key in ORIGINS) != 1:
        yield f"{place}: needs exactly one of {', '.join(ORIGINS)}, lm_eval"
    yield from _of_values(place, spec)
    yield from _of_shots(place, spec)
    yield from _of_generate(place, spec.get("generate", {}))
    if isinstance(spec.get("task"), str):
        try:
            find_task(spec["task"])
        except SourceError as error:
            yield f"{place}.{error}"


def _of_values(place: str, spec: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in WORDS.items():
        if key in spec and spec[key] not in allowed:
            yield f"{place}.{key} = {spec[key]!r}: must be one of {', '.join(allowed)}"
    for key in TEXTS:
        if key in spec and not (isinstance(spec[key], str) and spec[key]):
            yield f"{place}.{key} = {spec[key]!r}: must be text that is not empty"
    for key, least in COUNTS.items():
        if key in spec and not (_is(spec[key], (int,)) and spec[key] >= least):
            yield f"{place}.{key} = {spec[key]!r}: must be a whole number of at least {least}"
    if not isinstance(spec.get("shuffle", False), bool):
        yield f"{place}.shuffle = {spec['shuffle']!r}: must be true or false"
    measures = spec.get("measures", ["-"])
    if not isinstance(measures, list) or not measures or not all(isinstance(one, str) for one in measures):
        yield f"{place}.measures = {measures!r}: must be a list of names"
    if not isinstance(spec.get("fields", {}), dict):
        yield f"{place}.fields = {spec['fields']!r}: must map a canonical field to the row's own"
    yield from _of_pattern(f"{place}.strip_reasoning", spec.get("strip_reasoning", False))


def _of_pattern(place: str, given: Any) -> Iterator[str]:
    if isinstance(given, bool):
        return
    import regex

    why = ""
    if isinstance(given, str) and given:
        try:
            regex.compile(given)
            return
        except regex.error as error:
            why = f" of the regex module ({error})"
    yield f"{place} = {given!r}: must be true, false or a regular expression{why}"


def _of_shots(place: str, spec: Mapping[str, Any]) -> Iterator[str]:
    if "fewshot_split" in spec and "fewshot_file" in spec:
        yield f"{place}: shots come from fewshot_split or from fewshot_file, not both"
    shots = spec.get("num_fewshot", 0)
    if _is(shots, (int,)) and shots > 0 and "file" in spec and "fewshot_file" not in spec:
        yield f"{place}.num_fewshot = {shots!r}: a file is one split; name the shots' as fewshot_file"


def _of_generate(place: str, given: Any) -> Iterator[str]:
    place = f"{place}.generate"
    if not isinstance(given, dict):
        yield f"{place} = {given!r}: must be a mapping, e.g. {{max_new_tokens: 64}}"
        return
    yield from _unknown(place, given, tuple(GENERATE))
    wrong = [key for key in given if key in GENERATE and not _is(given[key], GENERATE[key])]
    for key in wrong:
        yield f"{place}.{key} = {given[key]!r}: must be {' or '.join(kind.__name__ for kind in GENERATE[key])}"
    stop = given.get("stop", [])
    if "stop" not in wrong and not all(isinstance(one, str) for one in stop):
        yield f"{place}.stop = {stop!r}: must be strings that are not empty"
    elif not wrong:
        known = {key: given[key] for key in given if key in GENERATE} | {"stop": tuple(stop)}
        yield from (f"{place}.{one}" for one in Generation(**known).problems())


def _unknown(place: str, spec: Mapping[Any, Any], keys: Sequence[str]) -> Iterator[str]:
    for key in spec:
        if key not in keys:
            yield f"{place}.{key}: unknown key: {did_you_mean(key, keys)}allowed: {', '.join(keys)}"


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
