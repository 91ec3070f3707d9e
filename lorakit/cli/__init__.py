"""The command line: parses, calls the library, prints. `main` turns a LorakitError into one message and exit 1."""

from __future__ import annotations

import sys

from ..errors import LorakitError


def main() -> None:
    """Run the `lorakit` command."""
    from .app import app  # here, so that `import lorakit` does not pay for the command line

    try:
        app()
    except LorakitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # 130 is what typer makes of Ctrl-C
            raise
        print("interrupted; finished checkpoints are kept, see --resume", file=sys.stderr)
        sys.exit(130)
