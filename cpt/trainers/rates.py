"""A stage's schedule under its trainer: the rate of every step, and the optimizer's state carried over from before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from cpt.checkpoints import SEAL, keep_state, size_of
from cpt.schedule import STATE, Schedule

OPTIMIZER = "optimizer.pt"  # the trainer's name


@dataclass(frozen=True)
class Rates:
    """The rates of a stage of so many steps; folder: the stage's; state: what an earlier stage kept, to go on from."""

    schedule: Schedule
    steps: int
    folder: Path
    state: Path | None = None

    @property
    def keep_after(self) -> int:
        """Optimizer steps before the anneal: what the stage is then, the next one may go on from."""
        return self.schedule.anneal_step(self.steps)

    def keep(self, checkpoint: Path) -> int:
        """Copy that state out of its checkpoint, if this is it and it is not kept yet. Returns the bytes written."""
        target = self.folder / STATE
        if checkpoint.name != f"checkpoint-{self.keep_after}" or (target / SEAL).is_file():
            return 0
        keep_state(checkpoint, target)
        return size_of(target)

    def scheduler(self, optimizer: Any) -> LambdaLR:
        """The rate of every step, as torch has it."""
        return LambdaLR(optimizer, self.schedule.factor(self.steps, self.state is not None))

    def go_on(self, optimizer: Any) -> None:
        """Give the optimizer the moments of the earlier stage; rates and decay stay the stage's own."""
        if self.state is None:
            return
        kept = torch.load(self.state / OPTIMIZER, map_location="cpu", weights_only=True)
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(kept)
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)
