"""What measuring costs: multiple choice against lm-evaluation-harness, a checkpoint measured again, memory of the head.

300 rows with as many choices, and questions and choices as long, as piqa (2), ARC-easy (4) and CommonsenseQA (5) have,
100 each, of the tiny world's words; a random Llama of 0.6 M parameters. lm-eval reads local task files, at its default
batch size of 1 and at 16, which is its fastest here. Questions are shared, choices are not: 46 % of the tokens that
lm-eval runs are left, so a smaller ratio than that is what the rest of the work makes.

Processes of their own: `python -m tests.bench.evaluation SIDE FOLDER`. Imports no torch by itself.
"""

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from eval_harness.tasks.tiny_world import STORY_WORDS, VALUES
from tests.bench.commands import ROOT
from tests.bench.figures import Figure, ratio_of

EACH = 100  # rows of each shape
SHAPES = {"two": (2, 7, 17), "four": (4, 20, 4), "five": (5, 13, 2)}  # choices; words of a question, of a choice
WORLD = ROOT / "cpt" / "assets" / "tiny_world"
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
MIDDLE = SMALL | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}  # 5 M parameters
WIDE = MIDDLE | {"vocab_size": 128_000, "num_hidden_layers": 2}
BATCH, LENGTH = 64, 128  # of the memory figure: rows, and tokens that the backbone sees of each
MOST_PROCESSES = 5  # pairs of processes: most of their time is import
METRICS = ("acc", "acc_norm")


def multiple_choice(repeats: int) -> list[Figure]:
    """Our measure and lm-eval in turns, model and rows in memory; then both as processes from nothing."""
    if find_spec("lm_eval") is None:
        print("note: lm-evaluation-harness is not installed (pip install 'cpt[lm-eval]'): left out")
        return []
    with TemporaryDirectory() as name, quiet_lm_eval():
        folder = prepare(Path(name))
        model, tokenizer = opened(folder)
        sides = {"ours": partial(ours, model, tokenizer, folder)} | {
            f"lm-eval, batch {size}": partial(theirs, model, tokenizer, folder, size) for size in (1, 16)
        }
        seconds = in_turns(sides, repeats)
        commands = {"ours": [*OURS, "ours", str(folder)], "lm-eval": lm_eval_command(folder)}
        processes = {side: partial(output_of, command) for side, command in commands.items()}
        whole = in_turns(processes, min(repeats, MOST_PROCESSES))
    mine, *others = sides
    return [
        *(
            ratio_of(
                f"multiple choice, our measure / {other}",
                seconds[mine],
                seconds[other],
                (mine, other),
                most=1 / 3 if other.endswith("batch 1") else 2 / 3,  # as it comes, and at its best
            )
            for other in others
        ),
        ratio_of(
            "multiple choice from nothing, ours / lm-eval run", whole["ours"], whole["lm-eval"], tuple(commands), 0.5
        ),
    ]


def measured_again(repeats: int) -> list[Figure]:
    """The same rows on the same weights with the cache of the first time; at 5 M parameters, for it costs the same at
    any size: reading and recognising the rows is half of it."""
    from eval_harness.cache import Cache
    from eval_harness.measure import model_identity

    first: list[float] = []
    again: list[float] = []
    with TemporaryDirectory() as name:
        folder = prepare(Path(name), MIDDLE)
        model, tokenizer = opened(folder)
        ours(model, tokenizer, folder)
        for number in range(repeats):
            how = {"cache": Cache(folder / f"{number}.sqlite"), "identity": model_identity("bench")}
            first.append(timed(partial(ours, model, tokenizer, folder, **how)))
            again.append(timed(partial(ours, model, tokenizer, folder, **how)))
    return [ratio_of("an unchanged checkpoint measured again / first", again, first, ("again", "first"), most=0.02)]


def memory_of_the_head(repeats: int) -> list[Figure]:
    """Peak resident memory above the loaded model, 128,000 entries of vocabulary, one scored token a row."""
    if not Path("/proc/self/clear_refs").exists():
        print("note: peak memory of a part of a process is read from /proc, which is not here: left out")
        return []
    pairs = min(repeats, MOST_PROCESSES)
    with TemporaryDirectory() as name:
        peaks = {
            side: [float(output_of([*OURS, side, name], **GIVE_BACK)) for _ in range(pairs)]
            for side in ("score", "backbone")
        }
    name = "peak memory, scoring one token a row / backbone alone"
    sides = ("score", "backbone")
    return [ratio_of(name, peaks["score"], peaks["backbone"], sides, most=1.3, measured="MiB")]


# ---- rows, model, sides -------------------------------------------------------------------------------


def prepare(folder: Path, shape: dict[str, Any] = SMALL) -> Path:
    """The model with its tokenizer, the rows, and a task of lm-eval for each shape."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(WORLD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for task in SHAPES:
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(task)), encoding="utf-8")
        about = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer_index",
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in METRICS],
        }
        (folder / f"{task}.yaml").write_text(json.dumps(about), encoding="utf-8")  # JSON is YAML
    return folder


def rows(shape: str) -> list[dict[str, Any]]:
    """Rows of one shape, their lengths spread by a half around the shape's."""
    choices, asked, answered = SHAPES[shape]
    words = sorted({word for group in (*VALUES.values(), *STORY_WORDS.values()) for word in group})
    draw = Random(shape)

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(max(1, length // 2), length + length // 2)))

    return [
        {
            "question": text(asked) + ".",
            "choices": [text(answered) for _ in range(choices)],
            "answer_index": n % choices,
        }
        for n in range(EACH)
    ]


def opened(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, as `python -m eval_harness` opens them."""
    from eval_harness.loading import load

    loaded = load(str(folder / "model"))
    return loaded.model, loaded.tokenizer


def ours(model: Any, tokenizer: Any, folder: Path, **how: Any) -> None:
    """Read the rows and measure."""
    from eval_harness.items import EvalSet
    from eval_harness.measure import measure
    from eval_harness.prompts import Prompting
    from eval_harness.rows import canonical
    from eval_harness.sources import read_rows

    sets = [
        EvalSet(
            shape,
            [canonical(row) for row in read_rows(file=str(folder / f"{shape}.jsonl"))],
            METRICS,
            prompting=Prompting(chat_template="none"),
        )
        for shape in SHAPES
    ]
    found = measure(model, tokenizer, sets, **how)
    if any(by["acc"].n != EACH for by in found.values()):
        raise RuntimeError(f"not every row was measured: {found}")


def theirs(model: Any, tokenizer: Any, folder: Path, batch_size: int) -> None:
    """Read the rows and run lm-eval's own model class on them, without its standard errors."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(SHAPES))
    evaluate(lm, tasks, bootstrap_iters=0, log_samples=False)


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times in turns, after one that is not counted."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side))
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Neither its log lines nor its progress bars, which go to stderr."""
    logger = logging.getLogger("lm_eval")
    level, stderr = logger.level, sys.stderr
    logger.setLevel(logging.ERROR)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stderr = stderr
            logger.setLevel(level)


# ---- processes ----------------------------------------------------------------------------------------


OURS = [sys.executable, "-m", "tests.bench.evaluation"]


def lm_eval_command(folder: Path) -> list[str]:
    """lm-eval's command line on the same model and rows; it reads all of its task files before it starts."""
    return [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"),
        *("--model_args", f"pretrained={folder / 'model'},dtype=float32"),
        *("--include_path", str(folder), "--tasks", ",".join(SHAPES)),
    ]


# glibc raises its threshold as it goes, and then keeps what was freed: the same work took 106 or 136 MiB.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def output_of(command: list[str], **env: str) -> str:
    """Run a process; its last line. Raises RuntimeError with its output when it fails."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {child.returncode}:\n{child.stdout}{child.stderr[-4000:]}")
    return child.stdout.splitlines()[-1]


def peak(side: str) -> float:
    """MiB that scoring, or the backbone alone, needs above the loaded model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from eval_harness.prompts import Encoded
    from eval_harness.scoring import score

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)).eval()
    ids = torch.randint(WIDE["vocab_size"], (BATCH, LENGTH + 1))
    sequences = [Encoded(row, [False] * LENGTH + [True]) for row in ids.tolist()]
    with torch.inference_mode():
        model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)  # first calls load and allocate
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    if side == "score":
        found = score(model, sequences, batch_tokens=BATCH * LENGTH)
        if any(one is None or one.tokens != 1 for one in found):
            raise RuntimeError("not every row was scored")
    else:
        with torch.inference_mode():
            model.model(
                input_ids=ids[:, :-1], attention_mask=torch.ones(BATCH, LENGTH, dtype=torch.long), use_cache=False
            )
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """KiB, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    side, place = sys.argv[1], Path(sys.argv[2])
    if side == "ours":
        ours(*opened(place), place)
        print("measured")
    else:
        print(peak(side))
