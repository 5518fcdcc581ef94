"""/tokens: who may talk to this server."""

from __future__ import annotations

from blixard.api.operation import Call, Operation
from blixard.protocol import routes
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, TokenView


async def create(call: Call[CreateTokenRequest]) -> CreateTokenReply:
    reply = await call.plane.tokens.create(call.namespace, call.body)
    call.context.gate.token_was_made()
    return reply


async def list_tokens(call: Call[None]) -> list[TokenView]:
    return await call.plane.tokens.tokens(call.namespace)


async def revoke(call: Call[None]) -> TokenView:
    return await call.plane.tokens.revoke(call.namespace, call.parameters["token_id"])


OPERATIONS = (
    Operation(routes.CREATE_TOKEN, create),
    Operation(routes.TOKENS, list_tokens),
    Operation(routes.REVOKE_TOKEN, revoke),
)
