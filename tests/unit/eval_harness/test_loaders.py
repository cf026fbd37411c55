"""Adapters of other kinds, by packages that register a loader; broken checkpoints; scoring in few bits and after it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_harness.lineage import Lineage, Part, weights_hashes
from eval_harness.loading import LOADERS, LoadError, load, load_lineage, load_model, made_of, weights_folder
from eval_harness.prompts import Encoded
from eval_harness.scoring import score

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
PAGE = Path(__file__).resolve().parents[3] / "docs" / "write_a_loader.md"
FORGETS = """

def forgets(model, folder, *, name, merged):
    load(model, folder, name=name, merged=merged)
"""


def file_of_the_page(name: str) -> str:
    """A file as the documentation has it."""
    found = re.search(
        rf"<!-- file: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    return found[1]


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def scaled(base: Path, tmp_path: Path) -> Path:
    """A folder of the toy adapter: twice the last norm's first half, half of the other."""
    from safetensors.torch import save_file

    folder = tmp_path / "scaled"
    folder.mkdir()
    save_file({"scale": torch.tensor([2.0] * 8 + [0.5] * 8)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "TOY_SCALE", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install(package, **kinds)`: a package on the path with its entry points, as an installer leaves it."""

    def do(package: str = "toy_scale", **kinds: str) -> None:
        site = tmp_path / f"site_{package}"
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (site / f"{package}.py").write_text(file_of_the_page("toy_scale.py") + FORGETS)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{kind} = {package}:{function}" for kind, function in kinds.items()]
        (about / "entry_points.txt").write_text("\n".join([f"[{LOADERS}]", *lines]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return do


@pytest.fixture
def stage(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`stage((adapter, merged), ...)`: a folder of weights and adapters as a stage writes it."""

    def make(*adapters: tuple[Path, bool]) -> Path:
        folder, parts = tmp_path / "stage", []
        for number, (adapter, merged) in enumerate(adapters, 1):
            to = folder / "adapters" / f"0{number}_a"
            shutil.copytree(adapter, to)
            parts.append(Part(to.name, to, merged, (to.name,)))
        made = Lineage(str(base), base, sha256=weights_hashes(base), adapters=tuple(parts))
        (folder / "lineage.json").write_text(json.dumps(made.to_json()))
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def scaled_by_hand(model: Any) -> torch.Tensor:
    model.model.norm.weight.data *= torch.tensor([2.0] * 8 + [0.5] * 8)
    return logits(model)


# ---- kinds -------------------------------------------------------------------------------------------


def test_a_registered_loader_puts_its_adapter_on(install: Callable[..., None], scaled: Path, base: Path) -> None:
    registered = tomllib.loads(file_of_the_page("pyproject.toml"))["project"]["entry-points"]
    assert registered == {LOADERS: {"TOY_SCALE": "toy_scale:load"}}
    install(TOY_SCALE="load")
    loaded = load(scaled)
    expected = scaled_by_hand(load_model(base))
    torch.testing.assert_close(logits(loaded.model), expected)
    assert not torch.allclose(expected, logits(load_model(base)))
    assert "scale_of_default" in dict(loaded.model.model.norm.named_parameters())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert len(loaded.tokenizer) == len(load(base).tokenizer)


def test_in_a_lineage_it_stands_on_what_was_merged_before(
    install: Callable[..., None], stage: Callable[..., Path], scaled: Path, lora: Path, base: Path
) -> None:
    install(TOY_SCALE="load")
    folder = stage((lora, True), (scaled, False))
    expected = scaled_by_hand(load_lineage(made_of(lora).all_merged()))
    torch.testing.assert_close(logits(load_model(folder)), expected)
    merged = load_lineage(made_of(folder).all_merged())
    torch.testing.assert_close(logits(merged), expected)
    assert [name for name, _ in merged.model.norm.named_parameters()] == ["weight"]


def test_a_lora_stands_on_it_once_it_is_merged(
    install: Callable[..., None], stage: Callable[..., Path], scaled: Path, lora: Path
) -> None:
    install(TOY_SCALE="load")
    found = load_model(stage((scaled, True), (lora, False)))
    by_hand = load_model(lora)
    by_hand.base_model.model.model.norm.weight.data *= torch.tensor([2.0] * 8 + [0.5] * 8)
    assert found.peft_config.keys() == {"02_a"}
    torch.testing.assert_close(logits(found), logits(by_hand))


def test_it_is_not_active_beside_another(
    install: Callable[..., None], stage: Callable[..., Path], scaled: Path, lora: Path
) -> None:
    install(TOY_SCALE="load")
    with pytest.raises(LoadError, match=r"02_a: TOY_SCALE cannot be active beside others \(01_a\): merge all but one"):
        load_model(stage((lora, False), (scaled, False)))


def test_a_kind_that_nobody_loads_is_refused_before_weights_are_read(
    install: Callable[..., None], scaled: Path, base: Path, stage: Callable[..., Path]
) -> None:
    says = r"peft_type is 'TOY_SCALE'; only LORA is read here, .* group eval_harness.loaders \(installed: "
    with pytest.raises(LoadError, match=says + r"none\)\. .*docs/write_a_loader.md"):
        made_of(scaled)
    install(OTHER="load", ANOTHER="load")
    for folder in (scaled, stage((scaled, False))):
        with pytest.raises(LoadError, match=says + r"ANOTHER, OTHER\)"):
            made_of(folder)


def test_two_loaders_of_one_kind_are_refused(install: Callable[..., None], scaled: Path) -> None:
    install(TOY_SCALE="load")
    install("toy_again", TOY_SCALE="load")
    with pytest.raises(LoadError, match=r"several loaders \(toy_again:load, toy_scale:load\): uninstall one"):
        load_model(scaled)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_such", r"TOY_SCALE = toy_scale:no_such: cannot be imported"),
        ("forgets", r"scaled: toy_scale:forgets returned NoneType, and must return the model"),
    ],
)
def test_a_loader_that_does_not_work_is_named(
    install: Callable[..., None], scaled: Path, function: str, says: str
) -> None:
    install(TOY_SCALE=function)
    with pytest.raises(LoadError, match=says):
        load_model(scaled)


def test_its_own_errors_and_files_are_checked(install: Callable[..., None], scaled: Path) -> None:
    from safetensors.torch import save_file

    install(TOY_SCALE="load")
    save_file({"scale": torch.ones(4)}, scaled / "adapter_model.safetensors")
    with pytest.raises(LoadError, match=r"scale is \[4\] and must be \[16\]"):
        load_model(scaled)
    (scaled / "adapter_config.json").write_text("[]")
    with pytest.raises(LoadError, match=r"adapter_config.json: holds a list and must hold an object"):
        load_model(scaled)
    (scaled / "adapter_model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no adapter_model.safetensors"):
        load_model(scaled)


def test_a_lora_never_asks_for_a_loader(install: Callable[..., None], lora: Path) -> None:
    install(LORA="forgets")
    assert load_model(lora).peft_config.keys() == {"default"}


# ---- what is broken ----------------------------------------------------------------------------------


def test_a_checkpoint_without_a_tokenizer(base: Path, lora: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    for place in (base, lora):
        with pytest.raises(LoadError, match=r"base: no tokenizer beside the weights; run tokenizer.save_pretrained"):
            load(place)
        assert load_model(place) is not None


def test_an_adapter_whose_base_is_missing_names_both(lora: Path, base: Path, tmp_path: Path) -> None:
    shutil.rmtree(base)
    for read in (load, load_model, lambda place: weights_folder(made_of(place))):
        with pytest.raises(LoadError, match=r"base: the weights beneath \S+lora are not there; say where .*--base"):
            read(lora)
    base.mkdir()
    with pytest.raises(LoadError, match=r"not a checkpoint: no config\.json"):
        load_model(lora)
    with pytest.raises(LoadError, match="nothing: no such folder"):
        weights_folder(made_of(tmp_path / "nothing"))


def test_a_nan_in_the_weights_is_found_before_anything_is_measured(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"base: the weights hold NaN in 1 tensors: model\.layers\.1\.mlp\.down_proj"):
        load_model(base)


# ---- few bits ----------------------------------------------------------------------------------------


def state_of_the_process() -> dict[str, Any]:
    """What torch and its libraries keep for the whole process, and later training would feel."""
    return {
        "default_dtype": torch.get_default_dtype(),
        "default_device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.random.get_rng_state().tolist(),
        "linear": torch.nn.functional.linear,
        "layer": (torch.nn.Linear.forward, torch.nn.Linear.__init__, torch.nn.Linear.reset_parameters),
    }


def trained(model: Any, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a few AdamW steps of a seeded LoRA on the model, and its tensors after them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).train()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in learned.items()}


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_scoring_in_few_bits_leaves_the_process_able_to_train(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], bits: Any
) -> None:
    """The same model, and full weights loaded after it, learn bit for bit what they learn in a fresh process.

    On a CPU with AVX512-BF16 it fails without `quantization.keep_gradients_right`: a scoring pass repacks the
    4-bit weights, and what is used from then on has no gradient to the layers below.
    """
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}  # as bitsandbytes repacks it
    base = tiny_checkpoint(tmp_path / "base", **wide)
    never_scored = trained(load_model(base, quantization=bits))
    full = trained(load_model(base))
    sequences = [Encoded(IDS[0].tolist(), [False] + [True] * 5)]
    before = state_of_the_process()
    model = load_model(base, quantization=bits)
    found = score(model, sequences)[0]
    assert state_of_the_process() == before
    assert found is not None
    assert score(model, sequences)[0] == found
    for (losses, tensors), (expected, wanted) in (
        (trained(model), never_scored),
        (trained(load_model(base)), full),
    ):
        assert losses == expected
        assert losses[-1] < losses[0]
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
