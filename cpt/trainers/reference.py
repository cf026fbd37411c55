"""What another set of weights computes on the batch at hand: one pass without gradient, and nothing else changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cpt.data.blocks import by_number, keeping
from cpt.data.recording import backbone
from cpt.losses.divergences import Head
from cpt.methods.step import Seen

Weights = dict[str, Tensor]
PASSED = ("input_ids", "attention_mask", "position_ids")


def head_of(model: Any) -> Head:
    """A model's head with what its configuration does to logits, read as TRL's fused head reads it."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, head = causal.config.get_text_config(), causal.get_output_embeddings()
    named = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scale = next((one for one in named if one is not None), None)
    if scale is None and (dividing := getattr(config, "logits_scaling", None)) is not None:
        scale = dividing if config.model_type == "hyperclovax" else 1 / dividing
    return Head(
        head.weight,
        getattr(head, "bias", None),
        1.0 if scale is None else float(scale),
        getattr(config, "final_logit_softcapping", None),
    )


def look(
    model: Any,
    inputs: dict[str, Tensor],
    weights: Weights | None = None,
    layers: Sequence[Any] = (),
    read: Sequence[int] = (),
) -> Seen:
    """Hidden states of the batch, the head that reads them, outputs of blocks; detached.

    model: on its device, not wrapped for several processes. weights: by parameter name, put in the place of the
    model's own for the while; None: the model without its adapters. layers: the model's blocks; read: numbers of those
    whose outputs are kept. Runs in eval mode and draws no random number.
    """
    with torch.no_grad(), evaluating(model), without_adapters(model) if weights is None else holding(model, weights):
        given = {name: inputs[name] for name in PASSED if name in inputs}
        with keeping({number: layers[number] for number in read}) as found:
            hidden = backbone(model)(**given, use_cache=False).last_hidden_state
        head = head_of(model)
        return Seen(
            hidden,
            Head(head.weight.detach(), head.bias, head.scale, head.softcap),
            by_number(found, len(layers)),
        )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode; the modes of all modules are restored, and the random state (a kernel may draw all the same)."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Adapters off; PEFT switches requires_grad on for all of them when it leaves: what was off is off again."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def holding(model: Any, weights: Weights) -> Iterator[None]:
    """Other values in some of the model's parameters; its own tensors come back."""
    own = {name: parameter.data for name, parameter in model.named_parameters() if name in weights}
    parameters = dict(model.named_parameters())
    try:
        for name in own:
            parameters[name].data = weights[name].to(own[name])  # an average is float32, whatever they are
        yield
    finally:
        for name, tensor in own.items():
            parameters[name].data = tensor
