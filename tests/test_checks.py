"""Checks of a caller's tensors and numbers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sagan_layers import ConditionalBatchNorm2d, ProjectionDiscriminatorHead, checks, functional


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Record the tensors whose values a check reads; each of them seems to lie from 0 to 9."""
    read_tensors: list[Tensor] = []

    def aminmax(labels: Tensor) -> tuple[Tensor, Tensor]:
        read_tensors.append(labels)
        return torch.tensor(0), torch.tensor(9)

    monkeypatch.setattr(torch, "aminmax", aminmax)
    yield read_tensors
    functional.set_debug_checks(False)


def check_labels_on_a_gpu() -> None:
    with FakeTensorMode():
        labels = torch.zeros(3, dtype=torch.long, device="cuda")
    checks.check_labels(labels, num_classes=5, batch=3, like=labels)


def test_label_values_on_a_gpu_are_read_only_with_debug_checks(reads: list[Tensor]) -> None:
    check_labels_on_a_gpu()
    assert len(reads) == 0
    functional.set_debug_checks(True)
    with pytest.raises(ValueError, match="labels: expected values from 0 to 4, got values from 0 to 9"):
        check_labels_on_a_gpu()
    functional.set_debug_checks(False)
    check_labels_on_a_gpu()
    assert len(reads) == 1


@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_turns_debug_checks_on(
    value: str | None, enabled: bool, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGAN_LAYERS_DEBUG_CHECKS", raising=False)
    if value is not None:
        monkeypatch.setenv("SAGAN_LAYERS_DEBUG_CHECKS", value)
    importlib.reload(checks)
    if enabled:
        with pytest.raises(ValueError, match="got values from 0 to 9"):
            check_labels_on_a_gpu()
    else:
        check_labels_on_a_gpu()
    assert len(reads) == enabled


@pytest.mark.gpu
def test_a_step_with_labels_on_a_gpu_does_not_wait_for_it() -> None:
    norm = ConditionalBatchNorm2d(4, 3, momentum=None, device="cuda")
    head = ProjectionDiscriminatorHead(4, 3, device="cuda")
    x = torch.randn(2, 4, 3, 3, device="cuda", requires_grad=True)
    labels = torch.tensor([0, 2], device="cuda")
    head(norm(x, labels), labels).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(norm(x, labels), labels).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x.grad).all()


def test_empty_labels_of_an_empty_batch_pass() -> None:
    labels = torch.empty(0, dtype=torch.long)
    checks.check_labels(labels, num_classes=5, batch=0, like=labels)
