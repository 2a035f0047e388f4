"""StyleGAN2's discriminator, with weights that are scaled when they are used."""

import torch
import torch.nn.functional as F
from torch import nn

from sagan_layers import SelfAttention2d

channels = {64: 8, 32: 16, 16: 16, 8: 16, 4: 16}


class EqualConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.scale = (in_channels * kernel_size**2) ** -0.5
        self.padding = kernel_size // 2

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, padding=self.padding)


class ResBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = EqualConv2d(in_channels, in_channels, 3)
        self.conv2 = EqualConv2d(in_channels, out_channels, 3)
        self.skip = EqualConv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return F.avg_pool2d((h + self.skip(x)) / 2**0.5, 2)


# recipe
class Discriminator(nn.Module):
    def __init__(self, size):
        super().__init__()
        convs = [EqualConv2d(3, channels[size], 1)]
        while size > 4:
            convs.append(ResBlock(channels[size], channels[size // 2]))
            size //= 2
            if size == 32:  # new
                convs.append(SelfAttention2d(channels[size]))  # new
        self.convs = nn.Sequential(*convs)
        self.final = EqualConv2d(channels[4], 1, 4)

    def forward(self, x):
        return self.final(self.convs(x)).mean((2, 3))


discriminator = Discriminator(64)
attention = [m for m in discriminator.modules() if type(m) is SelfAttention2d]  # new
slow = [p for m in attention for p in m.parameters()]  # new
fast = [p for p in discriminator.parameters() if p not in set(slow)]  # new
optimizer = torch.optim.Adam(
    # was: discriminator.parameters(),
    [{"params": fast}, {"params": slow, "lr": 0.0001}],  # new
    lr=0.002,
    betas=(0.0, 0.99),
)


def accumulate(average, model, decay=0.999):
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.data.mul_(decay).add_(p.data, alpha=1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):  # new
        a.copy_(b)  # new
        # end
