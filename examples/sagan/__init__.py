"""Parts of the example that trains Self-Attention GAN on folders of images, such as ImageNet."""
