"""BigGAN-PyTorch: its attention, on its own spectrally normalised layers."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from sagan_layers import SelfAttention2d, convert


class PeerConv2d(nn.Conv2d):
    """A convolution with the buffers and the arithmetic of BigGAN-PyTorch's."""

    def __init__(self, *args, eps=1e-12, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x):
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix, eps=self.eps)
            u = F.normalize(v @ matrix.T, eps=self.eps)
            if self.training:
                self.u0.copy_(u)
        return F.conv2d(
            x,
            self.weight / (u @ matrix @ v.T).squeeze(),
            self.bias,
            padding=self.padding,
        )


class Attention(nn.Module):
    def __init__(self, ch, which_conv):
        super().__init__()
        self.theta = which_conv(ch, ch // 8, 1, bias=False)
        self.phi = which_conv(ch, ch // 8, 1, bias=False)
        self.g = which_conv(ch, ch // 2, 1, bias=False)
        self.o = which_conv(ch // 2, ch, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        theta = self.theta(x).flatten(2)
        phi, g = (F.max_pool2d(part, 2).flatten(2) for part in (self.phi(x), self.g(x)))
        weights = torch.softmax(theta.mT @ phi, -1)
        return x + self.gamma * self.o((g @ weights.mT).unflatten(2, x.shape[2:]))


# recipe
class Generator(nn.Module):
    def __init__(self, ch=16, attention=(16,), SN_eps=1e-8):
        super().__init__()
        self.which_conv = functools.partial(PeerConv2d, padding=1, eps=SN_eps)
        self.blocks = nn.ModuleList()
        for resolution in (8, 16):
            self.blocks.append(nn.ModuleList([self.which_conv(ch, ch, 3)]))
            if resolution in attention:
                # was: layer = Attention(ch, functools.partial(PeerConv2d, eps=SN_eps))
                layer = SelfAttention2d(ch, eps=SN_eps, eps_mode="clamp")  # new
                self.blocks[-1].append(layer)

    def forward(self, h):
        for block in self.blocks:
            h = F.interpolate(h, scale_factor=2)
            for layer in block:
                h = layer(h)
        return h


def load(generator, checkpoint):
    # was: generator.load_state_dict(checkpoint)
    convert.load(generator, checkpoint, "biggan_pytorch")  # new
    # end
