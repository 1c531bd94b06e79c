"""Triton reads whether it interprets kernels when it is imported, which tests of other rooms have transformers do."""

import tests.support.kernels.interpreted  # noqa: F401
