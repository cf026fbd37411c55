"""What a base computed, recorded once: regions by the plain formula, equal however it was cut, no loss at step 0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from cpt import DataError
from cpt.data import recording
from cpt.data.activations import Regions, record_features, record_regions, record_top_k
from cpt.data.recording import Recorder, backbone
from cpt.losses.threshold_margin import margins, regions


@pytest.fixture
def rows() -> datasets.Dataset:
    """Rows of unequal length, of which the first tokens are not learned."""
    random = torch.Generator().manual_seed(7)
    ids = [torch.randint(5, 400, (3 + 5 * i % 17,), generator=random).tolist() for i in range(150)]
    labels = [[-100] * min(2, len(one) - 2) + one[min(2, len(one) - 2) :] for one in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(seed=3)


def hidden(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """(N, H) of one row alone: the states that predict its learned tokens."""
    with torch.no_grad():
        states = backbone(model)(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
    return states[[t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]]


def contents(made: Regions, count: int) -> list[list[list[int]]]:
    return [made.regions([row], "cpu").tolist() for row in range(count)]


def test_regions_and_thresholds_are_the_plain_formula(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    made = record_regions(Recorder(model, rows, tmp_path), {})
    states = torch.cat([hidden(model, row) for row in rows])
    low, high, noise = made.thresholds("cpu")
    mean, deviation = states.double().mean(0), states.double().std(0, unbiased=False)
    torch.testing.assert_close(low, (mean - deviation).float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(high, (mean + deviation).float(), atol=1e-6, rtol=1e-5)
    assert 0 < noise.max() < 1e-4
    far = ((states - low).abs() > noise) & ((states - high).abs() > noise)
    codes = made.regions(range(len(rows)), "cpu")
    assert torch.equal(codes[far], regions(states, low, high)[far])
    assert far.float().mean() > 0.999


def test_at_the_base_the_margin_is_exactly_zero_in_any_batch(
    model: Any, rows: datasets.Dataset, tmp_path: Path
) -> None:
    """Padded on the right, among rows of other lengths, as in training."""
    made = record_regions(Recorder(model, rows, tmp_path), {})
    thresholds = made.thresholds("cpu")
    for part in ([0, 149, 3], list(range(20, 60)), [7]):
        width = max(len(rows[i]["input_ids"]) for i in part) + 11
        ids = torch.zeros(len(part), width, dtype=torch.long)
        for n, i in enumerate(part):
            ids[n, : len(rows[i]["input_ids"])] = torch.tensor(rows[i]["input_ids"])
        states = backbone(model)(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
        learned = [
            [t for t in range(width - 1) if t + 1 < len(rows[i]["labels"]) and rows[i]["labels"][t + 1] != -100]
            for i in part
        ]
        mine = torch.cat([states[n, where] for n, where in enumerate(learned)])
        assert margins(mine, made.regions(part, "cpu"), *thresholds).sum() == 0


def test_the_mode_and_gradients_are_given_back(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    model.train()
    record_regions(Recorder(model, rows, tmp_path), {})
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_recording_that_is_there_asks_no_model(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    first = contents(record_regions(Recorder(model, rows, tmp_path), {"of": "this"}), 5)
    assert json.loads((tmp_path / "about.json").read_text()) == {"of": "this"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert contents(record_regions(Recorder(model, rows, tmp_path), {"of": "this"}), 5) == first


def test_a_recording_of_something_else_is_refused(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    record_regions(Recorder(model, rows, tmp_path), {"model": "a", "precision": None, "rows": ["1"]})
    with pytest.raises(DataError, match=r"of something else \(model 'a' instead of 'b'\): remove the folder"):
        record_regions(Recorder(model, rows, tmp_path), {"model": "b", "precision": None, "rows": ["1"]})
    with pytest.raises(DataError, match="precision None instead of 'bf16', rows 1 ids instead of 2 ids"):
        record_regions(Recorder(model, rows, tmp_path), {"model": "a", "precision": "bf16", "rows": ["1", "2"]})


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_recording_goes_on_where_it_was_killed(
    model: Any, rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = contents(record_regions(Recorder(model, rows, tmp_path / "whole"), {}), len(rows))
    written = list[str]()
    save = recording.save_file

    def dying(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if len(written) == after:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file.name)
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "save_file", dying)
        with pytest.raises(KeyboardInterrupt):
            record_regions(Recorder(model, rows, tmp_path / "cut"), {})
    again = list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(recording, "save_file", lambda tensors, file: (again.append(file.name), save(tensors, file)))
        made = record_regions(Recorder(model, rows, tmp_path / "cut"), {})
    assert not set(written) & set(again)
    assert contents(made, len(rows)) == whole


def test_processes_share_the_parts(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    """Two that take turns: each barrier hands over to the other."""
    import threading

    barrier, failed = threading.Barrier(2), list[BaseException]()

    def work(rank: int) -> None:
        try:
            record_regions(Recorder(model, rows, tmp_path / "two", rank, 2, barrier.wait), {})
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    made = Regions(tmp_path / "two")
    assert contents(made, len(rows)) == contents(record_regions(Recorder(model, rows, tmp_path / "one"), {}), len(rows))


def test_it_takes_two_bits_an_entry(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    record_regions(Recorder(model, rows, tmp_path), {})
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    size = sum(file.stat().st_size for file in tmp_path.glob("regions-*"))
    assert size < 1.1 * tokens * model.config.hidden_size * 4 / 16 + 8 * len(rows) + 3 * 400  # of float32, and heads
    assert not list(tmp_path.glob("moments-*"))


def test_one_pass_with_scratch_is_the_same_recording(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    two = record_regions(Recorder(model, rows, tmp_path / "two"), {})
    one = record_regions(Recorder(model, rows, tmp_path / "one"), {}, passes=1)
    assert contents(one, len(rows)) == contents(two, len(rows))
    for mine, other in zip(one.thresholds("cpu"), two.thresholds("cpu"), strict=True):
        assert torch.equal(mine, other)
    assert sorted(file.name for file in one.folder.iterdir()) == sorted(file.name for file in two.folder.iterdir())


def test_features_and_likely_tokens_are_the_models_own(model: Any, rows: datasets.Dataset, tmp_path: Path) -> None:
    features = record_features(Recorder(model, rows, tmp_path / "features"), {})
    likely = record_top_k(Recorder(model, rows, tmp_path / "likely"), {}, k=7)
    chosen = [149, 3, 70]
    states = torch.cat([hidden(model, rows[i]) for i in chosen])
    torch.testing.assert_close(features.features(chosen, "cpu"), states, atol=1e-6, rtol=1e-5)
    tokens, log_probs = likely.top_k(chosen, "cpu")
    whole = model.get_output_embeddings()(states).log_softmax(1)
    torch.testing.assert_close(log_probs, whole.topk(7).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.gather(1, tokens), log_probs, atol=1e-5, rtol=1e-5)
    assert [len(one) for one in likely.top_k([], "cpu")] == [0, 0]
