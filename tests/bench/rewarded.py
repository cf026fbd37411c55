"""Step time of a rewarded stage: a 60 M Llama, 2 prompts x 4 completions of 16 tokens, generated for every step.

Prompts have 17 to 20 tokens. Long completions would hide the trainer behind generation; here that is 37 % of a step.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from trl import GRPOConfig, GRPOTrainer

from cpt.data.sampler import GroupSampler
from cpt.data.stage_data import TASK, StageData
from cpt.data.tokens import TokenRows
from cpt.methods.base import StageInfo
from cpt.quiet import quiet
from cpt.rewards.scoring import Scored
from cpt.trainers import rft
from cpt.trainers.session import Session
from tests.bench import training
from tests.bench.figures import Figure, ratio_of
from tests.bench.timing import StepEnd, interleave, steps_for
from tests.contract.lab import vowels

PROMPTS, GROUP, BATCH = 64, 4, 8
TRAINING: dict[str, Any] = training.TRAINING | {
    "per_device_train_batch_size": BATCH,
    "num_generations": GROUP,
    "max_completion_length": 16,
}


def rft_no_methods(repeats: int) -> list[Figure]:
    """A cpt stage without methods against bare TRL: the same prompts, order, arguments, weights and reward.

    Raises RuntimeError when the sides differ in a token they sampled, for then they did not do the same work.
    """
    with TemporaryDirectory() as folder, quiet():
        steps = steps_for(repeats)
        sides = {"cpt": partial(stage, Path(folder), steps), "trl": partial(bare, Path(folder), steps)}
        seconds, sampled = interleave(sides, repeats)
    if sampled["cpt"] != sampled["trl"]:
        raise RuntimeError("the two sides of the rft pair sampled different completions: their times say nothing")
    return [
        ratio_of("rft step, no methods / bare GRPOTrainer", seconds["cpt"], seconds["trl"], ("cpt", "trl"), most=1.03)
    ]


def stage(folder: Path, steps: int, step_end: StepEnd) -> list[list[int]]:
    """Train one rft stage as `cpt run` does; return the completions."""
    data = StageData(load=training.no_sources)
    data.sources[TASK] = TokenRows(prompts())
    info = StageInfo(index=1, name="bench", kind="rft", seed=0, batch_rows=BATCH)
    session = Session(folder, own_random_state(step_end), lambda line: None)
    reward = Noted()
    rewarding = rft.Rewarding([Scored(reward, "vowels", "bench")], [1.0])
    rft.train(model, training.tokenizer(), data, info, (), TRAINING | {"max_steps": steps}, session, rewarding)
    return reward.completions


def bare(folder: Path, steps: int, step_end: StepEnd) -> list[list[int]]:
    """Train with TRL alone, but for the order of prompts, which is ours; return the completions."""
    args = GRPOConfig(output_dir=str(folder / "trl"), max_steps=steps, seed=0, **TRAINING, **training.ON_CPU)
    reward = Noted()
    trainer = _SameOrder(
        model=model(),
        args=args,
        reward_funcs=[reward],
        train_dataset=prompts().remove_columns("input_ids"),
        processing_class=training.tokenizer(),
    )
    training.run(trainer, own_random_state(step_end))
    return reward.completions


class _SameOrder(GRPOTrainer):
    """Takes the prompts in the order of a cpt stage."""

    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        return GroupSampler(PROMPTS, GROUP, BATCH, repeats=1, rounds=self.args.max_steps, seed=0)


class Noted:
    """A reward, the share of vowels, that keeps the ids of what it was asked about."""

    __name__ = "vowels"

    def __init__(self) -> None:
        self.completions: list[list[int]] = []

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.completions += completion_ids
        return vowels(completions)


def own_random_state(step_end: StepEnd) -> StepEnd:
    """Give a side its random state back after its pause: both sample from the one generator of the process."""

    def step() -> bool:
        state = torch.get_rng_state()
        stop = step_end()
        torch.set_rng_state(state)
        return stop

    return step


def model() -> Any:
    """The bench's Llama with a vocabulary that the tokenizer can decode: 60.1 million parameters."""
    return training.llama(vocab_size=len(training.tokenizer()))


def prompts() -> datasets.Dataset:
    """Sums of random numbers, as text and as the ids that TRL makes of it."""
    numbers = np.random.default_rng(0).integers(0, 100, size=(PROMPTS, 5)).tolist()
    texts = [" + ".join(map(str, some)) + " =" for some in numbers]
    return datasets.Dataset.from_dict({"input_ids": training.tokenizer()(texts)["input_ids"], "prompt": texts})
