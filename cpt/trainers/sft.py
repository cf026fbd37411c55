"""Train one sft or pretrain stage: rows to tokens, tokens to a plugged SFTTrainer, and back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from cpt.data.collator import Collator
from cpt.data.sampler import MixedSampler, steps_for
from cpt.data.stage_data import StageData
from cpt.data.tokens import TokenSettings
from cpt.errors import DataError
from cpt.methods.base import Method, StageInfo
from cpt.methods.step import Step
from cpt.schedule import Schedule
from cpt.trainers.plug import Seam, plug
from cpt.trainers.rates import Rates
from cpt.trainers.session import Session, Trained, arguments, prepared, train_to_end

_TOKEN_FIELDS = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "packing",
    "packing_strategy",
)


def token_settings(training: dict[str, Any], chat_template: Any) -> TokenSettings:
    """The part of the trainer arguments that decides how rows become tokens."""
    given = {key: training[key] for key in _TOKEN_FIELDS if key in training}
    return TokenSettings(**given, chat_template=chat_template)


def sft_config(training: dict[str, Any], folder: Path, seed: int) -> SFTConfig:
    """SFTConfig of a stage. Raises ConfigError for values that TRL refuses."""
    decided = {
        # The rows are packed and masked already, by source: TRL must not do it again.
        "packing": False,
        "assistant_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return arguments(SFTConfig, training, folder, seed, decided)


def train(
    open_model: Callable[[], Any],
    tokenizer: Any,
    data: StageData,
    stage: StageInfo,
    methods: Sequence[Method],
    training: dict[str, Any],
    session: Session,
    schedule: Schedule | None = None,
    goes_on_from: Path | None = None,
    seam: "type[TokenSeam] | None" = None,
) -> Trained:
    """Run the stage in the session's folder, from its newest checkpoint if there is one.

    open_model gives the model as the stage's parent left it; it is called once the trainer's arguments exist,
    for under ZeRO-3 they decide how weights are loaded. goes_on_from: the folder that the schedule has the stage
    start from, its optimizer's state included. `stopped` of the outcome is true when the session asked
    for a stop: a checkpoint is then written. seam: of another kind of stage that learns tokens. Raises as
    `train_to_end`.
    """
    args = sft_config(training, session.checkpoints, stage.seed)
    shares = data.rows_per_batch(stage.batch_rows)
    task_rows = stage.batch_rows - sum(shares.values())
    stage = replace(stage, epoch_steps=data.pool / task_rows)
    model = prepared(open_model, args, methods, stage)
    _check_attention(model, args, training)
    if args.max_steps <= 0:
        args.max_steps = steps_for(args.num_train_epochs, data.pool, task_rows)
    if schedule is not None and args.max_steps < 2:
        raise DataError(
            f"stages.{stage.name}.schedule = {schedule.type!r}: a stage of 1 step has nothing before its anneal that "
            "the next could go on from: raise training.max_steps, or leave the schedule out"
        )
    trainer = plug(SFTTrainer, seam or TokenSeam)(
        model=model,
        args=args,
        train_dataset=data.dataset(),
        data_collator=Collator(
            tokenizer.pad_token_id, training.get("pad_to_multiple_of"), bool(training.get("packing")), data.beside
        ),
        processing_class=tokenizer,
        sampler=MixedSampler(data.sizes, shares, stage.batch_rows, args.max_steps, stage.seed, data.copies),
        methods=methods,
        stage=stage,
        origins=data.origins,
        rates=Rates(schedule, args.max_steps, session.folder, goes_on_from) if schedule else None,
    )
    return train_to_end(trainer, methods, session)


def _check_attention(model: Any, args: SFTConfig, training: dict[str, Any]) -> None:
    flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
    if training.get("packing") and flash and args.per_device_train_batch_size > 1:
        raise DataError(
            "packing with flash attention tells packed rows apart only in batches of one row: set "
            "training.per_device_train_batch_size to 1 (and raise gradient_accumulation_steps), "
            "or model.attn_implementation to sdpa."
        )


class TokenSeam(Seam):
    """The seam of stages that learn tokens: all rows of a batch, the task's and added ones, share one forward."""

    _total_train_tokens: int

    def tokens_seen(self) -> int:
        """Tokens of all batches so far, padding left out."""
        return int(self._total_train_tokens)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Also counts what the whole effective batch holds, over all ranks: what sums are divided by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if self._weighers or self._adders:
            self._window = self._count(batches, device)
        return batches, items

    def _count(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
        counts = torch.zeros(len(self._origins), 2, device=device)
        for batch in batches:
            learned = batch["labels"][:, 1:].ne(-100).sum(1)
            per_row = torch.stack([learned, torch.ones_like(learned)], dim=1).to(counts)
            counts.index_add_(0, batch["origin"].to(device), per_row)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        table = dict(zip(self._origins, counts.tolist(), strict=True))
        window = {f"{name}_tokens": tokens for name, (tokens, _) in table.items()}
        window |= {f"{name}_rows": rows for name, (_, rows) in table.items()}
        tokens, rows = counts.sum(0).tolist()
        return window | {"tokens": tokens, "rows": rows, "batches": float(len(batches) * self.args.world_size)}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, and what token weights and terms add to it.

        Times the number of ranks, because DDP and DeepSpeed average gradients.
        """
        origin, row = inputs.pop("origin"), inputs.pop("row")
        loss = self._watched_loss(model, inputs, return_outputs, num_items_in_batch)
        if "attention_mask" not in inputs:  # TRL counts one packed row per micro-batch; here there are B
            self._total_train_tokens += inputs["input_ids"].numel() - inputs["input_ids"].size(1)
        if not (self._weighers or self._adders):
            return loss
        step = self._captured_step(model, origin, row)
        return loss + (self._reweighed(step) + self._terms(step)) * self.accelerator.num_processes

    def _reweighed(self, step: Step) -> torch.Tensor:
        """(product of weights - 1) x token loss: TRL's scalar, which holds weight 1, stays whole."""
        factors = self._weights(step)
        if factors is None:
            return step.log_probs.new_zeros(())
        return ((factors - 1.0) * self._token_losses(step)).sum() / max(1.0, self._window["tokens"])

    def _token_losses(self, step: Step) -> torch.Tensor:
        """(B, T-1) as TRL has them."""
        if self.args.loss_type == "dft":
            return -step.log_probs * step.log_probs.exp().detach()
        return -step.log_probs
