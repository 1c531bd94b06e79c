"""The tables of docs/models.md: the families, how each routes, and what is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from docs.generate.markdown import table
from docs.generate.rooms import ROOT
from expertd.kernels.model.families import FAMILIES, KNOWN_UNSUPPORTED, Family

PAGE = ROOT / "docs" / "models.md"
SMALL_MODELS = ROOT / "tests" / "support" / "families.py"
TESTED = ("CONFIGS", "SERVED")
"""Names of small models of the tests, by family, that are compared with transformers'."""


def page(text: str) -> str:
    """The page with its tables, between their marks in `text`, as the code is."""
    return _between(_between(text, "families", families()), "refused", refused())


def _between(text: str, name: str, written: str) -> str:
    marks = re.search(rf"(?<=<!-- {name}: )[^\n]*-->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    if marks is None:
        raise SystemExit(f"{PAGE} has no marks of {name!r} to write between")
    return f"{text[: marks.start(1)]}\n{written}\n{text[marks.end(1) :]}"


def families() -> str:
    tested = set(_tested(ast.parse(SMALL_MODELS.read_text())))
    if tested != FAMILIES.keys():
        raise SystemExit(f"{SMALL_MODELS} and the table of families differ in {sorted(tested ^ FAMILIES.keys())}")
    titles = ("`model_type`", "published", "how it routes", "tensors of experts", "source")
    rows = (
        (f"`{name}`", one.published, routing(one), tensors(one), f"`{one.source}`") for name, one in FAMILIES.items()
    )
    return table(titles, rows)


def refused() -> str:
    return table(
        ("`model_type`", "refused because it"), ((f"`{name}`", why) for name, why in KNOWN_UNSUPPORTED.items())
    )


def routing(family: Family) -> str:
    """What is decided by the architecture, and what config.json says."""
    return ", ".join(_routing(family))


def _routing(family: Family) -> Iterator[str]:
    yield family.scoring_func
    if family.bias is not None:
        yield f"bias `{family.module}.{family.bias}`"
    if family.table is not None:
        yield f"by token id in layers that have `{family.module}.{family.table}`"
    if "n_group" not in family.decided:
        yield "groups if `n_group` > 1"
    always = family.decided.get("norm_topk_prob")
    yield "normalised" if always else "normalised if `norm_topk_prob`"


def tensors(family: Family) -> str:
    """Names behind the layer's, and where layers are when not under `model`."""
    prefix = family.prefix.removesuffix(".")
    under = "" if prefix == "model" else f", under `{prefix}`" if prefix else ", with no prefix"
    return " or ".join(_tensors(family)) + under


def _tensors(family: Family) -> Iterator[str]:
    experts = f"{family.module}.experts"
    names = ",".join(family.projections.get(f"{one}_proj", one) for one in ("gate", "up", "down"))
    yield f"`{experts}.{{E}}.{{{names}}}{'' if family.projections else '_proj'}`"
    if family.fused:
        yield f"`{experts}.{{gate_up,down}}_proj`{' (also transposed)' if family.transposed else ''}"


def _tested(tree: ast.Module) -> Iterator[str]:
    """The families of the small models that the tests have."""
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)) if name in TESTED:
                yield from _strings(keys)
            case ast.Assign(targets=[ast.Name(id="SMALL")]):
                # A model of its own, in DeepSeek-V3's format.
                yield "deepseek_v3"


def _strings(keys: Iterable[ast.expr | None]) -> Iterator[str]:
    return (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
