"""The command `cpt` where accelerate starts FSDP on CPUs: it asks for a GPU and makes DDP of it otherwise.

accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes 2 -m tests.distributed.fsdp_worker run ...

Only that check is lifted: what wraps, trains, saves and gathers is accelerate's and ours, over gloo.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_made = AcceleratorState.__init__


def _made_on_a_cpu(state: Any, *args: Any, fsdp_plugin: Any = None, **about: Any) -> None:
    """What the constructor does for FSDP on a GPU, also for processes on a CPU."""
    _made(state, *args, fsdp_plugin=fsdp_plugin, **about)
    if fsdp_plugin is None or state.distributed_type != DistributedType.MULTI_CPU:
        return
    if state._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(state._mixed_precision)
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = fsdp_plugin
    PartialState._shared_state["distributed_type"] = state.distributed_type


if __name__ == "__main__":
    AcceleratorState.__init__ = _made_on_a_cpu
    from cpt.cli import main

    main()
