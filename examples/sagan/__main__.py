"""The program: ``sagan``, ``python -m sagan`` and ``python examples/imagenet_sagan.py``."""

from __future__ import annotations

import sys

from sagan import signals


def run() -> None:
    """Run the command in ``sys.argv`` and end with its exit code."""
    signals.start_program()
    from sagan.cli.main import main  # imports torch: seconds, in which a signal may come
    from sagan.cli.terminal import outlive_the_terminal

    with signals.program():
        outlive_the_terminal()
        sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
