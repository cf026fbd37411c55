"""What each rank runs: every case of the battery as one stage, rank 0 keeps the weights.

torchrun --nproc_per_node 2 -m tests.distributed.worker FOLDER
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

from tests.contract.lab import Lab, scripted
from tests.distributed.stages import STAGES


def main(folder: Path) -> None:
    """Train every stage on as many ranks as there are, twice the accumulation of rows per rank."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from tests.models import llama

    tokenizer = AutoTokenizer.from_pretrained("cpt/assets/tiny_world")
    lab = Lab(folder, tokenizer, partial(llama, tokenizer))
    for name, (methods, kind, lora) in STAGES.items():
        with scripted():
            outcome = lab.stage(methods, kind=kind, lora=lora, world=2, per_device_train_batch_size=2, save_steps=100)
        if dist.get_rank() == 0:
            save_file({k: v.contiguous() for k, v in outcome.after.items()}, folder / f"{name}.safetensors")
            keep = ("processes", "distributed_type", "methods")
            (folder / f"{name}.json").write_text(json.dumps({key: outcome.facts[key] for key in keep}))
    dist.barrier()
    dist.destroy_process_group()
    # A gloo thread that is still alive when the interpreter goes aborts about one run in ten, after success.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
