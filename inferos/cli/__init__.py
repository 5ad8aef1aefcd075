"""The command line. `main` is the entry point of the command `inferos`.

Importing it is quick: a command imports what it needs when it runs.
"""

from inferos.cli._app import app, main

__all__ = ["app", "main"]
