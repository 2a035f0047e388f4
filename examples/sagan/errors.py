"""What a user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right; the message says what was expected and what was found.

    The command line shows the message alone. Any other exception is a fault of the program and keeps its
    traceback.
    """
