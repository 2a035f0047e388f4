"""The subcommands of the trainer, one module each."""
