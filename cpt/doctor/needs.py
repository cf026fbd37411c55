"""What a stream needs of the machine: which checks must be ok for it, and checks of what only a stream names."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cpt.config import Stream
from cpt.data.spec import Source
from cpt.doctor.devices import accelerators
from cpt.doctor.line import Check, Line, absent, fail, ok, warn
from cpt.doctor.room import check_disk_room, check_memory, trainings, zero_settings
from cpt.doctor.software import TRACKERS
from cpt.errors import ConfigError
from cpt.resources import model_path


def needed(stream: Stream) -> dict[str, list[str]]:
    """Name of a check -> what of the stream needs it to be ok."""
    found: dict[str, list[str]] = {}
    if stream.model.quantization:
        found[f"{stream.model.quantization[0]}-bit"] = [f"model.quantization = {stream.model.quantization}"]
    if str(stream.model.attn_implementation).startswith("flash"):
        found["attention"] = [f"model.attn_implementation = {stream.model.attn_implementation}"]
    if stream.model.dtype in ("bfloat16", "float16"):
        found[stream.model.dtype] = [f"model.dtype = {stream.model.dtype}"]
    if stream.processes and stream.processes > 1:
        found |= {name: [f"processes = {stream.processes}"] for name in ("all-reduce", "shared memory")}
    arguments = {"bf16": "bfloat16", "fp16": "float16", "use_vllm": "vllm", "deepspeed": "deepspeed"}
    for place, training in trainings(stream):
        for key, check in arguments.items():
            if training.get(key, key == "bf16" and not training.get("use_cpu")):  # TRL's default on a GPU
                found.setdefault(check, []).append(f"{place}.{key}")
    return found


def stream_checks(stream: Stream, folder: Path) -> list[Check]:
    """Checks of what the stream names: its packages, DeepSpeed's settings, processes, room, names, rows, rewards."""
    checks = [
        Check("packages", partial(check_packages, stream), "pip install what is missing"),
        Check("processes", partial(check_processes, stream), "processes=1 uses one"),
        Check("memory", partial(check_memory, stream), "model=PATH of a smaller one", limit_s=60),
        Check("room", partial(check_disk_room, stream, folder), "output_dir=FOLDER on another disk", limit_s=60),
        Check("names", partial(check_names, stream), "give folders and files instead of names", limit_s=60),
        Check("start", partial(check_start, stream), "mend it, then: cpt validate STREAM", limit_s=300, alone=True),
    ]
    if any(training.get("deepspeed") for _, training in trainings(stream)):
        checks.insert(1, Check("zero", partial(check_zero, stream), "launch/deepspeed holds files that work"))
    return [replace(check, of_stream=True) for check in checks]


def check_packages(stream: Stream) -> Line:
    """Packages that only some arguments need: trackers, optimizers of few bits, fused kernels."""
    wanted = [(f"{place}.{key}", name) for place, t in trainings(stream) for key, name in _packages(t)]
    missing = [(place, name) for place, name in wanted if find_spec(name) is None]
    if missing:
        found = "\n".join(f"{place}: needs {name}, which is not installed" for place, name in missing)
        return fail(found, f"pip install {' '.join(sorted({name.replace('_', '-') for _, name in missing}))}")
    return ok(f"{', '.join(sorted({name for _, name in wanted})) or 'nothing beyond cpt itself'}")


def _packages(training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(argument, module) for every argument that needs a package cpt does not bring."""
    targets = training.get("report_to") or []
    for target in [targets] if isinstance(targets, str) else targets:
        if target in TRACKERS:
            yield f"report_to = {target}", target
    if any(word in str(training.get("optim")) for word in ("8bit", "paged", "bnb")):
        yield f"optim = {training['optim']}", "bitsandbytes"
    if training.get("use_liger_kernel"):
        yield "use_liger_kernel", "liger_kernel"


def check_processes(stream: Stream) -> Line:
    """As many processes as the stream is made for, each with a device of its own where there are devices."""
    wanted, devices = stream.processes, accelerators()
    on_cpu = not devices or all(training.get("use_cpu") for _, training in trainings(stream))
    start = f"torchrun --nproc_per_node {wanted or 'N'} -m cpt run STREAM"
    if wanted is None:
        return ok(f"any number; this machine has {_plural(len(devices), 'device')} and {os.cpu_count()} cores")
    if not on_cpu and wanted > len(devices):
        here = _plural(len(devices), "device")
        return fail(f"processes = {wanted}: this machine has {here}", f"processes={len(devices)}, or several machines")
    if on_cpu and wanted > (os.cpu_count() or 1):
        return warn(f"processes = {wanted} on {os.cpu_count()} cores: they will wait for each other", "processes=1")
    return ok(f"processes = {wanted}: {start}" if wanted > 1 else "processes = 1")


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" + "s" * (n != 1)


def check_zero(stream: Stream) -> Line:
    """DeepSpeed's settings are there; how they spread a model."""
    said = []
    for place, training in trainings(stream):
        if training.get("deepspeed"):
            zero = zero_settings(training)
            away = [key for key in ("offload_optimizer", "offload_param") if key in zero]
            said.append(f"{place}: ZeRO-{zero.get('stage', 0)}" + f" with {' and '.join(away)}" * bool(away))
    return ok("\n".join(dict.fromkeys(said)))


# ---- names on the Hub -------------------------------------------------------------------------------


def sources(part: Any, place: str = "") -> Iterator[tuple[str, Source]]:
    """Every source in a stream, with its place."""
    if isinstance(part, Source):
        yield place, part
    inside: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(part, BaseModel):
        inside = ((key, getattr(part, key)) for key in type(part).model_fields)
    elif isinstance(part, list | dict):
        inside = iter(part.items() if isinstance(part, dict) else enumerate(part))
    for key, value in inside:
        yield from sources(value, f"{place}.{key}".lstrip("."))


def hub_names(stream: Stream) -> list[tuple[str, str, str]]:
    """(place, models | datasets, name) of all that is neither a file, nor a folder, nor shipped, nor cached."""
    from eval_harness.sources import find_task

    named: list[tuple[str, str, str]] = []
    for key, path in {"path": stream.model.path, "adapter": stream.model.adapter}.items():
        if path and not Path(model_path(path)).expanduser().exists():
            named.append((f"model.{key}", "models", path))
    if stream.tokenizer.path and not Path(stream.tokenizer.path).exists():
        named.append(("tokenizer.path", "models", stream.tokenizer.path))
    for place, source in sources(stream):
        if source.hub and not (source.file and stream.data_root):
            named.append((place, "datasets", source.hub))
        elif source.task and not stream.data_root and (task := find_task(source.task)) is not None:
            named.append((place, "datasets", task.hub))
    return [one for one in named if not _cached(*one[1:])]


def _cached(kind: str, name: str) -> bool:
    from huggingface_hub import constants

    if any(Path(constants.HF_HUB_CACHE).glob(f"{kind}--{name.replace('/', '--')}/snapshots/*/*")):
        return True
    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return kind == "datasets" and (root / name.replace("/", "___")).is_dir()


def check_names(stream: Stream) -> Line:
    """Names on the Hub are in the local cache, or the Hub knows them and gives them out."""
    from huggingface_hub import constants

    names = hub_names(stream)
    if not names:
        return ok("everything the stream names is on this machine")
    if constants.HF_HUB_OFFLINE:
        found = "\n".join(f"{place} = {name}: not in the local cache" for place, _, name in names)
        each = dict.fromkeys((kind, name) for _, kind, name in names)
        commands = [f"hf download {name}" + " --repo-type dataset" * (kind == "datasets") for kind, name in each]
        said = " && HF_HUB_OFFLINE=0 ".join(commands)
        return fail(found, f"HF_HUB_OFFLINE=0 {said}, where there is a network; or give folders and files")
    answers = {(kind, name): _asked(kind, name) for _, kind, name in dict.fromkeys(names)}
    wrong = [f"{place} = {name}: {answers[kind, name]}" for place, kind, name in names if answers[kind, name]]
    if wrong:
        return fail("\n".join(wrong), "hf auth login for what is gated; else give another name, a folder or a file")
    return ok(f"the Hub has {', '.join(dict.fromkeys(name for *_, name in names))}")


def _asked(kind: str, name: str) -> str | None:
    """What the Hub says against a name, or None."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    try:
        url = f"{constants.ENDPOINT}/api/{kind}/{name}/revision/main"
        code = get_session().get(url, headers=build_hf_headers(), timeout=6).status_code
    except Exception as error:  # every HTTP library has its own for: no network
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
    known = {401: "does not exist, or is private", 403: "is gated", 404: "does not exist"}
    return known.get(code) or (f"the Hub answers {code}" if code >= 400 else None)


# ---- the beginning of a run -------------------------------------------------------------------------


def check_start(stream: Stream) -> Line:
    """Rows, tokenizer, trainer arguments, adapters and rewards, as `cpt run` checks them before it trains."""
    from cpt.inputs import read_inputs
    from cpt.quiet import quiet
    from cpt.train_stage import check_ahead

    if problems := _rewards(stream):
        raise ConfigError(*problems)
    if away := hub_names(stream):
        names = ", ".join(dict.fromkeys(name for *_, name in away))
        return absent(f"{names} must be fetched first; `cpt run` checks rows and arguments as it begins")
    if any(training.get("deepspeed") for _, training in trainings(stream)):
        _launched()
    notes: list[str] = []
    with quiet():
        inputs = read_inputs(stream, notes.append)
        check_ahead(stream, inputs, range(len(stream.stages)))
    rows = sum(len(here.rows.rows) for here in inputs.stages)
    said = f"{rows:,} rows read, {_plural(len(stream.stages), 'stage')} as `cpt run` checks them before it trains"
    return ok("\n".join([said, *notes]))


def _rewards(stream: Stream) -> list[str]:
    """Why rewards cannot be imported, all of them."""
    from cpt.rewards.spec import resolve

    found: list[str] = []
    for i, stage in enumerate(stream.stages):
        for j, reward in enumerate(stage.rewards):
            try:
                resolve(reward, f"stages.{i}.rewards.{j}")
            except ConfigError as error:
                found += error.problems
    return found


def _launched() -> None:
    """What torchrun says to a single process: DeepSpeed asks for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
