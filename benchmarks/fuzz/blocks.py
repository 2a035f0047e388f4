"""Random calls of every block and functional form, and what each must return: plain torch in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sagan_layers
from sagan_layers import functional

Tensors = dict[str, Tensor]


@dataclass
class Call:
    """A module's construction and call, or a function's call.

    Attributes:
        make: the module's class, or the function.
        options: keywords of ``make`` that are no tensors.
        inputs: by the names that messages use; None for an optional one that is left out.
        oracle: takes options, state (float64) and inputs (float64); returns "y" and the buffers after the call.
        scale: of the weights.
    """

    make: Callable[..., Any]
    options: dict[str, Any]
    inputs: dict[str, Any]
    oracle: Callable[[Any, Tensors, Any], Tensors]
    dtype: torch.dtype = torch.float32
    training: bool = True
    scale: float = 1.0

    @property
    def is_module(self) -> bool:
        return isinstance(self.make, type)

    def build(self, **changes: Any) -> nn.Module:
        """Return the module with random parameters and buffers, none of them special."""
        module: nn.Module = self.make(
            **self.options, **({"dtype": self.dtype} if self.takes_dtype else {}), **changes
        )
        # Below eps u shrinks at each iteration, and soon float32 cannot hold it.
        clamps = self.options.get("eps_mode") == "clamp"
        scale = max(self.scale, 1e-6) if clamps else self.scale
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 2)
                elif tensor.is_floating_point():
                    tensor.normal_(std=scale if name.endswith("weight") else 1.0)
                    if name.endswith(("weight_u", "weight_v")):
                        tensor.div_(tensor.float().norm() + 1e-6)
        return module.train(self.training)

    @property
    def takes_dtype(self) -> bool:
        return self.is_module and "Loss" not in self.make.__name__ and "Penalty" not in self.make.__name__


# -- The oracles. `o` are the options, `s` the state, `i` the inputs.

# How close values came to a kink of a ReLU or a maximum, where a gradient jumps.
kinks: list[float] = []
# Relative error of some intermediate values, where exact ones would cancel.
noise = 0.0


def _noisy(x: Tensor) -> Tensor:
    if not noise:
        return x
    x = x * (1 + noise * torch.randn_like(x))
    if x.requires_grad:
        x.register_hook(lambda grad: grad * (1 + noise * torch.randn_like(grad)))  # type: ignore[no-untyped-call]
    return x


def _relu(x: Tensor) -> Tensor:
    kinks.append(
        float((x.detach().abs() / x.detach().abs().max().clamp_min(1e-300)).min()) if x.numel() else 1.0
    )
    return torch.relu(x)


def _pool(x: Tensor, size: int) -> Tensor:
    if size == 1:
        return x
    windows = x[..., : x.size(2) // size * size, : x.size(3) // size * size]
    windows = windows.unfold(2, size, size).unfold(3, size, size).flatten(-2)
    if windows.numel():
        largest = windows.detach().topk(2).values
        kinks.append(
            float((largest[..., 0] - largest[..., 1]).min() / x.detach().abs().max().clamp_min(1e-300))
        )
    return windows.amax(-1)


def _normalized(weight: Tensor, s: Tensors, o: Any, dim: int = 0, name: str = "") -> tuple[Tensor, Tensors]:
    """Return weight / sigma, and the vectors that a layer keeps."""
    u, v = s[f"{name}weight_u"], s[f"{name}weight_v"]
    matrix = weight.transpose(0, dim).flatten(1)
    eps, clamps = getattr(o, "eps", 1e-12), getattr(o, "eps_mode", "add") == "clamp"
    least = 0.0 if clamps else eps

    def unit(product: Tensor, otherwise: Tensor) -> Tensor:
        norm = product.norm()
        return product / (norm.clamp_min(eps) if clamps else norm + eps) if norm > least else otherwise

    with torch.no_grad():
        iterates = o.training or getattr(o, "iterate_when_frozen", True)
        for _ in range(getattr(o, "n_power_iterations", 1) if iterates else 0):
            if getattr(o, "iterate_from", "u") == "u":
                v = unit(matrix.T @ u, v)
                u = unit(matrix @ v, u)
            else:
                u = unit(matrix @ v, u)
                v = unit(matrix.T @ u, v)
    sigma = u @ matrix @ v
    kept = {f"{name}weight_u": u, f"{name}weight_v": v} if o.training else {}
    normalized = weight if sigma.abs() <= least else _noisy(_noisy(weight) / sigma)
    return normalized, {**kept, "sigma": sigma.detach()}


def _is_sn(o: Any) -> bool:
    return issubclass(o.make, sagan_layers.SpectralNormLayer)


def _weight(o: Any, s: Tensors, dim: int = 0) -> tuple[Tensor, Tensors]:
    if not _is_sn(o):
        return s["weight"], {}
    weight, kept = _normalized(s["weight"], s, o, dim)
    del kept["sigma"]
    return weight, kept


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, o: Any, up: int, down: int) -> Tensor:
    y = x if x.dim() == 4 else x[None]
    y = y.repeat_interleave(up, 2).repeat_interleave(up, 3)
    kernel, dilation = weight.shape[2:], _pair(o.dilation)
    if o.padding == "same":
        if _pair(getattr(o, "stride", 1)) != (1, 1):
            raise ValueError("same with a stride")
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in (1, 0)]
        sides = [side for total in totals for side in (total // 2, total - total // 2)]
    else:
        height, width = (0, 0) if o.padding == "valid" else _pair(o.padding)
        sides = [width, width, height, height]
    mode = getattr(o, "padding_mode", "zeros")
    y = F.pad(y, sides, "constant" if mode == "zeros" else mode)
    y = F.conv2d(y, weight, bias, _pair(getattr(o, "stride", 1)), 0, dilation, o.groups)
    y = y if down == 1 else F.avg_pool2d(y, down)
    if 0 in y.shape[-2:]:
        raise ValueError("an empty output")
    return y if x.dim() == 4 else y[0]


def _conv(o: Any, s: Tensors, i: Any) -> Tensors:
    weight, kept = _weight(o, s)
    return {"y": _convolved(i.input, weight, s.get("bias"), o, o.upsample, o.downsample), **kept}


def _transposed(o: Any, s: Tensors, i: Any) -> Tensors:
    weight, kept = _weight(o, s, 1)
    sizes = (_pair(o.stride), _pair(o.padding), _pair(o.output_padding), o.groups, _pair(o.dilation))
    return {"y": F.conv_transpose2d(i.input, weight, s.get("bias"), *sizes), **kept}


def _linear(o: Any, s: Tensors, i: Any) -> Tensors:
    weight, kept = _weight(o, s)
    return {"y": i.input @ weight.T + s.get("bias", 0), **kept}


def _embedding(o: Any, s: Tensors, i: Any) -> Tensors:
    weight, kept = _weight(o, s)
    if i.input.numel() and not 0 <= int(i.input.min()) <= int(i.input.max()) < o.num_embeddings:
        raise ValueError("range")
    return {"y": F.embedding(i.input, weight, o.padding_idx, scale_grad_by_freq=o.scale_grad_by_freq), **kept}


def _batch_normed(o: Any, x: Tensor, gain: Tensor, bias: Tensor, s: Any, momentum: Any) -> Tensors:
    mean, var = s.get("running_mean"), s.get("running_var")
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    kept: Tensors = {}
    if o.training or mean is None:
        count = x.numel() // x.size(1)
        if count < 2:
            raise ValueError("one value")
        if o.training and mean is not None:
            with torch.no_grad():
                correction = 0 if o.biased_running_var else 1
                kept["running_mean"] = torch.lerp(mean, x.mean(axes), momentum)
                kept["running_var"] = torch.lerp(var, x.var(axes, correction=correction), momentum)
        mean, var = x.mean(axes), x.var(axes, correction=0)
    gain, bias = (
        each.reshape(*(each.shape if each.dim() == 2 else [1, -1]), *[1] * (x.dim() - 2))
        for each in (gain, bias)
    )
    std = _noisy((_noisy(var.view(shape)) + o.eps).sqrt())
    y = _noisy(_noisy(x - _noisy(mean.view(shape))) / std) * gain + bias
    return {"y": y if o.activation is None else _relu(y), **kept}


def _norm_module(o: Any, s: Tensors, i: Any) -> Tensors:
    kept: Tensors = {}
    if getattr(o, "condition_features", None):
        gain, bias = (s[f"{name}_projection.weight"] for name in ("weight", "bias"))
        if o.spectral_norm:
            gain, kept_gain = _normalized(
                gain, s, SimpleNamespace(training=o.training), name="weight_projection."
            )
            bias, kept_bias = _normalized(
                bias, s, SimpleNamespace(training=o.training), name="bias_projection."
            )
            kept = {**kept_gain, **kept_bias}
            del kept["sigma"]
        gain, bias = 1 + i.condition @ gain.T, i.condition @ bias.T
    elif o.num_classes is not None:
        gain, bias = o.gain_offset + s["weight"][i.condition.long()], s["bias"][i.condition.long()]
    else:
        gain, bias = s["weight"], s["bias"]
    running = {name: s[f"norm.{name}"] for name in ("running_mean", "running_var") if f"norm.{name}" in s}
    found = _batch_normed(o, i.input, gain, bias, running, 1.0 if o.momentum is None else o.momentum)
    return kept | {name if name == "y" else f"norm.{name}": value for name, value in found.items()}


def _softmax(logits: Tensor) -> Tensor:
    powers = _noisy(torch.exp(_noisy(logits - logits.detach().amax(-1, keepdim=True))))
    return _noisy(powers / _noisy(powers.sum(-1, keepdim=True)))


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    return _softmax(scale * torch.einsum("nle,nse->nls", query, key)) @ value


def _self_attended(
    o: Any, x: Tensor, maps: dict[str, tuple[Tensor, Tensor | None] | None], gamma: Tensor
) -> Tensor:
    def project(name: str, features: Tensor) -> Tensor:
        found = maps[name]
        if found is None:
            return features
        y = torch.einsum("oc,nchw->nohw", found[0].flatten(1), features)
        return y if found[1] is None else y + found[1][:, None, None]

    query = project("query", x).flatten(2).mT
    key, value = (_pool(project(name, x), o.pool_size).flatten(2).mT for name in ("key", "value"))
    attended = _attended(query, key, value).mT
    gathered = gamma * project("out", attended.reshape(*attended.shape[:2], *x.shape[2:]))
    return x + gathered if o.residual else gathered


def _attention_module(o: Any, s: Tensors, i: Any) -> Tensors:
    kept: Tensors = {}
    maps: dict[str, tuple[Tensor, Tensor | None] | None] = {"out": None}
    for name in ("query", "key", "value", *(["out"] if o.output_projection else [])):
        weight = s[f"{name}.weight"]
        if o.spectral_norm:
            weight, vectors = _normalized(weight, s, o, name=f"{name}.")
            kept |= vectors
        maps[name] = weight, s.get(f"{name}.bias")
    kept.pop("sigma", None)
    return {"y": _self_attended(o, i.input, maps, s["gamma"]), **kept}


def _head(o: Any, s: Tensors, i: Any) -> Tensors:
    weights: Tensors = {}
    kept: Tensors = {}
    for name in ("linear", "embedding"):
        if f"{name}.weight" in s:
            weights[name] = s[f"{name}.weight"]
            if o.spectral_norm:
                weights[name], vectors = _normalized(weights[name], s, o, name=f"{name}.")
                kept |= vectors
    kept.pop("sigma", None)
    x = i.input if o.activation is None else _relu(i.input)
    features = x.sum((2, 3)) if o.pooling == "sum" else x.mean((2, 3))
    y = features @ weights["linear"].T + s["linear.bias"]
    if "embedding" in weights:
        y = y + (weights["embedding"][i.labels.long()] * features).sum(1, keepdim=True)
    return {"y": y, **kept}


def _loss(o: Any, s: Tensors, i: Any) -> Tensors:
    name = o.make.__name__.lower()
    if "generator" in name:
        return {"y": -i.fake_logits.mean()}
    real, fake = -i.real_logits, i.fake_logits
    if "hinge" in name:
        return {"y": _relu(1 + real).mean() + _relu(1 + fake).mean()}
    return {"y": (real.clamp_min(0) + (1 + (-real.abs()).exp()).log()).mean() + F.softplus(fake).mean()}


def _functional_norm(o: Any, s: Tensors, i: Any) -> Tensors:
    running = {
        name: getattr(i, name) for name in ("running_mean", "running_var") if getattr(i, name) is not None
    }
    return _batch_normed(o, i.x, i.gain, i.bias, running, o.momentum)


def _functional_attention(o: Any, s: Tensors, i: Any) -> Tensors:
    maps = {
        name: None
        if getattr(i, f"{name}_weight") is None
        else (getattr(i, f"{name}_weight"), getattr(i, f"{name}_bias"))
        for name in ("query", "key", "value", "out")
    }
    return {"y": _self_attended(o, i.x, maps, i.gamma.reshape(()))}


def _functional_spectral(o: Any, s: Tensors, i: Any) -> Tensors:
    o = SimpleNamespace(**vars(o) | {"training": True})
    weight, kept = _normalized(i.weight, {"weight_u": i.u, "weight_v": i.v}, o, o.dim)
    return {"y": weight, "sigma": kept["sigma"], "u": kept["weight_u"], "v": kept["weight_v"]}


def _attention(o: Any, s: Tensors, i: Any) -> Tensors:
    return {"y": _attended(i.query, i.key, i.value, o.scale)}


def _attention_weights(o: Any, s: Tensors, i: Any) -> Tensors:
    return {"y": _softmax(o.scale * (i.query @ i.key.mT))}


def _functional_resampling(o: Any, s: Tensors, i: Any) -> Tensors:
    factors = (o.factor, 1) if o.make is functional.upsample_conv2d else (1, o.factor)
    return {"y": _convolved(i.x, i.weight, i.bias, o, *factors)}


def _penalty(o: Any, s: Tensors, i: Any) -> Tensors:
    squares = ((1 - i.images.tanh() ** 2) * i.w).square().flatten(1).sum(1)
    return {"y": (squares.sqrt() - o.target).square().mean() if o.kind == "wgan-gp" else squares.mean()}


def gradients(y: Tensor, leaves: Tensors, weights: Tensor) -> Tensors:
    """Return the gradients of a weighted sum of y, zeros where it does not depend on a leaf."""
    found = torch.autograd.grad(y, [*leaves.values()], weights, allow_unused=True, materialize_grads=True)
    return {f"gradient of {name}": each.detach() for name, each in zip(leaves, found, strict=True)}


# -- The draws.


def _laid_out(r: random.Random, tensor: Tensor) -> Tensor:
    """Return the values in another place in memory; some of them repeated."""
    if tensor.dim() < 2:
        return tensor
    how = r.choice(("plain", "plain", "channels_last", "transposed", "inside", "stepped", "expanded"))
    if how == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "inside" and tensor.numel():
        large = tensor.new_full([size + 2 for size in tensor.shape], torch.nan)
        inner = large[tuple(slice(1, -1) for _ in tensor.shape)]
        return inner.copy_(tensor)
    if how == "stepped":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if how == "expanded" and tensor.size(0):
        return tensor[:1].expand_as(tensor)
    return tensor


def _tensor(r: random.Random, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return _laid_out(r, (torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


def _choose(r: random.Random, **choices: Any) -> dict[str, Any]:
    """Return one of the choices for each name."""
    return {name: r.choice(values) for name, values in choices.items()}


_YES_NO = (True, False)
_SPECTRAL: dict[str, Any] = {
    "n_power_iterations": (1, 1, 2, 5), "eps": (1e-12, 1e-12, 1e-4), "iterate_when_frozen": _YES_NO,
    "eps_mode": ("add", "clamp"), "iterate_from": ("u", "u", "v"),
}  # fmt: skip


def _convolution(r: random.Random) -> dict[str, Any]:
    o = _choose(
        r, in_channels=range(1, 5), out_channels=range(1, 5), kernel_size=(1, 2, 3, 3, 4, 5, (1, 3), (3, 2), (4, 1)),
        stride=(1,), padding=(0, 1, 1, 2, (0, 1), (2, 1)), dilation=(1, 1, 1, 2, (1, 2)), groups=(1, 1, 2, 3),
        bias=_YES_NO,
    )  # fmt: skip
    return o | {name: o[name] * o["groups"] for name in ("in_channels", "out_channels")}


def _extreme(r: random.Random, dtype: torch.dtype) -> float:
    return (
        10.0 ** r.randint(-18, 30) if dtype in (torch.float32, torch.bfloat16) and r.random() < 0.1 else 1.0
    )


def _shape(r: random.Random, *most: int) -> list[int]:
    return [r.randint(1, each) for each in most]


def _draw_conv(r: random.Random, dtype: torch.dtype) -> Call:
    make = r.choice((sagan_layers.SNConv2d, sagan_layers.SNConv2d, sagan_layers.ResamplingConv2d))
    o = _convolution(r) | {"upsample": 1, "downsample": 1, "backend": "auto"}
    o["padding_mode"] = r.choice(("zeros", "zeros", "reflect", "replicate", "circular"))
    if r.random() < 0.6:
        o[r.choice(("upsample", "downsample"))] = r.choice((2, 2, 3))
        o["backend"] = r.choice(("auto", "auto", "plain", "filtered", "folded", "matmul", "reordered"))
    else:
        o["stride"] = r.choice((1, 2, 3, (2, 1)))
    if r.random() < 0.2:
        o["padding"] = r.choice(("same", "valid"))
    normalized = make is sagan_layers.SNConv2d
    o |= _choose(r, **_SPECTRAL) if normalized else {}
    batch = [] if r.random() < 0.1 else _shape(r, 4)
    x = _tensor(r, dtype, *batch, o["in_channels"], *_shape(r, 9, 9))
    return Call(make, o, {"input": x}, _conv, scale=_extreme(r, dtype) if normalized else 1.0)


def _draw_transposed(r: random.Random, dtype: torch.dtype) -> Call:
    o = _convolution(r) | _choose(r, stride=(1, 2, 3), output_padding=(0, 0, 0, 1), **_SPECTRAL)
    x = _tensor(r, dtype, *_shape(r, 4), o["in_channels"], *_shape(r, 6, 6))
    return Call(sagan_layers.SNConvTranspose2d, o, {"input": x}, _transposed, scale=_extreme(r, dtype))


def _draw_linear(r: random.Random, dtype: torch.dtype) -> Call:
    o = _choose(r, in_features=range(1, 41), out_features=range(1, 21), bias=_YES_NO, **_SPECTRAL)
    x = _tensor(r, dtype, *_shape(r, *[4] * r.randint(0, 3)), o["in_features"])
    return Call(sagan_layers.SNLinear, o, {"input": x}, _linear, scale=_extreme(r, dtype))


def _draw_embedding(r: random.Random, dtype: torch.dtype) -> Call:
    o = _choose(
        r, num_embeddings=range(1, 31), embedding_dim=range(1, 21), scale_grad_by_freq=_YES_NO, **_SPECTRAL
    )
    o["padding_idx"] = r.choice((None, None, r.randrange(o["num_embeddings"])))
    kind = r.choice((torch.int64, torch.int32))
    labels = torch.randint(o["num_embeddings"], _shape(r, *[4] * r.randint(0, 3)), dtype=kind)
    return Call(sagan_layers.SNEmbedding, o, {"input": labels}, _embedding, scale=_extreme(r, dtype))


def _draw_norm(r: random.Random, dtype: torch.dtype) -> Call:
    o = _choose(
        r, num_features=range(1, 10), num_classes=(None, None, 1, 5, 9), condition_features=(None, 1, 6),
        eps=(1e-5, 1e-4), momentum=(0.1, 1.0, 0.0, None), track_running_stats=(True, True, False),
        spectral_norm=_YES_NO, biased_running_var=_YES_NO, activation=(None, "relu"),
        backend=("auto", "auto", "blocked", "reference"), gain_offset=(0.0, 1.0),
    )  # fmt: skip
    if o["num_classes"] is not None:
        o["condition_features"] = None
    else:
        o["gain_offset"] = 0.0
    o["spectral_norm"] &= o["condition_features"] is not None
    (batch,) = _shape(r, 5)
    x = _tensor(r, dtype, batch, o["num_features"], *_shape(r, 6, 6), scale=_extreme(r, dtype))
    condition: Any = None
    if o["num_classes"] is not None:
        condition = torch.randint(o["num_classes"], (batch,), dtype=r.choice((torch.int64, torch.int32)))
    elif o["condition_features"] is not None:
        condition = _tensor(r, dtype, batch, o["condition_features"])
    inputs = {"input": x + r.choice((0, 0, 0, 30)), "condition": condition}
    return Call(sagan_layers.ConditionalBatchNorm2d, o, inputs, _norm_module)


def _draw_attention(r: random.Random, dtype: torch.dtype) -> Call:
    o = _choose(
        r, in_channels=range(1, 21), key_channels=(None, 1, 3, 5), value_channels=(None, 1, 4, 7),
        pool_size=(1, 2, 2, 3), output_projection=(True, True, False), bias=_YES_NO, spectral_norm=_YES_NO,
        residual=_YES_NO, n_power_iterations=(1, 2), eps=(1e-12,),
        backend=("auto", "auto", "composed", "reference", "chunked", "sdpa"),
    )  # fmt: skip
    o["value_channels"] = o["value_channels"] if o["output_projection"] else None
    sides = [r.randint(o["pool_size"], 9) for _ in range(2)]
    x = _tensor(r, dtype, *_shape(r, 3), o["in_channels"], *sides)
    return Call(sagan_layers.SelfAttention2d, o, {"input": x}, _attention_module)


def _draw_head(r: random.Random, dtype: torch.dtype) -> Call:
    choices = {"num_classes": (None, 1, 9), "pooling": ("sum", "mean"), "spectral_norm": _YES_NO}
    o = _choose(r, in_channels=range(1, 21), activation=("relu", None), **choices)
    (batch,) = _shape(r, 5)
    x = _tensor(r, dtype, batch, o["in_channels"], *_shape(r, 6, 6))
    labels = None if o["num_classes"] is None else torch.randint(o["num_classes"], (batch,))
    return Call(sagan_layers.ProjectionDiscriminatorHead, o, {"input": x, "labels": labels}, _head)


def _draw_loss(r: random.Random, dtype: torch.dtype) -> Call:
    kind, network = r.choice(("Hinge", "Softplus")), r.choice(("Generator", "Discriminator"))
    name = r.choice((f"{kind}{network}Loss", f"{kind.lower()}_{network.lower()}_loss"))
    names = ["fake_logits"] if network == "Generator" else ["real_logits", "fake_logits"]
    inputs = {each: _tensor(r, dtype, *_shape(r, 9, 3), scale=3) for each in names}
    return Call(getattr(sagan_layers, name), {}, inputs, _loss)


def _draw_functional_norm(r: random.Random, dtype: torch.dtype) -> Call:
    batch, channels = _shape(r, 5, 9)
    o = _choose(
        r, training=_YES_NO, momentum=(0.1, 0.7), eps=(1e-5,), biased_running_var=_YES_NO, activation=(None, "relu"),
        backend=("auto", "blocked", "reference"),
    )  # fmt: skip
    rest = _shape(r, *[6] * r.randint(0, 3))
    inputs: dict[str, Any] = {"x": _tensor(r, dtype, batch, channels, *rest, scale=_extreme(r, dtype))}
    shape = r.choice(((channels,), (batch, channels)))
    inputs |= {name: _tensor(r, dtype, *shape) for name in ("gain", "bias")}
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    running = torch.randn(2, channels, dtype=kept).unbind() if r.random() < 0.7 else (None, None)
    inputs |= {"running_mean": running[0], "running_var": None if running[1] is None else running[1].exp()}
    return Call(functional.conditional_batch_norm, o, inputs, _functional_norm, training=o["training"])


def _draw_functional_attention(r: random.Random, dtype: torch.dtype) -> Call:
    batch, queries, keys, width, values = _shape(r, 3, 20, 20, 9, 9)
    tensors = {
        "query": _tensor(r, dtype, batch, queries, width),
        "key": _tensor(r, dtype, batch, keys, width),
    }
    o = _choose(r, scale=(1.0, 0.5, -1.0, 0.0, 3))
    if r.random() < 0.3:
        return Call(functional.attention_weights, o, tensors, _attention_weights)
    o |= _choose(r, backend=("auto", "reference", "chunked", "sdpa"))
    tensors["value"] = _tensor(r, dtype, batch, keys, values)
    return Call(functional.attention, o, tensors, _attention)


def _draw_functional_block(r: random.Random, dtype: torch.dtype) -> Call:
    o = _choose(
        r, pool_size=(1, 2), residual=_YES_NO, backend=("auto", "composed", "reference", "chunked", "sdpa")
    )
    C, E, Ev = _shape(r, 9, 5, 9)
    has_out = r.random() < 0.7
    rows = {"query": (E, C), "key": (E, C), "value": (Ev if has_out else C, C), "out": (C, Ev)}
    ends = r.choice(((), (1, 1)))
    sides = [r.randint(o["pool_size"], 7) for _ in range(2)]
    inputs: dict[str, Any] = {"x": _tensor(r, dtype, *_shape(r, 3), C, *sides)}
    for name, shape in rows.items():
        inputs[f"{name}_weight"] = _tensor(r, dtype, *shape, *ends, scale=0.5)
    inputs["gamma"] = torch.tensor(0.7, dtype=dtype)
    for name, shape in rows.items():
        inputs[f"{name}_bias"] = torch.randn(shape[0]).to(dtype) if r.random() < 0.3 else None
    if not has_out:
        inputs |= {"out_weight": None, "out_bias": None}
    return Call(functional.self_attention_2d, o, inputs, _functional_attention)


def _draw_functional_resampling(r: random.Random, dtype: torch.dtype) -> Call:
    o = _convolution(r)
    channels, out, kernel = (o.pop(name) for name in ("in_channels", "out_channels", "kernel_size"))
    bias = torch.randn(out).to(dtype) if o.pop("bias") else None
    del o["stride"]
    o |= _choose(
        r, factor=(1, 2, 2, 3), backend=("auto", "plain", "filtered", "folded", "matmul", "reordered")
    )
    x = _tensor(r, dtype, *_shape(r, 3), channels, *_shape(r, 8, 8))
    weight = _tensor(r, dtype, out, channels // o["groups"], *_pair(kernel))
    make = r.choice((functional.upsample_conv2d, functional.conv2d_downsample))
    return Call(make, o, {"x": x, "weight": weight, "bias": bias}, _functional_resampling)


def _draw_functional_spectral(r: random.Random, dtype: torch.dtype) -> Call:
    options = {"eps": (1e-12,), "eps_mode": ("add", "clamp"), "iterate_from": ("u", "v")}
    o = _choose(r, dim=(0, 1), n_power_iterations=(0, 1, 3), **options)
    scale = _extreme(r, dtype) if o["eps_mode"] == "add" else 1.0
    weight = _tensor(r, dtype, *_shape(r, *[9] * r.randint(2, 4)), scale=scale)
    outputs = weight.size(o["dim"])
    u, v = torch.randn(outputs).to(dtype), torch.randn(weight.numel() // outputs).to(dtype)
    return Call(functional.spectral_normalize, o, {"weight": weight, "u": u, "v": v}, _functional_spectral)


def gradient_penalty(images: Any, w: Tensor, kind: str, target: float) -> Any:
    """Return the penalty of D(x) = sum(w tanh(x))."""
    is_tensor = isinstance(images, Tensor)
    if is_tensor and images.is_floating_point() and not images.requires_grad:
        images = images.requires_grad_()
    try:
        logits = (images.tanh() * w).sum((1, 2, 3))
    except Exception:  # no images for this D
        logits = w
    return sagan_layers.GradientPenalty(kind, target)(logits=logits, images=images)


def _draw_penalty(r: random.Random, dtype: torch.dtype) -> Call:
    inputs = {"images": _tensor(r, dtype, *_shape(r, 4), 2, 3, 3), "w": _tensor(r, dtype, 2, 3, 3)}
    o = _choose(r, kind=("r1", "r2", "wgan-gp"), target=(1.0, 0.0))
    return Call(gradient_penalty, o, inputs, _penalty)


MODULES = (
    _draw_conv, _draw_conv, _draw_transposed, _draw_linear, _draw_embedding, _draw_norm, _draw_norm, _draw_attention,
    _draw_attention, _draw_head,
)  # fmt: skip
FUNCTIONS = (
    _draw_loss, _draw_functional_norm, _draw_functional_attention, _draw_functional_block, _draw_functional_resampling,
    _draw_functional_spectral, _draw_penalty,
)  # fmt: skip
_DTYPES = (*[torch.float32] * 4, torch.float64, torch.float64, torch.bfloat16, torch.float16)


def draw_call(
    number: int, draws: Any = MODULES + FUNCTIONS, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> Call:
    """Return the call of a case."""
    r = random.Random(number)
    torch.manual_seed(number)
    dtype = r.choice(dtypes)
    call: Call = draws[number % len(draws)](r, dtype)
    call.dtype = dtype
    if call.is_module:
        call.training = r.random() < 0.7
    return call
