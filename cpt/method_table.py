"""What every method is and needs, read from its class: for a terminal, as JSON, and as the index of docs/methods.

A method of another package is listed like ours; one that cannot be imported is a line that says so.
"""

import inspect
import json
import re
import textwrap
import types
import typing
from dataclasses import asdict, dataclass, field
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from cpt.errors import ConfigError
from cpt.methods import registry
from cpt.suggest import did_you_mean

WIDTH = 80
KINDS = ("pretrain", "sft", "rft", "sdft", "unlearn")

# What a method pays for a hook, from cheap to dear; "works" is what the seam calls it for.
HOOKS = {
    "prepare_data": "reads rows before the stage, or adds some to every batch",
    "prepare_model": "changes what is trained, once before a stage",
    "weigh_tokens": "weighs tokens in every micro-batch, no extra pass",
    "loss_terms": "adds to the loss of every micro-batch",
    "edit_gradients": "reads and writes all gradients at every optimizer step",
    "edit_weights": "reads and writes all trained weights at every optimizer step",
    "finish_stage": "changes the finished model, once after a stage",
    "state_dict": "keeps tensors beside every checkpoint",
}
# Launches that `cpt.trainers.deepspeed.refuse_edits` turns down for a hook.
REFUSED = {
    "edit_gradients": ("fp16", "FSDP", "DeepSpeed with offload"),
    "edit_weights": ("FSDP", "DeepSpeed with offload", "ZeRO-3"),
}
# What `cpt.train_stage` turns down for a need.
NEEDS = {
    "base": ("FSDP", "ZeRO-3", "packing"),
    "whole": ("FSDP", "ZeRO-3"),
    "adapter": ("full weights", "vLLM"),
    "base without adapter": ("full weights",),
    "start without adapter": ("full weights",),
    "own passes": ("DeepSpeed", "FSDP", "re-entrant checkpointing"),
}


@dataclass(frozen=True)
class FieldFacts:
    """One setting: its type, default (as YAML writes it, None where it must be given), bounds and meaning."""

    name: str
    type: str
    default: Any
    bounds: str
    description: str
    required: bool = False


@dataclass(frozen=True)
class MethodFacts:
    """One method. problem: why it could not be imported; then nothing else is known but its name and home.

    absent: the setting at which it does nothing, None if it has none. refused: launches where it does not work.
    """

    name: str
    home: str
    problem: str | None = None
    summary: str = ""
    description: str = ""
    paper: str | None = None
    cost: str | None = None
    kinds: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    owns_requires_grad: bool = False
    absent: dict[str, Any] | None = None
    fields: list[FieldFacts] = field(default_factory=list)
    page: str | None = None


def every() -> list[MethodFacts]:
    """All methods by name, entry points of other packages included."""
    return [facts(name) for name in registry.homes()]


def one(name: str) -> MethodFacts:
    """The facts of one method. Raises ConfigError for a name that is none."""
    if name not in registry.homes():
        known = ", ".join(registry.homes())
        raise ConfigError(f"methods {name}: is no method.{did_you_mean(name, registry.homes())} Known: {known}.")
    return facts(name)


def facts(name: str) -> MethodFacts:
    """Facts of a registered name; what its import raises is told, not raised."""
    home = registry.homes()[name]
    try:
        found = registry.find(name)
    except (Exception, SystemExit) as error:  # the code of another package
        return MethodFacts(name, home, problem=f"{type(error).__name__}: {error}")
    return describe(name, home, found)


def describe(name: str, home: str, method: Any) -> MethodFacts:
    """Facts of a method's class, or that it is none."""
    from cpt.methods.base import Method

    if not (inspect.isclass(method) and issubclass(method, Method)):
        return MethodFacts(name, home, problem=f"{home} is no subclass of cpt.Method")
    module = _paragraphs(inspect.getmodule(method).__doc__ or "")
    own = _paragraphs(method.__doc__ or "")
    head, text = (own or [""])[0], " ".join(module)
    hooks = [hook for hook in HOOKS if getattr(method, hook) is not getattr(Method, hook)]
    return MethodFacts(
        name=name,
        home=home,
        summary=head,
        description="\n\n".join(own[1:]),
        paper=_papers(text),
        cost=_sentence(text, "Cost"),
        kinds=[kind for kind in KINDS if kind in method.kinds],
        hooks=hooks,
        refused=sorted({where for hook in hooks for where in REFUSED.get(hook, ())} | _refused_for_needs(method)),
        owns_requires_grad=method.owns_requires_grad,
        absent=method.absent,
        fields=[_field(key, info) for key, info in method.model_fields.items() if key != "type"],
        page=f"docs/methods/{name}.md" if name in registry.OURS else None,
    )


def _refused_for_needs(method: Any) -> set[str]:
    """Where the method does not work as it is by default; a field without a default may be what decides."""
    try:
        needs = method.model_construct().needs
    except AttributeError:
        return set()
    return {where for need in needs for where in NEEDS.get(need, ())}


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n") if part.strip()]


def _papers(text: str) -> str | None:
    found = dict.fromkeys(re.findall(r"arXiv[ :](\d{4}\.\d{4,5})", text))
    return ", ".join(f"arXiv {number}" for number in found) or None


def _sentence(text: str, word: str) -> str | None:
    """What stands after `Cost:`, to the end of its paragraph."""
    found = re.search(rf"{word}: (.*)", text)
    return found[1].rstrip(".") if found else None


def _field(name: str, info: Any) -> FieldFacts:
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    plain = _plain(value)
    bounds = _bounds(info.metadata)
    return FieldFacts(name, _type(info.annotation), plain, bounds, info.description or "", info.is_required())


def _plain(value: Any) -> Any:
    """A default as YAML writes it: of what is made of parts, the keys that are set."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value


def _type(annotation: Any) -> str:
    """As a reader of YAML would say it: float, list of str, all | list of str | null."""
    parts = get_args(annotation)
    match get_origin(annotation):
        case typing.Annotated:
            return _type(parts[0])
        case typing.Literal:
            return " | ".join(map(str, parts))
        case typing.Union | types.UnionType:
            return " | ".join(map(_type, parts))
        case None:
            return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
        case origin:
            of = f" of {', '.join(map(_type, parts))}" if parts else ""
            return f"{origin.__name__}{of}"


_BOUNDS = {
    "gt": "above {}",
    "ge": "at least {}",
    "lt": "below {}",
    "le": "at most {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} of them",
}


def _bounds(metadata: list[Any]) -> str:
    said = [word.format(getattr(part, key)) for part in metadata for key, word in _BOUNDS.items() if hasattr(part, key)]
    return ", ".join(said)


# ---- forms ------------------------------------------------------------------------------------------


def text(methods: list[MethodFacts]) -> str:
    """A line or two for each method: name, kinds of stages, what it is, where it does not work by default."""
    wide = max(len(method.name) for method in methods) if methods else 0
    blocks = []
    for method in methods:
        kinds = " ".join(method.kinds)
        limits = f" Not under {', '.join(method.refused)}." if method.refused else ""
        said = f"{kinds}: {method.summary}{limits}"
        if method.problem is not None:
            said = f"cannot be imported: {method.problem}"
        indent = " " * (wide + 2)
        blocks.append(textwrap.fill(said, WIDTH, initial_indent=f"{method.name:{wide}}  ", subsequent_indent=indent))
    return "\n".join([*blocks, "", "cpt methods NAME shows fields, costs and more; limits are those of the defaults"])


def page(method: MethodFacts) -> str:
    """Everything about one method, for a terminal."""
    if method.problem is not None:
        return _filled(f"{method.name} ({method.home}) cannot be imported: {method.problem}")
    parts = [_filled(f"{method.name}: {method.summary}")]
    parts += [_filled(part) for part in method.description.split("\n\n") if part]
    about = {
        "paper": method.paper,
        "stages": ", ".join(method.kinds),
        "cost": method.cost,
        "does": "; ".join(HOOKS[hook] for hook in method.hooks) or None,
        "refused": f"{', '.join(method.refused)} (as it is by default)" if method.refused else "nowhere",
        "absent at": _setting(method.absent) if method.absent else "no setting",
        "from": method.home,
        "more": method.page,
    }
    parts.append("\n".join(_hung(name, said) for name, said in about.items() if said))
    parts.append("\n".join(["fields", *(_hung(f"  {one.name}", _about(one), 17) for one in method.fields)]))
    return "\n\n".join(parts)


def _about(one: FieldFacts) -> str:
    """Type, bounds, default and meaning of a field in one line."""
    default = "required" if one.required else f"default {_value(one.default)}"
    said = ", ".join(part for part in (one.type, one.bounds, default) if part)
    return f"{said}: {one.description}" if one.description else said


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_value(value)}" for key, value in setting.items())


def _filled(said: str) -> str:
    return textwrap.fill(said, WIDTH, break_long_words=False, break_on_hyphens=False)


def _hung(name: str, said: str, wide: int = 11) -> str:
    head = f"{name:{wide}}" if len(name) < wide else f"{name} "
    return textwrap.fill(
        said, WIDTH, initial_indent=head, subsequent_indent=" " * wide, break_long_words=False, break_on_hyphens=False
    )


def as_json(methods: list[MethodFacts]) -> list[dict[str, Any]]:
    """The facts as plain values."""
    return [asdict(method) for method in methods]


def markdown(methods: list[MethodFacts]) -> str:
    """docs/methods/index.md: `cpt methods --markdown` writes it, a test holds it to the classes."""
    rows = [
        f"| [{method.name}]({method.name}.md) | {method.summary} | {', '.join(method.kinds)} | {method.cost or '-'} "
        f"| {', '.join(method.refused) or '-'} | {f'`{_setting(method.absent)}`' if method.absent else '-'} "
        f"| {method.paper or '-'} |"
        for method in methods
        if method.problem is None
    ]
    head = "| method | what it does | stages | cost | refused under | absent at | paper |"
    return "\n".join([_INTRODUCTION, head, "|---|---|---|---|---|---|---|", *rows, "", *map(_hooks, methods), _END])


def _hooks(method: MethodFacts) -> str:
    return f"- `{method.name}` {'; '.join(HOOKS[hook] for hook in method.hooks)}."


_INTRODUCTION = """# Methods

Made by `cpt methods --markdown` from the classes. [Choose a method](../choose_a_method.md) says which to begin with;
`cpt methods NAME` shows one with every field, those of installed packages too.
"""
_END = """
Methods compose, in the order a stage lists them; two that decide what is trained cannot stand in one stage. At the
setting under "absent at" a stage is bit-equal to one without the method. [Write a method](../write_a_method.md) for one
of your own."""
