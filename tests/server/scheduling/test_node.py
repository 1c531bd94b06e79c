"""A server's devices as one, while some of them are lost."""

import pytest

from expertd.kernels.torch.backend import TorchBackend
from expertd.proto.base.errors import StalePlacement
from expertd.server.scheduling.node import Node
from tests.support.serving import random_weights

LAYER, OTHER, EXPERTS = 1, 7, (0, 1, 2, 3)


async def test_a_layer_is_not_made_without_the_experts_that_a_lost_device_had() -> None:
    node = Node({number: TorchBackend() for number in range(2)}, most=4, room=5)
    node.start()
    node.held[LAYER] = ((0, 1), (2, 3))
    await node.load(LAYER, EXPERTS, random_weights(4, 256, 128))
    wanted = (*EXPERTS, 4)
    node.lose(node.devices[1], "it is lost")
    with pytest.raises(StalePlacement, match="layer 1: a device was lost meanwhile with experts that are to stay"):
        await node.splice(OTHER, LAYER, LAYER, wanted, (4,), random_weights(1, 256, 128))
    node.stop()
