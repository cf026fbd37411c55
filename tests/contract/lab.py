"""A stage in a few lines: a Llama of hidden 16, rows of unequal length, the real seam and the real trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt.config import GENERATING, Stage
from cpt.data.stage_data import TASK, StageData
from cpt.methods.base import Method, StageInfo

WORDS = ["ab", "cd", "efg", "h", "ijklm", "no", "pqrs", "t", "uv", "wxyz"]
TASK_ROWS = [{"prompt": " ".join(WORDS[: 1 + i % 5]), "completion": " ".join(WORDS[-1 - i % 7 :])} for i in range(24)]
GENERAL_ROWS = [{"prompt": WORDS[i % 10], "completion": " ".join(WORDS[i % 4 : 4 + i % 6])} for i in range(10)]
TEXT_ROWS = [{"text": " ".join(WORDS[i % 3 : 3 + i % 7])} for i in range(24)]

TRAINING = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
}
WRITING = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.7}
SHOWN = "{prompt} {privileged_context}"


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """Share of vowels: something that a model of random weights already varies in."""
    return [sum(text.count(letter) for letter in "aeiou") / max(1, len(text)) for text in completions]


@contextmanager
def scripted() -> Iterator[None]:
    """Completions that follow from the prompt and their place in its group: equal on any number of ranks."""
    from trl import GRPOTrainer

    from cpt.trainers.sdft import SDFTTrainer

    def script(self: Any, prompts: list[list[int]]) -> list[list[int]]:
        first = self.accelerator.process_index * len(prompts)
        places = [(first + i) % self.num_generations for i in range(len(prompts))]
        return [
            [10 + (7 * sum(ids) + 13 * place + 5 * t) % 1000 for t in range(1 + (sum(ids) + place) % 5)]
            for ids, place in zip(prompts, places, strict=True)
        ]

    sampled, written = GRPOTrainer._generate_single_turn, SDFTTrainer._generate_transformers
    GRPOTrainer._generate_single_turn = lambda self, prompts, *rest: (script(self, prompts), None)
    SDFTTrainer._generate_transformers = lambda self, prompts: (prompts, script(self, prompts))
    try:
        yield
    finally:
        GRPOTrainer._generate_single_turn, SDFTTrainer._generate_transformers = sampled, written


@dataclass
class Outcome:
    """Weights before and after, and the stage's facts."""

    before: dict[str, Any]
    after: dict[str, Any]
    facts: dict[str, Any]
    stopped: bool
    lines: list[dict[str, Any]]

    def moved(self) -> set[str]:
        """Names of the tensors that changed by at least a bit."""
        return {name for name, tensor in self.after.items() if not tensor.equal(self.before[name])}


class Lab:
    """Runs small stages; `tokenizer` and `llama` (a model factory) come from the fixtures."""

    def __init__(self, folder: Path, tokenizer: Any, llama: Callable[..., Any]) -> None:
        self.folder, self.tokenizer, self.llama, self.runs = folder, tokenizer, llama, 0
        self.memory = folder / "memory"

    def model(self, lora: bool = False, **config: Any) -> Any:
        """A fresh model with the same weights each time; with `lora` a PEFT model over it."""
        import torch

        model = self.llama(seed=3, **config)
        if not lora:
            return model
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(5)
            return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    def stage(
        self,
        methods: Sequence[Any] = (),
        kind: str = "sft",
        folder: Path | None = None,
        stop_after: int | None = None,
        lora: bool = False,
        world: int = 1,
        dropout: float = 0.0,
        extra: Sequence[Method] = (),
        reward: Callable[..., Any] = vowels,
        reference: Any = None,
        adapters_off: frozenset[str] = frozenset({"base", "start"}),
        **training: Any,
    ) -> Outcome:
        """Train one stage. `methods` are as in YAML; `extra` are instances of methods made up by a test.

        stop_after: ask for a stop once so many steps are logged; run again with the same `folder` to resume.
        reward, reference: of an rft stage. adapters_off: what the model with `lora` is without it.
        """
        from cpt.train_stage import fresh_methods
        from cpt.trainers import sdft, sft, unlearn
        from cpt.trainers.session import Session

        self.runs += 1
        # The likely tokens' border moves with rounding, and Adam makes much of the little there is to distil here.
        whole = {"distillation_mode": "full_logits"} if kind == "sdft" else {}
        training = TRAINING | (WRITING if kind in GENERATING else {}) | whole | training
        config = configured(methods, kind, training, lora)
        batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * world
        about = self.lent(config) | {"adapters_off": adapters_off if lora else frozenset()}
        info = StageInfo(index=1, name="lab", kind=kind, seed=11, batch_rows=batch, world=world, **about)
        data, active = self.data(config, training), [*fresh_methods(config), *extra]
        for method in active:
            method.prepare_data(data, info)
        model = self.model(lora, attention_dropout=dropout)
        before = weights(model)
        lines: list[dict[str, Any]] = []

        def stop() -> bool:
            return stop_after is not None and len(lines) >= stop_after - 1

        session = Session(folder or self.folder / f"stage{self.runs}", stop, lines.append)
        models = iter([model])  # what is opened after the first is a teacher

        def opened() -> Any:
            return next(models, None) or self.model(lora, attention_dropout=dropout)

        given = (opened, self.tokenizer, data, info, active, training, session)
        plain: dict[str, Any] = {"sdft": sdft, "unlearn": unlearn}
        trained = rewarded(given, reward, reference) if kind == "rft" else plain.get(kind, sft).train(*given)
        for method in active if not trained.stopped else ():
            method.finish_stage(trained.model, info)
        return Outcome(before, weights(trained.model), trained.facts, trained.stopped, lines)

    def lent(self, config: Stage) -> dict[str, Any]:
        """What a stage's `StageInfo` holds beside its numbers; answers are written by a script, not by the model."""
        from cpt.data.sources import load_all

        about = {"parent": "start", "memory": self.memory, "record": self.recorded, "open_base": self.model}
        about |= {"earlier": (("before", self.before()),), "identities": {"before": "start"}}
        return about | {"rows": load_all(config.data, None, "data"), "generate": written}

    def before(self) -> Any:
        """Rows of a stage before this one, which left the weights as they were."""
        from cpt.data.sources import load
        from cpt.data.spec import Source

        return load(Source(rows=GENERAL_ROWS), None, "before")

    def recorded(
        self,
        model: Any,
        rows: Any,
        name: str,
        *,
        of: str = "regions",
        who: str = "base",
        make: bool = True,
        **how: Any,
    ) -> Any:
        """What a method asks of its rows; recorded once a lab, whose base every stage starts from."""
        from cpt.data import activations
        from cpt.data.memory import entry
        from cpt.data.recording import Recorder, launched

        own = {name: value for name, value in how.items() if name not in ("key", "precision", "device")}
        about = {"of": of, "who": who, "rows": rows.ids, **own}
        folder = entry(self.memory, name, {**about, "ids": rows.dataset["input_ids"][:]})
        if not make and not (folder / "about.json").is_file():
            return None
        return getattr(activations, f"record_{of}")(Recorder(model, rows.dataset, folder, **launched()), about, **own)

    def batch(self, step: int, methods: Sequence[Any] = (), kind: str = "sft") -> list[dict[str, Any]]:
        """The rows of an optimizer step, from 0, with their `origin` and `row`; four a batch, as `stage` draws them."""
        from cpt.data.sampler import MixedSampler
        from cpt.train_stage import fresh_methods

        config = configured(methods, kind, TRAINING)
        data, info = self.data(config, TRAINING), StageInfo(index=1, name="lab", kind=kind, seed=11, batch_rows=4)
        for method in fresh_methods(config):
            method.prepare_data(data, replace(info, earlier=(("before", self.before()),), memory=self.memory))
        numbers = list(MixedSampler(data.sizes, data.rows_per_batch(4), 4, step + 1, seed=11))[4 * step :]
        rows = data.dataset()
        return [rows[i] for i in numbers]

    def data(self, config: Stage, training: dict[str, Any]) -> StageData:
        """The stage's task rows, tokenised, or its prompts; methods load theirs by the same settings."""
        from cpt.data.prompted import demonstrated, prompted
        from cpt.data.sources import Loaded, drawn, load_all
        from cpt.data.tokens import tokenise
        from cpt.trainers.sft import token_settings

        settings = token_settings(training, "auto")

        def load(sources: Any, place: str, most: int | None = None) -> Any:
            found = sources if isinstance(sources, Loaded) else load_all(sources, None, place)
            return tokenise(drawn(found, most, 0), self.tokenizer, settings, place)

        data = StageData(load)
        rows = load_all(config.data, None, "data").rows
        if config.kind == "rft":
            data.sources[TASK] = prompted(rows, self.tokenizer, "auto", None, "data")
        elif config.kind == "sdft":
            data.sources[TASK] = demonstrated(rows, self.tokenizer, "auto", None, SHOWN, "data")
        elif config.kind == "unlearn":
            return self.to_forget(data, config, training, rows, settings)
        else:
            data.sources[TASK] = load(config.data, "data")
        return data

    def to_forget(
        self, data: StageData, config: Stage, training: dict[str, Any], rows: Any, settings: Any
    ) -> StageData:
        """The rows to forget with their templates, and those to retain."""
        from cpt.data.forgetting import RETAIN, forget_data, passes
        from cpt.data.tokens import tokenise

        turns = passes(training, 4, len(rows))
        made = forget_data(
            data,
            rows,
            lambda rows, place: tokenise(rows, self.tokenizer, settings, place),
            config.template,
            turns,
            11,
            "data",
        )
        if config.retain:
            made.add(RETAIN, data.load(config.retain, "retain", None), round(config.retain_ratio * 4))
        return made


def written(**how: Any) -> Any:
    """Answers anew as a model might write them: the one that was asked about, and a word before it."""
    from cpt.data.rewritten import Written

    def answers(row: Any) -> Any:
        answer = row.prompt.partition("Reference answer:\n")[2].partition("\n")[0]
        return Written(f" well {answer.strip()}", ended=True)

    return lambda parts: ([answers(row) for row in part] for part in parts)


def configured(methods: Sequence[Any], kind: str, training: dict[str, Any], lora: bool = False) -> Stage:
    """A stage of the lab's rows, as a stream writes it."""
    fields = {"name": "lab", "kind": kind, "methods": list(methods), "training": training}
    fields |= {"adapter": "new"} if lora else {}
    fields |= {"data": {"rows": TEXT_ROWS if kind == "pretrain" else TASK_ROWS}}
    if kind == "unlearn":
        fields |= {"retain": {"rows": GENERAL_ROWS}, "retain_ratio": 0.25, "template": {"lines": ["t", "no uv"]}}
    return Stage.model_validate(fields | {"rewards": [f"{__name__}:vowels"] if kind == "rft" else []})


def rewarded(about: Sequence[Any], reward: Callable[..., Any], reference: Any) -> Any:
    """Train an rft stage with one reward; `about` as `rft.train` takes it."""
    from cpt.rewards.scoring import Scored
    from cpt.trainers import rft

    return rft.train(*about, rft.Rewarding([Scored(reward, reward.__name__, "lab")], [1.0], reference))


def weights(model: Any) -> dict[str, Any]:
    """A copy of every parameter, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest difference of any entry."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)
