"""Checks of what is installed: versions, files read and written, trackers, compilers, a stage trained."""

import shutil
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cpt import resources
from cpt.doctor.line import Line, absent, fail, ok, warn

# Distributions whose module has another name, beside those that differ by - and _.
_MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "swanlab", "clearml", "neptune", "dvclive")


@cache
def _project() -> dict[str, Any]:
    """[project] of pyproject.toml in a clone, where an editable install's own record may be older; else nothing."""
    import tomllib

    file = resources.HERE.parent / "pyproject.toml"
    found = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
    return found if found.get("name") == "cpt" else {}


def declared(extra: str | None = None) -> list[Any]:
    """What cpt, or one of its extras, asks for, as `packaging` Requirements."""
    from packaging.requirements import Requirement

    project = _project()
    if project:
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
        return [Requirement(line) for line in lines]
    found = [Requirement(line) for line in requires("cpt") or []]
    if extra is None:
        return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in found if one.marker is not None and one.marker.evaluate({"extra": extra})]


def tested() -> dict[str, str]:
    """Package -> the version that the project's own tests ran with; empty where constraints.txt did not come along."""
    file = resources.HERE / "bundled" / "constraints.txt"
    file = file if file.is_file() else resources.HERE.parent / "constraints.txt"
    if not file.is_file():
        return {}
    pairs = [line.split("==") for line in file.read_text(encoding="utf-8").splitlines() if "==" in line]
    return {_plain(name): number.strip() for name, number in pairs if not name.startswith("#")}


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def check_python() -> Line:
    """The interpreter's version against what cpt declares."""
    from packaging.specifiers import SpecifierSet

    number = ".".join(map(str, sys.version_info[:3]))
    wanted = _project().get("requires-python") or ">=3.11"
    if number not in SpecifierSet(wanted):
        return fail(f"{number}, and cpt needs {wanted}", "make PYTHON=/path/to/python3.11 dev")
    return ok(f"{number} (declared {wanted}) in {sys.prefix}")


def check_libraries() -> Line:
    """Every declared package is installed in a declared version, and imports."""
    problems, others, names = [], [], []
    for wanted in declared():
        problem = _wrong(wanted)
        if problem:
            problems.append(problem)
            names.append(f"'{wanted}'")
            continue
        known, found = tested().get(_plain(wanted.name)), version(wanted.name)
        if known and known != found.partition("+")[0]:
            others.append(f"{wanted.name} {found} (tested {known})")
    if problems:
        return fail("\n".join(problems), f"pip install {' '.join(names)}")
    said = f"{len(declared())} packages import, in declared versions; torch {version('torch')}"
    if others:
        return ok(f"{said}; other versions than tested: {', '.join(others)}")
    return ok(said + (", all as tested" if tested() else ""))


def _wrong(wanted: Any) -> str | None:
    """Why a requirement is not met, or None."""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is not installed (declared {wanted.specifier or 'any version'})"
    if not wanted.specifier.contains(found, prereleases=True):
        return f"{wanted.name} {found}: declared {wanted.specifier}"
    name = _MODULES.get(_plain(wanted.name), _plain(wanted.name).replace("-", "_"))
    try:
        import_module(name)
    except Exception as error:  # a broken library may raise anything
        return f"{wanted.name} {found} does not import: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def out_of_range(extra: str) -> str | None:
    """Which package of an extra has a version that is not the declared one, or None."""
    return next((problem for problem in map(_wrong, declared(extra)) if problem), None)


def check_tokenizer(scratch: Path) -> Line:
    """Text through the tiny world's tokenizer and back; bf16 weights through safetensors and back."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(resources.BUNDLED_MODELS["tiny-world"] / "tokenizer.json"))
    text = "3 + 4 = 7"
    if (back := reader.decode(reader.encode(text).ids)).strip() != text:
        return fail(f"tokenizers gives {back!r} for {text!r}", "pip install --force-reinstall tokenizers")
    weights = torch.randn(64, 33).to(torch.bfloat16)
    scratch.mkdir(parents=True, exist_ok=True)
    save_file({"weights": weights}, scratch / "weights.safetensors")
    if not torch.equal(load_file(scratch / "weights.safetensors")["weights"], weights):
        return fail("safetensors reads other values than it wrote", "pip install --force-reinstall safetensors")
    return ok("tokenizers and safetensors give back what they were given")


def check_trackers(scratch: Path) -> Line:
    """Targets of `report_to` that import; TensorBoard also writes a figure."""
    here = [name for name in TRACKERS if find_spec(name)]
    if not here:
        return absent(f"no tracker is installed; {_METRICS}", "pip install 'cpt[track]'")
    for name in here:
        import_module(name)
    if "tensorboard" in here:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(scratch / "tensorboard")) as writer:
            writer.add_scalar("loss", 1.0, 0)
        if not any(file.stat().st_size for file in (scratch / "tensorboard").iterdir()):
            return fail("tensorboard wrote nothing", "pip install --force-reinstall tensorboard")
    missing = [name for name in ("tensorboard", "trackio", "wandb") if name not in here]
    return ok(f"{', '.join(here)} for report_to" + (f"; not installed: {', '.join(missing)}" if missing else ""))


_METRICS = "metrics.jsonl is always written"


def check_vllm() -> Line:
    """Imports, if it is installed."""
    if find_spec("vllm") is None:
        return absent("not installed; rft stages generate with transformers", "pip install 'cpt[vllm]'")
    import_module("vllm")
    return ok(f"vllm {version('vllm')} imports")


# Small, and through the same headers, compiler and loader as DeepSpeed's own extensions.
_SOURCE = """
#include <torch/extension.h>
torch::Tensor twice(torch::Tensor x) { return x * 2; }
"""


def check_deepspeed() -> Line:
    """Imports, its builders find what they need, and an extension can be compiled, loaded and called."""
    if find_spec("deepspeed") is None:
        return absent("not installed; one process and DDP need none of it", "pip install 'cpt[deepspeed]'")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return fail(f"{' and '.join(missing)} not found, and it compiles with them", "apt-get install g++ ninja-build")
    if problem := out_of_range("deepspeed"):
        return fail(problem, "pip install 'cpt[deepspeed]'")
    import torch
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import CUDA_HOME, load_inline

    fits = CPUAdamBuilder().is_compatible(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        built = load_inline("cpt_doctor", _SOURCE, functions=["twice"], build_directory=folder, verbose=False)
        if built.twice(torch.ones(2)).tolist() != [2.0, 2.0]:
            return fail("a compiled extension computes wrongly", "use the compiler that torch was built with")
    said = f"deepspeed {version('deepspeed')} imports; a C++ extension was compiled, loaded and called"
    if torch.cuda.is_available() and CUDA_HOME is None:
        return warn(f"{said}; no CUDA toolkit, so no CUDA one can be", "export CUDA_HOME=/usr/local/cuda")
    if not fits:
        return warn(f"{said}; CPUAdam, which offload needs, is not compatible", "python -m deepspeed.env_report")
    return ok(said)


def check_training(scratch: Path) -> Line:
    """A stage of two steps on the tiny world: trained through TRL with a method, measured, committed."""
    from cpt.config import Stream
    from cpt.stream import run

    stream = Stream.parse(
        {
            "name": "doctor",
            "model": "tiny-world",
            "output_dir": str(scratch / "runs"),
            "training": {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1.0e-3},
            "stages": [
                {
                    "name": "reverse",
                    "data": {"task": "tiny_world/reverse", "limit": 64},
                    "test": {"task": "tiny_world/reverse", "limit": 8},
                    "methods": ["hft"],
                }
            ],
            "evaluation": {"within": "off"},
        }
    )
    done = run(stream, new=True, say=lambda line: None)
    stage = done.find("reverse")
    base = resources.BUNDLED_MODELS["tiny-world"] / "model.safetensors"
    if stage.done() is None or not stage.results():
        return fail("a stage of two steps left no record", "cpt run quickstart shows where it stops")
    if (stage.model / "model.safetensors").read_bytes() == base.read_bytes():
        return fail("two steps of training changed no weight", "cpt run quickstart shows what it trains")
    return ok("a stage of two steps on the tiny world: trained through TRL, measured, committed")
