"""The `expertd` command. Each subcommand lives in a module of its own, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys

from expertd import __version__

COMMANDS = {
    "serve": ("expertd.server.serve", "serve experts of a model from this machine"),
    "demo": ("expertd.client.demo", "run eight servers and a coordinator here and compare with transformers"),
}
"""Command -> module with `add_arguments(parser)` and `run(arguments) -> exit code`, and its one-line help."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="expertd", description="Expert-parallel Mixture-of-Experts as a service.")
    parser.add_argument("--version", action="version", version=f"expertd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the command that is called is imported: torch alone takes seconds.
        if arguments[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    code: int = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
