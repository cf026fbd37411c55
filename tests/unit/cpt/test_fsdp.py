"""What is gathered at the end of a stage under FSDP2, without a second process: precision, tied names, the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt.trainers import fsdp
from tests.models import llama


@pytest.fixture
def trainer(tiny_tokenizer: Any) -> Any:
    """In the place of a trainer: a tied model loaded in bfloat16, in float32 since, gathered once per name."""
    model = llama(tiny_tokenizer, tie_word_embeddings=True).to(torch.bfloat16)
    loaded = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()

    def get_state_dict(wrapped: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}

    accelerator = SimpleNamespace(get_state_dict=get_state_dict)
    return SimpleNamespace(model=model, model_wrapped=model, accelerator=accelerator, loaded_dtypes=loaded)


def test_a_stage_is_saved_as_it_was_loaded(trainer: Any, tmp_path: Any) -> None:
    trained = trainer.model.model.embed_tokens.weight.detach().clone()
    weights = fsdp.gather(trainer)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    trainer.model.save_pretrained(tmp_path, state_dict=weights)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved  # the tied tensor is written once
    assert torch.equal(saved["model.embed_tokens.weight"], trained.to(torch.bfloat16))
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert trainer.model.dtype == torch.bfloat16
    assert '"dtype": "bfloat16"' in (tmp_path / "config.json").read_text()


def test_the_other_processes_hold_nothing_and_keep_their_pieces(trainer: Any) -> None:
    trainer.accelerator.get_state_dict = lambda wrapped: {}
    assert fsdp.gather(trainer) == {}
    assert trainer.model.dtype == torch.float32
