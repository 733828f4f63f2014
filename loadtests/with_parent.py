"""A command that ends with whoever started it, also where that is killed.

    python -m loadtests.with_parent COMMAND…

What the command starts itself is not its: that ends as the command has it.
"""

import os
import sys

from adapter_store.process import die_with_parent


def main(command: list[str]) -> None:
    """Become the command."""
    die_with_parent()
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.exit(f"{command[0]}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
