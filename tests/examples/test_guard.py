"""What watches a run: updates that are not finite are left out, and signs of a collapse are told once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sagan.recipes import HealthConfig
from sagan.train.collapse import CollapseAlarm, diversity
from sagan.train.guard import FiniteGuard, Skipped, parameters_not_finite

CPU = torch.device("cpu")
LOSS = torch.tensor(1.0)


def network_and_optimizer() -> tuple[nn.Linear, torch.optim.Adam]:
    network = nn.Linear(3, 2)
    return network, torch.optim.Adam(network.parameters(), 0.1, fused=True)


def give_gradients(network: nn.Linear, value: float = 1.0) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
    network.bias.grad[1] = value


class TestFiniteGuard:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_an_update_with_such_a_gradient_changes_neither_weights_nor_moments(self, value: float) -> None:
        network, optimizer = network_and_optimizer()
        guard = FiniteGuard(CPU)
        with guard.iteration(0, ()):
            give_gradients(network)
            guard.step(optimizer, network, LOSS)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        moments = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
        with guard.iteration(1, ()):
            give_gradients(network, value)
            guard.step(optimizer, network, LOSS)
        assert all(torch.equal(*pair) for pair in zip(network.parameters(), before, strict=True))
        for state, moment in zip(optimizer.state.values(), moments, strict=True):
            assert torch.equal(state["exp_avg_sq"], moment)
            assert int(state["step"]) == 1
        assert guard.skipped() == Skipped(count=1, first_iteration=1, in_a_row=1, since=1)
        assert guard.skipped() is None
        assert not hasattr(optimizer, "found_inf")

    def test_a_loss_of_nan_counts_although_its_gradients_are_finite(self) -> None:
        network, optimizer = network_and_optimizer()
        guard = FiniteGuard(CPU)
        with guard.iteration(7, ()):
            give_gradients(network)
            guard.step(optimizer, network, torch.tensor(float("nan")))
        assert guard.skipped() == Skipped(count=1, first_iteration=7, in_a_row=1, since=7)

    def test_it_is_the_plain_optimizer_otherwise(self) -> None:
        torch.manual_seed(1)
        network, optimizer = network_and_optimizer()
        torch.manual_seed(1)
        other, plain = network_and_optimizer()
        guard = FiniteGuard(CPU)
        for number in range(3):
            give_gradients(network)
            give_gradients(other)
            with guard.iteration(number, ()):
                guard.step(optimizer, network, LOSS)
            plain.step()
        assert guard.skipped() is None
        assert all(torch.equal(*pair) for pair in zip(network.parameters(), other.parameters(), strict=True))

    def test_it_counts_updates_and_iterations_in_a_row(self) -> None:
        network, optimizer = network_and_optimizer()
        guard = FiniteGuard(CPU)
        for number, values in enumerate([(1.0, 1.0), (float("nan"), float("nan")), (1.0, float("inf"))]):
            with guard.iteration(number, ()):
                for value in values:
                    give_gradients(network, value)
                    guard.step(optimizer, network, LOSS)
        assert guard.skipped() == Skipped(count=3, first_iteration=1, in_a_row=2, since=1)
        with guard.iteration(3, ()):
            give_gradients(network)
            guard.step(optimizer, network, LOSS)
        with guard.iteration(4, ()):
            give_gradients(network, float("nan"))
            guard.step(optimizer, network, LOSS)
        assert guard.skipped() == Skipped(count=1, first_iteration=4, in_a_row=1, since=4)

    def test_moving_buffers_are_put_back_after_an_iteration_with_one(self) -> None:
        network, optimizer = network_and_optimizer()
        guard = FiniteGuard(CPU)
        statistic = torch.zeros(3)
        for value, expected in ((1.0, 1.0), (float("nan"), 1.0), (1.0, 2.0)):
            with guard.iteration(0, [statistic]):
                statistic += 1 if value == 1.0 else float("nan")
                give_gradients(network, value)
                guard.step(optimizer, network, LOSS)
            assert statistic.eq(expected).all()

    def test_parameters_that_are_not_finite_are_named(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert parameters_not_finite(network) == []
        network[1].bias.grad = torch.tensor([1.0, float("inf")])
        with torch.no_grad():
            network[0].weight[0, 0] = float("nan")
        assert parameters_not_finite(network) == ["0.weight", "1.bias"]


class TestCollapseAlarm:
    def test_a_saturated_discriminator_is_told_once_and_again_after_a_calm(self) -> None:
        alarm = CollapseAlarm(HealthConfig(saturated_logs=3, saturated_d_loss=0.1))
        told = [alarm.see_losses(loss) for loss in (0.0, 0.05, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)]
        assert [number for number, text in enumerate(told) if text] == [5, 10]
        assert "D's loss was below 0.1 in 3 logs in a row" in str(told[5])

    def test_lost_diversity_is_told_only_after_there_was_some(self) -> None:
        alarm = CollapseAlarm(HealthConfig(least_diversity=0.1))
        told = [alarm.see_diversity(share) for share in (0.0, 0.05, 0.15, 0.05, 0.3, 0.09, 0.01, 0.2, 0.05)]
        assert [number for number, text in enumerate(told) if text] == [5, 8]
        assert "samples of one class differ 9.0% as much as real images do" in str(told[5])

    def test_a_score_that_rises_for_long_is_told(self) -> None:
        alarm = CollapseAlarm(HealthConfig(rising_evaluations=2))
        told = [alarm.see_score(score) for score in (50, 40, 41, 39, 45, 46, 47, 30, 31, 32)]
        assert [number for number, text in enumerate(told) if text] == [5, 9]
        assert "become worse in 2 evaluations in a row, now 46" in str(told[5])

    def test_a_resumed_alarm_goes_on_where_it_was(self) -> None:
        config = HealthConfig(saturated_logs=2, rising_evaluations=2)
        alarm = CollapseAlarm(config)
        alarm.see_losses(0.0)
        alarm.see_score(10.0)
        alarm.see_score(11.0)
        alarm.see_diversity(0.5)
        other = CollapseAlarm(config)
        other.load_state_dict(alarm.state_dict())
        assert other == alarm
        assert other.see_losses(0.0) is not None
        assert other.see_score(12.0) is not None
        assert other.see_diversity(0.0) is not None

    @pytest.mark.parametrize(
        "changes",
        [{"most_skipped": 0}, {"least_diversity": 1.0}, {"on_nonfinite": "ignore"}, {"on_collapse": "panic"}],
    )
    def test_settings_out_of_range_are_refused(self, changes: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(changes))):
            replace(HealthConfig(), **changes)  # type: ignore[arg-type]


def test_diversity_is_the_spread_within_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[2:] = 200  # another class may look different, and a lone image says nothing
    assert diversity(images, labels) == 0
    images[1] = 20
    assert diversity(images, labels) == pytest.approx(torch.tensor([0.0, 20.0]).std().item() / 2)
    assert diversity(images[-1:], labels[-1:]) == 0
