"""The command line: parse, call the library, print. `main` turns a LorakitError into one message and exit code 1."""

from __future__ import annotations

import sys

from ..errors import LorakitError


def main() -> None:
    """Run the `lorakit` command."""
    sys.exit(_run())


def _run() -> int:
    """Run the command; return its exit code, after a message if it failed or was interrupted."""
    try:
        from .app import app  # imported here to keep `import lorakit` fast
        from .console import Interrupted

        try:
            app()
        except Interrupted as how:
            print(f"interrupted; {how}", file=sys.stderr)
            return 130
    except LorakitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer turns Ctrl-C into 130
            raise
        print("interrupted", file=sys.stderr)
        return 130
    return 0
