"""What bad input gets: one error that names the place and the next step, its exit code, and nothing committed lost.

Everything goes through `cpt.cli.main` in this process, with a stream of two four-step stages on the tiny world;
a process of its own only where the process is the point (a full disk, Ctrl-C, the entry point).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt import errors
from cpt.checkpoints import folder_hashes

Raw = dict[str, Any]
REPLAY = {"type": "replay", "ratio": 0.5, "general": {"task": "tiny_world/general", "limit": 40}}
CHAT = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}


def stage(name: str, task: str, **more: Any) -> Raw:
    return {"name": name, "data": {"task": f"tiny_world/{task}", "limit": 40}, **more}


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines a user is told; a traceback would be in `err` and not here."""
        return re.findall(r"^error: (.*)$", self.err, re.MULTILINE)


class Desk:
    """A folder to work in: one stream, its file, its runs, and the command line."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.file, self.runs = path, path / "stream.yaml", path / "runs"
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.stream: Raw = {
            "name": "bad",
            "model": "tiny-world",
            "output_dir": str(self.runs),
            "training": {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1},
            "stages": [stage("one", "reverse"), stage("two", "last_letter")],
            "evaluation": {"general": {"copy": {"task": "tiny_world/copy", "limit": 8}}},
        }

    def cpt(self, *arguments: str) -> Ended:
        """Run the command line in this process; `run` and `validate` get the stream's file."""
        from cpt import cli

        self.write()
        if arguments[0] in ("run", "validate"):
            arguments = (arguments[0], str(self.file), *arguments[1:])
        self._monkeypatch.setattr(sys, "argv", ["cpt", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = self._capsys.readouterr()
        return Ended(int(end.value.code or 0), out, err)

    def write(self) -> None:
        self.file.write_text(yaml.safe_dump(self.stream, sort_keys=False), encoding="utf-8")

    @property
    def run(self) -> Path:
        """The one run directory."""
        (path,) = self.runs.glob("bad-*")
        return path

    def committed(self) -> dict[str, dict[str, str]]:
        """Stage -> hashes of its files, for every stage that happened."""
        done = sorted((self.run / "stages").glob("*/DONE"))
        return {file.parent.name: folder_hashes(file.parent) for file in done}

    def world(self, change: Callable[[Raw, Raw], None], template: bool = True) -> str:
        """A copy of the tiny world whose tokenizer_config.json and tokenizer.json `change` may edit."""
        from cpt.resources import BUNDLED_MODELS

        folder = self.path / "world"
        shutil.copytree(BUNDLED_MODELS["tiny-world"], folder)
        files = [folder / "tokenizer_config.json", folder / "tokenizer.json"]
        contents = [json.loads(file.read_text()) for file in files]
        change(*contents)
        for file, content in zip(files, contents, strict=True):
            file.write_text(json.dumps(content))
        if not template:
            (folder / "chat_template.jinja").unlink()
        return str(folder)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, capsys, monkeypatch)


@pytest.fixture
def trained_once(desk: Desk) -> Desk:
    """A desk whose first stage is finished; the second one is in the stream and not yet run."""
    second = desk.stream["stages"].pop()
    assert desk.cpt("run").code == 0
    desk.stream["stages"].append(second)
    return desk


def set_at(raw: Any, path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        raw = raw[part]
    raw[last] = value


def test_every_exit_code_is_documented() -> None:
    from cpt import cli

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CptError)]
    assert {kind.exit_code for kind in kinds} == {2, 3, 4, 75, 130}
    documented = {int(code) for code in re.findall(r"\b\d+\b", (cli.__doc__ or "").partition("Exit codes:")[2])}
    assert documented == {0, 1} | {kind.exit_code for kind in kinds}


# ---- what a user writes: refused before anything is made ----------------------------------------------------


def rewarded(**changes: Any) -> Raw:
    """A second stage that is rewarded, four completions at a time."""
    task = {"task": "tiny_world/sums_rewarded"}
    training = {"num_generations": 2, "max_completion_length": 4} | changes.pop("training", {})
    return {"name": "two", "kind": "rft", "data": task, "rewards": ["exact_match"], "training": training} | changes


WRITTEN = {
    "method": ("stages.1.methods", [{"type": "repley"}], "stages.1.methods.0.type = 'repley'", "mean 'replay'?"),
    "field": ("training.learning_rat", 0.1, "training.learning_rat = 0.1", "mean 'learning_rate'?"),
    "field value": ("training.save_steps", 0, "training.save_steps = 0", "must be greater than 0"),
    "key": ("stages.0.data.shufle", True, "stages.0.data.0.shufle = True", "mean 'shuffle'?"),
    "model": ("model", "./nowhere", "model.path = './nowhere'", "Give a folder, a hub name or tiny-world"),
    "file": ("stages.1.data", {"file": "nope.jsonl"}, "stages.1.data.0.file = 'nope.jsonl'", "no such file"),
    "task": (
        "stages.1.data",
        {"task": "tiny_world/revers"},
        "stages.1.data.0.task = 'tiny_world/revers'",
        "'reverse'?",
    ),
    "column": (
        "stages.0.data",
        {"rows": [{"question": "a", "answer": "b"}], "fields": {"question": "qestion"}},
        "stages.0.data.0 (rows in memory) row 0: fields.question = 'qestion'",
        "fields found: question, answer",
    ),
    "no rows": ("stages.0.data", {"rows": []}, "stages.0.data.0.rows = []", "give at least one row"),
    "no answer": (
        "stages.0.data",
        {"rows": [{"prompt": "a", "completion": "b"}, {"prompt": "c"}]},
        "stages.0.data.0 (rows in memory) row 1: row without an answer",
        "map it with `fields:`",
    ),
    "empty answer": (
        "stages.0.data",
        {"rows": [{"instruction": "a", "output": " "}]},
        "stages.0.data.0 (rows in memory) row 0: row with an empty answer",
        "`output` has no text",
    ),
    "no room": (
        "stages.0.methods",
        [REPLAY | {"ratio": 0.999}],
        "stages.0.methods.0.ratio = 0.999",
        "leaves no room for task rows in an effective batch of 4",
    ),
    "no room for two": (
        "stages.0.methods",
        [REPLAY, REPLAY | {"name": "again"}],
        "stages.0.methods = 'replay 2 + again 2'",
        "lower their ratios",
    ),
    "one name twice": (
        "stages.0.methods",
        [REPLAY | {"ratio": 0.25}, REPLAY | {"ratio": 0.25}],
        "stages.0.methods.1.name = 'replay'",
        "give one a name of its own",
    ),
    "no earlier stage": (
        "stages.1.methods",
        [{"type": "replay", "ratio": 0.5, "earlier": ["on"]}],
        "stages.1.methods.0.earlier = ['on']",
        "mean 'one'?",
    ),
    "no reward": ("stages.1.kind", "rft", "stages.1.rewards = []", "exact_match, numeric, math, format or a path"),
    "unknown reward": (
        "stages.1",
        rewarded(rewards=["exact_mach"]),
        "stages.1.rewards.0.type = 'exact_mach'",
        "mean 'exact_match'?",
    ),
    "a reward twice": (
        "stages.1",
        rewarded(rewards=["numeric", {"type": "numeric", "weight": 0.5}]),
        "stages.1.rewards.1 = 'numeric'",
        "give one a `name:`",
    ),
    "group size": (
        "stages.1",
        rewarded(training={"num_generations": 3}),
        "stages.1.training.num_generations = 3",
        "must divide the 4 completions generated at a time",
    ),
    "group of one": (
        "stages.1",
        rewarded(training={"num_generations": 1}),
        "stages.1.training.num_generations = 1",
        "must be at least 2",
    ),
    "no number of completions": (
        "stages.1",
        rewarded(training={"num_generations": None}),
        "stages.1.training.num_generations = None",
        "must be a number",
    ),
    "no longest completion": (
        "stages.1",
        rewarded(training={"max_completion_length": None}),
        "stages.1.training.max_completion_length = None",
        "must be a number",
    ),
    "a weight towards nothing": (
        "stages.1",
        rewarded(kl={"weight": 0.5}),
        "stages.1.kl.weight = 0.5",
        "give base or previous",
    ),
    "kl on": ("stages.1", rewarded(kl=True), "stages.1.kl.to = 'on'", "'off', 'base' or 'previous'"),
    "beta": ("stages.1", rewarded(training={"num_generations": 2, "beta": 0.1}), "stages.1.training.beta", "`kl:`"),
    "a reward in sft": ("stages.1.rewards", ["numeric"], "stages.1.rewards", "only in kind: rft"),
    "kl in sft": ("stages.1.kl", "base", "stages.1.kl = 'base'", "only in kind: rft"),
    "nothing to continue": ("stages.1.adapter", "continue", "stages.1.adapter = 'continue'", "trained full weights"),
    "lora on the head": (
        "stages.1.adapter",
        {"mode": "new", "lora": {"target_modules": ["q_proj", "lm_head"]}},
        "stages.1.adapter.lora.target_modules = 'lm_head'",
        "Leave it out",
    ),
}


@pytest.mark.parametrize(("path", "value", "place", "step"), WRITTEN.values(), ids=WRITTEN)
def test_refused_before_anything_is_made(desk: Desk, path: str, value: Any, place: str, step: str) -> None:
    set_at(desk.stream, path, value)
    ended, validated = desk.cpt("run"), desk.cpt("validate")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith(place)
    assert step in ended.errors[0]
    assert (validated.code, validated.errors) == (ended.code, ended.errors)
    assert not desk.runs.exists()


def test_an_unknown_model_of_the_hub(desk: Desk) -> None:
    desk.stream["model"] = "tiny-wrld"
    ended = desk.cpt("run")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert ended.errors[0].startswith("model.path = 'tiny-wrld': neither a local folder nor bundled")
    assert "Did you mean 'tiny-world'? Offline, give a folder: model=PATH." in ended.errors[0]


def test_the_entry_point_exits_with_the_code(desk: Desk) -> None:
    desk.stream["stages"][0]["methods"] = ["hft", "replay"]
    desk.write()
    done = subprocess.run([sys.executable, "-m", "cpt.cli", "validate", str(desk.file)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stages.0.methods.1.general = None: nothing to replay")


# ---- the tokenizer ------------------------------------------------------------------------------------------


def no_pad(config: Raw, tokenizer: Raw) -> None:
    del config["pad_token"]


def pad_is_unknown(config: Raw, tokenizer: Raw) -> None:
    config["unk_token"] = config["pad_token"]


@pytest.mark.parametrize(("change", "said"), [(no_pad, "no pad token"), (pad_is_unknown, "is its unknown token")])
def test_a_pad_token_that_cannot_be_used(desk: Desk, change: Callable[[Raw, Raw], None], said: str) -> None:
    desk.stream["model"] = desk.world(change)
    desk.stream["stages"].pop()
    ended = desk.cpt("run")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert said in ended.errors[0]
    assert "set tokenizer.pad_token, e.g. to the eos token '<|end|>'" in ended.errors[0]
    assert desk.cpt("run", "tokenizer.pad_token=<|end|>").code == 0


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("stages.1.data", {"rows": [CHAT]}, "stages.1.data: "),
        ("stages.1.methods", [REPLAY | {"general": {"rows": [CHAT]}}], "stages.1.methods.0.general: "),
        ("stages.1.test", {"rows": [CHAT]}, "stages.two.test: "),
        ("evaluation.general.talk", {"rows": [CHAT]}, "evaluation.general.talk: "),
    ],
)
def test_conversations_without_a_chat_template(desk: Desk, path: str, value: Any, place: str) -> None:
    """Seen before the first stage trains, not when the second begins."""
    desk.stream["model"] = desk.world(lambda config, tokenizer: None, template=False)
    set_at(desk.stream, path, value)
    ended = desk.cpt("run")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert ended.errors[0].startswith(place)
    assert "chat template" in ended.errors[0]
    assert "tokenizer.chat_template" in ended.errors[0]
    assert not list(desk.runs.glob("*/stages/*/DONE"))


def test_characters_that_the_tokenizer_loses_are_counted(desk: Desk) -> None:
    def drop_accents(config: Raw, tokenizer: Raw) -> None:
        tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "é"}, "content": ""}

    rows = [{"prompt": "né", "completion": "été"}, {"prompt": "to", "completion": "be"}]
    desk.stream |= {"model": desk.world(drop_accents), "stages": [{"name": "one", "data": {"rows": rows}}]}
    ended = desk.cpt("run")
    assert ended.code == 0
    assert "warning: task: 3 characters do not survive the tokenizer (2 rows)" in ended.out
    facts = json.loads((desk.run / "stages/01_one/DONE").read_text())["facts"]
    assert facts["rows"]["task"]["lost_characters"] == 3


def test_a_base_whose_weights_are_cut_off(desk: Desk) -> None:
    folder = Path(desk.world(lambda config, tokenizer: None))
    desk.stream["model"] = str(folder)
    truncate(folder / "model.safetensors")
    ended = desk.cpt("run")
    assert ended.code == 2
    assert ended.errors[0].startswith(f"model {folder}: the model cannot be loaded")
    assert ended.errors[0].endswith("Restore the folder or download it again, then run again.")


def test_arguments_that_trl_refuses_stop_before_the_first_stage(desk: Desk) -> None:
    desk.stream["stages"][1]["training"] = {"logging_strategy": "stepz"}
    ended = desk.cpt("run")
    assert ended.code == 2
    assert ended.errors[0].startswith("stages.1.training: TRL refuses these arguments: stepz is not a valid Interval")
    assert not list(desk.runs.glob("*/stages/*/DONE"))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"type": "no_such_package.rewards:helpful"}, "there is no module no_such_package"),
        ({"type": "os.path:no_such_function"}, "os.path has no no_such_function"),
        ({"type": "tests.e2e.test_bad_input:needs_a_column"}, "needs difficulty"),
    ],
)
def test_a_reward_of_yours_that_cannot_be_asked(desk: Desk, reward: Raw, said: str) -> None:
    desk.stream["stages"][1] = rewarded(rewards=[reward])
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith("stages.1.rewards.0 = ")
    assert said in ended.errors[0]
    assert not list(desk.runs.glob("*/stages/*/DONE"))


def needs_a_column(completions: list[str], difficulty: list[int], **columns: Any) -> list[float]:
    """No stage's rows bring it."""
    return [float(n) for n in difficulty]


def test_full_weights_cannot_be_trained_in_4_bits(desk: Desk) -> None:
    desk.stream["model"] = {"path": "tiny-world", "quantization": "4bit"}
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (2, 2), ended.err
    for number, line in enumerate(ended.errors):
        assert line.startswith(f"stages.{number}.adapter = None: full weights cannot be trained")
        assert "give adapter: new" in line


def test_quantization_without_its_package(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt.adapters import spec

    monkeypatch.setattr(spec, "is_installed", lambda: False)
    desk.stream["model"] = {"path": "tiny-world", "quantization": "8bit"}
    for one in desk.stream["stages"]:
        one["adapter"] = "new"
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith("model.quantization = '8bit': needs bitsandbytes: pip install")


@pytest.mark.parametrize(
    ("training", "place", "said"),
    [
        ({"max_completion_length": 512}, "stages.1.training.max_completion_length = 512", "context of 256 tokens"),
        ({"max_completion_length": 254}, "stages.1.data", "leaves room for a completion"),
        ({"loss_type": "nonsense"}, "stages.1.training.loss_type = 'nonsense'", "dapo, grpo"),
        ({"use_vllm": True}, "stages.1.training.use_vllm = true", "needs the package vllm"),
    ],
)
def test_what_only_a_rewarded_stage_would_meet(desk: Desk, training: Raw, place: str, said: str) -> None:
    desk.stream["stages"][1] = rewarded(training=training)
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith(place)
    assert said in ended.errors[0]
    assert not list(desk.runs.glob("*/stages/*/DONE"))


def leaves(completions: list[str], **columns: Any) -> list[float]:
    """Ends the interpreter, as a script's own check may."""
    sys.exit(0)


def test_a_reward_that_exits_is_one_that_raises(desk: Desk) -> None:
    desk.stream["stages"] = [rewarded(rewards=["tests.e2e.test_bad_input:leaves"])]
    ended = desk.cpt("run")
    assert ended.code == 0, ended.err
    assert "reward leaves raised on 16 of 16 completions, which score 0: SystemExit" in ended.out


def test_a_reward_renamed_between_a_stop_and_the_next_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are for logs: the stage goes on."""
    from cpt import cli

    def stop(line: str) -> None:
        if "step 2" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    desk.stream["stages"] = [rewarded(training={"save_steps": 2})]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "speaking", lambda: nullcontext(stop))
        assert desk.cpt("run").code == 75
    desk.stream["stages"][0]["rewards"] = [{"type": "exact_match", "name": "mine"}]
    ended = desk.cpt("run")
    assert ended.code == 0, ended.err
    facts = json.loads((desk.run / "stages/01_two/DONE").read_text())["facts"]
    assert facts["resumed_from"] is not None
    assert facts["rewards"]["mine"]["rows"] == 16


def test_lora_that_fits_no_module_of_the_model(desk: Desk) -> None:
    desk.stream["stages"][1]["adapter"] = {"mode": "new", "lora": {"target_modules": ["query"]}}
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith("stages.1.adapter.lora")
    assert "query" in ended.errors[0]
    assert not list(desk.runs.glob("*/stages/*/DONE"))


def test_an_adapter_of_another_base(desk: Desk) -> None:
    """Trained in one run, given to a stream over another model."""
    desk.stream["stages"] = [stage("one", "reverse", adapter="new")]
    assert desk.cpt("run").code == 0
    made = desk.run / "stages" / "01_one" / "model"
    other = desk.world(lambda config, tokenizer: None)
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(other) / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, Path(other) / "model.safetensors")
    desk.stream["name"] = "other"
    desk.stream["model"] = {"path": other, "adapter": str(made)}
    desk.stream["stages"] = [stage("one", "reverse", adapter="continue")]
    ended = desk.cpt("run")
    assert ended.code == 2
    assert ended.errors[0].startswith(f"model.adapter = {str(made)!r}")
    assert not list(desk.runs.glob("other-*/stages/*/DONE"))


def test_a_checkpoint_of_another_number_of_processes(stopped: Desk) -> None:
    """As two processes leave it: each keeps its random state in a file of its own."""
    from cpt.checkpoints import SEAL, seal

    checkpoint = stopped.run / "stages/02_two/checkpoints/checkpoint-4"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copyfile(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    (checkpoint / SEAL).unlink()
    seal(checkpoint)
    ended = stopped.cpt("run")
    assert ended.code == 3
    assert "was written by 2 processes, and 1 are running" in ended.errors[0]
    assert "Start 2, or delete" in ended.errors[0]


# ---- the run directory --------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_of_another_stream(trained_once: Desk) -> None:
    desk, before = trained_once, trained_once.committed()
    run = str(desk.run)
    ended = desk.cpt("run", "name=other", "--run", run)
    assert ended.code == 3
    assert ended.errors == [
        f"{run} is a run of stream 'bad', not of 'other': leave --run out, or use name=bad",
    ]
    ended = desk.cpt("run", "--run", run, f"model={desk.world(no_pad)}", "tokenizer.pad_token=<|pad|>")
    assert ended.code == 3
    assert ended.errors == [f"{run} was made from another base model or tokenizer: use --new"]
    ended = desk.cpt("resume", str(desk.runs / "nothing"))
    assert ended.code == 3
    assert f"no run directory, and no run of that name beside it. Runs there: {desk.runs / 'bad'}" in ended.errors[0]
    assert desk.committed() == before


@pytest.fixture
def stopped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose second stage was stopped by a real SIGTERM, with checkpoints of steps 2 and 4 of 6."""
    from cpt import cli

    def stop_in_two(line: str) -> None:
        said.append(line)
        if "step 3" in line and any("two: sft from 01_one" in earlier for earlier in said):
            os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    desk.stream["training"]["max_steps"] = 6
    with monkeypatch.context() as patch:
        patch.setattr(cli, "speaking", lambda: nullcontext(stop_in_two))
        ended = desk.cpt("run")
    assert ended.code == 75
    assert ended.errors == [
        "stopped by SIGTERM in stage 'two', with a checkpoint written; run the same command again to go on from there"
    ]
    found = sorted(path.name for path in (desk.run / "stages/02_two/checkpoints").iterdir())
    assert found == ["checkpoint-2", "checkpoint-4"]
    return desk


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", truncate),
        ("model.safetensors", flip_a_bit),
        ("rng_state.pth", Path.unlink),
        ("SEAL.json", truncate),
    ],
)
def test_a_damaged_checkpoint_is_not_read(stopped: Desk, name: str, damage: Callable[[Path], None]) -> None:
    """Refused by name; what the error advises then leads to the weights of an undamaged run."""
    desk, before = stopped, stopped.committed()
    checkpoint = desk.run / "stages/02_two/checkpoints/checkpoint-4"
    damage(checkpoint / name)
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (3, 1), ended.err
    assert ended.errors[0].startswith(f"{checkpoint / name}: is ")
    assert f"Delete {checkpoint} to go on from checkpoint-2, then run the same command again" in ended.errors[0]
    assert desk.committed() == before

    shutil.rmtree(checkpoint)
    assert desk.cpt("run").code == 0
    after = desk.committed()
    assert after["01_one"] == before["01_one"]
    assert json.loads((desk.run / "stages/02_two/DONE").read_text())["facts"]["resumed_from"] == "checkpoint-2"
    undamaged = desk.run
    assert desk.cpt("run", "--new").code == 0
    (again,) = set(desk.runs.glob("bad-*")) - {undamaged}
    assert (
        after["02_two"]["model/model.safetensors"] == folder_hashes(again / "stages/02_two/model")["model.safetensors"]
    )


def test_a_damaged_model_is_not_trained_on(trained_once: Desk) -> None:
    desk = trained_once
    weights = desk.run / "stages/01_one/model/model.safetensors"
    whole = weights.read_bytes()
    flip_a_bit(weights)
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert ended.errors[0].startswith(f"{weights}: is damaged (its hash is not the one recorded")
    assert "Restore it, or delete" in ended.errors[0]
    weights.write_bytes(whole)
    ended = desk.cpt("run")
    assert ended.code == 0
    assert "stages: one kept, two to do" in ended.out


@pytest.mark.parametrize("name", ["run.json", "stages/01_one/stage.json", "stages/01_one/DONE", "cache"])
def test_a_damaged_record_is_named(trained_once: Desk, name: str) -> None:
    """Records are cut off; the cache too, and then it is asked, as its eval/DONE is gone."""
    desk = trained_once
    if name == "cache":
        (desk.run / "stages/01_one/eval/DONE").unlink()
        files = [desk.runs / ".eval_cache.sqlite"]
    else:
        files = [desk.run / name]
    for file in files:
        truncate(file)
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (3, 1), ended.err
    assert ended.errors[0].startswith(
        tuple(f"{file}: {how} (" for file in files for how in ("is damaged", "cannot be used"))
    )
    assert re.search("[Dd]elete", ended.errors[0])


# ---- what happens while training ----------------------------------------------------------------------------


def command(desk: Desk) -> list[str]:
    desk.write()
    return [sys.executable, "-m", "cpt.cli", "run", str(desk.file)]


def test_a_full_disk_loses_nothing(trained_once: Desk) -> None:
    """No file may grow beyond 3 MiB: the second stage's optimizer state (4.3 MB) fails in the middle."""
    desk, before = trained_once, trained_once.committed()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))

    done = subprocess.run(command(desk), capture_output=True, text=True, preexec_fn=limit)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert (ended.code, len(ended.errors)) == (4, 1), ended.err
    assert ended.errors[0].startswith(f"{desk.runs}: the disk (or a quota) is full")
    assert "Nothing committed is lost: free some space, then run the same command again" in ended.errors[0]
    assert desk.committed() == before
    assert list((desk.run / "stages/02_two/checkpoints").glob("*/optimizer.pt"))  # it did fail in a checkpoint
    again = desk.cpt("run")
    assert again.code == 0, again.err
    assert "stages: one kept, two to do" in again.out
    assert desk.committed()["01_one"] == before["01_one"]


def write_text(file: Path, tokenizer: Any) -> None:
    file.write_text("x")


def write_tokenizer(file: Path, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.save(str(file))


def write_tensors(file: Path, tokenizer: Any) -> None:
    import torch

    torch.save({"x": torch.zeros(100_000)}, file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's always-full device")
@pytest.mark.parametrize("write", [write_text, write_tokenizer, write_tensors])
def test_whichever_library_meets_the_full_disk(
    tmp_path: Path, tiny_tokenizer: Any, write: Callable[[Path, Any], None]
) -> None:
    from cpt.disk import readable_disk_errors

    # Through a link: a library that removes what it could not write removes the link, never the device.
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(errors.TrainingError) as caught, readable_disk_errors(tmp_path):
        write(full, tiny_tokenizer)
    assert str(caught.value).startswith(f"{tmp_path}: the disk (or a quota) is full")


@pytest.mark.parametrize(
    "training",
    [{"learning_rate": 1e30}, {"learning_rate": 1e30, "max_steps": 2, "save_steps": 100}],
    ids=["in a loss", "in the last update, which shows in no loss"],
)
def test_a_loss_that_is_not_a_number(trained_once: Desk, training: Raw) -> None:
    desk, before = trained_once, trained_once.committed()
    desk.stream["stages"][1]["training"] = training
    ended = desk.cpt("run")
    assert (ended.code, len(ended.errors)) == (4, 1), ended.err
    assert ended.errors[0].startswith("stage 'two': the loss, or a weight, was not a number at step ")
    assert "Lower training.learning_rate (now 1e+30)" in ended.errors[0]
    assert "run the same command again" in ended.errors[0]
    assert desk.committed() == before
    del desk.stream["stages"][1]["training"]
    again = desk.cpt("run")
    assert again.code == 0
    assert desk.committed().keys() == {"01_one", "02_two"}
    assert desk.committed()["01_one"] == before["01_one"]


def test_ctrl_c_writes_a_checkpoint(desk: Desk) -> None:
    desk.stream["stages"].pop()
    desk.stream["training"] |= {"max_steps": 150, "save_steps": 1000}
    with subprocess.Popen(command(desk), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("step 1 " in line for line in process.stdout), "it ended before its first step"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    told = "error: stopped by Ctrl-C in stage 'one', with a checkpoint written; run the same command again"
    assert told in err
    assert "Traceback" not in err
    (checkpoint,) = (desk.run / "stages/01_one/checkpoints").iterdir()
    assert desk.cpt("resume", str(desk.run)).code == 0
    facts = json.loads((desk.run / "stages/01_one/DONE").read_text())["facts"]
    assert facts["resumed_from"] == checkpoint.name


def test_a_second_ctrl_c_stops_at_once(trained_once: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpt import cli

    def interrupt_twice(line: str) -> None:
        if "step 1 " in line:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    desk, before = trained_once, trained_once.committed()
    with monkeypatch.context() as patch:
        patch.setattr(cli, "speaking", lambda: nullcontext(interrupt_twice))
        ended = desk.cpt("run")
    assert ended.code == 130
    assert ended.errors == ["stopped at once; a run goes on from its newest checkpoint when it is started again"]
    assert desk.committed() == before
    assert desk.cpt("run").code == 0
    assert desk.committed().keys() == {"01_one", "02_two"}
