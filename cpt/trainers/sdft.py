"""Train one sdft stage: the model writes, and learns what it would write with a demonstration before it.

Paper: on-policy self-distillation, arXiv 2601.19897, by a plugged `trl.experimental.sdft.SDFTTrainer`. Cost: sampling,
one forward pass of the teacher over prompt, demonstration and completion, one forward and backward of the student; both
hold full logits of the completions. A teacher that is not the student itself is a second model.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trl.trainer.utils import add_fused_lm_head

from cpt.data.added import added_rows
from cpt.data.collator import Collator
from cpt.data.sampler import GroupSampler
from cpt.data.stage_data import TASK, StageData
from cpt.errors import ConfigError
from cpt.methods.base import Method, StageInfo
from cpt.trainers.generated import GeneratedSeam, check_generation
from cpt.trainers.plug import plug
from cpt.trainers.reference import evaluating, without_adapters
from cpt.trainers.rft import rounds_for
from cpt.trainers.session import Session, Trained, arguments, prepared, spreads_weights, train_to_end

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL is pinned: nothing changes unnoticed

from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

TEACHER_STATE = "teacher.safetensors"
# What TRL looks at only in a stage's first loss.
CHOICES = {
    "teacher_model_kind": ("base", "live", "ema"),
    "distillation_mode": ("topk_logits", "full_logits", "sampled_token"),
}


def sdft_config(training: dict[str, Any], folder: Path, seed: int) -> SDFTConfig:
    """SDFTConfig of a stage. Raises ConfigError for values that TRL refuses, now or in its first step."""
    check_generation(training)
    for name, allowed in CHOICES.items():
        if training.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"training.{name} = {training[name]!r}: must be one of {', '.join(allowed)}")
    if training.get("distillation_mode", "topk_logits") == "topk_logits" and not training.get("distillation_topk", 100):
        raise ConfigError("training.distillation_topk: must be a positive number in distillation_mode: topk_logits")
    made: Any = arguments(SDFTConfig, training, folder, seed, {})
    alone = made.distillation_topk == 1 and not made.distillation_add_tail
    if made.distillation_mode == "topk_logits" and alone:
        raise ConfigError(
            "training.distillation_topk = 1: one token alone has probability 1 with student and teacher, so there is "
            "nothing to learn: take more, or distillation_add_tail: true"
        )
    if made.num_loss_tokens_to_skip >= made.max_completion_length:
        raise ConfigError(
            f"training.num_loss_tokens_to_skip = {made.num_loss_tokens_to_skip}: leaves nothing to learn of "
            f"completions of at most {made.max_completion_length} tokens (max_completion_length)"
        )
    if made.teacher_model_kind == "ema" and (spread := spreads_weights(made)) is not None:
        raise ConfigError(
            f"training.teacher_model_kind = 'ema': {spread} leaves each process a part of every weight, and the "
            "average is taken of whole ones: use base or live, DDP or ZeRO-2"
        )
    return made


def train(
    open_model: Callable[[], Any],
    tokenizer: Any,
    data: StageData,
    stage: StageInfo,
    methods: Sequence[Method],
    training: dict[str, Any],
    session: Session,
) -> Trained:
    """Run the stage in the session's folder, from its newest checkpoint if there is one.

    The task's rows are prompts with and without their demonstration (`cpt.data.prompted.demonstrated`), rows that
    methods added are token rows. As in sft, open_model gives the model as the parent left it; the teacher too.
    Checkpoints and stops wait for the end of a generation. Raises as `train_to_end`.
    """
    args: Any = sdft_config(training, session.checkpoints, stage.seed)
    prompts = data.sources[TASK].dataset
    repeats = args.steps_per_generation * args.num_iterations
    accumulation = args.gradient_accumulation_steps
    rounds_an_epoch = len(prompts) * args.num_generations / args.generation_batch_size
    stage = replace(stage, epoch_steps=rounds_an_epoch * repeats / accumulation)
    model = prepared(open_model, args, methods, stage)
    if args.max_steps <= 0:
        args.max_steps = math.ceil(rounds_for(args, len(prompts)) * repeats / accumulation)
    rounds = math.ceil(args.max_steps * accumulation / repeats)
    if args.distillation_topk is not None:  # more than there are is all of them; TRL's first loss would fail
        args.distillation_topk = min(args.distillation_topk, model.config.get_text_config().vocab_size)
    trainer = plug(SDFTTrainer, DistillSeam)(
        model=model,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        sampler=GroupSampler(
            len(prompts), args.num_generations, args.generation_batch_size, repeats, rounds, stage.seed
        ),
        methods=methods,
        stage=stage,
        origins=data.names,
        open_teacher=open_model,
        added=added_rows(data, stage.seed, accumulation, args.world_size, Collator(tokenizer.pad_token_id)),
    )
    return train_to_end(trainer, methods, session)


class _Ready(DemonstrationTeacherContextBuilder):  # type: ignore[misc]
    """Rows come with the teacher's prompt, as ids, in the place of what is to be put into it."""

    def _compose_teacher_prompt(self, prompt: list[int], privileged_context: list[int]) -> list[int]:
        return privileged_context


class DistillSeam(GeneratedSeam):
    """The seam of self-distilled stages: TRL generates and compares; who teaches is decided here."""

    teacher_model: Any

    def __init__(self, *args: Any, open_teacher: Callable[[], Any], **kwargs: Any) -> None:
        self._open_teacher = open_teacher
        super().__init__(*args, **kwargs)
        self.teacher_context_builder = _Ready(self)
        if self._added_rows is not None:
            add_fused_lm_head(self.causal, temperature=1.0)

    # ---- the teacher ----------------------------------------------------------------------------------

    @property
    def _kind(self) -> str:
        found: str = self.args.teacher_model_kind
        return found

    def _setup_teacher_model(self) -> None:
        """base: the weights that the stage starts from; ema: their moving average; live: the student itself.

        TRL's own choices are a model read again from where the student's configuration says it is from, and under an
        adapter the weights beneath, which are not where the stage starts if it goes on with an adapter.
        """
        off = "start" in self._stage.adapters_off
        beside = self._kind == "ema" or (self._kind == "base" and not off)
        self._average, self._averaged = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        if not beside:
            self.teacher_model = self.model
            return
        teacher = self._open_teacher()
        if self._kind == "ema":
            names = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            self._averaged = {name: tensor for name, tensor in teacher.named_parameters() if name in names}
        self.teacher_model = self.beside(teacher)
        # In float32: a twentieth of what a step changes is below what bfloat16 tells apart.
        self._average = {name: tensor.detach().float() for name, tensor in self._averaged.items()}

    @contextmanager
    def _get_teacher_context_for_self_distillation(self) -> Iterator[None]:
        """Where one model is student and teacher, it teaches without dropout; as base without its adapters too."""
        if self.teacher_model is not self.model:
            yield
            return
        with evaluating(self.model), without_adapters(self.model) if self._kind == "base" else nullcontext():
            yield

    def edit_weights(self) -> None:
        """The methods' edits, then the teacher's average of what came of them."""
        super().edit_weights()
        if self._average and (self.state.global_step + 1) % self.args.teacher_sync_steps == 0:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    if (mean := self._average.get(name)) is not None:
                        mean.lerp_(weight.to(mean), self.args.teacher_update_rate)
            self._teach_average()

    def _teach_average(self) -> None:
        """Round the average into the teacher; of float32 weights it is the teacher's own."""
        with torch.no_grad():
            for name, mean in self._average.items():
                self._averaged[name].copy_(mean)

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        if self._average:
            save_file(
                {name: mean.detach().contiguous() for name, mean in self._average.items()}, folder / TEACHER_STATE
            )

    def _load_own(self, folder: Path) -> None:
        super()._load_own(folder)
        if self._average:
            with torch.no_grad():
                for name, mean in load_file(folder / TEACHER_STATE).items():
                    self._average[name].copy_(mean)
            self._teach_average()

    # ---- rows and loss --------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[list[int]]) -> list[list[int]]:
        """Rows come as ids: those that the evaluation generates from."""
        return [list(ids) for ids in prompts]

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._prepare_training_batch(inputs)  # type: ignore[misc]
        tokens = batch["prompt_mask"].sum() + batch["completion_mask"].sum()
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens.reshape(1)).sum())
        return batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss and the mean token loss of added rows, with the methods' terms on them.

        Times the number of ranks, because DDP and DeepSpeed average gradients.
        """
        self._assert_trainable()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        self._begin_window()
        return loss + self._of_added_rows(model, loss) * self.accelerator.num_processes
