"""`expertd completion`: what a shell needs to complete the commands and their options."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys

from expertd.cli import COMMANDS

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose script to print; it says where to put it")


def run(arguments: argparse.Namespace) -> int:
    """0 when the script is on standard output, 1 where the package that writes it is missing."""
    try:
        import shtab
    except ImportError:
        print("expertd completion: error: it needs shtab: pip install 'expertd[completion]'", file=sys.stderr)
        return 1
    print(shtab.complete(_whole(), arguments.shell))
    return 0


def _whole() -> argparse.ArgumentParser:
    """All commands in one parser; those whose packages are not installed here without their options."""
    parser = argparse.ArgumentParser(prog="expertd")
    top = parser.add_subparsers()
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, (module, summary) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = top.add_parser(group, help="measurements").add_subparsers()
        command = (groups[group] if group else top).add_parser(last, help=summary)
        with contextlib.suppress(ImportError):
            importlib.import_module(module).add_arguments(command)
    return parser
