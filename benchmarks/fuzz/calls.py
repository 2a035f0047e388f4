"""Calls of every block and functional form, valid and slightly invalid, against float64."""

from __future__ import annotations

import inspect
import random
import re
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sagan_layers
from benchmarks.fuzz import blocks
from benchmarks.fuzz.blocks import Call, Tensors, draw_call, gradients
from benchmarks.fuzz.outcomes import Campaign, Outcome, WrongError, outcome_of, text_of

_PACKAGE = str(Path(sagan_layers.__file__).parent)
# Errors may be this many times what rounding the inputs changes.
_ROUNDINGS = 40
_HOSTILE_VALUES: tuple[Any, ...] = (
    None, "a", "same", -1, 0, 1.5, float("nan"), float("inf"), True, 2, 7, (1,), (1, 2), (1, 2, 3), [3], ("a",), (0, 1),
    (1.5, 2), 1j, object(), np.int64(2), np.float32(0.5), torch.tensor(2), torch.ones(2), {}, torch.int64, b"x",
)  # fmt: skip


def is_raised_by_us(error: BaseException) -> bool:
    """Return whether a ``raise`` of the package made the error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(_PACKAGE) and (last.line or "").startswith("raise")


def is_clear(error: BaseException, names: set[str]) -> bool:
    """Return whether an error is a ValueError or TypeError of ours that names an argument."""
    named = bool(set(re.findall(r"\w+", str(error))) & names)
    return named and isinstance(error, (ValueError, TypeError)) and is_raised_by_us(error)


def _names(call: Call) -> set[str]:
    """Return the names that a message may use for an argument of the call."""
    forward = getattr(call.make, "forward", call.make)
    found = {name for each in (call.make, forward) for name in inspect.signature(each).parameters}
    return (found | set(call.options) | set(call.inputs) | {"input", "x", "labels", "logits", "map"}) - {
        "self"
    }


def _run(call: Call, module: nn.Module | None) -> tuple[Tensors, Tensors]:
    """Return the outputs of our code, with the buffers after it, and the leaves that have gradients."""
    leaves: Tensors = {} if module is None else dict(module.named_parameters())
    inputs = dict(call.inputs)
    for name, value in call.inputs.items():
        if isinstance(value, Tensor):
            updated = name.startswith("running") or name in ("u", "v")
            inputs[name] = value.detach().clone() if updated else value.detach()
            if value.is_floating_point() and not updated:
                leaves[name] = inputs[name].requires_grad_()
    if module is None:
        result = call.make(**inputs, **call.options)
    else:  # the losses have keywords only
        result = module(*inputs.values()) if call.takes_dtype else module(**inputs)
    outputs = {"y": result} if isinstance(result, Tensor) else result._asdict()
    outputs["y"] = outputs.pop("weight", outputs.get("y"))
    outputs |= {} if module is None else dict(module.named_buffers())
    return {**outputs, **{name: inputs[name] for name in inputs if name.startswith("running")}}, leaves


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor * (1 + torch.finfo(dtype).eps * torch.randn_like(tensor))


def _expected(call: Call, state: Tensors, cotangent: Tensor | None, rounding: bool = False) -> Tensors:
    """Return the oracle's outputs and gradients; with inputs off by a rounding if asked for."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        found = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        return (_rounded(found.double(), value.dtype) if rounding else found.double()).requires_grad_()

    options = SimpleNamespace(**{"training": call.training, "make": call.make, **call.options})
    s = {name: wide(value) for name, value in state.items()}
    inputs = {name: wide(value) for name, value in call.inputs.items()}
    blocks.noise = torch.finfo(call.dtype).eps if rounding else 0.0
    outputs = call.oracle(options, s, SimpleNamespace(**inputs))
    results = {name: value.detach() for name, value in outputs.items()}
    if cotangent is not None:
        leaves = {name: t for name, t in {**s, **inputs}.items() if getattr(t, "requires_grad", False)}
        weights = _rounded(cotangent, call.dtype) if rounding else cotangent
        results |= gradients(outputs["y"], leaves, weights)
    return results


def _check(ours: Tensors, want: Tensors, rounded: list[Tensors]) -> None:
    """Raise WrongError unless each is as near to what is expected as its dtype and size allow."""
    for name, expected in want.items():
        found = ours[name]
        if found.shape != expected.shape:
            raise WrongError(f"{name}: expected shape {list(expected.shape)}, got {list(found.shape)}")
        limits = torch.finfo(found.dtype)
        changes = [(each[name] - expected).abs().nan_to_num(0, 0, 0).flatten() for each in rounded]
        spread = float(torch.cat([torch.zeros(1, dtype=torch.float64), *changes]).max())
        # The oracle rounds to float64 itself.
        least = limits.tiny / limits.eps if found.dtype != torch.float64 else limits.eps
        allowed = _ROUNDINGS * spread + 4 * limits.eps * expected.abs() + least
        off = (found.detach().double() - expected).abs()
        sound = expected.isfinite() & (expected.abs() + allowed < limits.max / 4)
        if (bad := sound & ~(off <= allowed)).any():
            place = tuple(int(axis[0]) for axis in bad.nonzero(as_tuple=True))
            values = f"expected {expected[place]:.8g}, got {found[place]:.8g}, allowed {allowed[place]:.2g}"
            raise WrongError(f"{name}{list(place)}: {values} ({found.dtype})")


def check_call(call: Call) -> None:
    """Compare a call with the oracle, values and gradients; raise WrongError, or what our code raises."""
    module = call.build() if call.is_module else None
    state = {} if module is None else {name: value.clone() for name, value in module.state_dict().items()}
    outputs, leaves = _run(call, module)
    blocks.kinks.clear()
    if outputs["y"].is_meta:
        if not all(leaf.is_meta for leaf in leaves.values()):
            raise WrongError("accepted what has no result: tensors on two devices")
        return
    try:
        want = _expected(call, state, None)
    except Exception as error:
        raise WrongError(f"accepted what has no result: {error}") from error
    y, cotangent = outputs["y"], None
    if y.requires_grad and min(blocks.kinks, default=1) > 100 * torch.finfo(y.dtype).eps:
        cotangent = torch.randn(y.shape, dtype=torch.float64).to(y.dtype).double()
        outputs |= gradients(y, leaves, cotangent.to(y.dtype))
        want = {n: v for n, v in _expected(call, state, cotangent).items() if n in outputs}
    _check(outputs, want, [_expected(call, state, cotangent, rounding=True) for _ in range(3)])


def check_meta(call: Call) -> None:
    """Compare shape and dtype on the meta device with those on the CPU."""
    inputs = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in call.inputs.items()
    }
    real = _run(call, call.build() if call.is_module else None)[0]["y"]
    meta = Call(**{**vars(call), "inputs": inputs})
    found = _run(meta, meta.build(device="meta") if call.is_module else None)[0]["y"]
    if (found.shape, found.dtype, found.device.type) != (real.shape, real.dtype, "meta"):
        raise WrongError(
            f"on meta: {found.dtype} {list(found.shape)}, on the CPU {real.dtype} {list(real.shape)}"
        )


def _hostile_tensor(r: random.Random, tensor: Tensor) -> Any:
    """Return something that a caller could pass by mistake."""
    changes = (
        lambda: tensor[None], lambda: tensor[0], lambda: tensor[:0], lambda: tensor[..., :0], lambda: tensor.mT,
        lambda: torch.cat([tensor, tensor]), lambda: torch.cat([tensor, tensor], -1), lambda: tensor.to("meta"),
        lambda: tensor.long(), lambda: tensor.bool(), lambda: tensor.to(torch.complex64), lambda: tensor.double(),
        lambda: tensor.half(), lambda: tensor.to_sparse(), lambda: tensor.float().to_mkldnn(), lambda: tensor.tolist(),
        lambda: torch.nested.nested_tensor([tensor[0], tensor[0]]), lambda: tensor.numpy(), lambda: None,
        lambda: tensor * float("nan") if tensor.is_floating_point() else tensor - 10**6,
        lambda: 3.0, lambda: "x", lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        lambda: tensor.to(torch.float8_e4m3fn), lambda: torch.tensor(1.0), lambda: nn.Parameter(tensor),
    )  # fmt: skip
    try:
        return r.choice(changes)()
    except Exception:
        return r.choice((None, 3.0, "x", [1.0]))


def make_hostile(r: random.Random, call: Call) -> str:
    """Change one argument of a call, and return its name."""
    names = [*call.options, *[name for name in call.inputs if name != "w"]]
    name = r.choice(names)
    if name in call.options:
        call.options[name] = r.choice(_HOSTILE_VALUES)
    elif isinstance(call.inputs[name], Tensor):
        call.inputs[name] = _hostile_tensor(r, call.inputs[name])
    else:
        call.inputs[name] = torch.zeros(2, dtype=torch.int64)
    return name


def run_case(number: int, folder: Path | None = None) -> Outcome:
    """Run one call: three in ten are hostile, one in ten is on the meta device too."""
    call = draw_call(number)
    r = random.Random(f"hostile {number}")
    kind = r.choice("hhhmvvvvvv")
    if kind == "m" and call.is_module and not call.takes_dtype:
        kind = "v"
    changed = make_hostile(r, call) if kind == "h" else ""
    what = call.make.__name__

    def run() -> Outcome:
        given = {"changed": changed, **call.options, "dtype": call.dtype}
        try:
            (check_meta if kind == "m" else check_call)(call)
        except WrongError as error:
            return Outcome(
                "unclear" if "accepted" in str(error) else "wrong", what, f"{error}; {given}"[:600]
            )
        except Exception as error:
            clear = is_clear(error, _names(call))
            return Outcome(
                "clear" if clear else "unclear", what, "" if clear else f"{text_of(error)}; {given}"[:600]
            )
        return Outcome("right", what)

    return outcome_of(run, what)


CALLS = Campaign("calls", run_case, count=10_000, seconds=180, limit_s=20)
