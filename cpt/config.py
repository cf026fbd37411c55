"""A stream as YAML: the pydantic models behind it, and every error at once on the way in.

Nothing here imports torch, transformers, trl or peft: `cpt validate` answers in a second or two.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cpt import resources
from cpt.adapters.spec import StageAdapter, adapter_problems, bare_problems, not_new
from cpt.data.spec import Name, Source, Sources, Strict, refuse
from cpt.data.templates import Template
from cpt.errors import ConfigError
from cpt.explain import every_problem
from cpt.methods import registry
from cpt.methods.base import Method, whole_share
from cpt.rewards.spec import StageReward, label
from cpt.schedule import StageSchedule
from cpt.suggest import did_you_mean
from cpt.trainer_fields import check_shared, check_training, fitting
from eval_harness import strict_yaml

Kind = Literal["sft", "pretrain", "rft", "sdft", "unlearn"]
GENERATING = ("rft", "sdft")  # stages that learn from what the model writes
Group = Literal["task", "general"]
Problem = tuple[tuple[str | int, ...], Any, str]  # location, value, sentence


class Generate(Strict):
    """How a continuation is written: `eval_harness.generation.Generation`."""

    max_new_tokens: int | None = Field(None, gt=0, description="default: what the row's own answer needs")
    stop: list[str] = Field([], description="strings that end it")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="the smallest set of tokens of that mass")
    top_k: int = Field(0, ge=0, description="the k most likely tokens; 0 is all")
    seed: int = Field(0, description="of the samples")


class EvalSource(Source):
    """Rows that are only measured, and how."""

    split: str = Field("test", description="which split of the origin")
    measures: list[str] | None = Field(None, min_length=1, description="default: chosen by the rows' form")
    exact_match: Literal["one_pass", "generate"] = Field("one_pass", description="equal results; see docs")
    system: str | None = Field(None, description="a system message, or without a template a paragraph put first")
    num_fewshot: int = Field(0, ge=0, description="solved rows put before each row, drawn from `fewshot`")
    fewshot: Source | None = Field(None, description="rows that shots are drawn from, e.g. the training split")
    fewshot_seed: int = Field(0, description="of that draw")
    strip_reasoning: bool | str = Field(False, description="cut <think> blocks out of what is written; or a pattern")
    generate: Generate = Field(Generate(), description="how answers are written, for measures that read them")

    @model_validator(mode="after")
    def _measured_once(self) -> "EvalSource":
        given = [key for key in ("weight", "count") if getattr(self, key) is not None]
        refuse(*(((key,), getattr(self, key), "means nothing for rows that are only measured") for key in given))
        if bool(self.num_fewshot) != bool(self.fewshot):
            refuse((("fewshot",), None, "num_fewshot and fewshot go together: how many shots, and from which rows"))
        return self

    @field_validator("measures")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        from eval_harness.measure import MEASURES

        unknown = [(i, name) for i, name in enumerate(names or []) if name not in MEASURES]
        refuse(
            *(
                ((i,), name, f"is no measure.{did_you_mean(name, MEASURES)} Known: {', '.join(MEASURES)}.")
                for i, name in unknown
            )
        )
        return names


def _method(value: Any) -> Method:
    """Build the method its `type` names, so that error paths read stages.1.methods.0.ratio."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise PydanticCustomError("cpt", "must be a method's name or a mapping with its name under 'type'")
    try:
        found: Any = registry.find(value["type"])
    except registry.UnknownMethod as error:
        refuse((("type",), value["type"], str(error)))
    except (Exception, SystemExit) as error:  # the code of another package
        refuse((("type",), value["type"], f"cannot be imported: {type(error).__name__}: {error}"))
    if not (isinstance(found, type) and issubclass(found, Method)):
        refuse((("type",), value["type"], f"{registry.homes()[value['type']]} is no subclass of cpt.Method"))
    return found.model_validate(value)


AnyMethod = SerializeAsAny[Annotated[Method, PlainValidator(_method, json_schema_input_type=dict)]]


def an(kind: str) -> str:
    """The kind with its article, as it is spoken."""
    return f"{'a' if kind == 'pretrain' else 'an'} {kind}"


def forgetters() -> list[str]:
    """Names of the methods that forget."""
    return [name for name in registry.homes() if registry.find(name).forgets]


def source_fields(method: Method) -> list[str]:
    """Names of a method's fields that hold sources."""
    values = {key: getattr(method, key) for key in type(method).model_fields}
    return [key for key, v in values.items() if isinstance(v, list) and v and isinstance(v[0], Source)]


class KL(Strict):
    """What keeps a policy near a reference while it is rewarded: TRL's per-token KL (the k3 estimator)."""

    to: Literal["off", "base", "previous"] = Field("off", description="base: stage 0; previous: the stage's start")
    weight: float = Field(0.04, gt=0, description="TRL's beta")

    @model_validator(mode="after")
    def _towards_something(self) -> "KL":
        if self.to == "off" and self.weight != type(self).model_fields["weight"].default:
            refuse((("weight",), self.weight, "weighs nothing while `to` is off: give base or previous"))
        return self


def _as_kl(value: Any) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads `off` as false
        value = "on" if value else "off"
    return {"to": value} if isinstance(value, str) else value


class Stage(Strict):
    """One step of the stream: what is trained on, how, with which methods, and what measures it."""

    name: Name
    kind: Kind = Field(
        "sft",
        description="sft: prompts, answers; pretrain: text; rft: prompts, rewards; sdft: prompts, answers to be shown; "
        "unlearn: rows to forget",
    )
    data: Sources
    test: EvalSource | None = Field(None, description="held-out rows: the stage's column of the matrix")
    methods: list[AnyMethod] = Field([], description="techniques that compose; see `docs/methods`")
    adapter: StageAdapter | None = Field(None, description="continue, new or merge_then_new; default: full weights")
    rewards: list[StageReward] = Field([], description="rft: what a completion is worth; see docs/rewards.md")
    kl: Annotated[KL, BeforeValidator(_as_kl, json_schema_input_type=str | KL)] = Field(
        KL(), description="rft: off, base or previous"
    )
    retain: Sources | None = Field(None, description="unlearn: rows whose own loss keeps them")
    retain_ratio: float = Field(0.5, gt=0, lt=1, description="unlearn: their share of every effective batch")
    requested_by: str | None = Field(
        None, min_length=1, description="unlearn: who asked, as the ledger keeps it; default: the stream's name"
    )
    template: Template = Field(Template(), description="unlearn: what is taught in the place of an answer")
    schedule: StageSchedule | None = Field(
        None, description="infinite: the next stage goes on from before this one's anneal; see docs/schedules.md"
    )
    training: dict[str, Any] = Field(
        {}, description="any field of TRL's SFTConfig (rft: GRPOConfig, sdft: SDFTConfig); wins over the stream's"
    )

    @model_validator(mode="after")
    def _arguments_fit(self) -> "Stage":
        try:
            checked = check_training(self.training, self.kind)
        except ValidationError as error:
            refuse(*((("training", *e["loc"]), e["input"], e["msg"]) for e in error.errors()))
        object.__setattr__(self, "training", checked)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Stage":
        found = [
            *(self._method_problems() + self._reward_problems()),
            *(self._forgetting_problems() + self._schedule_problems()),
        ]
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            i = weighted.index(False)
            found.append((("data", i, "weight"), None, "give every source of the stage a weight, or none"))
        refuse(*found)
        return self

    def _method_problems(self) -> list[Problem]:
        found: list[Problem] = []
        for i, method in enumerate(self.methods):
            if self.kind not in method.kinds:
                allowed = ", ".join(sorted(method.kinds))
                found.append((("methods", i), method.type, f"does not work in {an(self.kind)} stage ({allowed})"))
            if method.active and "adapter" in method.needs and (text := not_new(self.adapter)):
                found.append((("methods", i), method.type, f"needs a new adapter beside the weights: {text}"))
        names = [method.label if method.active else None for method in self.methods]
        for i, name in enumerate(names):
            if name in names[:i] and name and not self.methods[i].owns_requires_grad:
                has_one = "name" in type(self.methods[i]).model_fields
                mend = "give one a name of its own" if has_one else "keep one"
                place = ("methods", i, "name") if has_one else ("methods", i)
                found.append((place, name, f"is listed twice, and logs tell methods apart by name: {mend}"))
        owners = [i for i, method in enumerate(self.methods) if method.owns_requires_grad]
        if len(owners) > 1:
            both = " and ".join(self.methods[i].type for i in owners)
            found.append((("methods", owners[1]), both, "both decide what is trained: keep one"))
        return found

    def _reward_problems(self) -> list[Problem]:
        if self.kind != "rft":
            names = ", ".join(label(reward) for reward in self.rewards)
            given = [("rewards", names), ("kl", None if self.kl == KL() else self.kl.to)]
            return [((key,), v, f"means nothing in {an(self.kind)} stage, only in kind: rft") for key, v in given if v]
        if not self.rewards:
            return [(("rewards",), [], "an rft stage needs at least one: exact_match, numeric, math, format or a path")]
        labels = [label(reward) for reward in self.rewards]
        return [
            (("rewards", i), name, "is listed twice: logs tell rewards apart by name, give one a `name:`")
            for i, name in enumerate(labels)
            if name in labels[:i]
        ]

    def _forgetting_problems(self) -> list[Problem]:
        if self.kind != "unlearn":
            given: list[tuple[str, Any]] = [("retain", self.retain and self.retain[0].label)]
            given += [("template", None if self.template == Template() else self.template.lines)]
            given += [("requested_by", self.requested_by)]
            given += [("retain_ratio", None if self.retain_ratio == 0.5 else self.retain_ratio)]
            return [((k,), v, f"means nothing in an {self.kind} stage, only in kind: unlearn") for k, v in given if v]
        active = [(i, method) for i, method in enumerate(self.methods) if method.active]
        forget = [(i, method) for i, method in active if method.forgets]
        found: list[Problem] = []
        if not forget:
            found.append(
                (("methods",), [m.type for m in self.methods], f"none forgets: give one of {', '.join(forgetters())}")
            )
        if len(forget) > 1:
            both = " and ".join(method.type for _, method in forget)
            found.append((("methods", forget[1][0]), both, "both are the loss of the rows to forget: keep one"))
        if self.retain is None:
            found += [
                (("methods", i), method.type, "keeps the stage's retain rows: give `retain`")
                for i, method in active
                if "retain" in method.needs
            ]
        if self.training.get("packing"):
            found.append((("training", "packing"), True, "rows are forgotten one by one: leave it out"))
        return found

    def _schedule_problems(self) -> list[Problem]:
        if self.schedule is None:
            return []
        place, word = ("schedule",), self.schedule.type
        if self.kind not in ("sft", "pretrain"):
            return [(place, word, f"means nothing in an {self.kind} stage, only in sft and pretrain")]
        if self.adapter is not None:
            return [(place, word, "goes on with the optimizer's state, which is of the full weights: drop the adapter")]
        owners = [method.type for method in self.methods if method.owns_requires_grad and method.active]
        if owners:
            text = f"goes on with the optimizer's state, and {owners[0]} trains other tensors in each stage: keep one"
            return [(place, word, text)]
        return []

    def method_sources(self) -> dict[str, list[Source]]:
        """The sources beside the stage's own rows, by place: `methods.0.general` of an active method, `retain`."""
        retain = {"retain": self.retain} if self.retain else {}
        return retain | {
            f"methods.{j}.{key}": getattr(method, key)
            for j, method in enumerate(self.methods)
            if method.active
            for key in source_fields(method)
        }


class ModelSpec(Strict):
    """The base model: a folder, a name on the Hub, or a model that ships with cpt (tiny-world)."""

    path: str = Field(description="folder, hub name, or tiny-world")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2, ...")
    adapter: str | None = Field(None, description="folder or hub name of a PEFT LoRA that the stream starts from")
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="weights by bitsandbytes, under LoRA")
    trust_remote_code: bool = Field(False, description="runs code of the model's author; off unless you say so")


def _as_model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class TokenizerSpec(Strict):
    """Repairs to the base model's tokenizer, kept for every stage."""

    path: str | None = Field(None, description="folder or hub name; default: the model's")
    pad_token: str | None = Field(None, description="an existing token to pad with")
    chat_template: str | None = Field(None, description="path of a Jinja file")


class DriftSource(Source):
    """Rows on which every stage is compared with the stream's start."""

    weights: bool = Field(True, description="also how far the weights moved; reads both checkpoints once")

    @model_validator(mode="after")
    def _read_once(self) -> "DriftSource":
        given = [key for key in ("weight", "count") if getattr(self, key) is not None]
        refuse(*(((key,), getattr(self, key), "means nothing for rows that are only measured") for key in given))
        return self


class Within(Strict):
    """What is scored while a stage trains: a few fixed rows of each set, every few optimizer steps."""

    every: int | Literal["auto", "off"] = Field("auto", description="optimizer steps; auto: for about 2 % of the stage")
    rows: int = Field(32, gt=0, description="of each set, the same all through; auto may take fewer")
    sets: list[Name] | None = Field(
        None, min_length=1, description="default: earlier stages' tests, the stage's own, the general sets"
    )

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_a_word(cls, value: Any) -> Any:
        value = {False: "off", True: "auto"}[value] if isinstance(value, bool) else value  # YAML 1.1 reads `off` so
        if value not in ("auto", "off") and not (isinstance(value, int) and value > 0):
            refuse(((), value, "must be auto, off or a number of optimizer steps of at least 1"))
        return value


def _as_within(value: Any) -> Any:
    return {"every": value} if isinstance(value, str | int) else value


class Evaluation(Strict):
    """What is measured after every stage, stage 0 included."""

    general: dict[Name, EvalSource] = Field({}, description="abilities to keep, by name")
    drift: DriftSource | None = Field(None, description="rows on which every stage is compared with the base")
    within: Annotated[Within, BeforeValidator(_as_within, json_schema_input_type=str | int | Within)] = Field(
        Within(), description="what is scored while a stage trains: auto, off, every so many steps, or a mapping"
    )
    batch_tokens: int | None = Field(None, gt=0, description="padded tokens per scoring batch; default: what fits")
    chat_template: Literal["auto", "none"] = Field("auto", description="auto: if the tokenizer has one; training too")
    refuse_overlap: bool = Field(False, description="stop when test rows occur in training rows")


class Retention(Strict):
    """What stays on disk once a stage is finished."""

    models: Literal["all", "last"] = Field("all", description="last: only the newest stage keeps its weights")
    checkpoints: bool = Field(False, description="keep the trainer's checkpoints of finished stages")


RATES = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
GROUP_SIZE = 8  # completions per prompt: TRL's default of num_generations
BATCH_DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # TRL's


class Stream(Strict):
    """A base model, an ordered list of stages, an evaluation plan."""

    name: Name
    model: Annotated[ModelSpec, BeforeValidator(_as_model, json_schema_input_type=str | ModelSpec)]
    tokenizer: TokenizerSpec = TokenizerSpec()
    seed: int = Field(0, ge=0, description="every stage derives its own from it")
    data_root: Path | None = Field(None, description="folder that `file:` sources are relative to")
    output_dir: Path = Field(Path("runs"), description="where run directories are made")
    processes: int | None = Field(
        None, gt=0, description="processes the stream is made for; another launch is refused; default: any"
    )
    training: Annotated[dict[str, Any], AfterValidator(check_shared)] = Field(
        {}, description="fields of TRL's SFTConfig or GRPOConfig for every stage that has them"
    )
    stages: list[Stage] = Field([], description="in order; none: only the base is measured")
    evaluation: Evaluation = Evaluation()
    retention: Retention = Retention()

    @model_validator(mode="after")
    def _hang_together(self, info: ValidationInfo) -> "Stream":
        found: list[Problem] = []
        names = [stage.name for stage in self.stages]
        for i, name in enumerate(names):
            if name in names[:i] or name in ("base", "drift"):  # a stage's folder, a set's file
                found.append((("stages", i, "name"), name, "is taken: every stage needs a name of its own"))
            if name in self.evaluation.general:
                found.append((("evaluation", "general", name), name, "is also a stage's name: rename one"))
        if "drift" in self.evaluation.general:
            found.append((("evaluation", "general", "drift"), "drift", "is the file of evaluation.drift: rename it"))
        for i, name in enumerate(self.evaluation.within.sets or []):
            if name not in (known := self.eval_sources()):
                text = f"is no set of this stream.{did_you_mean(name, known)} Known: {', '.join(known)}."
                found.append((("evaluation", "within", "sets", i), name, text))
        found += adapter_problems(self.stages, self.model) + bare_problems(self.stages, self.model)
        if not (info.context or {}).get("stored"):
            found += self.batch_problems()
        kinds = {stage.kind for stage in self.stages}
        for name, value in self.training.items() if kinds else ():
            if not any(fitting({name: value}, kind) for kind in kinds):
                found.append((("training", name), value, "no stage of this stream has such an argument"))
        for i, stage in enumerate(self.stages):
            training = self.training_of(stage)
            for key in RATES if stage.schedule else ():
                if key in training:
                    place = ("stages", i, "training", key) if key in stage.training else ("training", key)
                    text = f"the schedule of stage {stage.name!r} decides the rate: leave it out there"
                    found.append((place, training[key], text))
            if training.get("packing") and "max_length" in training and training["max_length"] is None:
                place = ("stages", i, "training", "max_length")
                found.append((place, None, "packing needs a length for its rows: give a number"))
        refuse(*found)
        return self

    def batch_problems(self) -> list[Problem]:
        """What does not go together with the effective batch, which the number of processes is a factor of."""
        found: list[Problem] = []
        for i, stage in enumerate(self.stages):
            learned = [one.name for one in self.stages[:i] if one.kind != "unlearn"]  # what may be replayed
            found += self._method_problems(i, stage, learned)
            found += [(("stages", i, "training", *problem[0]), *problem[1:]) for problem in self._group_problems(stage)]
        return found

    def _method_problems(self, i: int, stage: Stage, earlier: list[str]) -> list[Problem]:
        """What a stage's methods cannot do with its effective batch, one by one and together."""
        found: list[Problem] = []
        rows, taken = self.batch_rows(stage), {"task": 0}
        if stage.retain is not None:
            taken["retain"] = round(stage.retain_ratio * rows)
            texts = whole_share(stage.retain_ratio, rows)
            found += [(("stages", i, "retain_ratio"), stage.retain_ratio, text) for text in texts]
        for j, method in enumerate(stage.methods):
            place = ("stages", i, "methods", j)
            problems = method.check(rows, earlier)
            found += [((*place, field), getattr(method, field), text) for field, text in problems]
            for name, quota in method.quotas(rows).items():
                if name in taken:
                    found.append(((*place, "name"), name, "is taken: rows that a method adds need a name of their own"))
                if stage.kind in (*GENERATING, "unlearn") and getattr(method, "ratio", None) == "shuffled":
                    text = f"in an {stage.kind} stage rows come in a fixed share: give a number"
                    found.append(((*place, "ratio"), "shuffled", text))
                if stage.kind in (*GENERATING, "unlearn") and getattr(method, "by", None) == "tokens":
                    unknown = "a completion will have" if stage.kind in GENERATING else "templates bring along"
                    text = f"in an {stage.kind} stage nobody knows how many tokens {unknown}: leave it out"
                    found.append(((*place, "by"), "tokens", text))
                taken[name] = quota
        if not found and stage.kind not in GENERATING and sum(taken.values()) >= rows:
            shares = " + ".join(f"{name} {quota}" for name, quota in taken.items() if quota)
            text = f"leave no room for task rows in an effective batch of {rows}: lower their ratios"
            found.append((("stages", i, "methods"), shares, text))
        return found

    def _group_problems(self, stage: Stage) -> list[Problem]:
        """What is generated at a time must be whole groups of completions; GRPO compares those of one prompt."""
        if stage.kind not in GENERATING:
            return []
        training = BATCH_DEFAULTS | self.training_of(stage)
        for key in ("num_generations", "max_completion_length"):
            if training.get(key, GROUP_SIZE) is None:
                return [((key,), None, "must be a number")]
        group, at_once = training.get("num_generations", GROUP_SIZE), training.get("generation_batch_size")
        devices = training["per_device_train_batch_size"] * self.world
        if group < 2 and stage.kind == "rft":
            return [(("num_generations",), group, "must be at least 2: a group's mean is its baseline")]
        if at_once is not None and training.get("steps_per_generation") is not None:
            return [(("generation_batch_size",), at_once, "give it or steps_per_generation, not both")]
        steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
        parts = f"per_device_train_batch_size {training['per_device_train_batch_size']} x {self.world} processes"
        if at_once is not None and at_once % devices:
            return [(("generation_batch_size",), at_once, f"must be a multiple of {devices} ({parts})")]
        if (whole := at_once or devices * steps) % group:
            made = f"{parts} x {steps} steps per generation" if at_once is None else "generation_batch_size"
            text = f"must divide the {whole} completions generated at a time ({made})"
            return [(("num_generations",), group, text)]
        return []

    @property
    def world(self) -> int:
        """How many processes share an effective batch: what `processes` says, else what was launched."""
        return self.processes or int(os.environ.get("WORLD_SIZE") or 1)

    def training_of(self, stage: Stage) -> dict[str, Any]:
        """The stage's trainer arguments over those of the stream's that its kind has."""
        return {**fitting(self.training, stage.kind), **stage.training}

    def batch_rows(self, stage: Stage) -> int:
        """Rows of one effective batch: per device x accumulation x processes. In rft and sdft they are completions."""
        sizes = BATCH_DEFAULTS | self.training_of(stage)
        return sizes["per_device_train_batch_size"] * sizes["gradient_accumulation_steps"] * self.world

    def eval_sources(self) -> dict[str, tuple[Group, EvalSource]]:
        """Everything that is measured: name -> ("task" | "general", source), stages first."""
        found: dict[str, tuple[Group, EvalSource]] = {}
        for stage in self.stages:
            if stage.test:
                found[stage.name] = ("task", stage.test)
        return found | {name: ("general", source) for name, source in self.evaluation.general.items()}

    def to_yaml(self) -> str:
        """The resolved stream, every default written; `from_yaml` of it gives an equal stream."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> "Stream":
        """Read a stream; overrides are `dotted.path=value`, stages by number or by name.

        Raises ConfigError with every problem found, each with its dotted path.
        """
        raw = read_raw(path, overrides)
        refuse_sweep(raw, path)
        return cls.parse(raw)

    @classmethod
    def stored(cls, path: str | os.PathLike[str]) -> "Stream":
        """The stream.yaml of a run, whatever number of processes reads it: `run` checks batches before it trains."""
        return cls.parse(read_raw(path), stored=True)

    @classmethod
    def parse(cls, raw: dict[str, Any], stored: bool = False) -> "Stream":
        """As the constructor, with problems as one readable ConfigError. stored: see `Stream.stored`."""
        try:
            return cls.model_validate(raw, context={"stored": stored})
        except ValidationError as error:
            raise ConfigError(*every_problem(error, cls, raw)[0]) from error


def read_raw(path: str | os.PathLike[str], overrides: list[str] | None = None) -> dict[str, Any]:
    """The YAML file as a mapping, overrides applied, not validated yet. Raises ConfigError."""
    file = resources.find_recipe(os.fspath(path))
    try:
        raw = _apart(strict_yaml.load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must be a mapping with name, model and stages. See docs/config.md.")
    for text in overrides or []:
        _override(raw, text)
    return raw


def refuse_sweep(raw: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where a file holds a sweep of streams, not one."""
    if "stream" in raw and not raw.keys() & {"model", "stages"}:
        raise ConfigError(f"{path}: is a sweep, several runs of a stream. See them: cpt sweep {path} --list")


def _apart(value: Any) -> Any:
    """A copy in which an anchor's users no longer share one object: an override of one would change them all."""
    if isinstance(value, dict):
        return {key: _apart(part) for key, part in value.items()}
    return [_apart(part) for part in value] if isinstance(value, list) else value


# Parts that one word may stand for -> the key that the word is the value of.
SHORT = {"model": "path", "adapter": "mode", "kl": "to", "within": "every", "schedule": "type"}


def _override(raw: dict[str, Any], text: str) -> None:
    """Set one dotted path of the raw mapping, e.g. stages.reverse.methods.0.ratio=0.25."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", path):
        raise ConfigError(f"override {text!r}: write dotted.path=value, e.g. training.learning_rate=1e-4")
    *parents, last = path.split(".")
    here: Any = raw
    for depth, key in enumerate(parents):
        here = _child(here, key, ".".join(parents[: depth + 1]), text)
    if isinstance(here, list):
        here[_index(here, last, path, text)] = _value(value, text)
    else:
        here[last] = _value(value, text)


def _value(value: str, text: str) -> Any:
    """YAML 1.1 reads 1e-4 as text; a user means the number."""
    try:
        loaded = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: {value!r} is not valid YAML; put text in quotes") from error
    if isinstance(loaded, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", loaded):
        return float(loaded)
    return loaded


def _child(here: Any, key: str, path: str, text: str) -> Any:
    if isinstance(here, list):
        i = _index(here, key, path, text)
        if isinstance(here[i], str) and re.fullmatch(r"stages\.[^.]+\.(methods|rewards)\.[^.]+", path):
            here[i] = {"type": here[i]}
        if not isinstance(here[i], dict | list):
            raise ConfigError(f"override {text!r}: {path} is {here[i]!r}, which has no parts to set")
        return here[i]
    if key == "0" and here.keys() & {"hub", "file", "task", "rows"}:
        return here  # one source given without its list: errors call it number 0
    if here.get(key) is None:
        if key in ("stages", "methods", "rewards"):
            raise ConfigError(f"override {text!r}: there are no {path}, so nothing of them can be set")
        here[key] = {}
    elif key in SHORT and isinstance(here[key], str):
        here[key] = {SHORT[key]: here[key]}
    if not isinstance(here[key], dict | list):
        raise ConfigError(f"override {text!r}: {path} is {here[key]!r}, which has no parts to set")
    return here[key]


def _index(here: list[Any], key: str, path: str, text: str) -> int:
    names = [item.get("name", item.get("type")) if isinstance(item, dict) else item for item in here]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(here):
        return int(key)
    known = ", ".join(f"{i} ({name})" if name else str(i) for i, name in enumerate(names)) or "none"
    raise ConfigError(f"override {text!r}: {path} does not exist; there are: {known}")
