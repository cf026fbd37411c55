"""A checkpoint before it is loaded: a fingerprint of all that decides its outputs, a tokenizer, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval_harness import checkpoint as module
from eval_harness.checkpoint import Checkpoint
from eval_harness.lineage import LoadError


@pytest.fixture
def plain(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(plain)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def fingerprint(folder: Path) -> str:
    return Checkpoint.of(str(folder)).fingerprint()


def test_a_fingerprint_is_of_weights_and_config(plain: Path, make_model: Any, tokenizer: Any) -> None:
    first = fingerprint(plain)
    (plain / "README.md").write_text("no part of what it computes")
    assert fingerprint(plain) == first
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    second = fingerprint(plain)
    make_model(len(tokenizer), seed=3).save_pretrained(plain)
    assert len({first, second, fingerprint(plain)}) == 3


def test_an_adapter_is_its_base_and_itself(plain: Path, adapter: Path, make_model: Any, tokenizer: Any) -> None:
    first = fingerprint(adapter)
    assert first != fingerprint(plain)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 32}))
    second = fingerprint(adapter)
    make_model(len(tokenizer), seed=3).save_pretrained(plain)
    assert len({first, second, fingerprint(adapter)}) == 3


def test_an_adapter_without_tokenizer_takes_its_bases(adapter: Path, tokenizer: Any) -> None:
    found = Checkpoint.of(str(adapter))
    assert found.tokenizer().get_vocab() == tokenizer.get_vocab()
    assert found.lineage.describe() == "base + default"
    (adapter / "tokenizer.json").write_text("{")  # its own, and damaged: the base's may be another one
    with pytest.raises(LoadError, match="adapter: the tokenizer cannot be loaded"):
        found.tokenizer()


def test_what_is_missing_is_named(plain: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).unlink()
    with pytest.raises(LoadError, match="no tokenizer beside the weights"):
        Checkpoint.of(str(plain)).tokenizer()
    with pytest.raises(LoadError, match="is a file"):
        Checkpoint.of(str(plain / "config.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"not a checkpoint: no config\.json"):
        Checkpoint.of(str(tmp_path / "empty"))
    plain.rename(tmp_path / "moved")
    with pytest.raises(LoadError, match=r"weights beneath .+ are not there.*--base"):
        Checkpoint.of(str(adapter))
    assert Checkpoint.of(str(adapter), base=str(tmp_path / "moved")).fingerprint()


def test_a_name_on_the_hub_is_fetched_once_with_its_commit(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    plain.rename(tmp_path / "0a1b2c")

    def fetched(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return tmp_path / "0a1b2c"

    monkeypatch.setattr(module, "_fetched", fetched)
    found = Checkpoint.of("org/name", revision="main")
    assert (found.folder, found.revision, asked) == (tmp_path / "0a1b2c", "0a1b2c", [("org/name", "main")])
