"""One module for each subcommand of the trainer."""
