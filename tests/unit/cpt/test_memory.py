"""What outlives a stage: which rows are kept, what is said of them, and that a forgotten row leaves no trace."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpt import DataError
from cpt.data.memory import Memory, balanced, mark, per_stage, read_rows, reservoir, write_about
from cpt.data.sources import Loaded
from cpt.memory_table import forget_rows, text
from eval_harness.rows import Row
from eval_harness.sources import fingerprint


def loaded(n: int, name: str = "stage") -> Loaded:
    rows = [Row("completion", prompt=f"{name} asks {i}", completion=f"{name} says {i}") for i in range(n)]
    return Loaded(name, rows, fingerprint(rows), ("MIT",))


def derived(memory: Memory, name: str, of: str, rows: list[Row]) -> Path:
    folder = memory.folder / name
    folder.mkdir(parents=True)
    save_file({"regions": torch.arange(5)}, folder / "regions-00000.safetensors")
    write_about(folder, {"of": of, "aggregate": of == "fisher", "rows": [row.id for row in rows]})
    return folder


def everything(folder: Path) -> str:
    return "\n".join(file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file())


def test_kept_rows_are_told_with_source_licence_and_hash(tmp_path: Path) -> None:
    memory, given = Memory(tmp_path), loaded(5)
    assert memory.keep_rows("replay-two", given, {"select": "random"}).rows == given.rows
    (entry,) = memory.entries()
    assert entry.about["source"] == "stage"
    assert entry.about["licences"] == ["MIT"]
    assert entry.about["sha256"] == given.fingerprint
    assert entry.rows == [row.id for row in given.rows]
    assert "stage, MIT" in text(tmp_path)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    memory, given = Memory(tmp_path), loaded(4)
    memory.keep_rows("replay-two", given, {})
    (file,) = tmp_path.glob("*/rows.jsonl")
    assert read_rows(file) == given.rows
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    assert memory.keep_rows("replay-two", given, {}).rows == given.rows[:2]


def test_a_forgotten_row_leaves_every_file(tmp_path: Path) -> None:
    memory, given = Memory(tmp_path), loaded(6)
    other = loaded(3, "other")
    memory.keep_rows("replay-two", given, {})
    memory.keep_rows("replay-three", other, {})
    codes = derived(memory, "gere-1", "regions", given.rows)
    fisher = derived(memory, "ewc-1", "fisher", [*given.rows, *other.rows])
    others = derived(memory, "gere-2", "regions", other.rows)
    half = tmp_path / "gere-3"
    half.mkdir()
    (half / "moments-00000.safetensors").write_bytes(b"of who knows which rows")
    gone = given.rows[2]
    file = tmp_path.parent / "gone.jsonl"
    file.write_text(json.dumps({"prompt": gone.prompt, "completion": gone.completion}) + "\n")

    said = forget_rows(tmp_path, file)

    assert any("5 left" in line for line in said)
    for trace in (gone.id, gone.prompt, gone.completion):
        assert trace not in everything(tmp_path)  # type: ignore[operator]
    assert not codes.exists()
    assert not fisher.exists()
    assert not half.exists()
    assert others.exists()
    assert given.rows[3].prompt in everything(tmp_path)  # type: ignore[operator]
    assert "1 rows are forgotten" in text(tmp_path)


def test_a_forgotten_row_does_not_come_back(tmp_path: Path) -> None:
    memory, given = Memory(tmp_path), loaded(4)
    assert memory.without_forgotten(given) is given
    memory.forget([given.rows[0].id, given.rows[3].id])
    left = memory.without_forgotten(given)
    assert left.rows == given.rows[1:3]
    assert left.fingerprint != given.fingerprint
    assert memory.keep_rows("replay-two", left, {}).rows == given.rows[1:3]


def test_lines_copied_out_of_a_memory_are_known_there(tmp_path: Path) -> None:
    """As its rows.jsonl has them: by their id, which a row keeps whose answer was written anew."""
    memory, given = Memory(tmp_path / "memory"), loaded(3)
    memory.keep_rows("replay-a", given, {})
    file = next(memory.folder.rglob("rows.jsonl"))
    (tmp_path / "gone.jsonl").write_text(file.read_text(encoding="utf-8").splitlines()[1] + "\n", encoding="utf-8")
    said = forget_rows(memory.folder, tmp_path / "gone.jsonl")
    assert said[-1].startswith("1 rows forgotten")
    assert [row.id for row in read_rows(file)] == [row.id for i, row in enumerate(given.rows) if i != 1]


def test_a_removal_cut_short_is_an_error_with_the_folder(tmp_path: Path) -> None:
    memory, given = Memory(tmp_path), loaded(3)
    memory.keep_rows("replay-two", given, {})
    memory.check()
    (tmp_path / "forgotten.json").write_text(json.dumps({"digests": [mark(given.rows[1].id)]}))
    with pytest.raises(DataError, match=r"replay-two-\w+: holds 1 forgotten rows; remove the folder"):
        memory.check()
    memory.forget([given.rows[1].id])
    memory.check()


def test_a_budget_of_a_stage_is_a_count_or_a_share() -> None:
    rows = loaded(40).rows
    assert per_stage(rows, None, 1, None) == rows
    assert len(per_stage(rows, 7, 1, None)) == 7
    assert len(per_stage(rows, 0.1, 1, None)) == 4
    assert len(per_stage(rows, 0.001, 1, None)) == 1
    assert per_stage(rows, 7, 1, None) != per_stage(rows, 7, 2, None)
    assert per_stage(rows, 3, 1, lambda: [39, 0, 5, *range(40)]) == [rows[0], rows[5], rows[39]]


def test_a_reservoir_gives_every_row_the_same_chance() -> None:
    stages = [loaded(30, "a").rows, loaded(60, "b").rows, loaded(10, "c").rows]
    counts = [0, 0, 0]
    for seed in range(400):
        kept = reservoir(stages, 20, seed)
        assert sum(map(len, kept)) == 20
        counts = [n + len(part) for n, part in zip(counts, kept, strict=True)]
    for n, rows in zip(counts, stages, strict=True):
        expected = 400 * 20 * len(rows) / 100
        assert abs(n - expected) < 4 * (400 * 20 * 0.24) ** 0.5


def test_a_reservoir_goes_on_from_what_it_kept() -> None:
    """A row that was dropped after one stage does not return after the next."""
    stages = [loaded(30, "a").rows, loaded(60, "b").rows, loaded(50, "c").rows]
    before, after = reservoir(stages[:2], 12, 5), reservoir(stages, 12, 5)
    assert all(
        set(row.id for row in new) <= set(row.id for row in old) for new, old in zip(after, before, strict=False)
    )
    assert sum(map(len, after[:2])) < 12


def test_balanced_is_equal_and_wastes_nothing() -> None:
    stages = [loaded(50, "a").rows, loaded(2, "b").rows, loaded(50, "c").rows]
    assert sorted(len(part) for part in balanced(stages, 21, 0)) == [2, 9, 10]
    assert [len(part) for part in balanced(stages, 1000, 0)] == [50, 2, 50]
    assert sum(len(part) for part in balanced(stages, 2, 0)) == 2
    assert balanced([], 5, 0) == []
