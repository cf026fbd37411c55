"""Adapters: what a stream may say, the model that a lineage gives, what is saved, held in few bits and exported.

"Trained" here means: the tensors of the adapter in training are set to seeded random numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpt import models
from cpt.adapters.spec import DEFAULTS, OWNED, Adapter
from cpt.config import ModelSpec, Stream
from cpt.errors import ConfigError, DataError, RunDirError
from cpt.export import export
from cpt.models import (
    check_adapter,
    lineage,
    needs_weights_of,
    open_for_training,
    open_model,
    save_model,
    stands_on_base,
    starts_as_parent,
)
from cpt.run_dir import Run
from eval_harness.loading import load_model
from tests.models import logits

ROWS = [{"prompt": "a", "completion": "b"}]
WIDE = {"hidden_size": 64, "intermediate_size": 128}
bits_needed = pytest.mark.usefixtures("bitsandbytes")


@pytest.fixture
def base(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A plain checkpoint; its layers are wide enough (64) for every kernel of bitsandbytes."""
    return tiny_checkpoint(tmp_path / "base", **WIDE)


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Run:
    made = Run.create(tmp_path / "runs", "s", "0" * 8)
    made.stage(0, "base").begin({"name": "base", "model": str(base)})
    (made.path / "stream.yaml").write_text(stream(model={"path": str(base)}).to_yaml())
    return made


@pytest.fixture
def train(run: Run, base: Path, tiny_tokenizer: Any) -> Callable[..., tuple[Path, torch.Tensor]]:
    """`train(number, name, adapter, **model)`: a committed stage from the one before; (model folder, logits)."""

    def stage(number: int, name: str, adapter: Any, **fields: Any) -> tuple[Path, torch.Tensor]:
        spec = ModelSpec(path=str(base), **fields)
        before = next((f.model for f in run.stages() if f.path.name.startswith(f"{number - 1:02d}")), base)
        folder = run.stage(number, name)
        data = {"label": "rows", "rows": 1}
        made = Adapter.model_validate({"mode": adapter} if isinstance(adapter, str) else adapter) if adapter else None
        about = {"methods": [], "adapter": made.model_dump() if made else None}
        folder.begin({"name": name, "kind": "sft", "stage": about, "data": data})
        parent = before if number > 1 else base
        model = open_for_training(parent, spec, made, folder.path.name, number)
        move(model, number)
        folder.commit("id", {"steps": 1}, lambda to: save_model(model, tiny_tokenizer, to), False)
        return folder.model, logits(model)

    return stage


def stream(model: Any = "tiny-world", *adapters: Any) -> Stream:
    stages = [{"name": f"s{i}", "data": {"rows": ROWS}, "adapter": adapter} for i, adapter in enumerate(adapters)]
    return Stream.parse({"name": "s", "model": model, "stages": stages})


def refused(model: Any, *adapters: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        stream(model, *adapters)
    return caught.value.problems


def move(model: Any, seed: int) -> None:
    """Set everything that learns, a LoRA, or shift it, the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                # Of a magnitude (DoRA), what is there stays: zero would be no direction.
                parameter.copy_(noise if "lora_A" in name or "lora_B" in name else parameter + noise)


def learns(model: Any) -> set[str]:
    """Names of adapters with a tensor that learns; `weights` for a tensor of no adapter."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.split(".lora_")[1].split(".")[1] if ".lora_" in name else "weights" for name in names}


# ---- what a stream may say ------------------------------------------------------------------------------


def test_the_short_form_is_written_out_with_its_defaults_and_read_again() -> None:
    made = stream("tiny-world", "new", {"mode": "merge_then_new", "lora": {"r": 4, "bias": "none"}}, "continue", None)
    lora = [stage.adapter.lora if stage.adapter else None for stage in made.stages]
    assert lora == [DEFAULTS, {**DEFAULTS, "r": 4}, {}, None]
    assert Stream.parse(yaml.safe_load(made.to_yaml())) == made


def test_every_field_that_cannot_be_is_refused_at_once_with_its_place() -> None:
    wrong = {"r": 0, "rnk": 1, "lora_dropout": 1.0, "task_type": "SEQ_CLS", "init_lora_weights": "pissa"}
    wrong |= {"target_modules": ["q_proj", "model.lm_head"], "modules_to_save": ["embed_out"], "use_dora": "maybe"}
    found = refused("tiny-world", {"mode": "new", "lora": wrong}, {"mode": "continue", "lora": {"r": 4}})
    assert {problem.split(" ")[0] for problem in found} == {
        *(f"stages.0.adapter.lora.{name}" for name in wrong),
        "stages.1.adapter.lora.r",
    }
    assert any("TRL reads the head's weight directly" in problem for problem in found)


@pytest.mark.parametrize("name", sorted(OWNED.keys() - {"auto_mapping", "peft_version"}))
def test_owned_fields_are_those_of_the_installed_peft(name: str) -> None:
    from peft import LoraConfig

    assert name in LoraConfig.__dataclass_fields__
    with pytest.raises(ValueError, match="is not for a stage to set"):
        Adapter(mode="new", lora={name: "anything"})


@pytest.mark.parametrize(
    ("model", "adapters", "place", "says"),
    [
        ("tiny-world", ["continue"], "stages.0.adapter", "starts from plain weights"),
        ("tiny-world", ["new", None, "continue"], "stages.2.adapter", "'s1' before it trained full weights"),
        ("tiny-world", ["new", {"mode": "new", "lora": {"use_dora": True}}], "stages.1.adapter", "use_dora"),
        ({"quantization": "4bit"}, ["new", None], "stages.1.adapter", "full weights cannot be trained"),
        ({"quantization": "8bit"}, ["new", "merge_then_new"], "stages.1.adapter", "round the sum"),
    ],
)
def test_adapters_that_do_not_fit_together_are_refused(
    model: Any, adapters: list[Any], place: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt.adapters.spec.is_installed", lambda: True)
    (problem,) = refused({"path": "tiny-world", **model} if isinstance(model, dict) else model, *adapters)
    assert problem.startswith(f"{place} = ")
    assert says in problem


def test_adapters_that_fit_together_are_not_refused() -> None:
    dora = {"mode": "merge_then_new", "lora": {"use_dora": True}}
    made = stream("tiny-world", "merge_then_new", "continue", "new", None, "new", dora, dora, "continue")
    modes = [stage.adapter and stage.adapter.mode for stage in made.stages]
    assert modes == ["merge_then_new", "continue", "new", None, "new", "merge_then_new", "merge_then_new", "continue"]
    made = stream({"path": "tiny-world", "adapter": "somewhere"}, "continue", "new")
    assert [stage.adapter.mode for stage in made.stages] == ["continue", "new"]


def test_quantization_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt.adapters.spec.is_installed", lambda: False)
    (problem,) = refused({"path": "tiny-world", "quantization": "4bit"}, "new")
    assert problem.startswith("model.quantization = '4bit': needs bitsandbytes: pip install 'cpt[quant]'")


def test_the_page_names_every_field_that_is_not_for_a_stage_to_set(root: Path) -> None:
    text = (root / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert [name for name in OWNED if f"`{name}`" not in text] == []


# ---- the model in training ------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_yet_and_depends_on_its_seed_alone(base: Path) -> None:
    spec = ModelSpec(path=str(base))
    state = torch.get_rng_state()
    first, second, other = (open_for_training(base, spec, Adapter(mode="new"), "01_a", seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (dict(model.named_parameters()) for model in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(logits(first), logits(open_model(base, spec)))
    assert learns(first) == {"default"}


def test_a_lineage_loads_as_the_model_that_was_trained(train: Callable[..., Any], base: Path) -> None:
    spec = ModelSpec(path=str(base))
    expected = [
        ("default", "new", "base + 01_default"),  # a stage's name never mixes with that of the adapter in training
        ("more", "new", "base + 01_default + 02_more"),
        ("on", "continue", "base + 01_default + 02_more→03_on"),
        ("merged", "merge_then_new", "base + 01_default (merged) + 02_more→03_on (merged) + 04_merged"),
        ("full", None, "05_full"),
        ("top", {"mode": "new", "lora": {"r": 2, "target_modules": ["q_proj"]}}, "05_full + 06_top"),
    ]
    seen: list[torch.Tensor] = []
    for number, (name, adapter, says) in enumerate(expected, start=1):
        folder, trained = train(number, name, adapter)
        loaded = open_model(folder, spec)
        assert torch.equal(logits(loaded), trained), name
        assert lineage(folder, spec) == says
        assert not hasattr(loaded, "peft_config") or learns(loaded) == set()
        assert all(not torch.allclose(trained, other) for other in seen), name
        seen.append(trained)
    stages = folder.parent.parent
    assert needs_weights_of(folder) == stages / "05_full" / "model"
    assert needs_weights_of(stages / "04_merged" / "model") is None
    assert needs_weights_of(stages / "05_full" / "model") is None


def test_stages_that_were_superseded_together_still_load(train: Callable[..., Any], base: Path) -> None:
    train(1, "a", None)
    folder, before = train(2, "b", "new")
    stages = folder.parents[1]
    for name in ("01_a", "02_b"):
        (stages / name).rename(stages / f"{name}.superseded-1")
    found = open_model(stages / "02_b.superseded-1" / "model", ModelSpec(path=str(base)))
    assert torch.equal(logits(found), before)


def test_two_adapters_and_their_merge_are_the_sum_of_their_products(train: Callable[..., Any], base: Path) -> None:
    train(1, "a", {"mode": "new", "lora": {"r": 4, "lora_alpha": 12}})
    stacked, _ = train(2, "b", {"mode": "new", "lora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}})
    weights = load_file(base / "model.safetensors")
    for name, scale in (("01_a", 12 / 4), ("02_b", 16 / 8**0.5)):
        tensors = load_file(stacked / "adapters" / name / "adapter_model.safetensors")
        for key in [key for key in tensors if "lora_A" in key]:
            product = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            weights[key.removeprefix("base_model.model.").replace("lora_A.", "")] += scale * product
    by_hand = open_model(base, ModelSpec(path=str(base)))
    assert by_hand.load_state_dict(weights, strict=False).unexpected_keys == []
    expected = logits(by_hand)
    spec = ModelSpec(path=str(base))
    torch.testing.assert_close(logits(open_model(stacked, spec)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(models.open_merged(stacked, spec)), expected, atol=1e-5, rtol=0)


def test_what_learns_is_the_newest_adapter_or_every_weight(train: Callable[..., Any], base: Path) -> None:
    folder, _ = train(1, "a", "new")
    spec = ModelSpec(path=str(base))

    def opened(adapter: Adapter | None) -> Any:
        return open_for_training(folder, spec, adapter, "02_b", 2)

    stacked = opened(Adapter(mode="new"))
    assert stacked.active_adapter == "default"
    assert list(stacked.active_adapters) == ["default", "01_a"]
    assert learns(stacked) == learns(opened(Adapter(mode="continue"))) == {"default"}
    merged = opened(Adapter(mode="merge_then_new"))
    assert list(merged.active_adapters) == ["default"]
    full = opened(None)
    assert not hasattr(full, "peft_config")
    assert all(parameter.requires_grad for parameter in full.parameters())


def test_dora_is_merged_before_the_next_one_is_made(train: Callable[..., Any], base: Path) -> None:
    dora = {"mode": "merge_then_new", "lora": {"use_dora": True}}
    train(1, "a", dora)
    folder, trained = train(2, "b", dora)
    assert torch.equal(logits(open_model(folder, ModelSpec(path=str(base)))), trained)
    merged = models.open_merged(folder, ModelSpec(path=str(base)))
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=0)


def test_trained_modules_travel_with_their_adapter(train: Callable[..., Any], base: Path) -> None:
    folder, trained = train(1, "a", {"mode": "new", "lora": {"modules_to_save": ["embed_tokens"]}})
    assert torch.equal(logits(open_model(folder, ModelSpec(path=str(base)))), trained)
    torch.testing.assert_close(
        logits(models.open_merged(folder, ModelSpec(path=str(base)))), trained, atol=1e-5, rtol=0
    )


def test_equal_models_give_equal_files_and_weights_are_not_copied(
    base: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    spec = ModelSpec(path=str(base))
    lora = {"target_modules": ["v_proj", "q_proj", "up_proj", "o_proj"]}
    written = []
    for name in ("one", "two"):
        model = open_for_training(base, spec, Adapter(mode="new", lora=lora), "01_a", 5)
        save_model(model, tiny_tokenizer, tmp_path / name)
        files = {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
        written.append(files)
    assert written[0] == written[1]
    assert {
        name for name in written[0] if "adapters" in name or name.endswith(("lineage.json", "model.safetensors"))
    } == {
        "lineage.json",
        "adapters/01_a/adapter_config.json",
        "adapters/01_a/adapter_model.safetensors",
    }
    config = json.loads(written[0]["adapters/01_a/adapter_config.json"])
    assert config["target_modules"] == sorted(lora["target_modules"])
    assert config["base_model_name_or_path"] == str(base)
    assert all((tmp_path / "one" / name).stat().st_mode & 0o777 == 0o644 for name in written[0])


def test_gathered_tensors_are_saved_where_the_model_s_own_are_shards(
    base: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    spec = ModelSpec(path=str(base))
    for name, adapter in (("full", None), ("lora", Adapter(mode="new"))):
        model = open_for_training(base, spec, adapter, "01_a", 1)
        gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        expected = logits(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        to = tmp_path / name / "01_a" / "model"
        save_model(model, tiny_tokenizer, to, gathered)
        (to.parent / "stage.json").write_text("{}")
        assert torch.equal(logits(open_model(to, spec)), expected)


def test_adapters_are_float32_beside_weights_of_16_bits(base: Path) -> None:
    model = open_for_training(base, ModelSpec(path=str(base), dtype="bfloat16"), Adapter(mode="new"), "01_a", 1)
    kinds = {(parameter.dtype, ".lora_" in name) for name, parameter in model.named_parameters()}
    assert kinds == {(torch.float32, True), (torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("adapters", "holds"),
    [
        (["new"], True),
        (["new", "new"], True),
        (["new", "merge_then_new"], False),
        ([None, "new"], False),
        ([None], False),
    ],
)
def test_a_model_is_its_own_reference_only_on_the_untouched_base(
    train: Callable[..., Any], base: Path, adapters: list[Any], holds: bool
) -> None:
    spec = ModelSpec(path=str(base))
    for number, adapter in enumerate(adapters[:-1], start=1):
        train(number, "x", adapter)
    parent = base if len(adapters) == 1 else base.parent / "runs"
    if len(adapters) > 1:
        (parent,) = parent.glob("*/stages/01_x/model")
    last = Adapter(mode=adapters[-1]) if adapters[-1] else None
    assert stands_on_base(parent, spec, last) is holds
    if holds:
        model = open_for_training(parent, spec, last, "09_y", 1)
        move(model, 9)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(open_model(None, spec)))
        assert not torch.equal(logits(model), logits(open_model(None, spec)))


@pytest.mark.parametrize(
    ("adapters", "holds"),
    [
        (["new"], True),
        ([None, "new"], True),
        (["new", "merge_then_new"], True),
        (["new", "new"], False),
        (["new", "continue"], False),
        (["new", None], False),
    ],
)
def test_a_model_is_its_parent_without_its_adapter(
    train: Callable[..., Any], base: Path, adapters: list[Any], holds: bool
) -> None:
    spec, parent = ModelSpec(path=str(base)), base
    for number, adapter in enumerate(adapters[:-1], start=1):
        train(number, "x", adapter)
        (parent,) = (base.parent / "runs").glob("*/stages/01_x/model")
    last = Adapter(mode=adapters[-1]) if adapters[-1] else None
    assert starts_as_parent(parent, spec, last) is holds
    if holds:
        model = open_for_training(parent, spec, last, "09_y", 1)
        move(model, 9)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(open_model(parent, spec)), atol=1e-6, rtol=0)


# ---- what must not be trained on ------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(
    train: Callable[..., Any], base: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, trained = train(1, "a", "new")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere)
    same = ModelSpec(path=str(elsewhere), adapter=str(folder))  # the same weights under another path
    check_adapter(same, Adapter(mode="continue"))
    assert torch.equal(logits(open_model(None, same)), trained)
    other = tiny_checkpoint(tmp_path / "other", seed=1, **WIDE)
    with pytest.raises(ConfigError, match=r"model.adapter = .*sha256 differs for model.safetensors"):
        check_adapter(ModelSpec(path=str(other), adapter=str(folder)), Adapter(mode="continue"))


def test_weights_that_changed_beneath_an_adapter_are_refused(train: Callable[..., Any], base: Path) -> None:
    full, _ = train(1, "full", None)
    folder, trained = train(2, "a", "new")
    spec = ModelSpec(path=str(base))
    file = full / "model.safetensors"
    kept = file.read_bytes()
    save_file({key: tensor * 1.01 for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"not the model that 02_a was trained on .*sha256 differs for model.safetensors"
    ):
        open_model(folder, spec)
    file.write_bytes(kept)
    assert torch.equal(logits(open_model(folder, spec)), trained)
    shutil.rmtree(full)
    with pytest.raises(DataError, match="the weights beneath 02_a are not there"):
        open_model(folder, spec)


def foreign(base: Path, to: Path, **lora: Any) -> Path:
    """A LoRA as PEFT itself saves it, made on another path of the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    move(model, 7)
    model.save_pretrained(to)
    return to


def test_a_stream_starts_from_an_adapter_made_elsewhere(base: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = foreign(base, tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    moved = shutil.copytree(base, tmp_path / "moved")
    spec = ModelSpec(path=str(moved), adapter=str(folder))
    check_adapter(spec, Adapter(mode="continue"))
    assert models.adapter_note(spec) == f"note: model.adapter was made on {base}, the stream's base is {moved}"
    assert torch.equal(logits(open_model(None, spec)), expected)
    assert torch.equal(logits(open_model(moved, spec)), expected)
    model = open_for_training(moved, spec, Adapter(mode="continue"), "01_a", 1)
    assert torch.equal(logits(model), expected)
    save_model(model, tiny_tokenizer, tmp_path / "stages" / "01_a" / "model")
    assert lineage(tmp_path / "stages" / "01_a" / "model") == "base + 01_a"
    assert lineage(moved, spec) == "base + 00_adapter"
    assert not stands_on_base(moved, spec, Adapter(mode="new"))


def test_an_adapter_whose_tensors_do_not_fit_the_base_is_refused_by_name(
    base: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    narrow = tiny_checkpoint(tmp_path / "narrow", seed=1, hidden_size=64, intermediate_size=96)
    shallow = tiny_checkpoint(tmp_path / "shallow", seed=1, num_hidden_layers=1, **WIDE)
    theirs = foreign(base, tmp_path / "theirs", target_modules=["up_proj"])
    for folder, says in (
        (narrow, r"layers.0.mlp.up_proj.lora_B.weight is \[128, 8\] and must be \[96, 8\]"),
        (shallow, r"layers.1.mlp.up_proj.lora_A.weight has no module"),
    ):
        spec = ModelSpec(path=str(folder), adapter=str(theirs))
        with pytest.raises(ConfigError, match=says):
            check_adapter(spec, None)
        with pytest.raises(DataError, match=says):
            open_model(None, spec)


def test_a_shape_from_elsewhere_that_stands_alone_is_not_stacked(base: Path, tmp_path: Path) -> None:
    spec = ModelSpec(path=str(base), adapter=str(foreign(base, tmp_path / "dora", use_dora=True)))
    with pytest.raises(
        ConfigError, match=r"00_adapter \(use_dora\) cannot be active beside another: use merge_then_new"
    ):
        open_for_training(base, spec, Adapter(mode="new"), "01_a", 1)
    open_for_training(base, spec, Adapter(mode="merge_then_new"), "01_a", 1)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["q_prj"]}, r"Target modules .*q_prj.* not found"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "reaches the head of the model"),
        ({"layers_to_transform": [0]}, "PEFT refuses it: `layers_to_transform` cannot be used"),
    ],
)
def test_a_lora_that_the_model_cannot_take_is_refused_on_its_skeleton(
    base: Path, lora: dict[str, Any], says: str
) -> None:
    (base / "model.safetensors").write_bytes(b"")  # no weights are read
    with pytest.raises(ConfigError, match=says):
        check_adapter(ModelSpec(path=str(base)), Adapter(mode="new", lora=lora))
    check_adapter(ModelSpec(path=str(base)), Adapter(mode="new"))


def test_an_embedding_tied_to_the_head_takes_no_lora(
    base: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    tied = tiny_checkpoint(tmp_path / "tied", seed=1, tie_word_embeddings=True, **WIDE)
    lora = Adapter(mode="new", lora={"target_modules": ["embed_tokens", "q_proj"]})
    check_adapter(ModelSpec(path=str(base)), lora)
    with pytest.raises(ConfigError, match="ties to its head"):
        check_adapter(ModelSpec(path=str(tied)), lora)


# ---- few bits -------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = torch.arange(5, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@bits_needed
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_are_the_same_after_an_evaluation(base: Path, bits: Any) -> None:
    spec = ModelSpec(path=str(base), quantization=bits)
    model = open_for_training(base, spec, Adapter(mode="new"), "01_a", 1)
    move(model, 1)
    before = gradients(model)
    logits(model)
    after = gradients(model)
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.abs().max() > 0 for tensor in before.values())


@bits_needed
def test_no_4_bit_layer_may_repack_its_weights(base: Path) -> None:
    """What keeps gradients right on CPUs with AVX512-BF16, asserted on every CPU."""
    from bitsandbytes.nn import Linear4bit

    model = open_model(None, ModelSpec(path=str(base), quantization="4bit"))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * len(layers)
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert type(model.lm_head) is torch.nn.Linear


@bits_needed
def test_a_lineage_on_quantized_weights_stays_on_them_until_it_is_merged(train: Callable[..., Any], base: Path) -> None:
    train(1, "a", "new", quantization="4bit")
    folder, trained = train(2, "b", "new", quantization="4bit")
    spec = ModelSpec(path=str(base), quantization="4bit")
    assert lineage(folder) == "base (4bit) + 01_a + 02_b"
    assert torch.equal(logits(open_model(folder, spec)), trained)
    merged = models.open_merged(folder, spec)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    plain = logits(load_model(folder, base=base, quantization="none"))
    torch.testing.assert_close(logits(merged), plain, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, trained, atol=1e-3)  # 4 bits do round


@bits_needed
def test_nothing_is_merged_into_quantized_weights(train: Callable[..., Any], base: Path) -> None:
    folder, _ = train(1, "a", "new")
    train(2, "b", "merge_then_new")
    spec = ModelSpec(path=str(base), adapter=str(folder.parents[1] / "02_b" / "model"), quantization="8bit")
    with pytest.raises(DataError, match="merging into 8bit weights would round the sum"):
        open_model(None, spec)


def test_quantization_is_part_of_the_base_s_identity(base: Path) -> None:
    plain = Stream(name="s", model={"path": str(base)})
    held = Stream.model_construct(**{**dict(plain), "model": ModelSpec(path=str(base), quantization="4bit")})
    assert models.base_identity(held) == models.base_identity(plain) | {"quantization": "4bit"}


# ---- export ---------------------------------------------------------------------------------------------


def test_a_merged_export_is_a_plain_checkpoint_with_the_lineage_s_logits(
    train: Callable[..., Any], run: Run, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(1, "a", "new")
    _, trained = train(2, "b", "new")
    with pytest.raises(
        RunDirError, match=r"base \+ 01_a \+ 02_b, more than one adapter on the base: export with --merge"
    ):
        export(run, "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    to = export(run, "b", tmp_path / "out", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(to)
    torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=0)
    assert len(AutoTokenizer.from_pretrained(to)) == len(AutoTokenizer.from_pretrained(base))
    card = (to / "README.md").read_text()
    assert "Made of: base + 01_a + 02_b" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert not list(to.rglob("*adapter*"))


def test_one_adapter_on_the_base_is_exported_as_peft_has_it(
    train: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    train(1, "a", "new")
    _, trained = train(2, "b", "continue")
    to = export(run, "b", tmp_path / "out")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(to)), trained)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {f.name for f in to.iterdir()}
    assert not (to / "lineage.json").exists()
    card = (to / "README.md").read_text()
    assert "library_name: peft" in card
    assert "| a | sft | LoRA, new (r 8) | rows | 1 | none | 1 |\n| b | sft | LoRA, continued |" in card
    assert "AutoPeftModelForCausalLM.from_pretrained" in card


def test_plain_weights_are_exported_as_they_are(train: Callable[..., Any], run: Run, tmp_path: Path) -> None:
    folder, _ = train(1, "a", None)
    for merge in (False, True):
        to = export(run, "a", tmp_path / f"out{merge}", merge)
        assert (to / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@bits_needed
def test_the_card_of_a_merge_says_that_training_saw_quantized_weights(
    train: Callable[..., Any], run: Run, base: Path, tmp_path: Path
) -> None:
    train(1, "a", "new", quantization="4bit")
    quantized = stream(model={"path": str(base), "quantization": "4bit"})
    (run.path / "stream.yaml").write_text(quantized.to_yaml())
    card = (export(run, "a", tmp_path / "out", merge=True) / "README.md").read_text()
    assert "on weights held in 4bit" in card
