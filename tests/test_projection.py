"""ProjectionDiscriminatorHead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sagan_layers import ProjectionDiscriminatorHead, SNEmbedding, SNLinear


def weights(head: ProjectionDiscriminatorHead) -> tuple[Tensor, Tensor | None]:
    """The linear row and the embedding table that the head applies in evaluation."""

    def of(layer: nn.Module | None) -> Tensor | None:
        if layer is None:
            return None
        return layer.weight / layer.sigma if isinstance(layer, (SNLinear, SNEmbedding)) else layer.weight

    row = of(head.linear)
    assert row is not None
    return row, of(head.embedding)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5)),
    classes=st.one_of(st.none(), st.integers(1, 4)),
    pooling=st.sampled_from(["sum", "mean"]),
    activation=st.sampled_from(["relu", None]),
    spectral_norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_logit_is_the_written_out_formula(
    shape: tuple[int, int, int, int],
    classes: int | None,
    pooling: str,
    activation: str | None,
    spectral_norm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, channels, height, width = shape
    options = {"activation": activation, "dtype": torch.float64}
    head = ProjectionDiscriminatorHead(channels, classes, pooling, spectral_norm, **options).eval()
    x = torch.randn(shape, dtype=torch.float64)
    labels = None if classes is None else torch.randint(classes, (batch,))
    row, table = weights(head)
    logits = head(x, labels)
    assert logits.shape == (batch, 1)
    for n in range(batch):
        pooled = (x[n].clamp(min=0) if activation else x[n]).flatten(1).sum(1)
        if pooling == "mean":
            pooled = pooled / (height * width)
        expected = row[0] @ pooled + head.linear.bias[0]
        if table is not None and labels is not None:
            expected = expected + table[labels[n]] @ pooled
        torch.testing.assert_close(logits[n, 0], expected)


@pytest.mark.parametrize(
    ("options", "linear", "embedding"),
    [({}, SNLinear, SNEmbedding), ({"spectral_norm": False}, nn.Linear, nn.Embedding)],
)
def test_layers_are_normalised_by_default_or_plain(
    options: dict[str, bool], linear: type[nn.Module], embedding: type[nn.Module]
) -> None:
    head = ProjectionDiscriminatorHead(4, 3, **options)
    assert head.pooling == "sum"
    assert (type(head.linear), head.linear.weight.shape) == (linear, (1, 4))
    assert (type(head.embedding), head.embedding.weight.shape) == (embedding, (3, 4))


def test_activated_features_and_int32_labels_give_the_same_logits() -> None:
    head = ProjectionDiscriminatorHead(4, 3).eval()
    x, labels = torch.randn(2, 4, 3, 3), torch.tensor([0, 2])
    assert torch.equal(head(x, labels), head(torch.relu(x), labels.int()))


def test_power_iteration_options_reach_both_layers() -> None:
    head = ProjectionDiscriminatorHead(4, 3, n_power_iterations=3, eps=1e-8)
    assert [(layer.n_power_iterations, layer.eps) for layer in (head.linear, head.embedding)] == [
        (3, 1e-8)
    ] * 2


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_reset_parameters_initialises_both_layers(spectral_norm: bool) -> None:
    head = ProjectionDiscriminatorHead(4, 3, spectral_norm=spectral_norm)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    head.reset_parameters()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in head.named_parameters())


def test_representation_names_classes_pooling_and_a_missing_activation() -> None:
    text = ProjectionDiscriminatorHead(4, None, "mean").extra_repr()
    assert text == "4, num_classes=None, pooling='mean'"
    assert ProjectionDiscriminatorHead(4, 2, activation=None).extra_repr().endswith("'sum', activation=None")


MAPS, LABELS = torch.ones(2, 4, 3, 3), torch.tensor([0, 2])
FLAT, FIVE_CHANNELS, ONE_HOT = torch.ones(2, 4), torch.ones(2, 5, 3, 3), torch.eye(3, dtype=torch.long)[:2]


@pytest.mark.parametrize(
    ("classes", "inputs", "error", "message"),
    [
        (3, (FLAT, LABELS), ValueError, r"expected \[N, C, H, W\] with C = 4, got \[2, 4\]"),
        (3, (FIVE_CHANNELS, LABELS), ValueError, r"with C = 4, got \[2, 5, 3, 3\]"),
        (3, (MAPS.double(), LABELS), TypeError, "the module's dtype torch.float32, got torch.float64"),
        (3, (MAPS.to("meta"), LABELS), ValueError, "the device of the module's parameters, cpu, got meta"),
        (3, (MAPS,), ValueError, r"labels: expected class indices of shape \[N\] = \[2\], got None"),
        (3, (MAPS, LABELS + 1), ValueError, "expected values from 0 to 2, got values from 1 to 3"),
        (3, (MAPS, LABELS - 1), ValueError, "expected values from 0 to 2, got values from -1 to 1"),
        (3, (MAPS, LABELS[:1]), ValueError, r"labels: expected shape \[N\] = \[2\], got \[1\]"),
        (3, (MAPS, ONE_HOT), ValueError, r"labels: expected shape \[N\] = \[2\], got \[2, 3\]"),
        (3, (MAPS, LABELS.float()), TypeError, "labels: expected an int64 or int32 tensor, got .*float32"),
        (3, (MAPS, LABELS.to("meta")), ValueError, "labels: expected the device of the module's parameters"),
        (None, (MAPS, LABELS), ValueError, r"labels: expected None \(the module has no classes\), got a"),
    ],
)
def test_wrong_inputs_are_refused(
    classes: int | None, inputs: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ProjectionDiscriminatorHead(4, classes)(*inputs)
