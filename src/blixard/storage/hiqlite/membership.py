"""Who belongs to the cluster. Nodes join by being started; leaving is asked for here."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx

from blixard.errors import ConfigError, StoreUnavailable
from blixard.storage.hiqlite.settings import NodeSettings

if TYPE_CHECKING:
    from blixard_hiqlite import Status

REMOVE_SECONDS = 30.0
_TRIES = 5


async def remove_member(settings: NodeSettings, status: Status, node_id: int) -> None:
    """Ask the leader to take ``node_id`` out of the cluster; it may be dead. See ``HiqliteDatabase.remove_member``."""
    addresses = {member: api for member, _, api, _ in status["members"]}
    if node_id not in addresses:
        raise ConfigError(
            f"node {node_id} is not a member of this cluster", hint=f"its members are {sorted(addresses)}"
        )
    if len(addresses) == 1:
        raise ConfigError("the last node of a cluster cannot be removed")
    leader = status["leader"]
    others = [addresses[leader]] if leader in addresses else []
    others += [address for member, address in addresses.items() if member not in (leader, node_id)]
    heard = [await _ask(settings, address, node_id) for address in others[:1]]
    for address in others[1:_TRIES]:
        if heard[-1] is None:
            return
        await asyncio.sleep(settings.heartbeat_seconds)  # the leader may be changing just now
        heard.append(await _ask(settings, address, node_id))
    if heard[-1] is not None:
        raise StoreUnavailable(f"no node of the cluster removed node {node_id}: {'; '.join(map(str, heard))}")


async def _ask(settings: NodeSettings, address: str, node_id: int) -> str | None:
    """Return None once it is done, else what was heard."""
    scheme = "http" if settings.tls is None else "https"
    try:
        async with httpx.AsyncClient(timeout=REMOVE_SECONDS, trust_env=False) as client:
            answer = await client.request(
                "DELETE",
                f"{scheme}://{address}/cluster/membership/sqlite",
                json={"node_id": node_id, "stay_as_learner": False},
                headers={"X-API-SECRET": settings.api_secret},
            )
    except httpx.HTTPError as error:
        return f"{address}: {error or type(error).__name__}"
    return None if answer.is_success else f"{address}: {answer.text[:200]}"
