"""What each rank runs: processes that agree, that measure together, one that comes late, and one that dies.

torchrun --nproc_per_node 2 -m tests.distributed.processes_worker agree|late|lost FOLDER
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt.errors import ConfigError, CptError, DataError
from cpt.processes import Processes, check_launch, readable_rank_errors, start
from cpt.signals import stop_requests
from eval_harness.measure import EvalSet, measure
from eval_harness.rows import canonical

DIES_AT = 3  # optimizer step


def sets() -> list[EvalSet]:
    """Rows of every form, few enough for one batch and too many for one round."""
    words = [canonical({"prompt": f"what is {i} + {i % 7}?", "completion": str(i + i % 7)}) for i in range(90)]
    picks = [canonical({"question": f"Is {i} odd?", "choices": ["yes", "no"], "answer_index": i % 2}) for i in range(9)]
    text = [canonical({"text": "the blue key is in the box " * 20}), canonical({"text": "a dog"})]
    written = EvalSet("written", words[:20], ("exact_match",), exact_match="generate")
    return [EvalSet("words", words), EvalSet("picks", picks), EvalSet("text", text), written]


def scores(model: Any, tokenizer: Any, shard: Processes | None = None) -> dict[str, Any]:
    """Every measure of every set as JSON, in batches small enough for several rounds."""
    found = measure(model, tokenizer, sets(), batch_tokens=64, shard=shard)
    return {name: {key: one.to_json() for key, one in by.items()} for name, by in found.items()}


def error_of(act: Callable[[], Any]) -> list[Any]:
    """How an act ended: class, sentences, and whether another process says it."""
    try:
        act()
    except CptError as error:
        return [type(error).__name__, error.problems, getattr(error, "elsewhere", False)]
    except Exception as error:
        return [type(error).__name__, [str(error)], None]
    return []


def fail(error: Exception) -> Any:
    """Raise as an expression."""
    raise error


def agree(processes: Processes, folder: Path) -> None:
    """Everything that processes agree on, one file of answers a rank."""
    from transformers import AutoTokenizer

    from tests.models import llama

    rank, held = processes.rank, []

    @contextmanager
    def lock() -> Iterator[None]:
        held.append(rank)
        yield

    with processes.holding(lock):
        tokenizer = AutoTokenizer.from_pretrained("cpt/assets/tiny_world")
    began = time.perf_counter()
    for _ in range(200):
        processes.any(False)
    seconds = time.perf_counter() - began
    answers = {
        "gather": processes.gather({"rank": rank}),
        "broadcast": processes.broadcast(f"from {rank}"),
        "any": [processes.any(rank == 1), processes.any(False)],
        "on_main": processes.on_main(lambda: held),
        "held": held,
        "together": processes.together(lambda: rank),
        "main_fails": error_of(lambda: processes.on_main(lambda: fail(ConfigError("a = 1: no", "b = 2: no")))),
        "main_breaks": error_of(lambda: processes.on_main(lambda: {}["missing"])),
        "one_fails": error_of(lambda: processes.together(lambda: rank == 1 and fail(DataError("its own")))),
        "both_fail": error_of(lambda: processes.together(lambda: fail(DataError(f"of {rank}")))),
        "scores": scores(llama(tokenizer), tokenizer, processes),
        "agreement_milliseconds": seconds / 200 * 1000,
    }
    (folder / f"{rank}.json").write_text(json.dumps(answers))


def late(processes: Processes, folder: Path) -> None:
    """What is made once for a run, asked for by a second rank that comes when the first is done with its part."""
    import torch

    from cpt.data.computed import computed
    from cpt.data.rewritten import Written, rewritten
    from cpt.data.sources import load
    from cpt.data.spec import Source

    made: list[str] = []
    loaded = load(Source(rows=[{"prompt": "what is 1 + 1?", "completion": "2"}]), None, "rows")

    def compute() -> dict[str, Any]:
        made.append("computed")
        return {"one": torch.ones(2)}

    def write(parts: Any) -> Iterator[list[Written | None]]:
        made.append("written")
        for part in parts:
            yield [Written("two", ended=True)] * len(part)

    def decide(found: list[Written | None]) -> tuple[list[Any], dict[str, Any]]:
        return loaded.rows, {"asked": len(found)}

    for _ in range(2):  # to make, then to read
        if processes.rank == 1:
            time.sleep(1)
        found = computed(folder / "memory", "sums", {"of": "sums"}, compute)
        if processes.rank == 1:
            time.sleep(1)
        rows, said = rewritten(folder / "memory", "anew", {"of": "anew"}, loaded, loaded.rows, write, decide)
    answers = {"made": made, "found": found["one"].tolist(), "rows": list(rows), "said": said}
    (folder / f"{processes.rank}.json").write_text(json.dumps(answers))


def lost(processes: Processes, folder: Path) -> int:
    """Train; rank 1 is killed in a step. Returns the exit code of the other."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tests.distributed.deepspeed_worker import model, rows

    died = folder / "died"

    class Dies(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if processes.rank == 1 and state.global_step == DIES_AT:
                died.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

    settings = {"use_cpu": True, "max_steps": 1000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **settings)
    trainer = Trainer(model=model(), args=args, train_dataset=rows(), callbacks=[Dies()])
    check_launch(trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes)
    try:
        with stop_requests(processes.any), readable_rank_errors(processes):
            trainer.train()
    except CptError as error:
        seconds = time.time() - float(died.read_text())
        said = {"error": type(error).__name__, "problems": error.problems, "seconds": seconds}
        (folder / "survivor.json").write_text(json.dumps(said))
        return error.exit_code
    return 0


def main(what: str, folder: Path) -> None:
    """Meet, do one of the three, and leave."""
    processes = start(2)
    if what == "lost":
        os._exit(lost(processes, folder))
    (late if what == "late" else agree)(processes, folder)
    processes.end()
    os._exit(0)  # a gloo thread that is still alive when the interpreter goes may abort after success


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
