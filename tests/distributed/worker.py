"""What each rank runs: every case of the battery as one stage, rank 0 keeps the weights.

torchrun --nproc_per_node 2 -m tests.distributed.worker FOLDER
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from cpt.methods import registry
from cpt.processes import start
from tests.contract.cases import CASES
from tests.contract.lab import Lab, scripted

# name -> (methods as in YAML, kind, with LoRA)
STAGES: dict[str, tuple[list[dict[str, Any]], str, bool]] = {
    "plain": ([], "sft", False),
    "plain_rft": ([], "rft", False),
    "plain_sdft": ([], "sdft", False),
}
for _name, _case in CASES.items():
    for _kind in _case.kinds(_case.settings):
        STAGES[f"{_name}_{_kind}"] = ([_case.settings], _kind, _case.lora)
    _kind = "unlearn" if registry.find(_name).forgets else "sft"
    STAGES[f"{_name}_lora"] = ([_case.settings], _kind, True)
    for _i, _also in enumerate((*_case.also, *_case.not_rft, *_case.not_lora)):
        STAGES[f"{_name}_also_{_i}"] = ([_also], _kind, _case.lora)
_SHARE = {"ratio": 0.25}  # of each that adds rows, or four rows would leave none to the task
STAGES["all_together"] = (
    [
        case.settings | (_SHARE if name in ("replay", "gere", "der") else {})
        for name, case in CASES.items()
        if not (case.lora or registry.find(name).forgets)
    ],
    "sft",
    False,
)


def main(folder: Path) -> None:
    """Train every stage on as many ranks as there are, twice the accumulation of rows per rank."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from tests.models import llama

    processes = start(2)
    tokenizer = AutoTokenizer.from_pretrained("cpt/assets/tiny_world")
    lab = Lab(folder, tokenizer, partial(llama, tokenizer))
    for name, (methods, kind, lora) in STAGES.items():
        with scripted():
            outcome = lab.stage(methods, kind=kind, lora=lora, world=2, per_device_train_batch_size=2, save_steps=100)
        if processes.is_main:
            save_file({k: v.contiguous() for k, v in outcome.after.items()}, folder / f"{name}.safetensors")
            keep = ("processes", "distributed_type", "methods")
            (folder / f"{name}.json").write_text(json.dumps({key: outcome.facts[key] for key in keep}))
    processes.end()
    os._exit(0)  # a gloo thread that is still alive when the interpreter goes aborts about one run in ten


if __name__ == "__main__":
    main(Path(sys.argv[1]))
