"""Tokens: shown once, stored as hashes."""

from __future__ import annotations

import hashlib
import secrets

import msgspec

from blixard.domain.ids import new_id
from blixard.errors import InvalidRequest, TokenNotFound, Unauthenticated
from blixard.protocol.workers import CreateTokenReply, CreateTokenRequest, Scope, TokenView
from blixard.services.clock import Clock
from blixard.services.views import token_view
from blixard.storage.repositories.tokens import StoredToken, TokenRepository

PREFIX = "blx_"
SECRET_BYTES = 32
USE_NOTED_EVERY = 60_000_000
"""Microseconds between two notes of a token's use, so that authentication is not a write."""
MAX_LIFETIME_SECONDS = 10 * 365 * 24 * 3600.0


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks: what the presented token allows."""

    namespace: str
    scopes: frozenset[Scope]
    token_id: str


def _hash(secret: str) -> str:
    # A fast hash is enough: the secret has 256 random bits, so there is nothing to guess.
    return hashlib.sha256(secret.encode()).hexdigest()


class TokenService:
    def __init__(self, tokens: TokenRepository, clock: Clock) -> None:
        self._tokens = tokens
        self._clock = clock

    async def create(self, namespace: str, request: CreateTokenRequest) -> CreateTokenReply:
        """Make a token. Its secret is in the answer and nowhere else."""
        _check(request)
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        now = self._clock.now()
        token = StoredToken(
            id=new_id("token"),
            namespace=namespace,
            name=request.name,
            hash=_hash(secret),
            scopes=tuple(sorted(set(request.scopes))),
            created_at=now,
            expires_at=None if request.expires_in is None else now + int(request.expires_in * 1e6),
        )
        await self._tokens.add(token)
        return CreateTokenReply(token=token_view(token), secret=secret)

    async def tokens(self, namespace: str) -> list[TokenView]:
        """Return the newest 1,000 tokens, revoked ones too."""
        return [token_view(token) for token in await self._tokens.list_all(namespace)]

    async def revoke(self, namespace: str, token_id: str) -> TokenView:
        """Make a token worthless at once. Doing it again is harmless. Raises ``TokenNotFound``."""
        token = await self._tokens.revoke(namespace, token_id, self._clock.now())
        if token is None:
            raise TokenNotFound(token_id)
        return token_view(token)

    async def authenticate(self, secret: str) -> Identity:
        """Return who presents this secret. Raises ``Unauthenticated`` with the same words for every reason but expiry.

        The look-up compares hashes of a 256-bit secret, so its timing tells nothing about the secret.
        """
        token = await self._tokens.find_by_hash(_hash(secret)) if secret.startswith(PREFIX) else None
        now = self._clock.now()
        if token is None or token.revoked_at is not None:
            raise Unauthenticated("the token is not valid", hint="`blixard token create` makes a new one")
        if token.expires_at is not None and token.expires_at <= now:
            raise Unauthenticated("the token has expired", hint="`blixard token create` makes a new one")
        if token.last_used_at is None or now - token.last_used_at > USE_NOTED_EVERY:
            await self._tokens.note_use(token.id, now)
        return Identity(namespace=token.namespace, scopes=frozenset(token.scopes), token_id=token.id)

    async def any_exists(self) -> bool:
        """Say whether there is a token that is neither revoked nor expired."""
        return await self._tokens.any_valid(self._clock.now())


def _check(request: CreateTokenRequest) -> None:
    if not 1 <= len(request.name) <= 255 or not request.name.isprintable():
        raise InvalidRequest("name must have 1 to 255 printable characters", field="name")
    if not request.scopes:
        raise InvalidRequest("a token needs a scope", field="scopes", hint=f"choose from {', '.join(Scope)}")
    if request.expires_in is not None and not 0 < request.expires_in <= MAX_LIFETIME_SECONDS:
        raise InvalidRequest(
            f"expires_in is {request.expires_in:g} s; above 0 and up to ten years is allowed", field="expires_in"
        )
