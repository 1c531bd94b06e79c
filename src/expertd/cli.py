"""The `expertd` command. Each subcommand lives in a module of its own, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable

from expertd import GRPC_VERBOSITY, SILENCED, __version__

COMMANDS = {
    "serve": ("expertd.server.serve", "serve experts of a model from this machine"),
    "up": ("expertd.client.tools.up", "serve a whole model from this machine until Ctrl-C"),
    "demo": ("expertd.client.tools.demo", "run eight servers and a coordinator here and compare with transformers"),
    "bench serve": ("expertd.client.tools.bench.serving", "measure a server beside the floors of the same bytes"),
    "bench kernels": ("expertd.kernels.cutile.tools.bench", "measure the GPU kernels beside the floors of this GPU"),
    "doctor": ("expertd.server.doctor.checkup", "check this machine for what 'expertd serve' needs"),
    "health": ("expertd.client.tools.health", "ask a server whether it serves, for container health checks"),
    "status": ("expertd.client.tools.status", "tell whether servers make a whole fleet of one model"),
    "fingerprint": ("expertd.client.tools.fingerprint", "make or check the manifest of a checkpoint's content"),
    "verify": ("expertd.client.tools.verify", "compare running servers with an FP32 reference from the checkpoint"),
    "top": ("expertd.client.tools.top", "watch running servers in the terminal"),
    "plan": ("expertd.client.placement.plan", "plan which server holds which experts, from recorded loads"),
    "rebalance": ("expertd.client.placement.rebalance", "move experts between running servers until loads are even"),
    "rollout": ("expertd.client.tools.rollout", "have running servers use other weights, or the former ones again"),
    "completion": ("expertd.completion", "print what bash, zsh or tcsh need to complete these commands"),
    "tune": ("expertd.kernels.cutile.tools.tune", "measure kernel configurations on this GPU and keep the best"),
}
"""Command -> module with `add_arguments(parser)` and `run(arguments) -> exit code`, and its one-line help."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    # Only the command that is called is imported: torch alone takes seconds.
    for name, (module_name, summary) in COMMANDS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            if name == "serve" and SILENCED:
                # It is gRPC that knows why a caller's TLS handshake failed.
                os.environ.pop(GRPC_VERBOSITY, None)
            if name == "serve":
                # Torch's threads would spin while they wait, and so keep the CPU from those of other servers.
                os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            parser = argparse.ArgumentParser(prog=f"expertd {name}", description=f"{summary[0].upper()}{summary[1:]}.")
            module = importlib.import_module(module_name)
            module.add_arguments(parser)
            return _run(name, module.run, parser.parse_args(arguments[len(words) :]))
    if not arguments:
        _overview().print_help()
        return 0
    return _overview().parse_args(arguments)  # type: ignore[return-value]


def _run(name: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The exit code; what no command has a word for of its own ends in one line, too."""
    from expertd.proto.base.errors import ExpertdError

    try:
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who reads the output, such as head, has enough; nor can the interpreter write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ExpertdError as error:
        print(f"expertd {name}: error: {error}", file=sys.stderr)
        return 1
    return code


def _overview() -> argparse.ArgumentParser:
    """What answers --help, --version and everything that is no command; it always exits."""
    lines = [f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="expertd",
        usage="expertd command [options]",
        description="Expert-parallel Mixture-of-Experts as a service.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n'expertd command --help' lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"expertd {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
