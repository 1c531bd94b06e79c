"""`expertd rollout`: other weights for running servers, that no call fails for, and back."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from expertd.client.fleet.models import is_complete, of_model
from expertd.client.fleet.ports import EITHER_PORT, grpc_addresses, port_at
from expertd.client.fleet.survey import survey
from expertd.client.placement.admin import (
    add_admin_arguments,
    admin_security_from,
    exit_code,
    release_weights,
    share_calls,
    update_weights,
)
from expertd.client.transport.security import ClientSecurity, security_from
from expertd.proto.base.errors import ExpertdError, StalePlacement
from expertd.proto.codec import ShardInfo

TIMEOUT = 10.0
"""Seconds in which servers tell of themselves."""


class InvalidRollout(ValueError):
    """Servers that no weights can be rolled out to, or not these."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that serves, with an administration."""

    address: str
    admin: str
    shard: ShardInfo


Change = Callable[[Server], Awaitable[object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("servers", nargs="+", metavar="ADDRESS", help=f"all servers of the fleet: {EITHER_PORT}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a checkpoint, as servers find it: take it, check it, and use it")
    what.add_argument("--back", action="store_true", help="use the former weights again, in all calls")
    what.add_argument(
        "--release",
        action="store_true",
        help="free what no call uses: the former weights, or after --back the new ones",
    )
    parser.add_argument(
        "--share", type=_share, default=1.0, help="of calls, that use the new weights: 0 to use none yet (default: 1)"
    )
    add_admin_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """See `exit_code`."""
    return exit_code("rollout", rollout(arguments), arguments)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; it must be from 0 to 1")
    return value


async def rollout(arguments: argparse.Namespace) -> None:
    """Once. Raises `InvalidRollout`, `ExpertdError`, `OSError` or `ValueError`; what was done counts."""
    security, admin = security_from(arguments), admin_security_from(arguments)
    fleet = Fleet(await grpc_addresses(list(dict.fromkeys(arguments.servers))), security, admin)
    if arguments.back:
        await fleet.use(0.0)
    elif arguments.release:
        await fleet.release()
    else:
        await fleet.stage(arguments.model)
        await fleet.use(arguments.share)


class Fleet:
    """Servers whose weights are changed. Its state is theirs: whoever was stopped at any point begins again."""

    def __init__(self, addresses: Sequence[str], security: ClientSecurity, admin: ClientSecurity) -> None:
        """`admin` is for their administration."""
        self._addresses = addresses
        self._security = security
        self._admin = admin

    async def stage(self, folder: str) -> None:
        """Have all servers that have one generation take the weights in `folder` as the next, one after another."""
        for server in await self._look():
            if server.shard.next is not None:
                print(f"{server.address} has a next generation, {server.shard.next.model_fingerprint}")
                continue
            wanted = next((one.shard.next.model_fingerprint for one in await self._look() if one.shard.next), "")
            epoch = server.shard.placement_epoch
            async with aclosing(update_weights(server.admin, self._admin, epoch, folder, wanted)) as staging:
                async for told in staging:
                    if told.HasField("done"):
                        name, size = told.done.next_model_fingerprint, told.total_bytes / 1e9
                        print(f"{server.address} has {name}: {size:.2f} GB read and checked")

    async def use(self, share: float) -> None:
        """Have this share of all calls use the next generation, which must be the same everywhere, and whole."""
        servers = await self._look()
        name = _next_of(servers)

        async def tell(server: Server) -> None:
            await share_calls(server.admin, self._admin, server.shard.placement_epoch, name, share)

        await _each([one for one in servers if one.shard.next and one.shard.next.share != share], tell)
        print(f"{share:.0%} of calls use {name}")

    async def release(self) -> None:
        """Free the generation that no call uses."""
        servers = await self._look()
        both = [one for one in servers if one.shard.next is not None]
        if not both:
            print("there is one generation: nothing to release")
            return
        shares = {one.shard.next.share for one in both if one.shard.next is not None}
        if len(shares) > 1 or not shares <= {0.0, 1.0}:
            raise InvalidRollout(
                f"calls use both generations, for shares {sorted(shares)}: --model DIR or --back first"
            )
        kept = _kept(servers, both, shares.pop())

        async def free(server: Server) -> None:
            (name,) = set(server.shard.fingerprints) - {kept}
            await release_weights(server.admin, self._admin, server.shard.placement_epoch, name)

        await _each(both, free)
        print(f"all calls use {kept}, and nothing else is held")

    async def _look(self) -> list[Server]:
        """Raises `InvalidRollout` where one does not serve, or cannot be changed."""
        servers = []
        for seen in await survey(self._addresses, self._security, TIMEOUT):
            if seen.shard is None or seen.health != "SERVING":
                raise InvalidRollout(f"{seen.address} does not serve: {seen.health}; wait until it does")
            if not seen.shard.admin_address:
                raise InvalidRollout(f"{seen.address} has no administration; start it with --admin-listen")
            servers.append(Server(seen.address, port_at(seen.shard.admin_address, seen.address), seen.shard))
        return servers


def _next_of(servers: Sequence[Server]) -> str:
    """The next generation of all `servers`. Raises `InvalidRollout` where that is not one, or not whole, and
    `ModelMismatch` where replicas differ."""
    names = {one.shard.next.model_fingerprint if one.shard.next else "" for one in servers}
    if len(names) > 1 or "" in names:
        lacking = [one.address for one in servers if one.shard.next is None]
        raise InvalidRollout(
            f"{', '.join(lacking)} have no next generation: --model DIR takes it there"
            if lacking
            else f"servers have several next generations, {', '.join(sorted(names))}: --release those not wanted"
        )
    name = names.pop()
    if not is_complete(of_model([(one.address, one.shard) for one in servers], name)):
        raise InvalidRollout(f"not every expert of {name} has an owner among these servers; name all of the fleet")
    return name


def _kept(servers: Sequence[Server], both: Sequence[Server], share: float) -> str:
    """The generation that stays, which all `servers` must have. Raises `InvalidRollout`."""
    names = {_chosen(one.shard, share) for one in both}
    if len(names) == 1 and all(names < {*one.shard.fingerprints, ""} for one in servers):
        return names.pop()
    raise InvalidRollout("servers have different weights: --model DIR takes the same ones everywhere")


def _chosen(shard: ShardInfo, share: float) -> str:
    return shard.next.model_fingerprint if share and shard.next else shard.model_fingerprint


async def _each(servers: Sequence[Server], change: Change) -> None:
    """Change all at once. Raises `StalePlacement` where somebody else changed one, or what it answers."""
    results = await asyncio.gather(*(change(one) for one in servers), return_exceptions=True)
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, StalePlacement):
            raise StalePlacement(f"{server.address} was changed by somebody else; run it again")
        if isinstance(result, ExpertdError):
            raise type(result)(f"{server.address}: {result}")
        if isinstance(result, BaseException):
            raise result
