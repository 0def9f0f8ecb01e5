"""Who may use a policy server, and how much: address, token, TLS and limits."""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, NotFoundError
from .wire import MAX_MESSAGE


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use a server, and how much.

    Attributes:
        host: Address to listen on; others than loopback need a token.
        port: Port; 0 for any free one.
        token: What a client must say (``Authorization: Api-Key TOKEN``, as openpi's, or ``Bearer TOKEN``).
        certificate, key: PEM files for TLS.
        clients: Connections at once.
        rate_hz: Requests a second of one client, on average; two seconds' worth at once.
        message_bytes: Size of a message.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    certificate: str | None = None
    key: str | None = None
    clients: int = 32
    rate_hz: float = 200.0
    message_bytes: int = MAX_MESSAGE

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"expected a port from 0 to 65535, got {self.port}")
        if self.clients < 1 or not self.rate_hz > 0 or self.message_bytes < 1024:
            raise ConfigError(
                "expected clients of at least 1, rate_hz above 0 and message_bytes of at least 1024, got "
                f"{self.clients}, {self.rate_hz} and {self.message_bytes}"
            )
        if self.token is not None and (
            len(self.token) < 16 or not self.token.isascii() or not self.token.isprintable()
        ):
            raise ConfigError(
                "expected a token of at least 16 printable ASCII characters. Type: "
                "export BRACHIUM_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe())')"
            )
        if not self.is_loopback and self.token is None:
            raise ConfigError(
                f"host={self.host} is open to the network: expected a token, got none. Type: "
                "export BRACHIUM_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe())')"
            )
        if self.key and not self.certificate:
            raise ConfigError("access.key without access.certificate: TLS needs both (or a PEM file that holds both)")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, where a certificate is given."""
        if self.certificate is None:
            return None
        for file in filter(None, (self.certificate, self.key)):
            if not Path(file).is_file():
                raise NotFoundError(f"no certificate or key at {file}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{self.certificate}: no certificate with its key in PEM format: {error}") from error
        return context

    def admits(self, header: str | None) -> bool:
        """Whether an Authorization header holds the token; takes the same time for every wrong one."""
        if self.token is None:
            return True
        kind, _, given = (header or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.token.encode())
        return same and kind.lower() in ("api-key", "bearer")
