"""The program: ``sagan``, ``python -m sagan`` and ``python examples/imagenet_sagan.py``."""

from __future__ import annotations

import sys

from sagan import signals
from sagan.extras import missing
from sagan.names import program_file


def run() -> None:
    """Run the command in ``sys.argv`` and end with its exit code."""
    signals.start_program()
    try:
        from sagan.cli.main import main  # imports torch: seconds, in which a signal may come
        from sagan.cli.terminal import outlive_the_terminal
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        if library == "sagan":
            raise
        print(missing(program_file(), library, "trainer"), file=sys.stderr)
        with signals.program():
            sys.exit(2)

    with signals.program():
        outlive_the_terminal()
        sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
