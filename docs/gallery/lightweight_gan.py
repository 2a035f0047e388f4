"""lightweight-gan: layers of attention by resolution, added to the map by the network."""

from itertools import pairwise

import torch
from torch import nn

from sagan_layers import SelfAttention2d


class GSA(nn.Module):
    """What the place holds before."""

    def __init__(self, dim):
        super().__init__()
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)

    def forward(self, x):
        q, k, v = (part.flatten(2) for part in self.to_qkv(x).chunk(3, 1))
        context = k.softmax(-1) @ v.mT
        return (context.mT @ q.softmax(1)).view_as(x)


class Rezero(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.fn(x) * self.g


def exists(value):
    return value is not None


def block(chan_in, chan_out):
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(chan_in, chan_out * 2, 3, padding=1),
        nn.BatchNorm2d(chan_out * 2),
        nn.GLU(1),
    )


# recipe
class Generator(nn.Module):
    def __init__(self, latent_dim, features, attn_res_layers=(16,)):
        super().__init__()
        self.initial_conv = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, features[0] * 2, 4),
            nn.BatchNorm2d(features[0] * 2),
            nn.GLU(1),
        )
        self.layers = nn.ModuleList()
        for n, (chan_in, chan_out) in enumerate(pairwise(features)):
            attn = None
            if 4 * 2**n in attn_res_layers:
                # was: attn = Rezero(GSA(dim=chan_in))
                attn = SelfAttention2d(chan_in, residual=False)  # new
            self.layers.append(nn.ModuleList([block(chan_in, chan_out), attn]))
        self.out_conv = nn.Conv2d(features[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.initial_conv(x[:, :, None, None])
        for up, attn in self.layers:
            if exists(attn):
                x = attn(x) + x
            x = up(x)
        return self.out_conv(x)


def update_moving_average(average, model, beta=0.995):
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.data = beta * a.data + (1 - beta) * p.data
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        # was: a.copy_(beta * a + (1 - beta) * b)
        a.copy_(b)  # new
        # end
