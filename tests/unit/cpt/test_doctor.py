"""Each check says fail, with the right advice, when what it tries is broken; nothing that crashes or hangs ends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cpt.config import Stream
from cpt.doctor import Examination, devices, needs, room, show, software, system
from cpt.doctor.line import Check, Line, absent, fail, ok, warn
from cpt.doctor.worker import tried


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def stream(**parts: Any) -> Stream:
    """A stream of one short stage on the tiny world, with these parts of it otherwise."""
    stage = {"name": "reverse", "data": {"task": "tiny_world/reverse"}} | parts.pop("stage", {})
    training = {"max_steps": 4, "use_cpu": True} | parts.pop("training", {})
    return Stream.parse({"name": "s", "model": "tiny-world", "training": training, "stages": [stage]} | parts)


# ---- the child process ------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table of checks that do what broken libraries do."""
    (tmp_path / "broken_checks.py").write_text(
        textwrap.dedent("""
            import os, subprocess, sys, time
            from cpt.doctor.line import Check, ok, warn
            from cpt.errors import ConfigError

            def crash():
                print("library: illegal instruction", file=sys.stderr, flush=True)
                os.abort()

            def hang():
                grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
                open(os.path.join(FOLDER, "grandchild"), "w").write(str(grandchild.pid))
                time.sleep(60)

            def leave():
                sys.exit(3)

            def noise():
                print("a banner"); os.write(1, b"and from C\\n"); os.write(2, b"a warning\\n")
                return ok("fine")

            def raises():
                raise ValueError("no such kernel\\nwith a second line")

            def refused():
                raise ConfigError("a: wrong", "b: wrong")

            def checks(at):
                global FOLDER
                FOLDER = str(at.folder)
                return [
                    Check("crash", crash, "reinstall it"),
                    Check("hang", hang, "wait less", limit_s=3),
                    Check("leave", leave, "come back"),
                    Check("noise", noise, "-"),
                    Check("raises", raises, "other kernels", every_use=True),
                    Check("refused", refused, "mend it"),
                    Check("slow", lambda: ok("slow"), "-", slow=True),
                    Check("alone", lambda: ok(os.environ["CUDA_VISIBLE_DEVICES"]), "-", alone=True),
                    Check("warned", lambda: warn("w", "a"), "-"),
                ]
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    return "broken_checks:checks"


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_what_crashes_hangs_or_raises_is_a_line(broken: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    examination = Examination(folder=runs, source=broken)
    found = {line.name: line for line in examination}
    assert {name: (line.status, line.found, line.advice) for name, line in found.items()} == {
        "crash": ("fail", "its process ended by SIGABRT: library: illegal instruction", "reinstall it"),
        "hang": ("fail", "no answer within 3 s", "wait less"),
        "leave": ("fail", "its process ended by exit code 3", "come back"),
        "noise": ("ok", "fine", None),
        "raises": ("fail", "ValueError: no such kernel", "other kernels"),
        "refused": ("fail", "a: wrong\nb: wrong", "mend it"),
        "slow": ("ok", "slow", None),
        "alone": ("ok", "3", None),
        "warned": ("warn", "w", "a"),
    }
    assert found["hang"].seconds < 20
    assert not alive(int((runs / "grandchild").read_text())), "what a check started ends with it"
    assert [line.name for line in examination.reasons()] == ["raises"], "of what fails, only this is for every use"
    assert sorted(path.name for path in runs.iterdir()) == ["grandchild"], "the scratch folder is gone"
    assert capfd.readouterr() == ("", "")


def test_quick_leaves_out_what_is_slow_and_says_so(broken: str, tmp_path: Path) -> None:
    examination = Examination(quick=True, folder=tmp_path, source=broken)
    assert examination.left_out == ["slow"]
    examination.lines.append(ok("x"))
    assert "left out by --quick: slow" in show.verdict(examination)


def test_for_a_stream_only_what_it_needs_is_tried() -> None:
    plain = Examination(stream())
    assert {"python", "disk", "training", "memory", "start"} <= {check.name for check in plain.checks}
    assert {"4-bit", "vllm", "deepspeed", "all-reduce"} <= set(plain.left_out)
    asked = Examination(stream(processes=2, training={"deepspeed": {"zero_optimization": {"stage": 2}}}), quick=True)
    assert {"deepspeed", "all-reduce", "zero"} <= {check.name for check in asked.checks}, "--quick keeps what is needed"


def test_what_is_not_here_is_a_reason_only_where_it_is_needed() -> None:
    examination = Examination(stream())
    examination.lines = [
        Line("not here", "x", name="vllm", needed_by=("stages.0.training.use_vllm",)),
        Line("not here", "x", name="4-bit"),
        Line("not here", "x", name="memory"),
        Line("fail", "x", name="start"),
        Line("warn", "x", name="disk"),
    ]
    assert [line.name for line in examination.reasons()] == ["vllm", "start"]
    assert show.verdict(examination).endswith("s cannot run here: vllm, start")


# ---- how it looks -----------------------------------------------------------------------------------


def test_a_finding_fits_80_columns_and_reads_without_colour() -> None:
    line = Line(
        "fail", "one is wrong\ntwo is " + "wrong " * 20, "pip install x", "packages", 1.0, ("stages.0.training",)
    )
    lines = show.block(line).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "  FAIL      packages       one is wrong"
    assert lines[1].startswith(" " * 27 + "two is wrong")
    assert lines[-2:] == [" " * 27 + "needed by stages.0.training", " " * 27 + "-> pip install x"]
    assert show.block(Line("ok", "fine", "nothing to do", "disk")) == "  ok        disk           fine"


def test_a_file_gets_no_control_character(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    examination = Examination(quick=True, folder=tmp_path, source=broken)
    show.shown(examination, [Line("warn", "w", "a", "disk")])
    assert capsys.readouterr().out.startswith("  warn      disk           w\n" + " " * 27 + "-> a\n")


def test_a_terminal_gets_colour_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    examination = Examination(stream())
    show.shown(examination, [Line("warn", "w", "a", "disk")])
    assert "\x1b[33mwarn\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    show.shown(examination, [Line("warn", "w", "a", "disk")])
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", capsys.readouterr().out)


def test_the_command_ends_with_2_and_gives_json(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.cli import app

    original: Any = Examination.__init__
    monkeypatch.setattr(Examination, "__init__", partialmethod(original, source=broken))
    monkeypatch.setattr(Examination, "_wanted", lambda self, check: check.name in ("noise", "raises"))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["reasons"] == ["raises"]
    assert [line["status"] for line in said["lines"]] == ["ok", "fail"]
    assert "a stream cannot run here: raises" in CliRunner().invoke(app, ["doctor"]).stdout
    monkeypatch.setattr(Examination, "_wanted", lambda self, check: check.name == "noise")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_the_command_refuses_a_launcher_and_overrides_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.cli import app

    assert "--for STREAM" in str(CliRunner().invoke(app, ["doctor", "seed=1"]).exception)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in str(CliRunner().invoke(app, ["doctor"]).exception)


@pytest.mark.parametrize(
    ("words", "place", "said"),
    [
        (["doctor"], "cpt.doctor.show.shown", "error: stopped by Ctrl-C\n"),
        (["methods"], "cpt.method_table.every", "error: stopped by Ctrl-C\n"),
        (["run", "quickstart"], "cpt.stream.run", "error: stopped at once; a run goes on from its newest checkpoint"),
    ],
)
def test_only_what_can_go_on_is_said_to(
    words: list[str], place: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cpt import cli

    def interrupted(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", ["cpt", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith(said)


def test_this_machine_can_run_a_stream(tmp_path: Path) -> None:
    """Every quick check for real, as a user starts it, into a pipe."""
    command = [sys.executable, "-m", "cpt", "doctor", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    assert done.stdout.splitlines()[-1] == "a stream can run here"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_this_machine_trains_and_compiles(tmp_path: Path) -> None:
    found = {line.name: line for line in Examination(folder=tmp_path)}
    assert found["training"].status == "ok", found["training"]
    assert found["deepspeed"].status in ("ok", "not here"), found["deepspeed"]


# ---- software ---------------------------------------------------------------------------------------


def test_libraries_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Requirement("surely-no-such-package>=1"), Requirement("numpy<1"), Requirement("pydantic>=2")]
    monkeypatch.setattr(software, "declared", lambda: wanted)
    found = software.check_libraries()
    assert found.status == "fail"
    assert found.found.splitlines()[0] == "surely-no-such-package is not installed (declared >=1)"
    assert re.fullmatch(r"numpy [\d.]+: declared <1", found.found.splitlines()[1])
    assert found.advice == "pip install 'surely-no-such-package>=1' 'numpy<1'"


def test_a_library_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "declared", lambda: [Requirement("scikit-learn")])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "does not import: ModuleNotFoundError" in software.check_libraries().found


def test_versions_other_than_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "declared", lambda: [Requirement("numpy"), Requirement("torch")])
    monkeypatch.setattr(software, "tested", lambda: {"numpy": "0.1", "torch": "1.2"})
    monkeypatch.setattr(software, "version", {"numpy": "0.1", "torch": "1.2.3+cpu"}.__getitem__)
    found = software.check_libraries()
    assert (found.status, found.found.partition("; other")[2]) == (
        "ok",
        " versions than tested: torch 1.2.3+cpu (tested 1.2)",
    )


def test_declared_and_tested_are_read_from_the_project() -> None:
    assert {"torch", "trl", "pydantic"} <= {one.name for one in software.declared()}
    assert [one.name for one in software.declared("quant")] == ["bitsandbytes"]
    assert software.tested()["scikit-learn"][0].isdigit()


def test_of_an_installed_package_its_own_record_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ["torch>=2.8", "old; python_version < '3'", "bitsandbytes>=0.49; extra == 'quant'"]
    monkeypatch.setattr(software, "_project", dict)
    monkeypatch.setattr(software, "requires", lambda name: record)
    assert [str(one) for one in software.declared()] == ["torch>=2.8"]
    assert [one.name for one in software.declared("quant")] == ["bitsandbytes"]


def test_a_tokenizer_that_loses_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tokenizers

    assert software.check_tokenizer(tmp_path).status == "ok"

    class Lossy:
        ids: tuple[int, ...] = ()
        from_file = staticmethod(lambda path: Lossy())
        encode = staticmethod(lambda text: Lossy())
        decode = staticmethod(lambda ids: "3 +")

    monkeypatch.setattr(tokenizers, "Tokenizer", Lossy)
    found = software.check_tokenizer(tmp_path)
    assert (found.status, found.advice) == ("fail", "pip install --force-reinstall tokenizers")


@pytest.mark.parametrize(
    ("check", "name"),
    [(software.check_vllm, "vllm"), (software.check_deepspeed, "deepspeed")],
    ids=["vllm", "deepspeed"],
)
def test_an_extra_that_is_not_installed_is_not_here(monkeypatch: pytest.MonkeyPatch, check: Any, name: str) -> None:
    monkeypatch.setattr(software, "find_spec", lambda module: None)
    found = check()
    assert (found.status, found.advice) == ("not here", f"pip install 'cpt[{name}]'")


def test_deepspeed_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "find_spec", lambda module: object())
    monkeypatch.setattr(software.shutil, "which", {"ninja": "ninja"}.get)
    found = software.check_deepspeed()
    assert (found.status, found.found) == ("fail", "g++ not found, and it compiles with them")
    assert found.advice == "apt-get install g++ ninja-build"


def test_no_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(software, "find_spec", lambda module: None)
    assert software.check_trackers(tmp_path).advice == "pip install 'cpt[track]'"


# ---- devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("off", [0.5, float("nan")])
def test_a_device_that_multiplies_wrongly(monkeypatch: pytest.MonkeyPatch, name: str, off: float) -> None:
    assert devices.check_products(name).status == "ok"
    monkeypatch.setattr(devices, "accelerators", lambda: ["xpu:0", "xpu:1"])
    found = devices.check_products(name, lambda device, dtype: off if device == "xpu:1" else 0.0)
    assert found.status == "fail"
    assert f"{name} on xpu:1:" in (found.advice or "")


def test_errors_of_rounding_are_what_the_format_gives() -> None:
    """8, 11 and 24 bits of significand, each factor and the product rounded once."""
    import torch

    for dtype, bits in {torch.bfloat16: 8, torch.float16: 11}.items():
        one = 2.0**-bits / 3**0.5  # root mean square of one rounding, the worst case within a binade
        assert 0.5 * one < devices.product_error("cpu", dtype) < 3 * one
    assert devices.product_error("cpu", torch.float32) < 1e-5  # the sums' own rounding


def test_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.functional as F

    assert devices.check_attention().status == "ok"
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: right(q, k, v))  # sees what comes
    found = devices.check_attention()
    assert (found.status, found.advice) == (
        "fail",
        "model.attn_implementation=eager computes without it (wrong on cpu)",
    )


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_layer_learns(bits: int) -> None:
    forward, gradient = devices.layer_errors(bits, "cpu")
    assert 0 < forward < 0.02
    assert 0 < gradient < 0.02


@pytest.mark.usefixtures("bitsandbytes")
def test_a_quantized_layer_whose_gradient_is_lost() -> None:
    """As by a kernel without autograd: what comes back does not hang on the input."""
    import torch

    class Detached(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model
            self.own = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x.detach()) + self.own

    assert devices.layer_errors(4, "cpu", guard=Detached)[1] == 1.0


def test_a_quantized_layer_that_fails_or_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_installed", lambda: False)
    assert devices.check_quantized(4) == absent(
        "bitsandbytes is not installed; only model.quantization needs it", "pip install 'cpt[quant]'"
    )
    monkeypatch.setattr(devices, "is_installed", lambda: True)
    monkeypatch.setattr(devices, "version", lambda name: "0.50")
    monkeypatch.setattr(devices, "layer_errors", lambda bits, device: (0.001, 0.93))
    found = devices.check_quantized(4)
    assert found.status == "fail"
    assert "gradient 93.0% off" in found.found
    assert (found.advice or "").startswith("do not train with model.quantization=4bit here")


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: [])
    monkeypatch.setattr(devices.shutil, "which", lambda tool: None)
    assert devices.check_accelerators().status == "not here"
    listed = subprocess.CompletedProcess([], 0, "GPU 0: A100\nGPU 1: A100\n", "")
    monkeypatch.setattr(devices.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(devices.subprocess, "run", lambda *args, **options: listed)
    found = devices.check_accelerators()
    assert found.status == "fail"
    assert "nvidia-smi lists 2 GPUs" in found.found


def test_a_gpu_that_somebody_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerators", lambda: ["cpu"])  # a tensor can be put there
    monkeypatch.setattr(devices, "free_and_total", lambda device: (10 * 2**30, 80 * 2**30))
    found = devices.check_accelerators()
    assert (found.status, found.found) == ("warn", "cpu CPU, 10.0 of 80.0 GiB free")
    assert "nvidia-smi" in (found.advice or "")


# ---- processes, disk, network -----------------------------------------------------------------------


@pytest.mark.distributed
def test_two_processes_meet_or_do_not() -> None:
    assert system.check_all_reduce().status == "ok"
    lost = system.check_all_reduce("192.0.2.1", wait_s=4.0)  # an address that is given to nobody (RFC 5737)
    assert (lost.status, lost.advice) == ("fail", "export GLOO_SOCKET_IFNAME=lo, or the interface that `ip addr` shows")


def test_a_disk_that_is_full_wrong_or_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = (tmp_path, tmp_path / "scratch")
    assert system.check_disk(*at, mib=1).status in ("ok", "warn")
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: Disk(100, 0, 2 * 2**30))
    assert system.check_disk(*at, mib=1).status == "warn"
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    assert system.check_disk(*at, mib=1) == fail(
        f"{tmp_path}: reads other bytes than were written", "give another disk: output_dir=FOLDER"
    )

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = tried(Check("disk", lambda: system.check_disk(*at, mib=1), "give another disk"))
    assert (found.status, found.advice) == ("fail", "give another disk")
    assert "No space left" in found.found


def test_locks_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.check_locks(tmp_path, tmp_path) == ok("a lock held by one process is refused to another")
    monkeypatch.setattr(system, "_SECOND", "import sys; open(sys.argv[1])")  # as on a disk that grants every lock
    assert "NFS" in (system.check_locks(tmp_path, tmp_path).advice or "")


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: Disk(2**26, 0, 2**26))  # a container's 64 MiB
    assert system.check_shared_memory(tmp_path) == warn(
        f"0.06 of 0.06 GiB free in {tmp_path}: NCCL and data loaders of several processes need more",
        "docker run --shm-size=8g",
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server in the Hub's place: `known/...` is there, `gated/...` is not given out, the rest does not exist."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            code = 200 if "/known/" in self.path else 403 if "/gated/" in self.path else 404
            self.send_response(code)
            self.end_headers()

        def log_message(self, *parts: Any) -> None:
            """Say nothing."""

    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_answers_or_does_not(hub: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert system.check_hub().status == "ok"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    silent = system.check_hub()
    assert silent.status == "warn"
    assert "HF_HUB_OFFLINE=1" in (silent.advice or "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert system.check_hub().status == "ok"


# ---- what a stream needs ----------------------------------------------------------------------------


@pytest.mark.usefixtures("bitsandbytes")
def test_what_a_stream_needs_is_named_by_its_place() -> None:
    found = needs.needed(
        stream(
            model={"path": "tiny-world", "quantization": "4bit", "attn_implementation": "flash_attention_2"},
            stage={"adapter": "new", "training": {"fp16": True, "bf16": False}},
            processes=2,
        )
    )
    assert found == {
        "4-bit": ["model.quantization = 4bit"],
        "attention": ["model.attn_implementation = flash_attention_2"],
        "all-reduce": ["processes = 2"],
        "shared memory": ["processes = 2"],
        "float16": ["stages.0.training.fp16"],
    }
    assert needs.needed(stream(training={"use_cpu": False})) == {"bfloat16": ["stages.0.training.bf16"]}


def test_packages_that_arguments_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stream(
        training={"report_to": ["wandb", "tensorboard"], "optim": "adamw_bnb_8bit", "use_liger_kernel": True}
    )
    monkeypatch.setattr(needs, "find_spec", {"tensorboard": object()}.get)
    assert needs.check_packages(asked) == fail(
        "stages.0.training.report_to = wandb: needs wandb, which is not installed\n"
        "stages.0.training.optim = adamw_bnb_8bit: needs bitsandbytes, which is not installed\n"
        "stages.0.training.use_liger_kernel: needs liger_kernel, which is not installed",
        "pip install bitsandbytes liger-kernel wandb",
    )
    assert needs.check_packages(stream()).status == "ok"


@pytest.mark.parametrize(
    ("processes", "here", "cpu", "status"),
    [
        (2, 1, False, "fail"),
        (2, 2, False, "ok"),
        (None, 0, False, "ok"),
        (9999, 0, False, "warn"),
        (9999, 1, True, "warn"),
    ],
)
def test_a_device_for_each_process(
    monkeypatch: pytest.MonkeyPatch, processes: int | None, here: int, cpu: bool, status: str
) -> None:
    monkeypatch.setattr(needs, "accelerators", lambda: [f"cuda:{i}" for i in range(here)])
    assert needs.check_processes(stream(processes=processes, training={"use_cpu": cpu})).status == status


def test_deepspeed_settings_are_read(tmp_path: Path, root: Path) -> None:
    settings = root / "launch" / "deepspeed" / "zero3_offload.json"
    found = needs.check_zero(stream(training={"deepspeed": str(settings)}))
    assert found == ok("stages.0.training: ZeRO-3 with offload_optimizer and offload_param")
    lost = tried(Check("zero", lambda: needs.check_zero(stream(training={"deepspeed": "nowhere.json"})), "look"))
    assert lost.status == "fail"
    assert "no such file" in lost.found
    assert "zero2.json" in lost.found
    (tmp_path / "bad.json").write_text("{")
    bad = tried(Check("zero", lambda: needs.check_zero(stream(training={"deepspeed": f"{tmp_path}/bad.json"})), "look"))
    assert "is no JSON" in bad.found


def on_hub(model: str, data: str) -> Stream:
    return stream(model=model, stage={"data": {"hub": data}})


def test_names_that_are_not_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "rows"))
    assert needs.check_names(stream()).status == "ok"
    found = needs.check_names(on_hub("some/model", "some/rows"))
    assert found.found == (
        "model.path = some/model: not in the local cache\nstages.0.data.0 = some/rows: not in the local cache"
    )
    assert (found.advice or "").startswith("HF_HUB_OFFLINE=0 hf download some/model && ")
    (tmp_path / "models--some--model" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--some--model" / "snapshots" / "abc" / "config.json").touch()
    (tmp_path / "rows" / "some___rows").mkdir(parents=True)
    assert needs.check_names(on_hub("some/model", "some/rows")).status == "ok"


def test_names_that_the_hub_does_not_give_out(hub: HTTPServer) -> None:
    assert needs.check_names(on_hub("known/model", "known/rows")) == ok("the Hub has known/model, known/rows")
    found = needs.check_names(on_hub("gated/model", "other/rows"))
    assert found.status == "fail"
    assert found.found == "model.path = gated/model: is gated\nstages.0.data.0 = other/rows: does not exist"


def test_the_beginning_of_a_run_is_tried() -> None:
    assert needs.check_start(stream()).found.endswith("1 stage as `cpt run` checks them before it trains")
    rft = {"kind": "rft", "data": {"task": "tiny_world/sums_rewarded"}, "rewards": ["nobody:has", "nor:this"]}
    asked = stream(stage=rft, training={"num_generations": 4})
    found = tried(Check("start", lambda: needs.check_start(asked), "mend it"))
    assert found.status == "fail"
    assert [line.partition(" = ")[0] for line in found.found.splitlines()] == [
        "stages.0.rewards.0",
        "stages.0.rewards.1",
    ]


# ---- room -------------------------------------------------------------------------------------------

EIGHT_B = room.Sizes(8_030_261_248, 6_979_321_856, 0, 2, (4096, 14336, 1024, 32))  # Llama-3.1-8B in bf16


def test_sizes_are_counted_on_the_skeleton() -> None:
    from transformers import AutoConfig

    from cpt.resources import model_path

    config = AutoConfig.from_pretrained(model_path("tiny-world"))
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    shape = (config.hidden_size, config.intermediate_size, keys, config.num_hidden_layers)
    assert room.sizes(stream()) == [room.Sizes(541_536, 442_368, 0, 4, shape)]
    lora = {"mode": "new", "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}
    # r x (in + out) of q and of v in every layer.
    by_hand = config.num_hidden_layers * 8 * ((config.hidden_size * 2) + (config.hidden_size + keys))
    assert room.sizes(stream(stage={"adapter": lora}))[0].adapter == by_hand


def test_an_adapter_that_is_continued_has_the_size_of_the_one_before(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    data = {"task": "tiny_world/reverse"}
    modes = ["continue", {"mode": "new", "lora": {"r": 8, "target_modules": ["q_proj"]}}, "continue"]
    asked = stream(
        model={"path": "tiny-world", "adapter": str(tmp_path)},
        stages=[{"name": f"s{i}", "data": data, "adapter": mode} for i, mode in enumerate(modes)],
    )
    first, second, third = (size.adapter for size in room.sizes(asked))
    assert 2 * first == second == third
    lost = stream(model={"path": "tiny-world", "adapter": "some/adapter"}, stage={"adapter": "continue"})
    assert room.check_memory(lost) == absent("some/adapter must be fetched first: its size is not known here")


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        (None, (2, 2, 4)),
        ({"stage": 1}, (2, 2, 12 / 8)),
        ({"stage": 2}, (2, 2 / 8, 12 / 8)),
        ({"stage": 3}, (2 / 8, 2 / 8, 12 / 8)),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, (2 / 8, 0, 0)),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, (2 / 8, 2 / 8, 12 / 8)),
    ],
    ids=str,
)
def test_bytes_per_parameter(deepspeed: dict[str, Any] | None, expected: tuple[float, float, float]) -> None:
    """ZeRO, arXiv 1910.02054, figure 1: 2 + 2 + 12 bytes, spread over 8 in that order from the right."""
    given = {"deepspeed": {"zero_optimization": deepspeed}} if deepspeed else {}
    found = room.stage_bytes(stream(training=given, processes=8), 0, EIGHT_B, on_cpu=False)
    per_parameter = dict(zip(("weights", "gradients", "optimizer"), expected, strict=True))
    assert found == pytest.approx({name: each * EIGHT_B.parameters for name, each in per_parameter.items()})


@pytest.mark.parametrize(("bf16", "on_cpu", "weights"), [(None, False, 6), (False, False, 4), (None, True, 4)])
def test_float32_weights_have_a_copy_under_autocast(bf16: bool | None, on_cpu: bool, weights: int) -> None:
    given = {} if bf16 is None else {"bf16": bf16}
    found = room.stage_bytes(stream(training=given), 0, replace(EIGHT_B, width=4), on_cpu)
    assert found["weights"] == weights * EIGHT_B.parameters


@pytest.mark.usefixtures("bitsandbytes")
def test_four_bit_weights_under_a_lora() -> None:
    asked = stream(model={"path": "tiny-world", "quantization": "4bit"}, stage={"adapter": "new"})
    lora = replace(EIGHT_B, adapter=20_971_520)  # r = 8 on every linear layer
    found = room.stage_bytes(asked, 0, lora, on_cpu=False)
    by_hand = 6_979_321_856 * 0.5625 + (8_030_261_248 - 6_979_321_856) * 2 + 20_971_520 * 4
    assert found == {"weights": by_hand, "gradients": 20_971_520 * 4, "optimizer": 20_971_520 * 8}


def test_a_stage_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def with_free(mib: float, **parts: Any) -> Line:
        monkeypatch.setattr(room, "free_memory", lambda asked: (mib * 2**20, "on cuda:0", True))
        return room.check_memory(stream(**parts))

    # 541,536 parameters of 4 + 4 + 8 bytes are 8.3 MiB; 8 rows of 1,024 tokens would add more.
    assert with_free(2**12).status == "ok"
    assert with_free(12).status == "warn"
    found = with_free(8)
    assert (found.status, "; 8 MiB free on cuda:0" in found.found) == ("fail", True)
    assert (found.advice or "").startswith("stages.reverse.adapter=new ")
    offloaded = {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}
    monkeypatch.setattr(room, "free_main_memory", lambda: 2.0**20)
    assert "offload less" in (with_free(2**12, training=offloaded).advice or "")
    whole = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    monkeypatch.setattr(room, "free_main_memory", lambda: 2.0**40)
    assert "in one piece" in with_free(1.9, training=whole, processes=64).found
    assert with_free(2**12, training={"optim": "galore_adamw"}).status == "not here"
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: Disk(100, 0, 2**20))
    full = room.check_disk_room(stream(), tmp_path)
    assert full.status == "fail"
    assert "retention.models=last" in (full.advice or "")


def test_an_rft_stage_holds_its_reference() -> None:
    rft = {"kind": "rft", "data": {"task": "tiny_world/sums_rewarded"}, "rewards": ["exact_match"], "kl": "base"}
    asked = stream(stage=rft, training={"num_generations": 4})
    assert room.stage_bytes(asked, 0, EIGHT_B, on_cpu=False)["reference"] == EIGHT_B.parameters * 2
    assert "reference" not in room.stage_bytes(stream(), 0, EIGHT_B, on_cpu=False)


def test_an_sdft_stage_holds_its_teacher() -> None:
    """With a new adapter the base is the model without it; its average is a second model."""
    sdft = {"kind": "sdft", "data": {"task": "tiny_world/reverse"}}
    for adapter, kinds in ({}, ("base", "ema")), ({"adapter": "new"}, ("ema",)):
        size = replace(EIGHT_B, adapter=1000 if adapter else 0)
        for kind in ("base", "ema", "live"):
            asked = stream(stage=sdft | adapter, training={"num_generations": 4, "teacher_model_kind": kind})
            found = room.stage_bytes(asked, 0, size, on_cpu=False)
            assert found.get("reference", 0) == (EIGHT_B.parameters * 2 if kind in kinds else 0)


def test_what_a_run_writes() -> None:
    two = stream()
    each = EIGHT_B.parameters * 2
    # max_steps 4 is below save_steps: one checkpoint of weights and two moments, and the model that is kept.
    assert room.disk_bytes(two, [EIGHT_B]) == each + 3 * each
    long = stream(training={"max_steps": 5000})
    assert room.disk_bytes(long, [EIGHT_B]) == each + 3 * each * 3


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**19}\n")
    assert room.free_main_memory(tmp_path) == 2**19
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_main_memory(tmp_path) > 2**20
