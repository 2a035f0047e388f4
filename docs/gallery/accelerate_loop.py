"""A loop with Hugging Face's accelerate, which accumulates gradients."""

import torch

from sagan_layers import (
    apply_spectral_norm,
    call_with_constant_parameters,
    hinge_discriminator_loss,
    hinge_generator_loss,
    shared_spectral_norm,
)


# recipe
def train(accelerator, generator, discriminator, loader):
    apply_spectral_norm(discriminator)  # new: before the optimizers
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9))
    d_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9)
    )
    generator, discriminator, g_optimizer, d_optimizer, loader = accelerator.prepare(
        generator, discriminator, g_optimizer, d_optimizer, loader
    )
    weights = shared_spectral_norm(discriminator)  # new
    weights.update()  # new: iterates once for all parts
    for images in loader:
        with accelerator.accumulate(generator, discriminator):
            fake = generator(
                torch.randn(len(images), 16, 1, 1, device=accelerator.device)
            )
            loss = hinge_discriminator_loss(
                real_logits=discriminator(images),
                fake_logits=discriminator(fake.detach()),
            )
            accelerator.backward(loss)
            d_optimizer.step()
            d_optimizer.zero_grad()
            if accelerator.sync_gradients:  # new
                weights.update()  # new: D has changed

            # was: fake_logits = discriminator(fake)
            fake_logits = call_with_constant_parameters(discriminator, fake)  # new
            accelerator.backward(hinge_generator_loss(fake_logits))
            g_optimizer.step()
            g_optimizer.zero_grad()
    # end
