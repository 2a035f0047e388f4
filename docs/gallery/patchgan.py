"""The PatchGAN discriminator of pix2pix and CycleGAN."""

from torch import nn

from sagan_layers import SelfAttention2d, apply_spectral_norm


# recipe
class NLayerDiscriminator(nn.Module):
    def __init__(self, input_nc, ndf=64, n_layers=3, norm_layer=nn.InstanceNorm2d):
        super().__init__()
        sequence = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for n in range(n_layers):
            stride = 2 if n < n_layers - 1 else 1
            narrow, wide = ndf * min(2**n, 8), ndf * min(2 ** (n + 1), 8)
            sequence += [
                nn.Conv2d(narrow, wide, 4, stride, 1),
                # was: norm_layer(wide),
                nn.LeakyReLU(0.2, True),
            ]
            if n == n_layers - 2:  # new: 32x32 for images of 256x256
                sequence += [SelfAttention2d(wide)]  # new
        sequence += [nn.Conv2d(wide, 1, 4, 1, 1)]
        self.model = nn.Sequential(*sequence)
        apply_spectral_norm(self.model)  # new

    def forward(self, images):
        return self.model(images)
        # end
