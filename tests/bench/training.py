"""Step time and optimizer state of a 65 M Llama on batches of 4 x 128 tokens, in float32.

At the half million parameters of the tiny world one would measure only the trainer's overhead.
"""

from collections.abc import Callable, Sequence
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
from cpt.adapters.spec import DEFAULTS
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import TokenRows
from cpt.methods.base import Method, StageInfo
from cpt.methods.hft import HFT
from cpt.quiet import CALLBACKS, quiet
from cpt.trainers import sft
from cpt.trainers.session import Session
from tests.bench.figures import Figure, ratio_of
from tests.bench.timing import StepEnd, interleave, steps_for

ROWS, BATCH, LENGTH = 64, 4, 128
SHAPE: dict[str, Any] = {  # 64.7 million parameters
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
}
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
    return [_against_trl("sft step, no methods / bare SFTTrainer", llama, repeats)]


def lora(repeats: int) -> list[Figure]:
    """A cpt stage that trains an adapter against bare TRL with the same PEFT model."""
    return [_against_trl("LoRA sft step / bare SFTTrainer with the same PEFT model", adapted, repeats)]


def _against_trl(name: str, open_model: Callable[[], Any], repeats: int) -> Figure:
    with TemporaryDirectory() as folder, quiet():
        steps = steps_for(repeats)
        sides = {
            "cpt": partial(stage, Path(folder), steps, open_model=open_model),
            "trl": partial(bare, Path(folder), steps, open_model=open_model),
        }
        seconds, _ = interleave(sides, repeats)
    return ratio_of(name, seconds["cpt"], seconds["trl"], ("cpt", "trl"), most=1.03)


def half_fine_tuning(repeats: int) -> list[Figure]:
    """hft against full fine-tuning, both as cpt stages: step time, and what the optimizer really holds."""
    with TemporaryDirectory() as folder, quiet():
        steps = steps_for(repeats)
        frozen = HFT(embeddings="frozen", head="frozen")
        sides = {
            "hft": partial(stage, Path(folder) / "hft", steps, methods=[frozen]),
            "full": partial(stage, Path(folder) / "full", steps),
        }
        seconds, facts = interleave(sides, repeats)
        trained = stage(Path(folder) / "trained", 2, lambda: False, methods=[HFT()])
    state = {name: found["optimizer_state_elements"] for name, found in (facts | {"trained": trained}).items()}
    reported = trained["methods"]["hft"]["trained_share"]
    agreement = state["trained"] / state["full"] / reported
    return [
        ratio_of("hft step, embeddings frozen / full", seconds["hft"], seconds["full"], ("hft", "full"), most=0.92),
        Figure("hft optimizer state, embeddings frozen / full", state["hft"] / state["full"], "x", most=0.52),
        Figure("hft optimizer state, embeddings trained / reported share", agreement, "x", most=1.02, least=0.98),
    ]


def stage(
    folder: Path,
    steps: int,
    step_end: StepEnd,
    methods: Sequence[Method] = (),
    open_model: Callable[[], Any] | None = None,
    batch: int = BATCH,
    world: int = 1,
    general: Any = None,
    memory: Path | None = None,
) -> dict[str, Any]:
    """Train one sft stage as `cpt run` does, from rows that are tokens already; return its facts.

    batch: rows of the effective batch, over all ranks. general: gives the token rows that methods ask for; memory:
    the folder for what they compute of rows. The stage asks at the end of every step but the last whether it should
    stop: that is where the clock hangs.
    """
    data = StageData(load=general or no_sources)
    data.sources[TASK] = TokenRows(rows())
    about: dict[str, Any] = {"memory": memory, "parent": "start", "record": partial(recorded, memory)}
    if open_model is adapted:
        about["adapters_off"] = frozenset({"base", "start"})
    info = StageInfo(index=1, name="bench", kind="sft", seed=0, batch_rows=batch, world=world, **about)
    for method in methods:
        method.prepare_data(data, info)
    training = TRAINING | {"max_steps": steps, "per_device_train_batch_size": batch // world}
    session = Session(folder, step_end, lambda line: None)
    return sft.train(open_model or llama, tokenizer(), data, info, methods, training, session).facts


def recorded(memory: Path, model: Any, rows: TokenRows, name: str, *, of: str = "regions", **how: Any) -> Any:
    """What a method asks of its rows, recorded once."""
    from cpt.data import activations
    from cpt.data.memory import entry
    from cpt.data.recording import Recorder, launched

    own = {key: value for key, value in how.items() if key not in ("who", "key", "precision", "device")}
    about = {"of": of, "rows": [], **own}
    recorder = Recorder(model, rows.dataset, entry(memory, name, about), **launched())
    return getattr(activations, f"record_{of}")(recorder, about, **own)


def bare(folder: Path, steps: int, step_end: StepEnd, open_model: Callable[[], Any]) -> None:
    """Train with TRL alone: its own collator, sampler and loop."""
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        dataset_kwargs={"skip_prepare_dataset": True},
        **TRAINING,
        **ON_CPU,
    )
    run(SFTTrainer(model=open_model(), args=args, train_dataset=rows(), processing_class=tokenizer()), step_end)


def run(trainer: Any, step_end: StepEnd) -> None:
    """Train a bare trainer to its end, without what it prints, and with the clock where a cpt stage has it."""
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ in CALLBACKS]:
        trainer.remove_callback(callback)
    trainer.add_callback(_Probe(step_end))
    trainer.train()


class _Probe(TrainerCallback):
    """Calls `step_end` where a cpt stage calls it."""

    def __init__(self, step_end: StepEnd) -> None:
        self.step_end = step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_end()


def llama(**shape: int) -> LlamaForCausalLM:
    """A Llama of SHAPE, or what is said otherwise, with tied embeddings: random parameters, the same each time."""
    known = tokenizer()
    config = LlamaConfig(
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=known.pad_token_id,
        eos_token_id=known.eos_token_id,
        **(SHAPE | shape),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def adapted() -> Any:
    """That Llama under a LoRA with cpt's defaults (r 8 on every linear layer): 1.2 million parameters to train."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **DEFAULTS))


def tokenizer() -> Any:
    """The tiny world's: trainers ask for one, and only prompts go through it."""
    return AutoTokenizer.from_pretrained(resources.model_path("tiny-world"))


def rows() -> datasets.Dataset:
    """Random tokens, every one of them learned; no row needs padding."""
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], size=(ROWS, LENGTH)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def no_sources(sources: Any, place: str, most_rows: int | None) -> TokenRows:
    """For stages without methods that add rows. Raises ValueError when one asks for some."""
    raise ValueError(f"{place}: the bench's methods add no rows, but one asked for {sources}")
