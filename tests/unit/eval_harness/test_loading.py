"""Loading adapters to look at them: PEFT folders, a stage's folders, few bits, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_harness.__main__ import main
from eval_harness.lineage import Lineage, Part, weights_hashes
from eval_harness.loading import LoadError, load, load_lineage, load_model, made_of
from tests.models import logits

bits_needed = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A LoRA as PEFT saves it, without a tokenizer; B is random, so that it changes what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def expected(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


@pytest.fixture
def stage(base: Path, adapter: Path, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A folder of weights and adapters as a stage writes it."""
    folder = tmp_path / "stage"
    to = folder / "adapters" / "01_a"
    to.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, to / file)
    made = Lineage(str(base), base, sha256=weights_hashes(base), adapters=(Part("01_a", to, trained_in=("01_a",)),))
    (folder / "lineage.json").write_text(json.dumps(made.to_json()))
    tiny_tokenizer.save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_is_loaded_on_the_base_it_names_with_its_tokenizer(
    adapter: Path, expected: torch.Tensor, base: Path
) -> None:
    loaded = load(adapter)
    assert torch.equal(logits(loaded.model), expected)
    assert not torch.allclose(logits(load_model(base)), expected)
    assert len(loaded.tokenizer) == len(load(base).tokenizer)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_base_that_moved_is_found_where_the_user_says(
    adapter: Path, stage: Path, expected: torch.Tensor, base: Path, tmp_path: Path
) -> None:
    moved = base.rename(tmp_path / "moved")
    for folder in (adapter, stage):
        with pytest.raises(LoadError, match=r"the weights beneath \S+ are not there; say where they are with base"):
            load_model(folder)
        assert torch.equal(logits(load_model(folder, base=moved)), expected)


def test_a_stage_s_folder_is_its_weights_and_adapters(stage: Path, expected: torch.Tensor) -> None:
    assert made_of(stage).describe() == "base + 01_a"
    assert torch.equal(logits(load(stage).model), expected)
    merged = load_lineage(made_of(stage).all_merged())
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_a_stage_s_folder_on_another_model_is_refused(
    stage: Path, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(LoadError, match=r"other: is not the model that 01_a was trained on .*model.safetensors"):
        load_model(stage, base=tmp_path / "other")


def test_merging_is_the_same_each_time_and_refuses_what_is_not_a_number(stage: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = (dict(load_lineage(made_of(stage).all_merged()).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    file = stage / "adapters" / "01_a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(LoadError, match=r"01_a: cannot be merged: NaNs"):
        load_lineage(made_of(stage).all_merged())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa: such an adapter changes more than it holds"),
        ({"bias": "all"}, "bias: all: such an adapter changes more"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"base_model_name_or_path": "no-such-model"}, r"no-such-model: the weights beneath \S+lora are no folder"),
        ({"target_modules": ["nothing_like_it"]}, "nothing_like_it.* not found"),
        ({"target_modules": ["q_proj"]}, "has no module"),
        ({"r": 4}, r"is \[8, 16\] and must be \[4, 16\]"),
    ],
)
def test_an_adapter_that_cannot_be_what_it_says_is_refused(adapter: Path, changes: dict[str, Any], says: str) -> None:
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(LoadError, match=says):
        load_model(adapter)


def test_an_adapter_that_lacks_tensors_is_refused(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, adapter / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=f"{lost} is missing"):
        load_model(adapter)


def test_pickled_and_broken_adapters_are_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"nothing")
    with pytest.raises(LoadError, match=r"adapter_model.safetensors: cannot be read"):
        load_model(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(LoadError, match=r"has no adapter_model.safetensors \(adapters saved as .bin are not read"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 2}', "format 2 is not known here"),
    ],
)
def test_a_damaged_lineage_is_refused(stage: Path, content: str, says: str) -> None:
    (stage / "lineage.json").write_text(content)
    with pytest.raises(LoadError, match=says):
        load_model(stage)


def test_a_lineage_reads_no_adapter_outside_its_folder(stage: Path) -> None:
    content = json.loads((stage / "lineage.json").read_text())
    edit(stage / "lineage.json", adapters=[{**content["adapters"][0], "name": "../../lora"}])
    with pytest.raises(LoadError, match=r"adapters/lora: has no adapter_config.json and no adapter_model.safetensors"):
        load_model(stage)


def test_a_base_for_plain_weights_is_refused(base: Path) -> None:
    with pytest.raises(LoadError, match="is plain weights, not an adapter's folder"):
        load_model(base, base=base)


def test_few_bits_without_bitsandbytes_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_harness.loading.is_installed", lambda: False)
    with pytest.raises(
        LoadError, match=r"4bit weights need bitsandbytes, which is not installed: pip install 'cpt\[quant"
    ):
        load_model(base, quantization="4bit")


@bits_needed
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_weights_in_few_bits_are_near_the_weights(base: Path, bits: Any) -> None:
    plain, held = logits(load_model(base)), logits(load_model(base, quantization=bits))
    assert not torch.equal(held, plain)
    assert (held - plain).norm() < 0.3 * plain.norm()


@bits_needed
def test_an_adapter_is_measured_on_the_bits_it_was_trained_on(stage: Path, expected: torch.Tensor) -> None:
    edit(stage / "lineage.json", quantization="4bit")
    held = logits(load_model(stage))
    assert not torch.allclose(held, expected)
    assert torch.equal(held, logits(load_model(stage, quantization="4bit")))
    assert torch.equal(logits(load_model(stage, quantization="none")), expected)


def test_the_command_line_measures_an_adapter_on_a_base(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    rows = [{"prompt": "a", "completion": "b"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite.write_text("sets: {rows: {file: rows.jsonl, measures: [answer_loss]}}")
    moved = base.rename(tmp_path / "moved")
    losses = []
    for model, more in ((adapter, ["--base", str(moved)]), (moved, [])):
        out = tmp_path / f"of_{model.name}"
        assert main(["--model", str(model), "--suite", str(suite), "--out", str(out), *more]) == 0
        losses.append(json.loads((out / "results.json").read_text()))
    assert "rows" in capsys.readouterr().out
    assert losses[0]["results"] != losses[1]["results"]
    assert main(["--model", str(adapter), "--suite", str(suite)]) == 2
    assert "--base" in capsys.readouterr().err
