"""What small engines of tests own."""

from collections.abc import Sequence

from expertd._native import OwnedLayer, Placement
from expertd.kernels.model.ranges import format_ranges


def placement_of(
    experts: Sequence[int] = (0, 1),
    layers: Sequence[int] = (1, 2),
    fingerprint: str = "model",
    epoch: int = 1,
    owned: Sequence[OwnedLayer] = (),
) -> Placement:
    """Some of 4 experts, or all of more, of H 128, of which a token has 2; at most 1000 tokens a request.

    The same experts of each of `layers`, unless `owned` says otherwise.
    """
    alike = [OwnedLayer(layer, experts, experts_text=format_ranges(experts), key=layer) for layer in layers]
    return Placement(
        model_fingerprint=fingerprint,
        epoch=epoch,
        layers=owned or alike,
        layers_text=format_ranges(layers),
        num_routed_experts=max(4, len(experts)),
        hidden_size=128,
        max_top_k=2,
        max_tokens=1000,
    )
