"""ConditionalBatchNorm2d and standing statistics."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from blocks import assert_same, state_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sagan_layers import ConditionalBatchNorm2d, SNLinear, convert, standing_statistics
from sagan_layers.functional import conditional_batch_norm

ZEROS = torch.zeros(4, dtype=torch.long)


def randomised(module: ConditionalBatchNorm2d) -> ConditionalBatchNorm2d:
    with torch.no_grad():
        if module.condition_features is None:
            module.weight.normal_(1, 0.3)
            module.bias.normal_()
        if module.norm.running_mean is not None:
            module.norm.running_mean.normal_()
            module.norm.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.01}, {"momentum": None}, {"track_running_stats": False}]
)
@pytest.mark.parametrize(
    ("conditioned", "condition"),
    [
        ({}, ()),
        ({"num_classes": 3}, (torch.tensor([0, 2, 2]),)),
        ({"condition_features": 2}, (torch.randn(3, 2, dtype=torch.float64),)),
    ],
    ids=["none", "labels", "vectors"],
)
def test_with_gain_one_and_bias_zero_it_is_torchs_batch_norm(
    options: dict[str, Any], conditioned: dict[str, int], condition: tuple[Tensor, ...]
) -> None:
    module = ConditionalBatchNorm2d(5, **conditioned, **options, dtype=torch.float64)
    if conditioned.get("condition_features"):
        nn.init.zeros_(module.weight_projection.weight)
        nn.init.zeros_(module.bias_projection.weight)
    torchs = nn.BatchNorm2d(5, **options, dtype=torch.float64)
    for step in range(3):
        x = torch.randn(3, 5, 4, 3, dtype=torch.float64) * (step + 1) + step
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = module(ours, *condition), torchs(theirs)
        torch.testing.assert_close(y, expected)
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    expected_buffers = {f"norm.{name}": buffer for name, buffer in torchs.named_buffers()}
    assert dict(module.named_buffers()).keys() == expected_buffers.keys()
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, expected_buffers[name])
    x = torch.randn(3, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(module.eval()(x, *condition), torchs.eval()(x))


@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 6),
    height=st.integers(2, 5),
    width=st.integers(1, 5),
    classes=st.integers(1, 4),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_labels_choose_rows_of_the_tables(
    batch: int, channels: int, height: int, width: int, classes: int, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    module = randomised(ConditionalBatchNorm2d(channels, classes, dtype=torch.float64)).train(training)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), dtype=torch.int32 if seed % 2 else torch.int64)
    mean, var = module.norm.running_mean.clone(), module.norm.running_var.clone()
    if training:
        values = x.transpose(0, 1).flatten(1)
        mean, var = values.mean(1), values.var(1, correction=0)
    y = module(x, labels)
    for n in range(batch):
        for c in range(channels):
            scaled = (x[n, c] - mean[c]) / (var[c] + 1e-5).sqrt()
            row = int(labels[n])
            torch.testing.assert_close(y[n, c], module.weight[row, c] * scaled + module.bias[row, c])


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_vectors_give_one_plus_a_projection_as_gain_and_another_as_bias(spectral_norm: bool) -> None:
    module = ConditionalBatchNorm2d(
        4, condition_features=3, spectral_norm=spectral_norm, dtype=torch.float64
    ).eval()
    x, vectors = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    assert type(module.weight_projection) is (SNLinear if spectral_norm else nn.Linear)
    gain_matrix, bias_matrix = (
        layer.normalized_weight() if spectral_norm else layer.weight
        for layer in (module.weight_projection, module.bias_projection)
    )
    gain, bias = 1 + vectors @ gain_matrix.t(), vectors @ bias_matrix.t()
    normalised = x / (1 + 1e-5) ** 0.5  # running mean 0 and variance 1
    torch.testing.assert_close(module(x, vectors), gain[..., None, None] * normalised + bias[..., None, None])


def test_fresh_tables_are_ones_and_zeros() -> None:
    module = ConditionalBatchNorm2d(4, 3)
    assert torch.equal(module.weight, torch.ones(3, 4))
    assert torch.equal(module.bias, torch.zeros(3, 4))
    unconditional = ConditionalBatchNorm2d(4)
    assert unconditional.weight.shape == unconditional.bias.shape == (4,)
    vectors = ConditionalBatchNorm2d(4, condition_features=2)
    assert vectors.weight_projection.bias is None


def offset_pair(offset: float, **options: Any) -> tuple[ConditionalBatchNorm2d, ConditionalBatchNorm2d]:
    """A layer with an offset and one without, with the same gains."""
    shifted = ConditionalBatchNorm2d(4, 3, gain_offset=offset, dtype=torch.float64, **options)
    plain = randomised(ConditionalBatchNorm2d(4, 3, dtype=torch.float64, **options))
    state = plain.state_dict()
    shifted.load_state_dict(state | {"weight": state["weight"] - offset})
    return shifted, plain


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("training", {"activation": "relu"}),
        ("evaluation", {}),
        ("evaluation", {"track_running_stats": False}),
        ("standing", {}),
    ],
)
def test_with_an_offset_gains_are_the_offset_plus_the_table(way: str, options: dict[str, Any]) -> None:
    x, labels = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    results = []
    for norm in offset_pair(1.0, **options):
        norm.train(way == "training")
        if way == "standing":
            with standing_statistics(norm):
                norm(2 * x, labels)
        y = norm(x, labels)
        y.pow(3).sum().backward()
        results.append([y, *(parameter.grad for parameter in norm.parameters()), *norm.buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("offset", [1.0, -0.5])
def test_a_new_layers_gain_is_one_whatever_the_offset(offset: float) -> None:
    norm = ConditionalBatchNorm2d(4, 3, gain_offset=offset)
    assert torch.equal(norm.state_dict()["weight"], torch.full((3, 4), 1 - offset))
    nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.state_dict()["weight"], torch.full((3, 4), 1 - offset))
    assert norm.extra_repr() == f"4, num_classes=3, gain_offset={offset}"


def test_weight_decay_pulls_gains_to_the_offset() -> None:
    norm = ConditionalBatchNorm2d(4, 3, gain_offset=1.0)
    nn.init.normal_(norm.weight)
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0, weight_decay=1.0)
    norm(torch.randn(2, 4, 3, 3), ZEROS[:2]).mul(0).sum().backward()
    optimizer.step()
    assert torch.equal(norm.weight.clone(), torch.ones(3, 4))


def test_what_stands_for_gains_with_an_offset_names_the_table_for_all_else() -> None:
    norm = ConditionalBatchNorm2d(4, 3, gain_offset=1.0)
    with pytest.raises(
        TypeError, match=r"weight: is computed, .* dict\(layer.named_parameters\(\)\)\['weight'\]"
    ):
        norm.weight[0] = 2.0
    norm.weight.copy_(torch.full((3, 4), 3.0))  # any values: they are a table's, not a projection's
    assert torch.equal(dict(norm.named_parameters())["weight"], torch.full((3, 4), 2.0))
    norm.weight = nn.Parameter(torch.zeros(3, 4))
    assert torch.equal(norm.weight.clone(), torch.ones(3, 4))
    norm.weight.requires_grad_(False)
    assert not norm._parameters["weight"].requires_grad


def test_other_code_bases_load_gains_into_tables_of_any_offset() -> None:
    states = []
    for norm in offset_pair(1.0):
        saved = convert.save(norm, "biggan_pytorch")
        loaded = ConditionalBatchNorm2d(4, 3, gain_offset=norm.gain_offset, dtype=torch.float64)
        convert.load(loaded, saved, "biggan_pytorch")
        torch.testing.assert_close(loaded.weight.clone(), norm.weight.clone())
        states.append(saved)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}], ids=str)
def test_without_a_condition_it_loads_torchs_batch_norm(options: dict[str, bool], nested: bool) -> None:
    theirs: nn.Module = nn.BatchNorm2d(4)
    ours: nn.Module = ConditionalBatchNorm2d(4)
    if nested:
        theirs, ours = (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), norm)) for norm in (theirs, ours))
    for value in theirs.state_dict().values():
        value.copy_(torch.rand(value.shape) + 7)
    names, state = list(ours.state_dict()), theirs.state_dict()
    before = list(state)
    result = ours.load_state_dict(state, **options)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(state) == before
    assert list(ours.state_dict()) == names
    x = torch.randn(2, 3 if nested else 4, 5, 5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    norm = next(module for module in ours.modules() if isinstance(module, ConditionalBatchNorm2d))
    assert norm.norm.num_batches_tracked == 7


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, nn.BatchNorm2d(4, affine=False), r'Missing key\(s\) in state_dict: "weight", "bias"'),
        (
            {},
            nn.BatchNorm2d(4, track_running_stats=False),
            'Missing key.*"norm.running_mean", "norm.running_var"',
        ),
        ({}, nn.BatchNorm2d(5), "size mismatch for norm.running_mean"),
        ({"track_running_stats": False}, nn.BatchNorm2d(4), 'Unexpected key.*"norm.running_mean"'),
        (
            {"num_classes": 3},
            nn.BatchNorm2d(4),
            r"weight: expected a table \[3, 4\], got \[4\] of a batch norm without classes, which loads into "
            r"ConditionalBatchNorm2d\(4\)",
        ),
        ({"condition_features": 3}, nn.BatchNorm2d(4), 'Missing key.*"weight_projection.weight"'),
    ],
)
def test_another_batch_norm_is_refused_by_name(ours: dict[str, Any], theirs: nn.Module, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ConditionalBatchNorm2d(4, **ours).load_state_dict(theirs.state_dict())


def test_batch_norm_without_gain_loads_where_gain_and_bias_may_be_missing() -> None:
    theirs, ours = nn.BatchNorm2d(4, affine=False), ConditionalBatchNorm2d(4)
    theirs(torch.randn(5, 4, 3, 3) + 2)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_keys_of_both_kinds_leave_torchs_unexpected() -> None:
    state = ConditionalBatchNorm2d(4).state_dict() | nn.BatchNorm2d(4).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"running_mean", "running_var"'):
        ConditionalBatchNorm2d(4).load_state_dict(state)


def test_only_rows_of_the_labels_get_gradients() -> None:
    module = ConditionalBatchNorm2d(4, 5)
    module(torch.randn(3, 4, 2, 2), torch.tensor([1, 1, 3])).square().sum().backward()
    touched = module.bias.grad.abs().sum(1) + module.weight.grad.abs().sum(1)
    assert (touched[[1, 3]] > 0).all()
    assert torch.count_nonzero(touched[[0, 2, 4]]) == 0


@pytest.mark.parametrize("biased", [False, True])
def test_running_variance_is_unbiased_as_torchs_or_biased_as_tensorflows(biased: bool) -> None:
    module = ConditionalBatchNorm2d(3, momentum=0.25, biased_running_var=biased, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    module(x)
    values = x.transpose(0, 1).flatten(1)
    expected = 0.75 + 0.25 * values.var(1, correction=0 if biased else 1)
    torch.testing.assert_close(module.norm.running_var, expected)
    torch.testing.assert_close(module.norm.running_mean, 0.25 * values.mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_large_means_with_small_variances_keep_their_digits(training: bool) -> None:
    module = ConditionalBatchNorm2d(4, eps=1e-12).train(training)
    noise = torch.randn(8, 4, 16, 16, dtype=torch.float64)
    x = (1000 + 0.05 * noise).float()
    exact = x.double()
    mean, var = exact.mean((0, 2, 3), keepdim=True), exact.var((0, 2, 3), correction=0, keepdim=True)
    if not training:
        module.norm.running_mean.copy_(mean.flatten())
        module.norm.running_var.copy_(var.flatten())
    y = module(x)
    # The mean itself is rounded to float32: 3e-5 of a value near 1000, in units of 0.05.
    rounding = 0.5 * torch.finfo(torch.float32).eps * 1024 / 0.05
    expected = (exact - mean) / var.sqrt()
    assert (y.double() - expected).abs().max() < 3 * rounding
    assert (y.double().var((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_float64_input_is_normalised_in_float64() -> None:
    module = ConditionalBatchNorm2d(2, eps=1e-14, dtype=torch.float64)
    x = 1e6 + 1e-3 * torch.randn(4, 2, 8, 8, dtype=torch.float64)
    values = x - 1e6
    mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(module(x), (values - mean) / (var + 1e-14).sqrt(), rtol=0, atol=1e-6)


@given(
    scale=st.floats(0.1, 10), shift=st.floats(-10, 10), seed=st.integers(0, 2**16), batch=st.integers(2, 4)
)
def test_training_output_is_invariant_to_scale_and_shift_of_the_input(
    scale: float, shift: float, seed: int, batch: int
) -> None:
    torch.manual_seed(seed)
    module = randomised(ConditionalBatchNorm2d(3, eps=1e-14, dtype=torch.float64))
    x = torch.randn(batch, 3, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(module(scale * x + shift), module(x), rtol=1e-8, atol=1e-8)


def test_evaluation_changes_nothing() -> None:
    module = randomised(ConditionalBatchNorm2d(3, 2)).eval()
    before = state_of(module)
    x, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    assert torch.equal(module(x, labels), module(x, labels))
    assert_same(state_of(module), before)


def test_freezing_every_batch_norm_of_a_network_freezes_this_one() -> None:
    model = nn.ModuleList([ConditionalBatchNorm2d(3, 2)])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = state_of(model)
    x = torch.randn(4, 3, 2, 2) * 9
    y = model[0](x, ZEROS)
    assert_same(state_of(model), before)
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)


def test_without_running_statistics_evaluation_uses_those_of_the_batch() -> None:
    module = ConditionalBatchNorm2d(3, track_running_stats=False)
    x = torch.randn(4, 3, 2, 2) * 9 + 1
    assert torch.equal(module.eval()(x), module.train()(x))
    assert not dict(module.named_buffers())


def test_reset_parameters_restores_the_initial_state() -> None:
    for module in (ConditionalBatchNorm2d(3, 2), ConditionalBatchNorm2d(3)):
        fresh = copy.deepcopy(module.state_dict())
        randomised(module).norm.num_batches_tracked.fill_(7)
        module.reset_parameters()
        assert_same(module.state_dict(), fresh)
    vectors = ConditionalBatchNorm2d(3, condition_features=4, spectral_norm=True)
    before = copy.deepcopy(vectors.state_dict())
    vectors.reset_parameters()
    assert not torch.equal(vectors.weight_projection.weight, before["weight_projection.weight"])
    assert not torch.equal(vectors.bias_projection.weight_u, before["bias_projection.weight_u"])


def test_representation_names_the_condition_and_options() -> None:
    assert ConditionalBatchNorm2d(3, 2).extra_repr() == "3, num_classes=2"
    options = {"biased_running_var": True, "activation": "relu", "backend": "reference"}
    vectors = ConditionalBatchNorm2d(3, None, 1e-3, None, condition_features=4, **options)
    assert vectors.extra_repr() == (
        "3, condition_features=4, biased_running_var=True, activation='relu', backend='reference'"
    )
    assert (vectors.eps, vectors.momentum) == (1e-3, None)


def statistics_of(parts: list[Tensor], correction: int = 1) -> tuple[Tensor, Tensor]:
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    return values.mean(1), values.var(1, correction=correction)


def assert_running_statistics(module: ConditionalBatchNorm2d, mean: Tensor, var: Tensor) -> None:
    torch.testing.assert_close(module.norm.running_mean, mean)
    torch.testing.assert_close(module.norm.running_var, var)


def gather(module: nn.Module, *batches: Tensor) -> None:
    with torch.no_grad(), standing_statistics(module):
        for batch in batches:
            module(batch)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("way", ["context", "method"])
def test_standing_statistics_are_those_of_all_values_together(way: str, biased: bool) -> None:
    module = ConditionalBatchNorm2d(3, biased_running_var=biased, dtype=torch.float64)
    shapes = (1, 3, 2, 3), (5, 3, 4, 4), (2, 3, 7, 1)
    batches = [torch.randn(shape, dtype=torch.float64) * (shape[0] + 1) + 10 * shape[0] for shape in shapes]
    if way == "context":
        gather(module, *batches)
    else:
        module.begin_standing_statistics()
        for batch in batches:
            module(batch)
        module.end_standing_statistics()
    assert_running_statistics(module, *statistics_of(batches, correction=0 if biased else 1))
    assert module.norm.num_batches_tracked.item() == 0


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_standing_statistics_do_not_depend_on_how_values_are_split(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(sum(sizes), 2, 2, 3).double() * 3 + 100
    module = ConditionalBatchNorm2d(2, dtype=torch.float64)
    gather(module, *values.split(sizes))
    assert_running_statistics(module, *statistics_of([values]))


def test_standing_passes_normalise_by_their_batch_and_start_from_zero() -> None:
    module = randomised(ConditionalBatchNorm2d(3, 2)).eval()
    x, labels = torch.randn(4, 3, 5, 5) * 4 + 2, torch.tensor([0, 1, 1, 0])
    expected = copy.deepcopy(module).train()(x, labels)
    for _ in range(2):
        with torch.no_grad(), standing_statistics(module):
            y = module(x, labels)
    torch.testing.assert_close(y, expected.detach())
    assert_running_statistics(module, *statistics_of([x]))


def test_standing_statistics_put_the_network_in_evaluation_and_restore_every_mode() -> None:
    model = nn.Sequential(ConditionalBatchNorm2d(3), nn.Dropout(0.9), nn.Flatten(), SNLinear(12, 2))
    model[1].eval()
    model[0].norm.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    u = model[3].weight_u.clone()
    x = torch.randn(4, 3, 2, 2)
    with torch.no_grad(), standing_statistics(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(x), model(x))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[3].weight_u, u)


def test_standing_statistics_are_undone_by_an_exception() -> None:
    model = nn.ModuleList([randomised(ConditionalBatchNorm2d(3)), nn.Dropout()])
    before = state_of(model)

    def interrupted() -> None:
        with standing_statistics(model):
            model[0](torch.randn(2, 3, 2, 2))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert_same(state_of(model), before)
    assert all(module.training for module in model.modules())
    model[0](torch.randn(2, 3, 2, 2))  # training as before, nothing is gathered any more
    assert model[0].norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_made_while_gathering_does_not_gather(duplicate: Any) -> None:
    module = ConditionalBatchNorm2d(3)
    with torch.no_grad(), standing_statistics(module):
        duplicated = duplicate(module)
        module(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match="expected begin_standing_statistics first"):
        duplicated.end_standing_statistics()


@pytest.mark.parametrize(
    ("module", "batches", "message"),
    [
        (
            nn.Sequential(ConditionalBatchNorm2d(3), nn.BatchNorm2d(3)),
            [],
            "expected ConditionalBatchNorm2d layers alone, got torch's batch norm at '1'",
        ),
        (nn.Linear(2, 2), [], "expected ConditionalBatchNorm2d layers alone, got none"),
        (ConditionalBatchNorm2d(3, track_running_stats=False), [], "expected track_running_stats=True"),
        (randomised(ConditionalBatchNorm2d(3)), [], "at least one forward pass of each layer, got none"),
        (
            randomised(ConditionalBatchNorm2d(3)),
            [torch.randn(1, 3, 1, 1)],
            r"more than 1 value per channel.*got \[1, 3, 1, 1\]",
        ),
    ],
    ids=["torch's batch norm", "no layers", "no running statistics", "no pass", "one value"],
)
def test_standing_statistics_that_cannot_be_taken_are_refused_and_change_nothing(
    module: nn.Module, batches: list[Tensor], message: str
) -> None:
    before = state_of(module)
    with pytest.raises(ValueError, match=message):
        gather(module, *batches)
    assert_same(state_of(module), before)
    assert all(layer.training for layer in module.modules())


def test_standing_statistics_accept_a_torch_batch_norm_without_running_statistics() -> None:
    model = nn.Sequential(ConditionalBatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    gather(model, torch.randn(2, 3, 2, 2))


def test_standing_statistics_of_a_network_are_set_for_all_layers_or_for_none() -> None:
    network = nn.Sequential(ConditionalBatchNorm2d(6), ConditionalBatchNorm2d(6))
    before = state_of(network)
    with pytest.raises(ValueError, match="each layer"), standing_statistics(network):
        network[0](torch.randn(4, 6, 5, 5))
    assert_same(state_of(network), before)


def test_standing_statistics_do_not_nest() -> None:
    norm = ConditionalBatchNorm2d(6)
    with standing_statistics(norm):
        norm(torch.randn(4, 6, 5, 5))
        for begin in (standing_statistics(norm).__enter__, norm.begin_standing_statistics):
            with pytest.raises(ValueError, match="not gathering them already"):
                begin()


IMAGES = torch.ones(4, 3, 2, 2)
LABELS, VECTORS = {"num_classes": 2}, {"condition_features": 2}
UNBATCHED, FEW_CHANNELS, ONE_VALUE = torch.ones(4, 3, 2), torch.ones(4, 2, 2, 2), torch.ones(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("options", "inputs", "error", "message"),
    [
        ({}, (UNBATCHED,), ValueError, r"input: expected \[N, C, H, W\] with C = 3, got \[4, 3, 2\]"),
        ({}, (FEW_CHANNELS,), ValueError, r"with C = 3, got \[4, 2, 2, 2\]"),
        ({}, (IMAGES.double(),), TypeError, "the module's dtype torch.float32, got torch.float64"),
        ({}, (IMAGES.to("meta"),), ValueError, "the device of the module's parameters, cpu, got meta"),
        ({}, (ONE_VALUE,), ValueError, r"expected more than 1 value per channel.*got \[1, 3, 1, 1\]"),
        ({}, (IMAGES, ZEROS), ValueError, r"labels: expected None \(the module has no classes\)"),
        (LABELS, (IMAGES,), ValueError, r"labels: expected class indices of shape \[N\] = \[4\], got None"),
        (LABELS, (IMAGES, ZEROS[:3]), ValueError, r"labels: expected shape \[N\] = \[4\], got \[3\]"),
        (LABELS, (IMAGES, ZEROS[:, None]), ValueError, r"\[N\] = \[4\], got \[4, 1\]"),
        (LABELS, (IMAGES, ZEROS + 2), ValueError, "labels: expected values from 0 to 1, got .* 2 to 2"),
        (LABELS, (IMAGES, ZEROS - 1), ValueError, "from 0 to 1, got values from -1 to -1"),
        (LABELS, (IMAGES, ZEROS.float()), TypeError, "labels: expected an int64 or int32 tensor.*float32"),
        (LABELS, (IMAGES, ZEROS.to("meta")), ValueError, "labels: expected the device of .*, cpu, got meta"),
        (VECTORS, (IMAGES,), ValueError, r"condition: expected vectors \[N, 2\] with N = 4, got None"),
        (VECTORS, (IMAGES, torch.ones(4, 3)), ValueError, r"condition: expected \[\*, 2\], got \[4, 3\]"),
        (VECTORS, (IMAGES, torch.ones(3, 2)), ValueError, r"condition: expected \[4, 2\], got \[3, 2\]"),
        (VECTORS, (IMAGES, torch.ones(4, 2).double()), TypeError, "dtype torch.float32, got torch.float64"),
    ],
)
def test_wrong_inputs_are_refused_before_statistics_are_updated(
    options: dict[str, Any], inputs: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    module = ConditionalBatchNorm2d(3, **options)
    mean = module.norm.running_mean.clone()
    with pytest.raises(error, match=message):
        module(*inputs)
    assert torch.equal(module.norm.running_mean, mean)


@pytest.mark.usefixtures("_fresh_compiler")
def test_standing_statistics_of_a_compiled_network_compile_once() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), ConditionalBatchNorm2d(4))
    other, batches = copy.deepcopy(network), [torch.randn(6, 3, 8, 8) for _ in range(12)]
    network.compile(backend="eager", fullgraph=True)
    with torch.no_grad(), standing_statistics(network):
        for number, batch in enumerate(batches):
            with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
                network(batch)
    gather(other, *batches)
    assert_running_statistics(network[1], other[1].norm.running_mean, other[1].norm.running_var)


def test_values_too_large_for_their_gradients_are_refused() -> None:
    x = torch.randn(4, 3, 2, 2) * 1e14
    options = torch.ones(3), torch.zeros(3)
    y = conditional_batch_norm(x, *options, training=True, backend="reference")
    expected = conditional_batch_norm(x.double(), *(each.double() for each in options), training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"power of -3/2 for gradients, got values up to [1-9]e\+14"):
        conditional_batch_norm(x.requires_grad_(), *options, training=True, backend="reference")
    # Blocks keep statistics in float64.
    y = conditional_batch_norm(x, *options, training=True, backend="blocked")
    wide = x.detach().double().requires_grad_()
    expected = conditional_batch_norm(wide, *(each.double() for each in options), training=True)
    gradients = [
        torch.autograd.grad((y * torch.sin(y.detach())).sum(), each)[0].double()
        for y, each in ((y, x), (expected, wide))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=float(gradients[1].abs().max()) * 1e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_jacobians_of_every_backend_are_the_same(backend: str) -> None:
    x, gain, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 2, 2), (2,), (2,)))

    def norm(*tensors: Tensor) -> Tensor:
        return conditional_batch_norm(*tensors, training=True, activation="relu", backend=backend)

    jacobians = torch.func.jacrev(norm, (0, 1, 2))(x, gain, bias)
    expected = torch.autograd.functional.jacobian(
        lambda *tensors: conditional_batch_norm(
            *tensors, training=True, activation="relu", backend="reference"
        ),
        (x, gain, bias),
    )
    torch.testing.assert_close(jacobians, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_named_backend_that_tracing_cannot_save_says_so() -> None:
    norm = ConditionalBatchNorm2d(3, backend="blocked").eval()
    with pytest.raises(ValueError, match=r"torch\.jit\.trace saves plain operations"):
        torch.jit.trace(norm, torch.randn(2, 3, 4, 4))
