"""A Lightning module with both optimizers by hand."""

import lightning
import torch

from sagan_layers import (
    apply_spectral_norm,
    frozen_spectral_norm,
    hinge_discriminator_loss,
    hinge_generator_loss,
    shared_spectral_norm,
)


# recipe
class GAN(lightning.LightningModule):
    def __init__(self, generator, discriminator):
        super().__init__()
        self.automatic_optimization = False
        self.generator = generator  # both hold a SelfAttention2d
        self.discriminator = discriminator
        apply_spectral_norm(self.discriminator)  # new

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-4, betas=(0.0, 0.9)),
            torch.optim.Adam(
                self.discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9)
            ),
        )

    def training_step(self, images, batch_idx):
        g_optimizer, d_optimizer = self.optimizers()
        fake = self.generator(torch.randn(len(images), 16, 1, 1, device=self.device))

        self.toggle_optimizer(d_optimizer)
        with shared_spectral_norm(self.discriminator):  # new: iterates once
            loss = hinge_discriminator_loss(
                real_logits=self.discriminator(images),
                fake_logits=self.discriminator(fake.detach()),
            )
            self.manual_backward(loss)
        d_optimizer.step()
        d_optimizer.zero_grad()
        self.untoggle_optimizer(d_optimizer)

        self.toggle_optimizer(g_optimizer)
        with frozen_spectral_norm(self.discriminator):  # new
            loss = hinge_generator_loss(fake_logits=self.discriminator(fake))
            self.manual_backward(loss)
        g_optimizer.step()
        g_optimizer.zero_grad()
        self.untoggle_optimizer(g_optimizer)
        # end
