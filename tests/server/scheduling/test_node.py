"""A server's devices as one, while some of them are lost."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from expertd.kernels.torch.backend import TorchBackend
from expertd.proto.base.errors import StalePlacement, Unavailable
from expertd.server.scheduling.node import Node
from tests.support.hanging import Hanging
from tests.support.serving import random_weights, until

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


def splice(node: Node) -> Awaitable[None]:
    return node.splice(OTHER, LAYER, None, EXPERTS, EXPERTS, random_weights(4, 256, 128))


async def lost_meanwhile(ask: Callable[[Node], Awaitable[object]]) -> object:
    """What comes of something that is asked of two devices, of which the second one hangs and is lost."""
    stuck = Hanging()
    node = Node({0: TorchBackend(), 1: stuck}, most=4)
    node.start()
    asking = asyncio.ensure_future(ask(node))
    try:
        await until(stuck.asked.is_set)
        node.lose(node.devices[1], "it hangs")
        async with asyncio.timeout(20):
            return await asking
    finally:
        stuck.go_on.set()
        node.stop()


async def test_what_a_hung_device_is_asked_ends_with_its_loss() -> None:
    assert await lost_meanwhile(lambda node: node.drop(LAYER)) is None
    assert await lost_meanwhile(lambda node: node.memory()) == {}
    with pytest.raises(Unavailable, match="device 1 was lost meanwhile: it hangs"):
        await lost_meanwhile(splice)


async def test_who_leaves_a_hung_device_waits_no_longer_than_for_its_loss() -> None:
    stuck = Hanging()
    node = Node({0: TorchBackend(), 1: stuck}, most=4)
    splicing = asyncio.ensure_future(splice(node))
    await until(stuck.asked.is_set)
    splicing.cancel()
    await asyncio.sleep(0.05)
    assert not splicing.done()
    node.lose(node.devices[1], "it hangs")
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(splicing, 20)
    stuck.go_on.set()
