"""Settings that every test shares."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Triton reads this when kernels are defined; its interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# The examples drawn are the same at every run. To look for new ones: HYPOTHESIS_PROFILE=explore.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# pytest-xdist fills the cores with processes; tensors here are too small for more threads to help.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_onnx(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """``run_onnx(module, inputs, dynamic_shapes, batches)``: the output for each batch of inputs, by onnxruntime."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="in the extra 'export'")
    runtime = pytest.importorskip("onnxruntime", reason="in the extra 'export'")
    # It reports that torchvision is absent.
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "level", logging.ERROR)

    def run(
        module: nn.Module | torch.export.ExportedProgram,
        inputs: tuple[Tensor, ...],
        dynamic_shapes: Any,
        batches: list[tuple[Tensor, ...]],
    ) -> list[Tensor]:
        with warnings.catch_warnings():  # torch.onnx warns of torch's own deprecated calls, and of equal axes
            warnings.simplefilter("ignore")
            options = {"dynamo": True, "dynamic_shapes": dynamic_shapes, "verbose": False}
            program = torch.onnx.export(module, inputs, **options)
        session = runtime.InferenceSession(program.model_proto.SerializeToString())
        names = [each.name for each in session.get_inputs()]
        arrays = [{name: x.numpy() for name, x in zip(names, batch, strict=True)} for batch in batches]
        return [torch.from_numpy(session.run(None, each)[0]) for each in arrays]

    return run


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
