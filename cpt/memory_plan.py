"""What training holds in memory, by arithmetic: bytes per process of weights, gradients, optimizer and activations.

Parameters are counted as in ZeRO (arXiv 1910.02054, section 3.1), whose stages 1, 2 and 3 spread optimizer state,
gradients and weights over the processes. Communication buckets, fragmentation and the device's own context come on
top: one or two GiB on a GPU.
"""

import re
from collections.abc import Collection

from cpt.errors import ConfigError

PARTS = ("weights", "gradients", "optimizer")
# Bytes of one weight and of its gradient. "mixed": float32 weights with `training.bf16`; autocast keeps a 16-bit copy
# of each weight that a matrix product reads until the step ends.
PRECISIONS = {"float32": (4, 4), "mixed": (6, 4), "bfloat16": (2, 2), "float16": (2, 2)}
# Moments that an optimizer keeps of every weight; Adafactor's are rows and columns, too few to count.
MOMENTS = {"adamw": 2, "ademamix": 3, "adagrad": 1, "rmsprop": 1, "lion": 1, "sgd": 0, "adafactor": 0}
OFFLOADED = {"optimizer": ("gradients", "optimizer"), "weights": ("weights",)}


def training_bytes(
    parameters: float,
    trained_share: float = 1.0,
    precision: str = "bfloat16",
    optimizer: str = "adamw_torch_fused",
    zero_stage: int = 0,
    offload: Collection[str] = (),
    world: int = 1,
    on: str = "device",
) -> dict[str, float]:
    """Bytes that one process holds, activations aside: {"weights", "gradients", "optimizer"}.

    parameters: of the model. trained_share: of them, those with a gradient.
    precision: a key of PRECISIONS. optimizer: a name of `training.optim`; moments have the weights' own precision, or
    the bits in the name ("adamw_8bit").
    zero_stage: 0 without DeepSpeed (plain, DDP), else 1, 2 or 3: weights and gradients then have 16 bits unless
    precision is "float32", and the optimizer keeps float32 weights and float32 moments whatever they were loaded in.
    offload: of {"optimizer", "weights"}, what lies in the memory of the machine; gradients lie with the optimizer.
    world: processes. on: "device", or "host" for what was moved there.
    Raises ConfigError for a value that is none of these.
    """
    _check(precision, zero_stage, offload, on)
    width, gradient = PRECISIONS[precision]
    held = 4 if precision in ("float32", "mixed") else 2
    if zero_stage:
        width = gradient = 4 if precision == "float32" else 2
        held = 4
    trained = parameters * trained_share
    spread = {part: world if zero_stage >= least else 1 for part, least in zip(PARTS, (3, 2, 1), strict=True)}
    whole = {
        "weights": parameters * width,
        "gradients": trained * (4 if "optimizer" in offload else gradient),  # the CPU's Adam reads float32
        "optimizer": trained * (_moments(optimizer, held) + (4 if zero_stage else 0)),
    }
    moved = {part for name in offload for part in OFFLOADED[name]}
    return {part: whole[part] / spread[part] if (part in moved) is (on == "host") else 0.0 for part in PARTS}


def activation_bytes(
    tokens: float, hidden: int, intermediate: int, key_value: int, layers: int, checkpointing: bool = False
) -> float:
    """Bytes of activations that the backward pass of a Llama-like model reads, in 16 bits, its head left out.

    tokens: rows x length of one micro-batch, padding included. hidden, intermediate: widths of a layer and of its MLP.
    key_value: width of all key heads together. With checkpointing each layer keeps its input, and one at a time all
    else. Attention is fused (no matrix of tokens x tokens); TRL's fused head keeps no logits.
    Counted from what autograd saves (tests/unit/cpt/test_memory_plan.py); compare Korthikanti et al., arXiv
    2205.05198, equation 2 without its attention matrix: 34 x hidden for a GPT layer.
    """
    layer = 20 * hidden + 4 * key_value + 8 * intermediate
    kept = 2 * hidden * layers + layer if checkpointing else layer * layers
    return tokens * (kept + 6 * hidden)


def _moments(optimizer: str, width: int) -> float:
    """Bytes per trained weight of an optimizer's moments; in few bits with one float32 scale per 256 weights."""
    found = re.match(rf"(?:paged_)?({'|'.join(MOMENTS)})(?:_|$)", optimizer)
    if found is None:
        raise ConfigError(
            f"optimizer = {optimizer!r}: its state is not known here. Known are names of training.optim that begin "
            f"with {', '.join(MOMENTS)}, or with paged_ before one."
        )
    bits = re.search(r"_(4|8|32)bit", optimizer)
    each = {"4": 0.5 + 4 / 256, "8": 1 + 4 / 256, "32": 4}[bits[1]] if bits else width
    return MOMENTS[found[1]] * each


def _check(precision: str, zero_stage: int, offload: Collection[str], on: str) -> None:
    for place, value, allowed in (
        ("precision", precision, tuple(PRECISIONS)),
        ("zero_stage", zero_stage, (0, 1, 2, 3)),
        ("on", on, ("device", "host")),
        *(("offload", part, tuple(OFFLOADED)) for part in offload),
    ):
        if value not in allowed:
            raise ConfigError(f"{place} = {value!r}: must be one of {', '.join(map(str, allowed))}.")
    if "weights" in offload and zero_stage != 3:
        raise ConfigError(f"offload = 'weights': needs zero_stage 3, not {zero_stage}; stages 1 and 2 hold them whole.")
    if offload and not zero_stage:
        raise ConfigError("offload: needs zero_stage 1, 2 or 3; without DeepSpeed nothing is moved.")
