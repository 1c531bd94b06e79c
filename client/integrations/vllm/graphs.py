"""Calls leave the GPU's graphs: they are made by the host, between the pieces that vLLM captures."""

from __future__ import annotations

import logging

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

log = logging.getLogger("vllm.expertd")
OPERATORS = ("vllm::moe_forward", "vllm::moe_forward_shared")
"""What vLLM has in a compiled graph for a layer of experts; calls are inside."""


def split(compilation: CompilationConfig) -> None:
    """Have graphs end before a layer's experts and go on after them, before they are compiled or captured.

    Where vLLM does not compile piecewise there is nothing to split: then no graphs are captured at all.
    """
    if compilation.mode == CompilationMode.VLLM_COMPILE and compilation.splitting_ops:
        missing = [name for name in OPERATORS if name not in compilation.splitting_ops]
        compilation.splitting_ops.extend(missing)
        wanted = CUDAGraphMode.PIECEWISE
    else:
        wanted = CUDAGraphMode.NONE
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE, wanted):
        log.info("cudagraph_mode is %s, not %s: calls cannot be captured", wanted, compilation.cudagraph_mode)
        compilation.cudagraph_mode = wanted
