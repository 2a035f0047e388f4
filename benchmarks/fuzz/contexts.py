"""Blocks inside other people's code, against the plain call of the same block."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrize, prune

import sagan_layers
from benchmarks.fuzz import blocks
from benchmarks.fuzz.blocks import Call, Tensors, draw_call, gradients
from benchmarks.fuzz.calls import is_raised_by_us
from benchmarks.fuzz.outcomes import Campaign, Outcome, WrongError, outcome_of, text_of

Inputs = tuple[Any, ...]
Context = Callable[[nn.Module, Inputs, Call], Tensors]
_CLOSE, _EXACT = 1e-4, 1e-6


def results(module: nn.Module, inputs: Inputs, run: Callable[..., Tensor] | None = None) -> Tensors:
    """Return the output, the gradients of a fixed function of it, and the buffers afterwards."""
    leaves: Tensors = {name: p for name, p in module.named_parameters() if p.requires_grad}
    given = list(inputs)
    for place, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[f"input {place}"] = given[place] = value.detach().requires_grad_()
    y = (module if run is None else run)(*given)
    found = gradients(y, leaves, cotangent(y))
    return {"y": y.detach(), **found, **{f"buffer {n}": b.clone() for n, b in module.named_buffers()}}


def cotangent(y: Tensor) -> Tensor:
    """Return weights of an output's entries, so that their weighted sum is a telling loss."""
    places = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape)
    return torch.sin(1 + 1.7 * places).to(y.dtype)


def compare(found: Tensors, want: Tensors, tolerance: float) -> None:
    """Raise WrongError unless what was found is what the plain call gave."""
    # Some gradients are zero but for the rounding of the others.
    largest = max((float(g.abs().max()) for n, g in want.items() if "gradient" in n and g.numel()), default=0)
    for name, ours in found.items():
        expected = want[name].double()
        off = (ours.detach().double() - expected).abs()
        size = largest if "gradient" in name else float(expected.abs().max()) if expected.numel() else 0
        allowed = tolerance * size + tolerance
        if ours.shape != expected.shape or not bool((off <= allowed).all()):
            detail = (
                f"off by {off.max():.3g}" if ours.shape == expected.shape else f"shape {list(ours.shape)}"
            )
            raise WrongError(f"{name}: {detail}, expected {expected.flatten()[:3].tolist()}")


def _samples(inputs: Inputs, module: nn.Module) -> list[Tensor] | None:
    """Return the inputs if their first axis is the batch's, and samples do not depend on each other."""
    if isinstance(module, sagan_layers.ConditionalBatchNorm2d) and module.norm.running_mean is None:
        return None
    tensors = [value for value in inputs if value is not None]
    least = (
        4
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        else 2
        if isinstance(module, nn.Linear)
        else 1
    )
    return tensors if tensors[0].dim() >= least else None


def _state(module: nn.Module) -> Tensors:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _autocast(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    with torch.autocast("cpu", torch.bfloat16):
        return {"y": results(m, x)["y"]}


def _in(make: Callable[[nn.Module], Any], *, gradients: bool = True) -> Context:
    """Return a context in which the call runs."""

    def run(m: nn.Module, x: Inputs, call: Call) -> Tensors:
        with make(m):
            return results(m, x) if gradients else {"y": m(*x).clone()}

    return run


def _vmap(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    if (samples := _samples(x, m)) is None:
        return {"y": m(*x)}
    return {"y": torch.vmap(lambda *one: m(*[each[None] for each in one])[0])(*samples)}


def _parameters(m: nn.Module) -> Tensors:
    return {name: p.detach() for name, p in m.named_parameters()}


def _per_sample_gradients(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    """Compare the sum of per-sample gradients with the gradient of the batch."""
    if (samples := _samples(x, m)) is None:
        return {"y": m(*x)}

    def loss(parameters: Tensors, *one: Tensor) -> Any:
        y = torch.func.functional_call(m, parameters, tuple(each[None] for each in one))
        return y.square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, *[0] * len(samples)))(_parameters(m), *samples)
    y = m(*x)
    want = gradients(y, dict(m.named_parameters()), 2 * y.detach())
    compare({f"gradient of {name}": value.sum(0) for name, value in each.items()}, want, _CLOSE)
    return {"y": y}


def _func_grad(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    def loss(parameters: Tensors) -> Any:
        y = torch.func.functional_call(m, parameters, x)
        return (y * cotangent(y)).sum()

    found = torch.func.grad(loss)(_parameters(m))
    return {f"gradient of {name}": value for name, value in found.items()}


def _jacrev(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    weights = cotangent(m(*x))
    found = torch.func.jacrev(lambda p: torch.func.functional_call(m, p, x))(_parameters(m))
    return {f"gradient of {n}": torch.tensordot(weights, j, weights.dim()) for n, j in found.items()}


def _forward_mode(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    parameters = _parameters(m)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    along: Any = torch.func.jvp(lambda p: torch.func.functional_call(m, p, x), (parameters,), (tangents,))
    plain = results(m, x)
    want = sum(((plain[f"gradient of {n}"] * t).sum() for n, t in tangents.items()), torch.zeros(()))
    if call.options.get("padding_idx") is not None:  # torch leaves out that row in reverse mode only
        return {"y": plain["y"]}
    compare({"jvp": (along[1] * cotangent(along[1])).sum()}, {"jvp": want}, 1e-3)
    return {"y": plain["y"]}


def _threads(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda each: results(each, x), [copy.deepcopy(m) for _ in range(4)])]
    for each in found:
        compare(each, found[0], _EXACT)
    return found[0]


class Subclass(Tensor):
    """A tensor of another class."""


def _subclass(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    found = results(m, tuple(value if value is None else value.as_subclass(Subclass) for value in x))
    if not isinstance(found["y"], Subclass) and isinstance(x[0], Tensor) and x[0].is_floating_point():
        raise WrongError("the output is a plain tensor")
    return {name: value.as_subclass(Tensor) for name, value in found.items()}


def _state_dict(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other = call.build()
    other.load_state_dict(torch.load(file, weights_only=True))
    return results(other, x)


def _meta(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    other = call.build(device="meta").to_empty(device="cpu")
    other.load_state_dict(m.state_dict())
    return results(other, x)


def _trace(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    given = tuple(value for value in x if value is not None)
    traced = torch.jit.trace(m, given)  # type: ignore[no-untyped-call]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return {"y": torch.jit.load(file)(*given)}  # type: ignore[no-untyped-call]


def _compile(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    torch.compiler.reset()
    return results(m, x, torch.compile(m, backend="eager", fullgraph=True))


def _double_backward(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    def second(module: nn.Module, inputs: Inputs) -> Tensors:
        leaves = [*module.parameters()]
        y = module(*inputs)
        loss = (y * cotangent(y)).sum() + y.square().sum()
        options: Any = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(loss, leaves, create_graph=True, **options)
        total = torch.stack([g.square().sum() for g in first]).sum()
        # One vector, because some are zero but for the rounding of the others.
        return {"all": torch.cat([g.flatten() for g in torch.autograd.grad(total, leaves, **options)])}

    wide = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in x)
    compare(second(copy.deepcopy(m), x), second(m.double(), wide), 2e-3)
    return {}


def _batched_gradients(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    y, leaves = m(*x), dict(m.named_parameters())
    many = torch.stack([cotangent(y), 2 * cotangent(y)])
    options: Any = {"allow_unused": True, "materialize_grads": True, "is_grads_batched": True}
    found = dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], many, **options), strict=True))
    compare({n: g[1] for n, g in found.items()}, {n: 2 * g[0] for n, g in found.items()}, _CLOSE)
    return {f"gradient of {n}": g[0] for n, g in found.items()}


def _averaged(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    average = torch.optim.swa_utils.AveragedModel(m, use_buffers=True)
    average.update_parameters(m)
    return {"y": average.train(call.training)(*x)}


def _dcgan(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    def initialise(layer: Any) -> None:
        name = type(layer).__name__
        if "Conv" in name and hasattr(layer, "weight"):
            nn.init.normal_(layer.weight.data, 0.0, 0.02)
        elif "BatchNorm" in name:
            nn.init.normal_(layer.weight.data, 1.0, 0.02)
            nn.init.constant_(layer.bias.data, 0)

    m.apply(initialise)
    plain_gains = not call.options.get(
        "spectral_norm"
    )  # a normalised projection has sigma 1, whatever was drawn
    if isinstance(m, sagan_layers.ConditionalBatchNorm2d) and m.activation is None and plain_gains:
        # With gains around 1 and biases of 0, the unconditional part normalises.
        m.train()
        plain = nn.functional.batch_norm(x[0], None, None, training=True, eps=m.eps)
        compare({"normalised": m(*x)}, {"normalised": plain}, 0.5)
    if not all(value.isfinite().all() for value in results(m, x).values()):
        raise WrongError("not finite")
    return {}


def _converted(dtype: torch.dtype) -> Context:
    def run(m: nn.Module, x: Inputs, call: Call) -> Tensors:
        given = (v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in x)
        y = m.to(dtype)(*given)
        if y.dtype != dtype:
            raise WrongError(f"expected {dtype}, got {y.dtype}")
        return {"y": y.detach()}

    return run


def _channels_last(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    if x[0].dim() != 4:
        return results(m, x)
    m = m.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return results(m, (x[0].contiguous(memory_format=torch.channels_last), *x[1:]))


class _Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.0


def _with_weights(change: Callable[[nn.Module], Any]) -> Context:
    """Return a context that changes how every layer gets its weight, not what it is."""

    def run(m: nn.Module, x: Inputs, call: Call) -> Tensors:
        # Not the table of a batch norm with gain_offset: its weight shows gains.
        for layer in [each for each in m.modules() if "weight" in each._parameters]:
            if isinstance(layer.weight, nn.Parameter):
                change(layer)
        return {"y": results(m, x)["y"]}

    return run


def _shared(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    with sagan_layers.shared_spectral_norm(m):
        found = results(m, x)
        if not isinstance(m, sagan_layers.ConditionalBatchNorm2d):
            compare({"y": m(*x)}, found, 1e-6)
    return found


def _fused(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    if not isinstance(m, nn.Conv2d):
        return {"y": m(*x)}
    norm = nn.BatchNorm2d(m.out_channels, dtype=m.weight.dtype).eval()
    norm.running_mean = torch.randn(m.out_channels, dtype=m.weight.dtype)
    inputs = (x[0] if x[0].dim() == 4 else x[0][None],)
    want = {"y": norm(m(*inputs))}
    compare({"y": fusion.fuse_conv_bn_eval(m, norm)(*inputs)}, want, 1e-4)
    return {}


def _hooked(m: nn.Module, x: Inputs, call: Call) -> Tensors:
    for layer in m.modules():
        layer.register_forward_hook(lambda _, __, y: y * 1.0)
        layer.register_full_backward_hook(lambda *_: None)
    return results(m, x)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXT_TABLE: dict[str, Context] = {
    "autocast": _autocast,
    "inference_mode": _in(lambda m: torch.inference_mode(), gradients=False),
    "no_grad": _in(lambda m: torch.no_grad(), gradients=False),
    "default device": _in(lambda m: torch.device("cpu")),
    "default dtype": _in(lambda m: _default_dtype()),
    "anomaly mode": _in(lambda m: torch.autograd.set_detect_anomaly(True)),
    "force_backend": _in(lambda m: sagan_layers.functional.force_backend("reference")),
    "vmap": _vmap,
    "per-sample gradients": _per_sample_gradients,
    "func.grad in training": _func_grad,
    "func.grad": _func_grad,
    "jacrev": _jacrev,
    "forward mode": _forward_mode,
    "functional_call": lambda m, x, _: {"y": torch.func.functional_call(m, _state(copy.deepcopy(m)), x)},
    "threads": _threads,
    "subclass": _subclass,
    "deepcopy": lambda m, x, _: results(copy.deepcopy(m), x),
    "pickle": lambda m, x, _: results(pickle.loads(pickle.dumps(m)), x),
    "state_dict": _state_dict,
    "share_memory": lambda m, x, _: results(m.share_memory(), x),
    "jit.trace": _trace,
    "compile": _compile,
    "export": lambda m, x, _: {"y": torch.export.export(m, x).module()(*x)},
    "checkpointed": lambda m, x, _: results(m, x, lambda *given: sagan_layers.checkpointed(m, *given)),
    "double backward": _double_backward,
    "batched gradients": _batched_gradients,
    "AveragedModel": _averaged,
    "DataParallel": lambda m, x, _: results(m, x, nn.DataParallel(m)),
    "meta, to_empty": _meta,
    "DCGAN init": _dcgan,
    "half": _converted(torch.float16),
    "bfloat16": _converted(torch.bfloat16),
    "channels_last": _channels_last,
    "parametrize": _with_weights(lambda m: parametrize.register_parametrization(m, "weight", _Same())),
    "prune": _with_weights(lambda m: prune.Identity.apply(m, "weight")),  # type: ignore[no-untyped-call]
    "shared_spectral_norm": _shared,
    "frozen_spectral_norm": _in(sagan_layers.frozen_spectral_norm),
    "remove_spectral_norm": lambda m, x, _: {"y": sagan_layers.remove_spectral_norm(m)(*x)},
    "hooks": _hooked,
    "fuse_conv_bn_eval": _fused,
}
_IN_EVALUATION = {
    "vmap", "per-sample gradients", "func.grad", "jacrev", "forward mode", "jit.trace", "export",
    "frozen_spectral_norm", "remove_spectral_norm", "fuse_conv_bn_eval",
}  # fmt: skip
_TOLERANCES = {"autocast": 0.3, "half": 0.3, "bfloat16": 0.3, "deepcopy": _EXACT, "pickle": _EXACT}


def _draw(number: int, evaluation: bool) -> tuple[Call, nn.Module, Tensors]:
    """Return a block whose plain call works, and what that gives."""
    for attempt in range(100):
        dtypes = torch.float32, torch.float32, torch.float64
        call = draw_call(number + 7919 * attempt, blocks.MODULES, dtypes)
        call.scale, call.training = 1.0, call.training and not evaluation
        if call.options.get("scale_grad_by_freq"):  # its gradient is no derivative
            continue
        try:
            module = call.build()
            want = results(copy.deepcopy(module), tuple(call.inputs.values()))
        except Exception:  # an invalid call, which is the other campaign's matter, as extreme values are
            continue
        if all(value.isfinite().all() and value.abs().sum() < 1e9 for value in want.values()):
            return call, module, want
    raise AssertionError("no valid call")


def run_case(number: int, folder: Path | None = None) -> Outcome:
    """Run one block in one context."""
    name = [*CONTEXT_TABLE][number % len(CONTEXT_TABLE)]
    call, module, want = _draw(random.Random(number).randrange(10**9), name in _IN_EVALUATION)

    def run() -> Outcome:
        inputs = tuple(call.inputs.values())
        shapes = [list(value.shape) for value in inputs if value is not None]
        given = f"{call.make.__name__}, training {call.training}, {call.options}, inputs {shapes}"
        try:
            compare(CONTEXT_TABLE[name](module, inputs, call), want, _TOLERANCES.get(name, _CLOSE))
        except WrongError as error:
            return Outcome("wrong", name, f"{error}; {given}"[:600])
        except Exception as error:
            clear = is_raised_by_us(error) and isinstance(error, (ValueError, TypeError, RuntimeError))
            return Outcome("clear" if clear else "unclear", name, f"{text_of(error)}; {given}"[:600])
        return Outcome("right", name)

    return outcome_of(run, name)


CONTEXTS = Campaign("contexts", run_case, count=1_000, seconds=120, limit_s=60)
