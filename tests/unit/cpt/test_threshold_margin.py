"""The threshold margin: three tokens and two dimensions worked by hand, and what must hold of any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt.losses.threshold_margin import HIGH, LOW, MIDDLE, Moments, margins, pack, regions, unpack

HIDDEN = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
# Means 2 and 2; variances 8/3 and 2; so thresholds 2 -+ 1.6330 and 2 -+ 1.4142.
LOWER, UPPER = torch.tensor([0.3670068, 0.5857864]), torch.tensor([3.6329932, 3.4142136])
REGIONS = torch.tensor([[LOW, MIDDLE], [MIDDLE, MIDDLE], [HIGH, HIGH]], dtype=torch.uint8)


def moments(*parts: torch.Tensor) -> Moments:
    made = Moments.of(2)
    for part in parts:
        made.add(part)
    return made


def test_thresholds_are_the_mean_less_and_plus_a_deviation() -> None:
    for made in (moments(HIDDEN), moments(HIDDEN[2:], HIDDEN[:2])):
        low, high = made.thresholds()
        torch.testing.assert_close(low, LOWER)
        torch.testing.assert_close(high, UPPER)


def test_regions_by_hand() -> None:
    assert torch.equal(regions(HIDDEN, LOWER, UPPER), REGIONS)
    at_the_thresholds = torch.stack([LOWER, UPPER])
    assert regions(at_the_thresholds, LOWER, UPPER).tolist() == [[LOW, LOW], [HIGH, HIGH]]


def test_loss_and_gradient_by_hand() -> None:
    now = torch.tensor([[1.0, 4.0], [0.0, 0.0], [3.0, 3.0]], requires_grad=True)
    outside = margins(now, REGIONS, LOWER, UPPER)
    torch.testing.assert_close(
        outside, torch.tensor([[0.6329932, 0.5857864], [0.3670068, 0.5857864], [0.6329932, 0.4142136]])
    )
    outside.sum().backward()
    assert now.grad is not None
    assert now.grad.tolist() == [[1, 1], [-1, -1], [-1, -1]]


def test_where_the_base_had_it_nothing_is_lost_and_nothing_pulls() -> None:
    now = HIDDEN.clone().requires_grad_()
    outside = margins(now, REGIONS, LOWER, UPPER)
    assert outside.sum() == 0
    outside.sum().backward()
    assert now.grad is not None
    assert now.grad.abs().sum() == 0


def test_noise_is_forgiven_and_counts_from_there() -> None:
    now = torch.tensor([[LOWER[0] + 0.1, 1.0]])
    codes = REGIONS[:1]
    assert margins(now, codes, LOWER, UPPER, noise=0.1001).sum() == 0
    torch.testing.assert_close(
        margins(now, codes, LOWER, UPPER, noise=torch.tensor([0.04, 0.0])).sum(), torch.tensor(0.06)
    )


@given(st.integers(1, 9), st.integers(1, 13), st.integers(0, 2**16))
def test_codes_survive_packing_in_two_bits(tokens: int, dimensions: int, seed: int) -> None:
    codes = torch.randint(0, 3, (tokens, dimensions), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes)
    assert packed.shape == (tokens, -(-dimensions // 4))
    assert torch.equal(unpack(packed, dimensions), codes)


@given(st.integers(0, 2**16))
def test_it_is_the_plain_formula(seed: int) -> None:
    """Case by case, as the paper writes it."""
    random = torch.Generator().manual_seed(seed)
    base, now = torch.randn(5, 3, generator=random), torch.randn(5, 3, generator=random)
    made = Moments.of(3)
    made.add(base)
    low, high = made.thresholds()
    codes, outside = regions(base, low, high), torch.zeros(5, 3)
    for n in range(5):
        for d in range(3):
            p = now[n, d]
            if base[n, d] <= low[d]:
                outside[n, d] = max(0, p - low[d])
            elif base[n, d] >= high[d]:
                outside[n, d] = max(0, high[d] - p)
            else:
                outside[n, d] = max(0, p - high[d]) + max(0, low[d] - p)
    torch.testing.assert_close(margins(now, codes, low, high), outside)


def test_half_precision_is_compared_in_full() -> None:
    assert margins(HIDDEN.bfloat16(), REGIONS, LOWER, UPPER).dtype == torch.float32


@pytest.mark.parametrize("code", [LOW, MIDDLE, HIGH])
def test_an_infinite_activation_gives_a_loss_that_is_no_number_or_infinite(code: int) -> None:
    """Broken weights must be seen by the watch for such losses, not hidden."""
    now = torch.tensor([[float("nan"), 0.0]])
    codes = torch.tensor([[code, MIDDLE]], dtype=torch.uint8)
    assert not torch.isfinite(margins(now, codes, LOWER, UPPER)).all()
