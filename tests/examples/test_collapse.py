"""Signs of a collapse are reported once, when they appear."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sagan.recipes import HealthConfig
from sagan.train.health import CollapseAlarm, diversity


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
