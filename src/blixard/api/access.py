"""Who may do what.

1. A token that is presented is always checked, whatever the transport; its scopes decide.
2. The Unix socket is only open to the user who runs the server (mode 0600) and needs no token.
3. A server on a loopback address is open to this machine as long as no token exists. Then the names by which it is called
   are checked, so that a web page open in a browser of this machine cannot use it.
4. All else needs a token.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from litestar.types import HTTPScope

from blixard.domain.ids import DEFAULT_NAMESPACE
from blixard.errors import Forbidden, Unauthenticated
from blixard.protocol.routes import Route
from blixard.protocol.workers import Scope

if TYPE_CHECKING:
    from blixard.services.tokens import TokenService

TOKENS_CHECK_SECONDS = 1.0
"""How old the knowledge may be that no token exists yet."""
MAX_TOKEN_LENGTH = 256
_EVERY_SCOPE = frozenset(Scope)


class Access(msgspec.Struct, frozen=True):
    """What this request may do, and in which namespace."""

    namespace: str
    scopes: frozenset[Scope]
    token_id: str | None = None


TRUSTED = Access(DEFAULT_NAMESPACE, _EVERY_SCOPE)


class Gatekeeper:
    """Decides for every request. ``host`` is what the TCP port is bound to. Raises ``Unauthenticated`` and ``Forbidden``."""

    def __init__(self, tokens: TokenService, host: str) -> None:
        self._tokens = tokens
        self._open = is_loopback(host)
        self._host = host
        self._token_seen = False
        self._checked_at = -TOKENS_CHECK_SECONDS

    async def admit(self, scope: HTTPScope, route: Route[Any, Any], *, trusted: bool) -> Access:
        """Return the access of this request if it suffices for the route (Any: whatever travels on it)."""
        if not route.scopes:
            return TRUSTED
        access = await self._access(scope, trusted=trusted)
        if not (route.scopes & access.scopes or Scope.ADMIN in access.scopes):
            wanted = " or ".join(f"`{name}`" for name in sorted(route.scopes))
            raise Forbidden(f"this needs a token with the scope {wanted}", hint="ask an admin to create one")
        return access

    async def _access(self, scope: HTTPScope, *, trusted: bool) -> Access:
        headers = {name: value for name, value in scope["headers"] if name in _HEADERS}
        if (header := headers.get(b"authorization")) is not None:
            identity = await self._tokens.authenticate(_bearer(header))
            return Access(identity.namespace, frozenset(identity.scopes), identity.token_id)
        if trusted:
            return TRUSTED
        if not self._open or await self._token_exists():
            raise Unauthenticated(
                "this server asks for a token",
                hint="an admin makes one with `blixard token create`; pass it in the variable BLIXARD_TOKEN",
            )
        self._check_names(headers)
        return TRUSTED

    async def _token_exists(self) -> bool:
        # Once seen, always required: revoking the last token must not open the server again.
        if not self._token_seen and time.monotonic() - self._checked_at >= TOKENS_CHECK_SECONDS:
            self._token_seen = await self._tokens.any_exists()
            self._checked_at = time.monotonic()
        return self._token_seen

    def token_was_made(self) -> None:
        """Ask for tokens from the next request on."""
        self._token_seen = True

    def _check_names(self, headers: dict[bytes, bytes]) -> None:
        """Refuse what a browser sends for a foreign page: a name that was rebound to 127.0.0.1, or another site's form."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_own_name(_hostname(f"//{host}")):
            raise Forbidden(
                f"this server does not answer to the name {host!r} without a token",
                hint="call it 127.0.0.1 or localhost, or create a token",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise Forbidden("requests from pages of other sites are refused", hint="create a token and send it")

    def _is_own_name(self, name: str) -> bool:
        return name in {"localhost", self._host} or is_loopback(name)


_HEADERS = frozenset({b"authorization", b"host", b"origin"})


def is_loopback(host: str) -> bool:
    """Say whether only this machine can connect to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _bearer(header: bytes) -> str:
    kind, _, secret = header.decode("latin-1").strip().partition(" ")
    if kind.lower() != "bearer" or not secret.strip() or len(secret) > MAX_TOKEN_LENGTH:
        raise Unauthenticated("the Authorization header is not of the form `Bearer blx_…`", hint="check BLIXARD_TOKEN")
    return secret.strip()
