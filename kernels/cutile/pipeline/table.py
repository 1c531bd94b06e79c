"""Measured choices: the configuration that a kernel runs with, by shape class and by machine.

A `Table` keeps what `expertd tune` chose. Tables come from two files: one shipped for a GPU, and a
cache that `expertd tune` fills, whose entries count only for the machine, toolchain and kernel sources that they were
measured on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from expertd.kernels.cutile.pipeline.toolchain import Toolchain, output
from expertd.kernels.weights.files import write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_CACHE = Path("~/.cache/expertd/tune.json")
SHIPPED = {"NVIDIA H200": "h200.json"}
"""Tables in the folder `tuned`, by GPU name."""
BUDGET_SPENT = "the time budget was spent"


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest candidate of one kernel for one shape class, as JSON values."""

    config: Any
    microseconds: float
    skipped: dict[str, str] = field(default_factory=dict)
    """Why candidates were left out, by candidate: they did not compile, were wrong, or were not reached in time."""

    @property
    def complete(self) -> bool:
        """Whether time was enough to try every candidate."""
        return not any(BUDGET_SPENT in reason for reason in self.skipped.values())


@dataclass(slots=True)
class Table:
    """Choices by kernel and shape class."""

    choices: dict[str, dict[str, Choice]] = field(default_factory=dict)

    def get(self, kernel: str, shape_class: str, kind: type[T]) -> T | None:
        """The configuration chosen for a kernel, as a `kind`; None where nothing was measured."""
        choice = self.choices.get(kernel, {}).get(shape_class)
        return None if choice is None else decode(kind, choice.config)

    def put(self, kernel: str, shape_class: str, choice: Choice) -> None:
        self.choices.setdefault(kernel, {})[shape_class] = choice

    def update(self, other: Table) -> None:
        """Take over the other table's choices where both have one."""
        for kernel, shapes in other.choices.items():
            self.choices.setdefault(kernel, {}).update(shapes)

    def to_json(self) -> dict[str, Any]:
        return {
            kernel: {shape_class: dataclasses.asdict(choice) for shape_class, choice in sorted(shapes.items())}
            for kernel, shapes in sorted(self.choices.items())
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Table:
        return cls(
            {
                kernel: {shape_class: Choice(**choice) for shape_class, choice in shapes.items()}
                for kernel, shapes in value.items()
            }
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What a measurement depends on besides kernel and shape."""

    gpu: str
    driver: str
    cuda_tile: str
    tileiras: str
    sources: str
    """Hash of the kernels' sources."""

    @classmethod
    def detect(cls) -> Machine:
        toolchain = Toolchain.detect()
        return cls(
            gpu=torch.cuda.get_device_name(),
            driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            cuda_tile=toolchain.cuda_tile,
            tileiras=toolchain.tileiras,
            sources=source_hash(Path(__file__).parents[1]),
        )

    @property
    def key(self) -> str:
        return " | ".join(dataclasses.astuple(self))


def load_table(machine: Machine, cache: Path = DEFAULT_CACHE) -> Table:
    """The shipped table of the machine's GPU, with what the cache holds for exactly this machine laid over it."""
    table = Table()
    if shipped := SHIPPED.get(machine.gpu):
        table.update(Table.from_json(json.loads((Path(__file__).parent / "tuned" / shipped).read_text())))
    table.update(Table.from_json(_read_cache(cache).get(machine.key, {})))
    return table


def store_table(table: Table, machine: Machine, cache: Path = DEFAULT_CACHE) -> None:
    """Write a machine's choices to the cache, in place of its earlier ones, at once or not at all."""
    write_json({**_read_cache(cache), machine.key: table.to_json()}, cache.expanduser())


def encode(value: object) -> object:
    """A configuration (a dataclass, a number or a string) as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def decode(kind: type[T], value: object) -> T:
    """The configuration of type `kind` that `encode` turned into `value`. Raises `TypeError` where it is none."""
    if not dataclasses.is_dataclass(kind):
        if type(value) is not kind:
            raise TypeError(f"{value!r} is not of type {kind.__name__}")
        return value
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} has no fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: decode(hints[name], item) if name in hints else item for name, item in value.items()})


def source_hash(folder: Path) -> str:
    """A hash of the Python files in `folder` and below."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _read_cache(cache: Path) -> dict[str, Any]:
    path = cache.expanduser()
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        logger.warning("the tuning cache %s is left out: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}
