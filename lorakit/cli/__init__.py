"""The command line: parse, call the library, print. `main` turns a LorakitError into one message and exit code 1."""

from __future__ import annotations

import sys

from ..errors import LorakitError


def main() -> None:
    """Run the `lorakit` command."""
    from .app import app  # imported here to keep `import lorakit` fast

    try:
        app()
    except LorakitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer turns Ctrl-C into 130
            raise
        print("interrupted; finished checkpoints are kept, see --resume", file=sys.stderr)
        sys.exit(130)
