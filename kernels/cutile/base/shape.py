"""Shapes that kernels are compiled and tuned for: of a server's experts, and of batches by class."""

from __future__ import annotations

from dataclasses import dataclass

SHAPE_CLASSES = (1, 8, 64, 256, 1024, 2048, 4096, 8192, 16384)
"""Largest token counts of the classes; a larger batch runs with the configuration of the last one."""
TILE_COUNT_STEP = 16
"""Counts of row tiles are multiples of this: launches compile kernels anew for sizes that are not."""
MAX_EXPERTS = 64
"""Of a layer on one GPU."""
MAX_HIDDEN_SIZE = 8192
MAX_INTERMEDIATE_SIZE = 16384
MAX_ELEMENTS = 1 << 31
"""Of an array of rows: kernels have 32-bit offsets."""
MOST_TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What a layer's weights on one server look like; defaults are DeepSeek-V3's with 32 local experts."""

    num_experts: int = 32
    hidden_size: int = 7168
    intermediate_size: int = 2048

    def key(self, num_tokens: int) -> str:
        """The name of a batch's shape class in tuning tables."""
        return f"e{self.num_experts}-h{self.hidden_size}-i{self.intermediate_size}-t{shape_class(num_tokens)}"


def shape_class(num_tokens: int) -> int:
    """The class of a batch: the smallest of `SHAPE_CLASSES` that holds it, or the last."""
    return next((bound for bound in SHAPE_CLASSES if num_tokens <= bound), SHAPE_CLASSES[-1])


def max_row_tiles(num_tokens: int, top_k: int, num_experts: int, tile_rows: int) -> int:
    """Most row tiles that `num_tokens` tokens with `top_k` expert ids each can need, rounded up."""
    pairs = num_tokens * min(top_k, num_experts)
    tiles = min(pairs, num_experts + pairs // tile_rows)
    return -(-tiles // TILE_COUNT_STEP) * TILE_COUNT_STEP


def tokens_within_reach(shape: ExpertShape, top_k: int) -> int:
    """The largest shape class whose rows, in tiles of any size, are fewer than `MAX_ELEMENTS` elements."""
    longest = max(shape.hidden_size, 2 * shape.intermediate_size)

    def elements(tokens: int) -> int:
        return max_row_tiles(tokens, top_k, shape.num_experts, MOST_TILE_ROWS) * MOST_TILE_ROWS * longest

    return next(tokens for tokens in reversed(SHAPE_CLASSES) if elements(tokens) < MAX_ELEMENTS)
