"""What `cpt validate` checks beyond the models: files, columns, the base's folder; and the JSON Schema."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpt.config import EvalSource, Stream
from cpt.data.sources import Loaded, load, wrong_kind
from cpt.data.spec import Source
from cpt.errors import ConfigError, DataError
from cpt.explain import every_problem
from cpt.methods import registry
from cpt.resources import BUNDLED_MODELS, model_path
from cpt.suggest import did_you_mean
from eval_harness.sources import SourceError, hub_of


def examine(raw: dict[str, Any]) -> Stream:
    """Validate a raw stream with its files and rows. Raises ConfigError with every problem of all three at once."""
    try:
        stream = Stream.model_validate(raw)
        found = problems(stream)
    except ValidationError as error:
        found, rest = every_problem(error, Stream, raw)
        if isinstance(rest, Stream):
            found += [line for line in problems(rest) if line not in found]
    if found:
        raise ConfigError(*found)
    return stream


def problems(stream: Stream) -> list[str]:
    """Everything that can be known without the network or a model, in one list, each with its dotted path."""
    found = _model_problems(stream)
    read = {}
    for place, source in _sources(stream):
        if _on_the_hub(source, stream):
            continue
        try:
            loaded = read[place] = load(source, stream.data_root, place)
        except DataError as error:
            found += error.problems
            continue
        stage, _, rest = place.removeprefix("stages.").partition(".")
        if place.startswith("stages.") and rest.startswith("data."):
            found += wrong_kind(stream.stages[int(stage)].kind, loaded, place)
    return found + _measure_problems(stream, read)


def _measure_problems(stream: Stream, read: dict[str, Loaded]) -> list[str]:
    """Measures that do not fit the rows, of the sets whose rows could be read."""
    from cpt.evaluation import eval_set
    from eval_harness.measure import MeasureError, check

    places = {stage.name: f"stages.{i}.test" for i, stage in enumerate(stream.stages)}
    sets = []
    for name, (group, source) in stream.eval_sources().items():
        place = places.get(name, f"evaluation.general.{name}")
        if place in read and (source.fewshot is None or f"{place}.fewshot" in read):
            sets.append(eval_set(name, group, source, read[place], read.get(f"{place}.fewshot"), stream.evaluation))
    try:
        check(sets)
    except MeasureError as error:
        return str(error).splitlines()
    return []


def _model_problems(stream: Stream) -> list[str]:
    path = Path(model_path(stream.model.path)).expanduser()
    local = path.is_absolute() or stream.model.path.startswith((".", "~")) or stream.model.path.count("/") > 1
    if local and not path.is_dir():
        return [f"model.path = {stream.model.path!r}: no such folder. Give a folder, a hub name or tiny-world."]
    if path.is_dir() and not (path / "config.json").is_file():
        return [f"model.path = {stream.model.path!r}: the folder holds no config.json, so it is no checkpoint."]
    return []


def _sources(stream: Stream) -> list[tuple[str, Source]]:
    found: list[tuple[str, Source]] = []
    for i, stage in enumerate(stream.stages):
        found += [(f"stages.{i}.data.{j}", source) for j, source in enumerate(stage.data)]
        found += _measured(f"stages.{i}.test", stage.test) if stage.test else []
        for key, part in stage.method_sources().items():
            found += [(f"stages.{i}.{key}.{k}", source) for k, source in enumerate(part)]
    if stream.evaluation.drift:
        found.append(("evaluation.drift", stream.evaluation.drift))
    for name, source in stream.evaluation.general.items():
        found += _measured(f"evaluation.general.{name}", source)
    return found


def _on_the_hub(source: Source, stream: Stream) -> str | None:
    """The data set of the Hub that the rows would come from, if they would."""
    if source.hub and not (source.file and stream.data_root):
        return source.hub
    try:
        return hub_of(source.task, source.split, stream.data_root) if source.task else None
    except SourceError:  # said when the source is read
        return None


def _measured(place: str, source: EvalSource) -> list[tuple[str, Source]]:
    return [(place, source), *([(f"{place}.fewshot", source.fewshot)] if source.fewshot else [])]


def unchecked(stream: Stream) -> list[str]:
    """Names that only the Hub could confirm, with the bundled model's name where it is near."""
    hub = [name for _, source in _sources(stream) if (name := _on_the_hub(source, stream))]
    if not Path(model_path(stream.model.path)).expanduser().is_dir():
        hub.insert(0, f"model {stream.model.path}.{did_you_mean(stream.model.path, BUNDLED_MODELS)}")
    return list(dict.fromkeys(hub))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a stream, every installed method's fields included (for editors)."""
    schema = Stream.model_json_schema()
    variants = []
    for name in registry.homes():
        found = registry.find(name).model_json_schema()
        schema["$defs"] |= found.pop("$defs", {})
        found["required"] = [*found.get("required", []), "type"]
        variants.append(found)
    schema["$defs"]["Stage"]["properties"]["methods"]["items"] = {"anyOf": [{"type": "string"}, *variants]}
    return schema
