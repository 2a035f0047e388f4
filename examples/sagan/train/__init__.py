"""The training loop, its updates, losses, checkpoints and guards."""
