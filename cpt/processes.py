"""The processes of one launch: who they are, how they agree, and how one that is lost ends the others.

torchrun (or `accelerate launch`) starts them; training talks over its own group, everything else over a gloo group
of ours, whose sockets close when a process dies: the others learn of it at once.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from cpt import errors
from cpt.errors import ConfigError, CptError, TrainingError

# A process that died is noticed at once; these end the wait for one that lives and does not answer.
TRAINING_TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(hours=4)  # the first process may be writing a large model meanwhile

MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
HOW = "torchrun --nproc_per_node N -m cpt run STREAM.yaml, or accelerate launch with a file of launch/ (see its README)"
# What gloo's errors say when the other side of a connection is gone or silent; NCCL's have a class of their own.
LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused")

T = TypeVar("T")
Failure = tuple[str, list[str]]  # name of an error's class, and its sentences: what one process tells the others


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch. All of them call every method, in the same order.

    rank, world: this process's number, and how many there are. With one, everything here is immediate.
    """

    rank: int = 0
    world: int = 1
    _group: Any = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the first process: it writes, and speaks for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on once all processes are here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def broadcast(self, found: T) -> T:
        """What the first process passes; it must be picklable."""
        if self.world == 1:
            return found
        import torch.distributed as dist

        holder = [found]
        dist.broadcast_object_list(holder, src=0, group=self._group)
        return found if self.is_main else holder[0]

    def gather(self, part: Any) -> list[Any]:
        """What every process passes, by rank, on all of them; it must be picklable."""
        if self.world == 1:
            return [part]
        import torch.distributed as dist

        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part, group=self._group)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether any process passes True: one number is sent, cheap enough for every step."""
        if self.world == 1:
            return flag
        import torch
        import torch.distributed as dist

        raised = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return bool(raised.item())

    def on_main(self, function: Callable[[], T]) -> T:
        """Let the first process call the function; its result (picklable), or its error, is everybody's."""
        if self.world == 1:
            return function()
        made, error = _attempt(function) if self.is_main else (None, None)
        made, failure = self.broadcast((made, _told(error)))
        self._agree(error, [failure])
        return made  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Call the function on every process and return each its own; the error of one ends all alike."""
        if self.world == 1:
            return function()
        made, error = _attempt(function)
        self._agree(error, self.gather(_told(error)))
        return made  # type: ignore[return-value]

    @contextmanager
    def holding(self, lock: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold what the first process enters on behalf of all; it lets go once all have left."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(lock())

            self.on_main(enter)
            yield
            self.wait()

    def end(self) -> None:
        """Part from the others after success. Then leave by `os._exit`: a thread of gloo may abort a normal exit."""
        if self.world > 1:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()

    def _agree(self, own: Exception | None, failures: list[Failure | None]) -> None:
        """Raise the error of the lowest rank that has one: itself there, its copy elsewhere."""
        first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return
        if first == self.rank and own is not None:
            raise own
        name, sentences = failures[first]  # type: ignore[misc]
        kind = vars(errors).get(name)
        if not (isinstance(kind, type) and issubclass(kind, CptError)):
            raise RuntimeError(f"process {first} of this run failed: {name}: {sentences[0]}")
        copy = kind(*sentences)
        copy.elsewhere = True  # said by the process where it arose
        raise copy


def start(expected: int | None = None, use_cpu: bool = False) -> Processes:
    """Meet the other processes of this launch; imports torch only if there are any.

    expected: how many there must be, None for any number. use_cpu: train on the CPU even where there is a device.
    Raises ConfigError for a launch that became another than it was meant to be, TrainingError when the processes
    do not find each other.
    """
    world = _launched(os.environ)
    if expected is not None and expected != world:
        error = ConfigError(
            f"processes = {expected}: this launch has {world}. Start as many as the stream is made for: "
            f"{HOW.replace(' N ', f' {expected} ')}."
        )
        error.elsewhere = int(os.environ.get("RANK") or 0) > 0  # they have not met yet, and all know it
        raise error
    if world == 1:
        return Processes()
    import torch.distributed as dist
    from accelerate import PartialState

    cpu = use_cpu or _flag(os.environ, "ACCELERATE_USE_CPU") or not _has_device()
    try:
        # The trainer's arguments make this state anew; they find the group there and keep it.
        PartialState(cpu=cpu, timeout=TRAINING_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    except dist.DistError as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise TrainingError(f"the {world} processes did not find each other at {address}: {error}") from error
    if dist.get_world_size() != world:
        raise ConfigError(f"WORLD_SIZE = {world}: the processes that met are {dist.get_world_size()}. Use {HOW}.")
    return Processes(dist.get_rank(), world, group)


def check_launch(distributed_type: str, world: int, *, deepspeed: bool = False, fsdp: bool = False) -> None:
    """Refuse a trainer that runs otherwise than it was launched; call it once the trainer exists.

    distributed_type, world: what the trainer's accelerator says (`DistributedType.value`, `num_processes`).
    deepspeed, fsdp: whether the trainer's own arguments ask for it; what the launcher asks for is in the environment.
    Raises ConfigError.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if world != launched:
        raise ConfigError(f"the launch has {launched} processes and the trainer sees {world}. Use {HOW}.")
    wanted = {
        "DEEPSPEED": deepspeed or _flag(os.environ, "ACCELERATE_USE_DEEPSPEED"),
        "FSDP": fsdp or _flag(os.environ, "ACCELERATE_USE_FSDP"),
    }
    for name, asked in wanted.items():
        if asked and distributed_type != name:
            raise ConfigError(
                f"the launch asks for {name} and the trainer runs as {distributed_type}: it would train otherwise than "
                "you meant, without a word. Leave `--cpu` and ACCELERATE_USE_CPU out; FSDP needs a GPU per process."
            )


@contextmanager
def readable_rank_errors(processes: Processes) -> Iterator[None]:
    """Turn what a collective raises when another process is gone into a TrainingError that says so."""
    try:
        yield
    except RuntimeError as error:
        if processes.world == 1 or not _is_lost(error):
            raise
        raise TrainingError(
            f"process {processes.rank}: another process of this run ended or does not answer (its own message says "
            "why); run the same command again: it goes on from the last checkpoint. "
            f"({str(error).splitlines()[0].split('. ')[0]})"
        ) from error


def _launched(environ: Any) -> int:
    """How many processes the launcher started. Raises ConfigError where it started fewer than it was asked for."""
    if environ.get("WORLD_SIZE"):
        world = int(environ["WORLD_SIZE"])
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if world > 1 and missing:
            raise ConfigError(f"WORLD_SIZE = {world}, but {', '.join(missing)} is not set. Start with {HOW}.")
        return world
    several = [f"{name} = {environ[name]}" for name in MPI if environ.get(name, "1") not in ("", "1")]
    if several:
        raise ConfigError(f"{several[0]}: a launch by mpirun is not supported. Start with {HOW}.")
    if environ.get("MASTER_ADDR") and "ACCELERATE_USE_CPU" in environ:  # its launcher of one process sets both
        raise ConfigError(
            "accelerate was asked for several processes and started one: on a CPU, `--cpu` and "
            f"distributed_type: MULTI_CPU do that, without a word. Use {HOW}."
        )
    return 1


def _has_device() -> bool:
    import torch

    return torch.accelerator.is_available()


def _flag(environ: Any, name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # raised by _agree, on all processes
        return None, error


def _told(error: Exception | None) -> Failure | None:
    if error is None:
        return None
    return type(error).__name__, error.problems if isinstance(error, CptError) else [str(error)]


def _is_lost(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(sign in str(error).lower() for sign in LOST)
