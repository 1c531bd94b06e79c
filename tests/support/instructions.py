"""The instruction sets that this processor has, for tests of every version of the native code."""

from expertd import _native

INSTRUCTION_SETS = ("portable", "sse4.2", "avx2", "avx512", "armv8-crc")
BEST = _native.instruction_set()
AVAILABLE = [name for name in INSTRUCTION_SETS if _native.use_instruction_set(name)]
_native.use_instruction_set(BEST)
