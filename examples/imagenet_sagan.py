"""Train a Self-Attention GAN on ImageNet or any folder of images, sample from it, and draw its attention."""

from sagan.__main__ import run

if __name__ == "__main__":
    run()
