"""Rounding weights with the correlations of a layer's inputs."""

import pytest
import torch

from tpx_export.quantise.gptq import Gram, quantise_with_gram
from tpx_export.quantise.weight_grid import (
    INT8,
    INT8_BY_INT8,
    WeightGrid,
    dequantise_weight,
    int4,
    quantise_weight,
)


def correlated(samples: int, width: int) -> torch.Tensor:
    """Inputs of which a quarter of the directions have most of the variance, with a mean."""
    few = torch.randn(samples, width // 4) @ torch.randn(width // 4, width) / (width // 4) ** 0.5
    return few + 0.1 * torch.randn(samples, width) + 0.5


def gram_of(*inputs: torch.Tensor) -> Gram:
    gram = Gram()
    for x in inputs:
        gram.add(x)
    return gram


def output_error(
    x: torch.Tensor, weight: torch.Tensor, quantised: tuple[torch.Tensor, torch.Tensor]
) -> float:
    difference = x @ (dequantise_weight(*quantised) - weight.t())
    return float(difference.norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize(
    ("width", "grid"),
    [
        (256, int4(128)),
        (192, int4(64)),
        (208, int4(16)),
        (2048 + 384, int4(128)),
        (208, INT8),
        (2048 + 50, INT8_BY_INT8),
    ],
)
def test_outputs_err_less_than_after_plain_rounding(width: int, grid: WeightGrid) -> None:
    """Of other inputs than those of the calibration, but as correlated; the last width takes two blocks."""
    torch.manual_seed(0)
    inputs, weight = correlated(3 * width, width), torch.randn(24, width)
    calibration, other = inputs.split([2 * width, width])
    plain = quantise_weight(weight, grid)
    found = quantise_with_gram(weight, grid, gram_of(calibration))
    for one, same in zip(found, plain, strict=True):
        assert (one.shape, one.dtype) == (same.shape, same.dtype)
    assert found[0].min() == grid.lowest and found[0].max() <= grid.highest
    assert output_error(other, weight, found) < 0.6 * output_error(other, weight, plain)


def test_uncorrelated_and_missing_inputs_give_plain_rounding() -> None:
    weight = torch.randn(8, 256)
    weight[3, 128:] = 0  # a group of zeros
    plain = quantise_weight(weight, int4(128))
    for inputs in (3 * torch.eye(256), torch.zeros(5, 256)):
        for one, same in zip(quantise_with_gram(weight, int4(128), gram_of(inputs)), plain, strict=True):
            torch.testing.assert_close(one, same, rtol=0, atol=0)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    """Few inputs, so that the result depends on what is added to the diagonal."""
    inputs, weight = correlated(40, 256), torch.randn(8, 256)
    values = [
        quantise_with_gram(weight, int4(128), gram_of(scale * inputs))[0] for scale in (1 / 1024, 1, 1024)
    ]
    assert (values[0] == values[1]).all() and (values[1] == values[2]).all()
    assert (values[1] != quantise_weight(weight, int4(128))[0]).any()


def test_a_value_is_rounded_against_the_errors_before_it() -> None:
    """Two inputs that are always equal: the second value rounds so that the sum is right, as far as it can."""
    weight = torch.zeros(1, 16)
    weight[0, 0], weight[0, 1], weight[0, 2] = -8.0, 3.4, 3.4  # a step of 1
    inputs = torch.zeros(100, 16)
    inputs[:, 0], inputs[:, 1:3] = torch.randn(100), torch.randn(100, 1)
    values, steps = quantise_with_gram(weight, int4(16), gram_of(inputs))
    assert steps.item() == 1
    assert values[:3, 0].tolist() == [-8, 3, 4]
    assert quantise_weight(weight, int4(16))[0][:3, 0].tolist() == [-8, 3, 3]


def test_gram_sums_over_calls_and_leading_dimensions() -> None:
    first, second = torch.randn(3, 5, 2100), torch.randn(4, 2100)
    gram, rows = gram_of(first, second), torch.cat([first.flatten(0, 1), second])
    expected = rows.t() @ rows
    for block, at in zip(gram.blocks, (slice(0, 2048), slice(2048, 2100)), strict=True):
        torch.testing.assert_close(block, expected[at, at], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_inputs_that_are_not_finite(value: float) -> None:
    x = torch.zeros(2, 16)
    x[1, 7] = value
    with pytest.raises(ValueError, match="expected finite activations, got NaN or infinity"):
        Gram().add(x)
