"""The forward passes of a GAN's two updates, as modules that compile and that DistributedDataParallel can wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sagan_layers.checks import (
    check_floating,
    check_module,
    check_same_device,
    check_type,
    is_dense,
    kind_of,
    named_parts,
    shape_of,
)
from sagan_layers.gan.losses import hinge_discriminator_loss, hinge_generator_loss


class DiscriminatorResult(NamedTuple):
    """What :class:`DiscriminatorPass` returns.

    Attributes:
        loss: a scalar, to call ``backward`` on.
        real_logits: the discriminator's output for the real images; a list of tensors if it returned several.
        fake_logits: its output for the generated images.

    Example:
        >>> result = DiscriminatorPass(nn.Linear(4, 6), nn.Linear(6, 1))(torch.randn(8, 6), torch.randn(8, 4))
        >>> result.real_logits.shape, result.fake_logits.shape
        (torch.Size([8, 1]), torch.Size([8, 1]))
    """

    loss: Tensor
    real_logits: Any
    fake_logits: Any


class GeneratorResult(NamedTuple):
    """What :class:`GeneratorPass` returns.

    Attributes:
        loss: a scalar, to call ``backward`` on.
        fake_logits: the discriminator's output for the generated images.

    Example:
        >>> GeneratorPass(nn.Linear(4, 6), nn.Linear(6, 1))(torch.randn(8, 4)).fake_logits.shape
        torch.Size([8, 1])
    """

    loss: Tensor
    fake_logits: Any


def call_with_constant_parameters(module: nn.Module, *inputs: Any) -> Any:
    """Return ``module(*inputs)`` with its parameters as constants: only the inputs get gradients.

    The same as setting ``requires_grad`` to False and back, but the module does not change, so nothing is compiled
    again. Buffers are updated as usual.

    Args:
        module: any module.
        inputs: its arguments.

    Example:
        >>> critic, x = nn.Linear(4, 1), torch.randn(2, 4, requires_grad=True)
        >>> call_with_constant_parameters(critic, x).sum().backward()
        >>> x.grad is None, critic.weight.grad is None
        (False, True)
    """
    check_module("module", module)
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, inputs)


class DiscriminatorPass(nn.Module):
    r"""The forward pass of a discriminator's update: generated and real images in one batch, and the loss.

    The generator runs in its current mode and without a graph. Real and generated images go through the discriminator
    together, so spectral normalisation iterates once for both.

    Only the discriminator is a submodule: ``DistributedDataParallel(DiscriminatorPass(...))`` reduces no gradients of
    the generator, and ``.compile(fullgraph=True)`` makes one graph of the whole pass.

    Args:
        generator: called as ``generator(latents)``, or ``generator(latents, labels)`` when labels are given.
        discriminator: called as ``discriminator(images)`` or ``discriminator(images, labels)``; returns logits, or a
            list or tuple of them, one for each scale.
        loss: takes the keywords ``real_logits`` and ``fake_logits``.

    Shape:
        - real: [N, C, H, W]; latents: [M, ...], from which the generator makes [M, C, H, W].
        - real_labels: [N], fake_labels: [M]; both or neither.

    Raises:
        ValueError: if there are labels for one kind of images only.
        TypeError: if the discriminator returns anything but a tensor or a list or tuple of tensors (of its scales).

    Example:
        >>> generator, discriminator = nn.Linear(4, 6), nn.Linear(6, 1)
        >>> update = DiscriminatorPass(generator, discriminator)
        >>> result = update(torch.randn(8, 6), torch.randn(8, 4))
        >>> result.loss.backward()
        >>> generator.weight.grad is None, discriminator.weight.grad is None
        (True, False)
    """

    calls_another_network = True  # that is not a submodule

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: Callable[..., Tensor] = hinge_discriminator_loss,
    ) -> None:
        super().__init__()
        _check_parts(generator, discriminator, loss)
        self.discriminator = discriminator
        self._generator = (generator,)  # in a tuple, so that it is not a submodule
        self._loss = loss

    def forward(
        self,
        real: Tensor,
        latents: Tensor,
        real_labels: Tensor | None = None,
        fake_labels: Tensor | None = None,
    ) -> DiscriminatorResult:
        """Return loss and logits for real images and for those generated from ``latents``."""
        if (real_labels is None) != (fake_labels is None):
            raise ValueError("real_labels, fake_labels: expected both or neither, got one")
        for name, labels in (("real_labels", real_labels), ("fake_labels", fake_labels)):
            if labels is not None and not isinstance(labels, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {kind_of(labels)}")
        (generator,) = self._generator
        with torch.no_grad():
            fake = generator(latents) if fake_labels is None else generator(latents, fake_labels)
        check_floating("real", real)
        check_floating("generator: output", fake)
        check_same_device("generator: output", fake, "the real images", real)
        if fake.shape[1:] != real.shape[1:]:
            raise ValueError(
                f"generator: expected images like the real ones, {shape_of(real)}, got {shape_of(fake)}"
            )
        images = torch.cat([real, fake.to(real.dtype)])
        if real_labels is None or fake_labels is None:
            logits = self.discriminator(images)
        else:
            logits = self.discriminator(images, torch.cat([real_labels, fake_labels]))
        parts = named_parts("logits", logits)
        for name, part in parts.items():
            if not isinstance(part, Tensor) or not is_dense(part):
                raise TypeError(
                    f"discriminator: expected a tensor of logits or a list of them, got {name} of type "
                    f"{kind_of(part)}; return such, or write your own update"
                )
            if part.shape[:1] != images.shape[:1]:
                raise ValueError(
                    f"discriminator: expected {name} for {len(images)} images, got {shape_of(part)}"
                )
        halves = (torch.split(part, [len(real), len(fake)]) for part in parts.values())
        real_logits, fake_logits = ([*half] for half in zip(*halves, strict=True))
        if isinstance(logits, Tensor):
            (real_logits,), (fake_logits,) = real_logits, fake_logits
        return DiscriminatorResult(
            self._loss(real_logits=real_logits, fake_logits=fake_logits), real_logits, fake_logits
        )


class GeneratorPass(nn.Module):
    r"""The forward pass of a generator's update: generated images, their logits, and the loss.

    The discriminator's parameters are constants of this pass: its weights get no gradients that would have to be
    cleared, and ``requires_grad`` does not change. Only the generator is a submodule.

    Args:
        generator: called as ``generator(latents)``, or ``generator(latents, labels)`` when labels are given.
        discriminator: called as ``discriminator(images)`` or ``discriminator(images, labels)``.
        loss: takes the keyword ``fake_logits``.

    Shape:
        - latents: [M, ...]; labels: [M] or None.

    Example:
        >>> generator, discriminator = nn.Linear(4, 6), nn.Linear(6, 1)
        >>> update = GeneratorPass(generator, discriminator)
        >>> update(torch.randn(8, 4)).loss.backward()
        >>> generator.weight.grad is None, discriminator.weight.grad is None
        (False, True)
    """

    calls_another_network = True  # that is not a submodule

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: Callable[..., Tensor] = hinge_generator_loss,
    ) -> None:
        super().__init__()
        _check_parts(generator, discriminator, loss)
        self.generator = generator
        self._discriminator = (discriminator,)
        self._loss = loss

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> GeneratorResult:
        """Return the loss and the logits of the images generated from ``latents``."""
        (discriminator,) = self._discriminator
        if labels is None:
            logits = call_with_constant_parameters(discriminator, self.generator(latents))
        else:
            logits = call_with_constant_parameters(discriminator, self.generator(latents, labels), labels)
        return GeneratorResult(self._loss(fake_logits=logits), logits)


def _check_parts(generator: object, discriminator: object, loss: object) -> None:
    check_module("generator", generator)
    check_module("discriminator", discriminator)
    check_type("loss", loss, Callable, "a function")  # type: ignore[arg-type]
