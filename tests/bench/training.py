"""Step time and optimizer state of a 65 M Llama on batches of 4 x 128 tokens, in float32.

At the half million parameters of the tiny world one would measure only the trainer's overhead.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from cpt import resources
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import TokenRows
from cpt.methods.base import Method, StageInfo
from cpt.methods.hft import HFT
from cpt.quiet import CALLBACKS, quiet
from cpt.trainers.sft import train
from tests.bench.figures import Figure, ratio_of
from tests.bench.timing import StepEnd, Training, interleave, steps_for

ROWS, BATCH, LENGTH, VOCABULARY = 64, 4, 128, 8192
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
}
ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def sft_no_methods(repeats: int) -> list[Figure]:
    """A cpt stage without methods against bare TRL: the same rows, arguments and weights."""
    with TemporaryDirectory() as folder, quiet():
        steps = steps_for(repeats)
        sides: dict[str, Training] = {
            "cpt": partial(stage, Path(folder), steps, ()),
            "trl": partial(bare, Path(folder), steps),
        }
        seconds, _ = interleave(sides, repeats)
    name = "sft step, no methods / bare SFTTrainer"
    return [ratio_of(name, seconds["cpt"], seconds["trl"], ("cpt", "trl"), most=1.03)]


def half_fine_tuning(repeats: int) -> list[Figure]:
    """hft against full fine-tuning, both as cpt stages: step time, and what the optimizer really holds."""
    with TemporaryDirectory() as folder, quiet():
        steps = steps_for(repeats)
        frozen = HFT(embeddings="frozen", head="frozen")
        sides = {
            "hft": partial(stage, Path(folder) / "hft", steps, [frozen]),
            "full": partial(stage, Path(folder) / "full", steps, []),
        }
        seconds, facts = interleave(sides, repeats)
        trained = stage(Path(folder) / "trained", 2, [HFT()], lambda: False)
    state = {name: found["optimizer_state_elements"] for name, found in (facts | {"trained": trained}).items()}
    reported = trained["methods"]["hft"]["trained_share"]
    agreement = state["trained"] / state["full"] / reported
    return [
        ratio_of("hft step, embeddings frozen / full", seconds["hft"], seconds["full"], ("hft", "full"), most=0.92),
        Figure("hft optimizer state, embeddings frozen / full", state["hft"] / state["full"], "x", most=0.52),
        Figure("hft optimizer state, embeddings trained / reported share", agreement, "x", most=1.02, least=0.98),
    ]


def stage(folder: Path, steps: int, methods: Iterable[Method], step_end: StepEnd) -> dict[str, Any]:
    """Train one stage as `cpt run` does, from rows that are tokens already; return its facts.

    The stage asks at the end of every step but the last whether it should stop: that is where the clock hangs.
    """
    data = StageData(load=_no_sources)
    data.sources[TASK] = TokenRows(rows())
    info = StageInfo(index=1, name="bench", kind="sft", seed=0, batch_rows=BATCH)
    training = TRAINING | {"max_steps": steps}
    return train(llama(), tokenizer(), data, info, list(methods), training, folder, step_end, lambda line: None).facts


def bare(folder: Path, steps: int, step_end: StepEnd) -> None:
    """Train with TRL alone: its own collator, sampler and loop."""
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        dataset_kwargs={"skip_prepare_dataset": True},
        **TRAINING,
        **ON_CPU,
    )
    trainer = SFTTrainer(
        model=llama(), args=args, train_dataset=rows(), processing_class=tokenizer(), callbacks=[_Probe(step_end)]
    )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in CALLBACKS]:
        trainer.remove_callback(callback)
    trainer.train()


class _Probe(TrainerCallback):
    """Calls `step_end` where a cpt stage calls it."""

    def __init__(self, step_end: StepEnd) -> None:
        self.step_end = step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_end()


def llama() -> LlamaForCausalLM:
    """12 layers, hidden 640, tied embeddings: 64.7 million random parameters, the same ones each time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """The tiny world's: trainers ask for one, no row of ours goes through it."""
    return AutoTokenizer.from_pretrained(resources.model_path("tiny-world"))


def rows() -> datasets.Dataset:
    """Random tokens, every one of them learned; no row needs padding."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=(ROWS, LENGTH)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def _no_sources(sources: Any, place: str, most_rows: int | None) -> TokenRows:
    raise ValueError(f"{place}: the bench's methods add no rows, but one asked for {sources}")
