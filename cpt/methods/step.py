"""What a method's hooks see of one micro-batch, and of the trainable tensors between steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cpt.losses.divergences import Head
    from cpt.methods.base import Term


class Seen(NamedTuple):
    """What other weights compute on a micro-batch, without gradient.

    hidden: (B, T, H) what the head reads. head: that head. blocks: as `Step.blocks`.
    """

    hidden: "Tensor"
    head: "Head"
    blocks: "Sequence[Any]" = ()


@dataclass
class Step:
    """One micro-batch of B rows and T tokens, after the trainer's own forward pass.

    model:     the model as the trainer calls it.
    inputs:    input_ids, labels and the mask or positions, each (B, T).
    origin:    (B,) number of each row's source in `names`; 0 is the task.
    row:       (B,) number of each row inside its source.
    log_probs: (B, T-1) log-probability of each label, with gradient; 0 where nothing is learned.
    mask:      (B, T-1) true where a token is learned.
    window:    counts over the whole effective batch and all ranks: "tokens", "rows", "batches",
               "<origin>_tokens", "<origin>_rows".
    number:    optimizer steps done so far in this stage.
    hidden:    (B, T, H) what the head reads, with gradient; only where a method needs "hidden". head: that head.
    blocks:    (B, T, H) for each block, what it gives to the next, with gradient; None for those that no method reads.
    factors:   (B, T-1) what the token losses are weighed by, all methods' together; None for ones.
    previous:  terms and notes of the optimizer step before, over all ranks, as `method/name`; empty in the first.
    notes:     what `note` took.
    """

    model: "nn.Module"
    inputs: dict[str, Any]
    origin: "Tensor"
    row: "Tensor"
    names: tuple[str, ...]
    log_probs: "Tensor"
    mask: "Tensor"
    window: dict[str, float]
    number: int
    hidden: Any = None
    head: "Head | None" = None
    blocks: "Sequence[Any]" = ()
    look: "Callable[..., Seen] | None" = None
    seen: dict[str, Seen] = field(default_factory=dict)
    factors: "Tensor | None" = None
    previous: dict[str, float] = field(default_factory=dict)
    notes: "dict[str, Term]" = field(default_factory=dict)

    def note(self, name: str, term: "Term") -> None:
        """Have a quantity logged as `method/name`, reduced as a term is; it adds nothing to the loss."""
        self.notes[name] = term

    def reference(self, name: str, weights: "dict[str, Tensor] | None" = None) -> Seen:
        """What other weights compute: hidden states, head and block outputs; one pass without gradient.

        weights: by parameter name, in the place of the model's own; None: the model without its adapters. The pass is
        made once for a name, however many methods ask; every rank must ask alike.
        """
        if name not in self.seen:
            assert self.look is not None
            self.seen[name] = self.look(self.inputs, weights)
        return self.seen[name]

    def rows(self, name: str) -> "Tensor":
        """(B,) true for the rows of one source."""
        return self.origin == self.names.index(name)


class Tensors:
    """Trainable tensors by name: their gradients, or the weights themselves. `map` writes; iteration is for reading.

    Under DeepSpeed each tensor is gathered for the call, so a change made in place is lost.
    """

    def __init__(self, parameters: dict[str, "nn.Parameter"], gradients: bool) -> None:
        self._parameters, self._gradients = parameters, gradients
        self.noted: dict[str, Any] = {}

    def __iter__(self) -> Iterator[tuple[str, "Tensor"]]:
        for name, parameter in self._parameters.items():
            tensor = parameter.grad if self._gradients else parameter.data
            if tensor is not None:
                yield name, tensor

    def weight(self, name: str) -> "Tensor":
        """The weight that a gradient is of, for reading."""
        return self._parameters[name].data

    def parameter(self, name: str) -> "Tensor":
        """The trainable tensor itself, to differentiate by."""
        return self._parameters[name]

    def map(self, change: Callable[[str, "Tensor"], "Tensor"]) -> None:
        """Replace every tensor by `change(name, tensor)`, in place."""
        for name, tensor in self:
            tensor.copy_(change(name, tensor))

    def drop(self, name: str) -> None:
        """Take a gradient away: the optimizer passes the tensor over, without decay or momentum."""
        self._parameters[name].grad = None

    def note(self, name: str, value: "Tensor") -> None:
        """Have a scalar, the same on every process, logged as `method/name`; several of a name are added."""
        self.noted[name] = self.noted.get(name, 0.0) + value.detach()
