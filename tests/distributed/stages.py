"""The stages both tests and ranks know by name: (methods as in YAML, kind, with LoRA)."""

from typing import Any

from tests.contract.cases import CASES

STAGES: dict[str, tuple[list[dict[str, Any]], str, bool]] = {
    "plain": ([], "sft", False),
    "plain_rft": ([], "rft", False),
}
for _name, _case in CASES.items():
    STAGES[f"{_name}_sft"] = ([_case.settings], "sft", False)
    STAGES[f"{_name}_pretrain"] = ([_case.settings], "pretrain", False)
    STAGES[f"{_name}_rft"] = ([_case.settings], "rft", False)
    STAGES[f"{_name}_lora"] = ([_case.settings], "sft", True)
    for _i, _also in enumerate(_case.also):
        STAGES[f"{_name}_also_{_i}"] = ([_also], "sft", False)
STAGES["all_together"] = ([case.settings for case in CASES.values()], "sft", False)
