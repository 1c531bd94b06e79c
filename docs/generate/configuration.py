"""docs/configuration.md, from the configuration dataclasses of the server and of clients."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

from docs.generate.markdown import table
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.transport.security import ClientSecurity
from expertd.server.options.config import ServerConfig, flag, metavar

PAGE = Path(__file__).parents[1] / "configuration.md"
HEAD = """\
# Configuration

Written by `make docs` from `server/options/config.py`, `client/config/coordinator.py` and
`client/transport/security.py`.
"""
SERVER = """\
## `expertd serve`

Options of the command, and fields of `ServerConfig` (with `_` for `-`). Values that cannot work end the command with
exit code 2 before anything is loaded, and the message starts with the option's name. Lists of experts and layers are
numbers and ranges: `0-31,40`.
"""
COORDINATOR = """\
## `CoordinatorConfig`

Keyword arguments, the second argument of `Coordinator`, `SyncCoordinator` and `register`. Unusable values raise
`ValueError` with the field's name.
"""
SECURITY = """\
## `ClientSecurity`

Keyword arguments, for `CoordinatorConfig(security=...)`; [security.md](security.md) has examples.
"""
ENVIRONMENT = """\
## Environment

| variable | meaning |
| --- | --- |
| `XDG_CACHE_HOME` | its `expertd/` keeps what `demo`, `bench serve` and read-only checkpoints need; else `~/.cache` |
"""


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join(
        (
            HEAD,
            SERVER,
            table(("option", "default", "meaning"), server_rows()),
            COORDINATOR,
            table(("field", "type", "default", "meaning"), field_rows(CoordinatorConfig)),
            SECURITY,
            table(("field", "type", "default", "meaning"), field_rows(ClientSecurity)),
            ENVIRONMENT,
        )
    )


def server_rows() -> Iterator[tuple[str, ...]]:
    for option in dataclasses.fields(ServerConfig):
        value = "" if option.metadata["parse"] is bool else f" {metavar(option)}"
        yield f"`{flag(option.name)}{value}`", default_of(option), option.metadata["help"]


def field_rows(config: type) -> Iterator[tuple[str, ...]]:
    meanings = field_docstrings(config)
    for option in dataclasses.fields(config):
        yield f"`{option.name}`", f"`{option.type}`", default_of(option), meanings[option.name]


def default_of(option: dataclasses.Field[object]) -> str:
    if option.default_factory is not dataclasses.MISSING:
        value = option.default_factory()
        plain = type(value).__repr__ is object.__repr__
        return f"`{type(value).__name__}()`" if plain else f"`{value!r}`"
    if option.default is dataclasses.MISSING:
        return "required"
    if option.default is None or option.default is False:
        return ""
    return f"`{option.default}`"


def field_docstrings(config: type) -> dict[str, str]:
    """The string below each field of a class, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    meanings = {}
    for statement, following in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        match following:
            case ast.Expr(ast.Constant(str(text))):
                meanings[statement.target.id] = " ".join(text.split())
            case _:
                raise SystemExit(f"{config.__name__}.{statement.target.id} has no docstring; write one below the field")
    return meanings


if __name__ == "__main__":
    PAGE.write_text(page())
