"""A self-distilled stage in a stream: beside other kinds, with methods and adapters, stopped, refused in time."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt import ConfigError, DataError, Run, Stream, run
from cpt.errors import Stopped

pytestmark = pytest.mark.e2e

REPLAY = {"type": "replay", "ratio": 0.25, "general": {"task": "tiny_world/general", "limit": 40}}
FIRST = {"name": "reverse", "kind": "sdft", "data": {"task": "tiny_world/reverse", "limit": 60}}


def stream(folder: Path, *stages: dict[str, Any], **more: Any) -> Stream:
    training = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-4, "logging_steps": 1}
    training |= {"num_generations": 2, "max_completion_length": 8, "distillation_alpha": 0.3}
    about = {"name": "shown", "model": "tiny-world", "output_dir": str(folder), "training": training}
    return Stream.parse(about | {"stages": list(stages), "evaluation": {"within": "off"}} | more)


def facts(done: Run, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done.path / "stages" / stage / "DONE").read_text())["facts"]
    return found


def test_beside_other_kinds_with_methods_and_adapters(tmp_path: Path) -> None:
    new, goes_on = {"mode": "new", "lora": {"r": 2}}, {"mode": "continue"}
    done = run(
        stream(
            tmp_path,
            FIRST | {"methods": [REPLAY, "hft"], "training": {"teacher_model_kind": "ema"}},
            FIRST
            | {"name": "again", "kind": "sft", "training": {"max_steps": 1}},  # passes by what it has no field for
            FIRST | {"name": "new", "adapter": new, "methods": [REPLAY]},
            FIRST | {"name": "on", "adapter": goes_on},
            evaluation={
                "within": {"every": 2, "rows": 4},
                "general": {"copy": {"task": "tiny_world/copy", "limit": 8}},
            },
        ),
        say=lambda line: None,
    )
    first, last = facts(done, "01_reverse"), facts(done, "04_on")
    assert first["arguments"]["distillation_alpha"] == 0.3
    assert first["tokens"] > 0
    assert 0.4 < first["methods"]["hft"]["trained_share"] < 0.6
    assert "left_out" not in first["within"]
    assert last["trained_parameters"] < last["parameters"] / 10
    lines = [json.loads(line) for line in (done.path / "stages/01_reverse/metrics.jsonl").open()]
    assert all(line["sdft/distillation_loss"] > 0 for line in lines[:4])
    assert all(line["added_rows_loss"] > 0 for line in lines[:4])


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.trainers.sdft import DistillSeam

    def weights(done: Run) -> bytes:
        (file,) = done.path.glob("stages/01_reverse/model/*.safetensors")
        return file.read_bytes()

    ema = FIRST | {"training": {"teacher_model_kind": "ema", "save_steps": 2}}
    whole = weights(run(stream(tmp_path / "whole", ema), say=lambda line: None))
    steps, step = list[int](), DistillSeam.training_step

    def killed(self: Any, *about: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise Stopped("killed")
        return step(self, *about)

    monkeypatch.setattr(DistillSeam, "training_step", killed)
    with pytest.raises(Stopped):
        run(stream(tmp_path / "cut", ema), say=lambda line: None)
    monkeypatch.setattr(DistillSeam, "training_step", step)
    assert list(tmp_path.glob("cut/*/stages/01_reverse/checkpoints/checkpoint-2/teacher.safetensors"))
    assert weights(run(stream(tmp_path / "cut", ema), say=lambda line: None)) == whole


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"rewards": ["exact_match"]}, r"stages\.0\.rewards = .*: means nothing in an sdft stage, only in kind: rft"),
        ({"schedule": "infinite"}, r"stages\.0\.schedule = .*: means nothing in an sdft stage"),
        ({"methods": ["distill"]}, r"stages\.0\.methods\.0 = 'distill': does not work in an sdft stage"),
        ({"methods": [REPLAY | {"by": "tokens"}]}, r"methods\.0\.by = 'tokens': in an sdft stage nobody knows"),
        ({"training": {"num_generations": 3}}, r"training\.num_generations = 3: must divide the 8 completions"),
        ({"training": {"max_prompt_length": 9}}, r"max_prompt_length = 9: is not for a stage to set: no prompt is cut"),
        (
            {"training": {"distilation_mode": "x"}},
            r"is no field of TRL .*'s SDFTConfig\. Did you mean .distillation_mode",
        ),
        ({"kind": "sft", "training": {"distillation_topk": 9}}, r"distillation_topk = 9: is no field of TRL"),
    ],
)
def test_what_a_stage_cannot_be(tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stream(tmp_path, FIRST | stage)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {"training": {"teacher_model_kind": "basis"}},
            r"stages\.0\.training\.teacher_model_kind = 'basis': must be one",
        ),
        (
            {"training": {"teacher_prompt_template": "{prompt}"}},
            r"stages\.0\.training: TRL refuses .*privileged_context",
        ),
        (
            {"training": {"generation_kwargs": {"num_return_sequences": 2}}},
            r"stages\.0\.training\.generation_kwargs\.num_return_sequences = 2: say it as training\.num_generations",
        ),
        ({"data": {"rows": [{"text": "plain"}]}}, r"stages\.0\.data: has rows of plain text, .* an sdft stage needs"),
        (
            {"training": {"max_completion_length": 4096}},
            r"stages\.0\.training\.max_completion_length = 4096: the model's",
        ),
    ],
)
def test_what_is_seen_before_the_first_stage_trains(tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    before = {"name": "before", "data": {"task": "tiny_world/copy", "limit": 8}, "training": {"max_steps": 1}}
    with pytest.raises((ConfigError, DataError), match=said.replace(r"stages\.0", r"stages\.1")):
        run(stream(tmp_path, before, FIRST | stage), say=lambda line: None)
    assert not list(tmp_path.rglob("01_before/DONE"))
