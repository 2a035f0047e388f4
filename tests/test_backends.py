"""The choice of a backend: select, explain, force and record."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sagan_layers import SNConv2d, backends, functional
from sagan_layers.functional import explain_backends, force_backend, record_backends, select_backend

Call = tuple[tuple[Tensor, ...], dict[str, Any]]

ATTENTION_INPUTS = torch.ones(1, 1024, 2), torch.ones(1, 512, 2), torch.ones(1, 512, 3)
IMAGES, KERNEL, CHANNELS = torch.ones(2, 4, 6, 6), torch.ones(4, 4, 3, 3), torch.ones(4)
BLOCK = {name: torch.ones(4, 4) for name in ("query_weight", "key_weight", "value_weight", "out_weight")}
BLOCK["gamma"] = torch.ones(())
# Wider than any Triton kernel takes.
WIDE, WIDE_BLOCK = (
    torch.ones(1, 600, 4, 4),
    {name: torch.ones(600, 600) for name in BLOCK} | {"gamma": torch.ones(())},
)

# How each function is called, how many of its tensors select a backend, and a backend that "auto" does not take.
CALLS: dict[str, tuple[Call, int, str]] = {
    "attention": ((ATTENTION_INPUTS, {}), 3, "sdpa"),
    "self_attention_2d": (((IMAGES,), BLOCK), 1, "fused"),
    "conditional_batch_norm": (((IMAGES, CHANNELS, CHANNELS), {}), 1, "blocked"),
    "upsample_conv2d": (((IMAGES, KERNEL), {"padding": 1}), 2, "folded"),
    "conv2d_downsample": (((IMAGES, KERNEL), {"padding": 1}), 2, "folded"),
}


@pytest.mark.parametrize("operation", CALLS)
def test_every_operation_can_be_selected_explained_forced_and_recorded(operation: str) -> None:
    (inputs, options), number, other = CALLS[operation]
    selecting = inputs[:number]

    def served_by(**choice: str) -> list[str]:
        with record_backends(operation=operation) as served:
            getattr(functional, operation)(*inputs, **options, **choice)
        return served

    chosen = select_backend(*selecting, operation=operation, **options)
    sentences = explain_backends(*selecting, operation=operation, **options)
    assert [name for name, sentence in sentences.items() if sentence == "chosen"] == [chosen]
    assert sentences[other].startswith("serves when named: ")
    assert served_by() == [chosen]
    assert served_by(backend=other) == [other]
    with force_backend(other, operation=operation):
        assert select_backend(*selecting, operation=operation, **options) == other
        assert served_by() == [other]
    for name, sentence in sentences.items():
        if sentence.startswith("cannot serve: "):
            message = f"serves these inputs ({name}: {sentence.removeprefix('cannot serve: ')})"
            with pytest.raises(ValueError, match=re.escape(message)):
                select_backend(*selecting, operation=operation, backend=name, **options)
        else:
            assert select_backend(*selecting, operation=operation, backend=name, **options) == name


def test_the_weights_of_layers_are_an_operation_too() -> None:
    layer, x = SNConv2d(4, 8, 3), IMAGES
    assert select_backend(layer.weight, operation="spectral_norm") == "cpu"
    assert explain_backends(layer.weight, operation="spectral_norm")["cpu"] == "chosen"
    with record_backends(operation="spectral_norm") as served:
        layer(x)
        with force_backend("reference", operation="spectral_norm"):
            layer(x)
    assert served == ["cpu", "reference"]


def test_a_forced_backend_serves_every_call_inside() -> None:
    with record_backends() as served:
        functional.attention(*ATTENTION_INPUTS)
        with force_backend("sdpa"):
            functional.attention(*ATTENTION_INPUTS, backend="chunked")
            with force_backend("reference"):
                functional.attention(*ATTENTION_INPUTS)
                functional.conditional_batch_norm(IMAGES, CHANNELS, CHANNELS, backend="blocked")
            functional.attention(*ATTENTION_INPUTS)
        functional.attention(*ATTENTION_INPUTS, backend="chunked")
    assert served == ["chunked", "sdpa", "reference", "reference", "sdpa", "chunked"]


def test_force_and_record_can_be_limited_to_one_operation() -> None:
    with (
        force_backend("reference", operation="attention"),
        record_backends(operation="conditional_batch_norm") as served,
    ):
        assert select_backend(*ATTENTION_INPUTS) == "reference"
        functional.attention(*ATTENTION_INPUTS)
        functional.conditional_batch_norm(IMAGES, CHANNELS, CHANNELS, backend="blocked")
    assert served == ["blocked"]


def test_the_force_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), force_backend("sdpa"):
        raise RuntimeError("inside")
    assert select_backend(*ATTENTION_INPUTS) == "chunked"


def test_forced_backends_of_several_threads_need_not_end_in_order() -> None:
    first, second = force_backend("sdpa"), force_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert select_backend(*ATTENTION_INPUTS) == "reference"
    second.__exit__(None, None, None)
    assert select_backend(*ATTENTION_INPUTS) == "chunked"


def test_a_forced_backend_that_cannot_serve_raises_as_when_named() -> None:
    wide = torch.randn(1, 4, 2), torch.randn(1, 4, 2), torch.randn(1, 4, 600)
    with force_backend("triton"), pytest.raises(ValueError, match=r"\(triton: .*600"):
        functional.attention(*wide)


def test_forcing_the_fused_block_does_not_force_attention() -> None:
    with force_backend("fused"), record_backends() as served:
        functional.self_attention_2d(IMAGES, **BLOCK, backend="reference")
        functional.attention(*ATTENTION_INPUTS)
    assert served == ["fused", "chunked"]


def test_the_explanation_names_each_backend_of_attention_and_why() -> None:
    sentences = explain_backends(*ATTENTION_INPUTS)
    assert list(sentences) == ["triton", "sdpa", "chunked", "reference"]
    assert sentences["triton"].startswith(("serves when named", "cannot serve"))
    assert sentences["reference"] == "serves when named: 'chunked' comes first"
    few = [tensor[:, :8] for tensor in ATTENTION_INPUTS]
    assert explain_backends(*few)["chunked"].startswith("serves when named: with fewer than")


@pytest.mark.parametrize("name", ["native", "", "Reference"])
def test_unknown_names_are_refused(name: str) -> None:
    known = f"backend: expected one of 'auto', 'triton', 'blocked', 'reference', got {name!r}"
    operation = "conditional_batch_norm"
    for choose in (
        lambda: select_backend(IMAGES, operation=operation, backend=name),
        lambda: functional.conditional_batch_norm(IMAGES, CHANNELS, CHANNELS, backend=name),
        lambda: force_backend(name, operation=operation).__enter__(),
    ):
        with pytest.raises(ValueError, match=known):
            choose()
    with pytest.raises(ValueError, match="backend: expected one of"):
        force_backend(name).__enter__()
    for call in (
        lambda: select_backend(IMAGES, operation=name),
        lambda: explain_backends(IMAGES, operation=name),
        lambda: force_backend("auto", operation=name).__enter__(),
        lambda: record_backends(operation=name).__enter__(),
    ):
        with pytest.raises(ValueError, match=f"operation: expected one of 'attention', .*got {name!r}"):
            call()


def test_triton_kernels_need_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_INTERPRETING", False)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.no_triton_reasons(cpu) == ["its kernels run on CUDA, and the tensors are on cpu"]
    assert backends.no_triton_reasons(cuda) == []
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert backends.no_triton_reasons(cuda) == ["its kernels were never compiled for ROCm"]


def test_selecting_for_the_block_asks_the_attention_inside() -> None:
    with pytest.raises(ValueError, match=r"no attention backend serves these inputs \(triton: "):
        select_backend(WIDE, operation="self_attention_2d", backend="triton", **WIDE_BLOCK)
    with force_backend("triton", operation="attention"), pytest.raises(ValueError, match=r"\(triton: "):
        select_backend(WIDE, operation="self_attention_2d", **WIDE_BLOCK)
    assert select_backend(WIDE, operation="self_attention_2d", backend="chunked", **WIDE_BLOCK) == "composed"


def test_a_forced_backend_that_cannot_serve_is_explained() -> None:
    query = torch.ones(1, 4, 600)
    with force_backend("triton"):
        sentences = explain_backends(query, query, query)
    assert sentences["triton"].startswith("cannot serve: ")
    assert sentences["reference"] == "serves when named: 'triton' comes first"
