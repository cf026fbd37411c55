"""Train one rft stage: prompts to completions to rewards, by a plugged GRPOTrainer.

Paper: GRPO, arXiv 2402.03300; TRL's default loss is DAPO's, arXiv 2503.14476. Rows that methods add (replay) cost
one forward and backward of their own per micro-batch.
"""

import json
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from cpt.checkpoints import write_json
from cpt.data.added import added_rows
from cpt.data.collator import Collator
from cpt.data.sampler import GroupSampler
from cpt.data.stage_data import TASK, StageData
from cpt.errors import ConfigError
from cpt.methods.base import Method, StageInfo
from cpt.rewards.scoring import Scored
from cpt.trainers.generated import GeneratedSeam, check_generation
from cpt.trainers.plug import plug
from cpt.trainers.session import Session, Trained, arguments, prepared, train_to_end

REWARD_STATE = "rewards.json"
# What TRL looks at only in a stage's first loss.
CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_type": ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


@dataclass(frozen=True)
class Reference:
    """What the policy is kept near: a model of its own, or (open_model None) the policy without its adapters."""

    weight: float
    open_model: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Rewarding:
    """How completions are judged: the rewards with their weights, and the reference if there is one."""

    rewards: Sequence[Scored]
    weights: Sequence[float]
    reference: Reference | None = None


def grpo_config(training: dict[str, Any], folder: Path, seed: int, weights: Sequence[float]) -> GRPOConfig:
    """GRPOConfig of a stage. Raises ConfigError for values that TRL refuses, now or in its first step."""
    check_generation(training)
    for name, allowed in CHOICES.items():
        if training.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"training.{name} = {training[name]!r}: must be one of {', '.join(map(str, allowed))}")
    return arguments(GRPOConfig, training, folder, seed, {"reward_weights": list(weights)})


def rounds_for(args: Any, prompts: int) -> int:
    """Generations after which every prompt was answered `num_train_epochs` times."""
    return max(1, math.ceil(args.num_train_epochs * prompts * args.num_generations / args.generation_batch_size))


def train(
    open_model: Callable[[], Any],
    tokenizer: Any,
    data: StageData,
    stage: StageInfo,
    methods: Sequence[Method],
    training: dict[str, Any],
    session: Session,
    rewarding: Rewarding,
) -> Trained:
    """Run the stage in the session's folder, from its newest checkpoint if there is one.

    The task's rows are prompts (`cpt.data.prompted`), rows that methods added are token rows. As in sft, open_model
    gives the model as the parent left it. Checkpoints and stops wait for the end of a generation: TRL forgets
    completions that are not learned from yet. Raises as `train_to_end`, and TrainingError for a reward that
    gives something that is no reward.
    """
    args: Any = grpo_config(training, session.checkpoints, stage.seed, rewarding.weights)
    prompts = data.sources[TASK].dataset
    repeats = args.steps_per_generation * args.num_iterations
    accumulation = args.gradient_accumulation_steps
    rounds_an_epoch = len(prompts) * args.num_generations / args.generation_batch_size
    stage = replace(stage, epoch_steps=rounds_an_epoch * repeats / accumulation)
    model = prepared(open_model, args, methods, stage)
    if args.max_steps <= 0:
        args.max_steps = math.ceil(rounds_for(args, len(prompts)) * repeats / accumulation)
    rounds = math.ceil(args.max_steps * accumulation / repeats)
    collator = Collator(tokenizer.pad_token_id)
    trainer = plug(GRPOTrainer, RewardSeam)(
        model=model,
        args=args,
        reward_funcs=list(rewarding.rewards),
        train_dataset=prompts,
        processing_class=tokenizer,
        sampler=GroupSampler(
            len(prompts), args.num_generations, args.generation_batch_size, repeats, rounds, stage.seed
        ),
        methods=methods,
        stage=stage,
        origins=data.names,
        rewarding=rewarding,
        added=added_rows(data, stage.seed, accumulation, args.world_size, collator),
    )
    trained = train_to_end(trainer, methods, session)
    trained.facts["rewards"] = trainer.reward_facts()
    return trained


class RewardSeam(GeneratedSeam):
    """The seam of rewarded stages: TRL generates and judges."""

    processing_class: Any
    ref_model: Any
    temperature: float
    reward_funcs: list[Scored]

    def __init__(self, *args: Any, rewarding: Rewarding, **kwargs: Any) -> None:
        self._prompt_ids = list[list[int]]()
        super().__init__(*args, **kwargs)
        if rewarding.reference is not None:
            self._keep_near(rewarding.reference)
        if self._added_rows is not None and self.temperature != 1.0:
            self._at_one = {"unit_temperature": True}
            _score_at_one(self.causal, self.args.cast_lm_head_to_fp32)

    def _keep_near(self, reference: Reference) -> None:
        """TRL's KL term towards a reference of ours: its own choices are the stage's start, or an adapter alone."""
        self.beta = reference.weight
        if reference.open_model is None:
            return  # TRL asks a PEFT model without its adapters
        model = reference.open_model()
        base = model.get_base_model() if is_peft_model(model) else model
        add_fused_lm_head(base, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        self.ref_model = self.beside(model)

    # ---- rows -----------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [row["input_ids"] for row in inputs]
        rows = [{key: value for key, value in row.items() if key != "input_ids"} for row in inputs]
        return super()._generate_and_score_completions(rows)  # type: ignore[misc]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that the rows came with: those that the evaluation generates from."""
        return [list(ids) for ids in self._prompt_ids], None, {}

    # ---- loss -----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, the terms of methods, and the mean token loss of added rows.

        Times the number of ranks, because DDP and DeepSpeed average gradients.
        """
        loss = self._watched_loss(model, inputs, return_outputs, num_items_in_batch)
        self._begin_window()
        more = loss.new_zeros(())
        if self._adders:
            self._window |= self._completions(inputs)
            origin = torch.zeros(len(inputs["advantages"]), dtype=torch.long, device=loss.device)
            more = more + self._terms(self._captured_step(model, origin, origin))
        return loss + (more + self._of_added_rows(model, loss)) * self.accelerator.num_processes

    def _completions(self, inputs: dict[str, Any]) -> dict[str, float]:
        """Completions and their tokens in the effective batch; tokens as TRL counts them, a mean over a generation."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return {
            "task_tokens": float(inputs["num_items_in_batch"]) * share,
            "task_rows": float(self._stage.batch_rows),
        }

    # ---- rewards --------------------------------------------------------------------------------------

    def reward_facts(self) -> dict[str, dict[str, Any]]:
        """Per reward: completions asked, those on which it raised, the first error. All ranks must call it."""
        ranks = gather_object([[reward.state() for reward in self.reward_funcs]])
        return {
            reward.__name__: {
                "rows": sum(state["rows"] for state in states),
                "raised": sum(state["raised"] for state in states),
                "first": next((state["first_error"] for state in states if state["first_error"]), None),
            }
            for reward, states in zip(self.reward_funcs, zip(*ranks, strict=True), strict=True)
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, facts in self.reward_facts().items():
            if facts["raised"]:
                logs[f"rewards/{name}/raised"] = facts["raised"]
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._states = gather_object([[reward.state() for reward in self.reward_funcs]])
        super()._save_checkpoint(model, trial)

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        write_json(folder / REWARD_STATE, self._states)

    def _load_own(self, folder: Path) -> None:
        super()._load_own(folder)
        states = json.loads((folder / REWARD_STATE).read_text(encoding="utf-8"))[self.accelerator.process_index]
        for reward, state in zip(self.reward_funcs, states, strict=True):
            reward.restore(state)


def _score_at_one(causal: Any, cast_lm_head_to_fp32: bool) -> None:
    """Let `model(..., unit_temperature=True)` score at temperature 1 where TRL's head divides by the sampling one."""
    sampling = causal.forward
    add_fused_lm_head(causal, temperature=1.0, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    unit = causal.forward

    def forward(self: Any, *args: Any, unit_temperature: bool = False, **kwargs: Any) -> Any:
        return (unit if unit_temperature else sampling)(*args, **kwargs)

    # `generate` checks its arguments against the signature, which TRL keeps too.
    forward.__wrapped__ = type(causal).forward  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)
