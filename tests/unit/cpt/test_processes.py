"""Launches that became another than they were meant to be, errors of lost processes, and the launch files."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.errors import ConfigError, TrainingError
from cpt.processes import Processes, _launched, check_launch, readable_rank_errors, start

LAUNCH = Path(__file__).parents[3] / "launch"
MET = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_torch() -> None:
    code = (
        "import sys; from cpt.processes import start, readable_rank_errors; p = start(1)\n"
        "with readable_rank_errors(p):\n"
        "    print(p.gather(2), p.broadcast(3), p.any(True), p.on_main(lambda: 4), p.together(lambda: 5), p.is_main)\n"
        "p.wait(); p.end(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n") == ["[2] 3 True 4 5 True", "False", ""]


def test_one_process_holds_the_lock_itself() -> None:
    said = []

    @contextmanager
    def lock() -> Any:
        said.append("held")
        yield
        said.append("let go")

    with Processes().holding(lock):
        assert said == ["held"]
    assert said == ["held", "let go"]


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "8", **MET}, 8),
        ({"MASTER_ADDR": "node-1"}, 1),  # set by a job's script; no launcher of one process
        ({"ACCELERATE_USE_CPU": "True"}, 1),  # accelerate launch of one process, as asked
        ({"PMI_SIZE": "1"}, 1),
    ],
)
def test_the_world_is_what_was_launched(environ: dict[str, str], world: int) -> None:
    assert _launched(environ) == world


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, "asked for several processes and started one"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE = 4: a launch by mpirun is not supported"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE = 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_a_launch_that_became_another_is_refused(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        _launched(environ)
    assert "torchrun --nproc_per_node" in str(caught.value)


def test_accelerate_on_a_cpu_starts_one_process_and_is_refused(tmp_path: Path) -> None:
    """The trap itself: `--cpu --num_processes 2` runs the script once and would exit 0."""
    script = tmp_path / "script.py"
    script.write_text(
        "from cpt.errors import ConfigError\nfrom cpt.processes import start\n"
        "try:\n    print('started', start().world)\nexcept ConfigError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("accelerate was asked for several processes and started one"), done.stderr


def test_a_stream_made_for_more_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"processes = 2: this launch has 1.*torchrun --nproc_per_node 2 "):
        start(2)


def test_a_trainer_that_is_alone_in_a_launch_of_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch("MULTI_CPU", 2)
    with pytest.raises(ConfigError, match="the launch has 2 processes and the trainer sees 1"):
        check_launch("NO", 1)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_became_ddp_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"deepspeed": name == "DEEPSPEED", "fsdp": name == "FSDP"}
    check_launch(name, 1, **asked)
    with pytest.raises(ConfigError, match=f"asks for {name} and the trainer runs as MULTI_CPU"):
        check_launch("MULTI_CPU", 1, **asked)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    check_launch(name, 1)
    with pytest.raises(ConfigError, match=f"asks for {name} and the trainer runs as NO"):
        check_launch("NO", 1)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:2912\nmore",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] Read error [127.0.0.1]:1: Connection reset by peer",
        "[enforce fail at buffer.cc] Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_a_lost_process_is_said_in_words(text: str) -> None:
    with (
        pytest.raises(TrainingError, match=r"another process of this run ended.*goes on from the last") as caught,
        readable_rank_errors(Processes(1, 2)),
    ):
        raise RuntimeError(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"gloo|buffer"), readable_rank_errors(Processes()):
        raise RuntimeError(text)


def test_nccls_errors_are_said_in_words_and_others_stay() -> None:
    from torch.distributed import DistBackendError

    with pytest.raises(TrainingError, match="another process"), readable_rank_errors(Processes(0, 2)):
        raise DistBackendError("NCCL communicator was aborted on rank 0")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), readable_rank_errors(Processes(0, 2)):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# ---- launch files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_file_and_starts_what_the_file_says(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    content = yaml.safe_load(file.read_text())
    assert load_config_from_file(str(file)).num_processes == content["num_processes"]
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "cpt"])
    args, _, _ = _validate_launch_command(given)
    assert args.num_processes == content["num_processes"]
    started = {"DEEPSPEED": args.use_deepspeed, "FSDP": args.use_fsdp, "MULTI_GPU": args.multi_gpu}
    # Only these three start more than one process.
    assert [name for name, chosen in started.items() if chosen] == (
        [content["distributed_type"]] if content["num_processes"] > 1 else []
    )
    assert file.name in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_files_leave_the_streams_values_to_the_stream(name: str, stage: int) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    file = LAUNCH / "deepspeed" / f"{name}.json"
    config = HfDeepSpeedConfig(str(file))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    assert config.is_offload() is name.endswith("offload")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config.get_value(key) == "auto"
    assert config.get_value("gradient_clipping") == "auto"
    # The stream's own optimizer and schedule: the same training under every launcher.
    assert not {"optimizer", "scheduler"} & json.loads(file.read_text()).keys()
    assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is (
        True if stage == 3 else None
    )
    assert file.name in (LAUNCH / "README.md").read_text()


# ---- edits that would not reach the right tensors ------------------------------------------------------


class _Config:
    """As accelerate's HfDeepSpeedConfig, from a dict."""

    def __new__(cls, zero: dict[str, Any]) -> Any:
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        return HfDeepSpeedConfig({"zero_optimization": zero})


def _arguments(zero: dict[str, Any] | None = None, **more: Any) -> Any:
    from types import SimpleNamespace

    plugin = None if zero is None else SimpleNamespace(hf_ds_config=_Config(zero))
    return SimpleNamespace(**({"fp16": False, "fsdp": False, "deepspeed_plugin": plugin} | more))


GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}
OFFLOADS = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("args", "gradients", "weights"),
    [
        (_arguments, None, None),
        (lambda: _arguments({"stage": 2}), None, None),
        (lambda: _arguments({"stage": 3, **GATHERS}), None, "ZeRO-3"),
        (lambda: _arguments({"stage": 2, **OFFLOADS}), "offload", "offload"),
        (lambda: _arguments(fsdp=True), "FSDP", "FSDP"),
        (lambda: _arguments(fp16=True), "fp16", None),
    ],
)
def test_edits_are_refused_where_they_would_not_arrive(
    monkeypatch: pytest.MonkeyPatch, args: Any, gradients: str | None, weights: str | None
) -> None:
    from cpt.methods.base import Method
    from cpt.trainers.deepspeed import refuse_edits

    monkeypatch.setenv("RANK", "0")  # as under a launcher

    class Masks(Method):
        type: str = "masks"

        def edit_gradients(self, gradients: Any, stage: Any) -> None:
            """Never called here."""

    class Averages(Method):
        type: str = "averages"

        def edit_weights(self, weights: Any, stage: Any) -> None:
            """Never called here."""

    class Neither(Method):
        type: str = "neither"

    assert refuse_edits([Neither()], args()) == []
    for method, where, what in ((Masks(), gradients, "gradients"), (Averages(), weights, "weights")):
        found = refuse_edits([method], args())
        if where is None:
            assert found == []
        else:
            assert len(found) == 1
            assert f"{method.type} edits {what}" in found[0]
            assert where in found[0]


def test_deepspeed_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.trainers.deepspeed import refuse_edits

    monkeypatch.delenv("RANK", raising=False)
    (found,) = refuse_edits([], _arguments({"stage": 2}))
    assert found.startswith("training.deepspeed: needs a launcher")
    assert "torchrun --nproc_per_node 1" in found


def test_zero3_that_could_not_write_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.trainers.deepspeed import refuse_edits

    monkeypatch.setenv("RANK", "0")
    (found,) = refuse_edits([], _arguments({"stage": 3}))
    assert "stage3_gather_16bit_weights_on_model_save must be true" in found
