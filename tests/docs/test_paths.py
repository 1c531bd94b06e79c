"""Files that documents name are there."""

import re
from pathlib import Path

import pytest

from tests.docs.fences import DOCUMENTS, ROOT

NAMED = re.compile(r"`((?:server|client|kernels|proto|native|tests|docs|deploy|src)/[\w./-]*\w)/?`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    named = NAMED.findall(document.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
