"""What we stand on in TRL, transformers, accelerate, PEFT and datasets, one test per fact.

An upgrade should fail here first. Each message says which part of ours depends on the fact: read it
before touching the test.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

# The old name works in every transformers we allow (>= 5.19); 5.23 warns of it, version 6 drops it.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

VOCAB, PAD = 64, 0

SIGNATURES = [
    (SFTTrainer.compute_loss, ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
    (Trainer._get_train_sampler, ["self", "train_dataset"]),
    (Trainer.get_batch_samples, ["self", "epoch_iterator", "num_batches", "device"]),
    (Trainer.training_step, ["self", "model", "inputs", "num_items_in_batch"]),
    (Trainer._set_signature_columns_if_needed, ["self"]),
    (Trainer._save_checkpoint, ["self", "model", "trial"]),
    (Trainer._load_from_checkpoint, ["self", "resume_from_checkpoint", "model"]),
    (Trainer._load_optimizer_and_scheduler, ["self", "checkpoint"]),
    (Trainer._load_rng_state, ["self", "checkpoint"]),
    (Trainer.create_optimizer, ["self", "model"]),
]

CONFIG_FIELDS = {
    "dataset_kwargs": "skip_prepare_dataset, with which cpt/data owns the tokenised rows",
    "packing": "stage training.packing",
    "packing_strategy": "packing per source in cpt/data",
    "padding_free": "refused by the seam: origins are per row",
    "completion_only_loss": "stage kind sft on prompt-completion rows",
    "assistant_only_loss": "stage kind sft on chat rows",
    "max_length": "truncation in cpt/data",
    "loss_type": "the seam multiplies nll's token losses",
    "use_cpu": "training where there is no accelerator",
    "remove_unused_columns": "the columns origin and row id",
    "data_seed": "the seed of the stage's sampler",
    "save_only_model": "resume inside a stage needs the optimizer",
    "average_tokens_across_devices": "num_items_in_batch counts every rank",
}


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=1)


@pytest.fixture
def rows() -> Dataset:
    """Eight tokenised rows of different lengths, the first two tokens of each without a label."""
    ids = [[2 + (7 * i + 3 * j) % (VOCAB - 2) for j in range(4 + i)] for i in range(8)]
    labels = [[-100, -100, *row[2:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "origin": [0, 1] * 4})


@pytest.fixture
def trainer(model, rows, tiny_tokenizer, tmp_path):
    """`trainer(cls=SFTTrainer, callbacks=(), **arguments)`: TRL as cpt/trainers builds it, on the CPU."""

    def build(cls: type[SFTTrainer] = SFTTrainer, callbacks=(), **arguments) -> SFTTrainer:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,  # TRL's default is True
            "per_device_train_batch_size": 2,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return cls(
            model=model,
            args=SFTConfig(**(settings | arguments)),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            callbacks=list(callbacks),
        )

    return build


def batch_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


# ---- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "parameters"), SIGNATURES, ids=lambda value: getattr(value, "__name__", ""))
def test_methods_the_seam_overrides_or_calls_keep_their_parameters(method, parameters) -> None:
    found = list(inspect.signature(method).parameters)
    assert found == parameters, f"cpt/trainers/plug.py stands on {method.__qualname__}{tuple(parameters)}"


def test_sft_trainer_is_a_transformers_trainer_without_a_sampler_of_its_own() -> None:
    assert issubclass(SFTTrainer, Trainer)
    owner = next(cls for cls in SFTTrainer.__mro__ if "_get_train_sampler" in vars(cls))
    assert owner is Trainer, f"{owner.__name__} samples by itself: the seam's exact quotas stand on Trainer's"


@pytest.mark.parametrize("field", CONFIG_FIELDS)
def test_sft_config_has_the_fields_we_set(field: str) -> None:
    assert field in {f.name for f in dataclasses.fields(SFTConfig)}, f"needed for: {CONFIG_FIELDS[field]}"


@pytest.mark.parametrize("gone", ["warmup_ratio", "evaluation_strategy", "overwrite_output_dir", "group_by_length"])
def test_fields_gone_from_training_arguments_are_still_gone(gone: str) -> None:
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert gone not in names, f"{gone} is back: config's hint for it (cpt validate) is wrong"


# ---- the fused LM head -----------------------------------------------------------------------------


def test_fused_forward_gives_label_log_probs_and_no_logits(trainer, model) -> None:
    inputs = batch_of(trainer := trainer())
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        fused = trainer.model(**inputs, fused_lm_head=True)
        logits = trainer.model(**plain, use_cache=False).logits

    labels = inputs["labels"][:, 1:]
    expected = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    depends = "Step.out of cpt/trainers/plug.py (log_probs, entropy, label_mask: B x (T-1), zero where -100)"
    assert torch.equal(fused.label_mask.bool(), labels != -100), depends
    torch.testing.assert_close(fused.log_probs, expected * (labels != -100), atol=1e-5, rtol=1e-5)
    assert fused.entropy.shape == fused.is_top1.shape == labels.shape, depends
    assert fused.get("logits") is None, "full-vocabulary methods would no longer need a forward of their own"
    assert fused.get("hidden_states") is None, "hidden states would no longer need a hook"


def test_fused_log_probs_carry_the_gradient(trainer) -> None:
    inputs = batch_of(trainer := trainer())
    trainer.model(**inputs, fused_lm_head=True).log_probs.sum().backward()
    gradients = [p.grad for p in trainer.model.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients), "loss terms of methods train nothing"


def test_compute_loss_is_the_label_log_probs_over_num_items(trainer) -> None:
    inputs = batch_of(trainer := trainer())
    fused = trainer.model(**inputs, fused_lm_head=True)
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(7))
    expected = -fused.log_probs.sum() / 7
    torch.testing.assert_close(loss, expected, msg=lambda m: f"cpt/trainers/plug.py's one formula: {m}")


# ---- rows, sampler, window -------------------------------------------------------------------------


def test_skip_prepare_leaves_rows_and_columns_alone(trainer, rows) -> None:
    kept = trainer(remove_unused_columns=False).train_dataset
    assert kept.column_names == rows.column_names, "cpt/data hands over origin and row id as columns"
    assert kept["input_ids"] == rows["input_ids"], "cpt/data owns order and truncation"


def test_a_plain_sampler_survives_accelerate_and_is_told_the_epoch(trainer) -> None:
    class Backwards(Sampler):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self):
            return iter(range(7, -1, -1))

        def __len__(self) -> int:
            return 8

    sampler, lengths = Backwards(), []

    class Ours(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            lengths.extend(batch["attention_mask"].sum(-1).tolist() for batch in samples)
            return samples, items

    trainer(Ours, num_train_epochs=2).train()
    assert lengths == 2 * [[11, 10], [9, 8], [7, 6], [5, 4]], "exact replay quotas stand on the sampler's order"
    assert sorted(set(sampler.epochs)) == [0, 1], "the sampler draws anew per epoch through set_epoch"


def test_get_batch_samples_holds_the_whole_accumulation_window(trainer) -> None:
    windows = []

    class Ours(SFTTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
            windows.append((len(samples), int(items), sum(int((b["labels"][:, 1:] != -100).sum()) for b in samples)))
            return samples, items

    trainer(Ours, gradient_accumulation_steps=2, max_steps=2, train_sampling_strategy="sequential").train()
    assert [count for count, *_ in windows] == [2, 2], "the seam counts Step.window here, before the first loss"
    assert all(items == counted for _, items, counted in windows), "num_items_in_batch counts shifted labels"


@pytest.mark.parametrize(("scaled", "share"), [(True, 1.0), (False, 0.25), (None, 1.0)])
def test_loss_is_scaled_for_ga_decides_who_divides(trainer, scaled: bool | None, share: float) -> None:
    class Ours(SFTTrainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum(p.sum() for p in model.parameters()) * 0 + 1.0

    inputs = batch_of(trainer := trainer(Ours))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 4
    loss = trainer.training_step(trainer.model, inputs, torch.tensor(7))
    assert float(loss) == share, "the seam says it is scaled and normalises by itself, over the window"


def test_max_steps_zero_still_takes_a_step(trainer) -> None:
    depends = "if this trains nothing now, a stage without training may build a trainer (cpt/stream.py)"
    assert trainer(max_steps=0).train().global_step > 0, depends


def test_bfd_packing_keeps_three_columns(rows) -> None:
    from trl import pack_dataset

    packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), seq_length=16, strategy="bfd")
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths"}, "packing per source in cpt/data"
    assert sum(map(sum, packed["seq_lengths"])) == sum(map(len, rows["input_ids"])), "no token is lost"


# ---- order of a step, checkpoints ------------------------------------------------------------------


def test_order_of_an_optimizer_step(trainer) -> None:
    events: list[str] = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            events.append("pre")

        def on_optimizer_step(self, *_, **__):
            events.append("post")

        def on_step_end(self, *_, model, **__):
            events.append(
                "end, gradients " + ("kept" if any(p.grad is not None for p in model.parameters()) else "gone")
            )

    class Ours(SFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            events.append(f"backward, sync {self.accelerator.sync_gradients}")
            return loss

        def _clip_grad_norm(self, model):
            events.append("clip")
            return super()._clip_grad_norm(model)

    trainer(Ours, [Recorder()], gradient_accumulation_steps=2, max_steps=1).train()
    depends = "edit_gradients runs after training_step where sync_gradients is set, so before clipping"
    assert events == [
        "backward, sync False",
        "backward, sync True",
        "clip",
        "pre",
        "post",
        "end, gradients gone",
    ], depends


@pytest.fixture
def checkpoint(trainer, tmp_path) -> Path:
    trainer(save_strategy="steps", save_steps=2, max_steps=2, learning_rate=1e-2).train()
    return tmp_path / "out" / "checkpoint-2"


def test_a_checkpoint_holds_these_files_and_no_other_pickle(checkpoint) -> None:
    files = {path.name for path in checkpoint.iterdir()}
    state = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert state <= files, "cpt/run_dir.py hashes these, and resume refuses a checkpoint without them"
    pickles = {name for name in files if name.endswith((".pt", ".pth", ".bin", ".pkl"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_checkpoint_state_loads_with_weights_only(checkpoint, name: str) -> None:
    assert torch.load(checkpoint / name, weights_only=True), "no code runs when a stage resumes"


def test_resume_never_reads_training_args(checkpoint, trainer, model) -> None:
    (checkpoint / "training_args.bin").unlink()
    resumed = trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    assert resumed.global_step == 3, "we delete training_args.bin, a pickle, from every checkpoint"


# ---- PEFT, chat templates --------------------------------------------------------------------------


def test_disable_adapter_unfreezes_what_was_frozen(model) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tensors = [p for name, p in adapted.named_parameters() if "lora_" in name]
    for tensor in tensors[::2]:
        tensor.requires_grad_(False)
    with adapted.disable_adapter():
        pass
    unfrozen = all(tensor.requires_grad for tensor in tensors)
    assert unfrozen, "PEFT keeps frozen halves now: the seam need not re-assert the trainable set any more"


def test_chat_template_returns_a_mapping_and_assistant_masks(tiny_tokenizer) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    plain = tiny_tokenizer.apply_chat_template(chat, tokenize=True)
    assert list(plain["input_ids"]), "eval_harness/prompts.py reads input_ids of a BatchEncoding"
    masked = tiny_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    mask = masked["assistant_masks"]
    assert len(mask) == len(masked["input_ids"]), "assistant-only loss reads assistant_masks"
    assert 0 < sum(mask) < len(mask), "assistant-only loss reads assistant_masks"
