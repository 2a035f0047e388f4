"""The subcommands of the trainer."""
