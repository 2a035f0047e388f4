"""DCGAN, as in PyTorch's examples, with few channels."""

import torch
from torch import nn

from sagan_layers import SelfAttention2d, apply_spectral_norm

nz, ngf, ndf = 16, 8, 8


def weights_init(m):
    if "Conv" in type(m).__name__:
        nn.init.normal_(m.weight.data, 0.0, 0.02)
    elif "BatchNorm" in type(m).__name__:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.zeros_(m.bias.data)


# recipe
generator = nn.Sequential(
    nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),  # 4x4
    nn.BatchNorm2d(ngf * 8),
    nn.ReLU(True),
    nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),  # 8x8
    nn.BatchNorm2d(ngf * 4),
    nn.ReLU(True),
    nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),  # 16x16
    nn.BatchNorm2d(ngf * 2),
    nn.ReLU(True),
    nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),  # 32x32
    nn.BatchNorm2d(ngf),
    nn.ReLU(True),
    SelfAttention2d(ngf),  # new
    nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False),  # 64x64
    nn.Tanh(),
)
discriminator = nn.Sequential(
    nn.Conv2d(3, ndf, 4, 2, 1, bias=False),  # 32x32
    nn.LeakyReLU(0.2, inplace=True),
    SelfAttention2d(ndf),  # new
    nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),  # 16x16
    # was: nn.BatchNorm2d(ndf * 2),
    nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),  # 8x8
    # was: nn.BatchNorm2d(ndf * 4),
    nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),  # 4x4
    # was: nn.BatchNorm2d(ndf * 8),
    nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
)
apply_spectral_norm(discriminator)  # new
generator.apply(weights_init)
discriminator.apply(weights_init)
# end


def step(real):
    logits = torch.cat(
        [
            discriminator(real),
            discriminator(generator(torch.randn(len(real), nz, 1, 1))),
        ]
    )
    return nn.functional.softplus(logits).mean()
