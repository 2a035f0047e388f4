"""The module that all Triton kernels share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sagan_layers import triton_support


@pytest.mark.parametrize(
    ("capability", "reasons"),
    [((7, 5), ["needs compute capability 8.0, got 7.5"]), ((8, 0), []), ((9, 0), []), ((10, 0), [])],
)
def test_older_gpus_are_refused(
    capability: tuple[int, int], reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    assert triton_support.unsupported_reasons(tensor, torch.float16) == reasons


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.float8_e5m2], ids=str)
def test_compiled_kernels_serve_their_dtypes_and_the_interpreter_wider_ones_too(
    dtype: torch.dtype, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", interpreted)
    refusals = triton_support.unsupported_reasons(torch.empty(1, dtype=dtype), torch.bfloat16, torch.float16)
    served = dtype == torch.float16 or (interpreted and dtype in (torch.float32, torch.float64))
    assert refusals == ([] if served else [f"serves torch.bfloat16, torch.float16, got {dtype}"])


@pytest.mark.parametrize(
    ("shape", "strides", "fits"),
    [
        ((2, 16, 7, 5), (2**40, 35, 5, 1), True),  # samples may be any distance apart
        ((1, 16, 7, 5), (1, 2**28, 5, 1), False),
        ((1, 2**16, 2**15), (0, 0, 0), False),  # a contiguous result spans more
    ],
)
def test_offsets_inside_a_sample_must_fit_into_32_bits(
    shape: tuple[int, ...], strides: tuple[int, ...], fits: bool
) -> None:
    x = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    limit = triton_support.MAX_SAMPLE_SPAN
    assert triton_support.large_sample_reasons(x) == (
        [] if fits else [f"a sample spans {limit} elements or more"]
    )


@pytest.mark.skipif(not triton_support.INTERPRETED, reason="the kernels are compiled")
def test_the_interpreter_rounds_bfloat16_as_torch_does() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def round_kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.arange(0, SIZE)
        tl.store(y + place, triton_support.rounded(tl.load(x + place), tl.bfloat16))

    x = torch.cat([torch.randn(62), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])])  # the last two are ties
    y = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, SIZE=64)
    assert torch.equal(y, x.bfloat16())
