"""Updates that are not finite are skipped, counted, and leave no trace; signs of collapse are reported once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from training_runs import ALONE

from sagan.recipes import HealthConfig
from sagan.train.health import CollapseAlarm, FiniteGuard, Skipped, diversity, parameters_not_finite

NAN, INF = float("nan"), float("inf")


class Guarded:
    """A network, its optimizer and its guard."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.network = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 0.1, fused=True)
        self.guard = FiniteGuard(ALONE)

    def give_gradients(self, value: float = 1.0) -> None:
        for parameter in self.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.network.bias.grad[1] = value

    def iterate(self, number: int, *values: float, loss: float = 1.0) -> None:
        """Run an iteration with an update for each of these values of a gradient."""
        with self.guard.iteration(number, ()):
            for value in values:
                self.give_gradients(value)
                self.guard.step(self.optimizer, self.network, torch.tensor(loss))

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.network.parameters()]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_update_with_such_a_gradient_changes_neither_weights_nor_moments(value: float) -> None:
    guarded = Guarded()
    guarded.iterate(0, 1.0)
    before, states = guarded.weights(), guarded.optimizer.state.values()
    moments = [state["exp_avg_sq"].clone() for state in states]
    guarded.iterate(1, value)
    assert all(torch.equal(*pair) for pair in zip(guarded.weights(), before, strict=True))
    for state, moment in zip(states, moments, strict=True):
        assert torch.equal(state["exp_avg_sq"], moment)
        assert int(state["step"]) == 1
    assert guarded.guard.skipped() == Skipped(count=1, first_iteration=1, in_a_row=1, since=1)
    assert guarded.guard.skipped() is None
    assert not hasattr(guarded.optimizer, "found_inf")


def test_a_loss_of_nan_counts_although_its_gradients_are_finite() -> None:
    guarded = Guarded()
    guarded.iterate(7, 1.0, loss=NAN)
    assert guarded.guard.skipped() == Skipped(count=1, first_iteration=7, in_a_row=1, since=7)


def test_it_is_the_plain_optimizer_otherwise() -> None:
    guarded, plain = Guarded(), Guarded()
    for number in range(3):
        guarded.iterate(number, 1.0)
        plain.give_gradients()
        plain.optimizer.step()
    assert guarded.guard.skipped() is None
    assert all(torch.equal(*pair) for pair in zip(guarded.weights(), plain.weights(), strict=True))


def test_it_counts_updates_and_iterations_in_a_row() -> None:
    guarded = Guarded()
    for number, values in enumerate([(1.0, 1.0), (NAN, NAN), (1.0, INF)]):
        guarded.iterate(number, *values)
    assert guarded.guard.skipped() == Skipped(count=3, first_iteration=1, in_a_row=2, since=1)
    guarded.iterate(3, 1.0)
    guarded.iterate(4, NAN)
    assert guarded.guard.skipped() == Skipped(count=1, first_iteration=4, in_a_row=1, since=4)


def test_moving_buffers_are_restored_after_an_iteration_with_a_skipped_update() -> None:
    guarded = Guarded()
    statistic = torch.zeros(3)
    for value, expected in ((1.0, 1.0), (NAN, 1.0), (1.0, 2.0)):
        with guarded.guard.iteration(0, [statistic]):
            statistic += value
            guarded.give_gradients(value)
            guarded.guard.step(guarded.optimizer, guarded.network, torch.tensor(1.0))
        assert statistic.eq(expected).all()


def test_parameters_that_are_not_finite_are_named() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert parameters_not_finite(network) == []
    network[1].bias.grad = torch.tensor([1.0, INF])
    with torch.no_grad():
        network[0].weight[0, 0] = NAN
    assert parameters_not_finite(network) == ["0.weight", "1.bias"]


def test_a_saturated_discriminator_is_reported_once_and_again_after_a_calm() -> None:
    alarm = CollapseAlarm(HealthConfig(saturated_logs=3, saturated_d_loss=0.1))
    messages = [alarm.see_losses(loss) for loss in (0.0, 0.05, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)]
    assert [number for number, text in enumerate(messages) if text] == [5, 10]
    assert "D's loss was below 0.1 in 3 logs in a row" in str(messages[5])


def test_lost_diversity_is_reported_only_after_there_was_some() -> None:
    alarm = CollapseAlarm(HealthConfig(least_diversity=0.1))
    messages = [alarm.see_diversity(share) for share in (0.0, 0.05, 0.15, 0.05, 0.3, 0.09, 0.01, 0.2, 0.05)]
    assert [number for number, text in enumerate(messages) if text] == [5, 8]
    assert "samples of one class differ 9.0% as much as real images do" in str(messages[5])


def test_a_score_that_rises_for_long_is_reported() -> None:
    alarm = CollapseAlarm(HealthConfig(rising_evaluations=2))
    messages = [alarm.see_score(score) for score in (50, 40, 41, 39, 45, 46, 47, 30, 31, 32)]
    assert [number for number, text in enumerate(messages) if text] == [5, 9]
    assert "become worse in 2 evaluations in a row, now 46" in str(messages[5])


def test_a_resumed_alarm_continues_where_it_was() -> None:
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
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
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
