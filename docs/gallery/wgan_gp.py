"""WGAN-GP: a critic without batch norm, and the usual gradient penalty."""

import torch
from torch import nn

from sagan_layers import SelfAttention2d, shared_spectral_norm

generator = nn.Sequential(
    nn.Linear(16, 8 * 8 * 8),
    nn.Unflatten(1, (8, 8, 8)),
    nn.ReLU(),
    nn.ConvTranspose2d(8, 3, 4, 2, 1),
)

# recipe
critic = nn.Sequential(
    nn.Conv2d(3, 16, 4, 2, 1),
    nn.LeakyReLU(0.2),
    SelfAttention2d(16),  # new
    nn.Conv2d(16, 32, 4, 2, 1),
    nn.LeakyReLU(0.2),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 1),
)
optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))


def gradient_penalty(real, fake):
    alpha = torch.rand(len(real), 1, 1, 1)
    images = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_step(real):
    fake = generator(torch.randn(len(real), 16)).detach()
    with shared_spectral_norm(critic):  # new
        loss = critic(fake).mean() - critic(real).mean()
        loss = loss + 10 * gradient_penalty(real, fake)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return loss.item()
    # end
