"""A policy that runs elsewhere: behind a policy server, brachium's or openpi's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ServerError, SpecMismatchError, WireError
from ..spec import ActionChunk, EmbodimentSpec, Guidance, Observation
from .connection import PolicyConnection
from .request import OURS, PROTOCOL, RequestFormat, Wish, read_actions


class RemotePolicy:
    """Predicts chunks by asking a server.

    A server of brachium says what robot its policy is for; one of openpi does not, and is told nothing of noise.

    Args:
        address: ``ws://HOST:PORT``, ``wss://...``, or ``HOST:PORT``.
        token: What the server asks for.
        authority: PEM file of the certificate authority to trust, for TLS with a certificate of one's own.
        embodiment: What the policy is for; needed for a server that does not say so, checked for one that does.
        action_horizon: Actions in a chunk, for a server that does not say so.
        request_format: How requests are written, for servers other than brachium's.
        timeout_s: How long a reply may take [s].
        patience_s: How long to wait for a server that is not up yet [s].

    Raises:
        ServerError, WireError: See `PolicyConnection`.
        SpecMismatchError: The policy is for another robot, or the server does not say for which.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        authority: str | None = None,
        embodiment: EmbodimentSpec | None = None,
        action_horizon: int | None = None,
        request_format: RequestFormat | None = None,
        timeout_s: float = 5.0,
        patience_s: float = 0.0,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._access: dict[str, Any] = {"token": token, "authority": authority}
        self._numbers = itertools.count()
        self.connection = PolicyConnection(address, patience_s=patience_s, **self._access)
        try:
            told = self._told(self.connection)
            self.is_ours = told is not None
            self.request_format = RequestFormat() if self.is_ours else (request_format or RequestFormat())
            self.identity: Mapping[str, Any] = {} if told is None else told["identity"]
            spec = embodiment if told is None else EmbodimentSpec.from_dict(told["spec"])
            horizon = action_horizon if told is None else int(told["action_horizon"])
            if spec is None or horizon is None:
                raise SpecMismatchError(
                    f"{address} does not say what robot its policy is for: expected embodiment= and action_horizon="
                )
            if embodiment is not None:
                spec.require_same(embodiment, f"the policy at {address}", "the robot")
        except BaseException:
            self.connection.close()
            raise
        self.embodiment, self.action_horizon = spec, horizon
        self.noise_dim = spec.action.dim if told is None else int(told["noise_dim"])
        self.takes_guidance = False if told is None else bool(told["takes_guidance"])

    def _told(self, connection: PolicyConnection) -> dict[str, Any] | None:
        """What a server of brachium says of itself."""
        told = connection.metadata.get(OURS)
        if told is None:
            return None
        if not isinstance(told, dict) or told.get("protocol") != PROTOCOL:
            got = told.get("protocol") if isinstance(told, dict) else told
            raise WireError(f"{self.address}: expected protocol {PROTOCOL}, got {str(got)[:40]}: update the older side")
        lacking = {"spec", "action_horizon", "noise_dim", "takes_guidance", "identity"} - set(told)
        if lacking:
            raise WireError(f"{self.address}: the handshake lacks {sorted(lacking)}")
        if told.get("executor") is not None:
            raise ServerError(
                f"{self.address} executes chunks itself ({told['executor']}); brachium's client does so too. Start the "
                "server without executor="
            )
        return told

    def reconnect(self) -> None:
        """Connect anew after a failure; what is there must be the same policy as before.

        Raises:
            ServerError: Nobody there, or another checkpoint than before.
        """
        self.connection.close()
        connection = PolicyConnection(self.address, **self._access)
        told = self._told(connection)
        if (told is not None) != self.is_ours or (told is not None and told["identity"] != self.identity):
            connection.close()
            raise ServerError(f"{self.address} serves another policy than before: start the run anew")
        self.connection = connection

    def predict(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray,
        guidance: Sequence[Guidance | None] | None = None,
    ) -> ActionChunk:
        """Chunks (n, h, a) for n observations and noise (n, h, noise_dim).

        Raises:
            ServerError: The server refused, failed, went away or took too long.
            WireError: The reply is none, or not finite.
        """
        guides = guidance if guidance is not None else [None] * len(observations)
        chunks: list[np.ndarray] = []
        under_way = 2 if self.is_ours else 1
        pairs = list(zip(observations, noise, guides))
        for start in range(0, len(pairs), under_way):
            futures = [self.connection.submit(self._request(*pair)) for pair in pairs[start : start + under_way]]
            for future in futures:
                reply = self.connection.wait(future, self.timeout_s)
                chunks.append(read_actions(reply, action_dim=self.embodiment.action.dim))
        if any(len(chunk) != self.action_horizon for chunk in chunks):
            raise WireError(
                f"{self.address}: expected chunks of {self.action_horizon} actions, got {sorted(map(len, chunks))}"
            )
        return ActionChunk(
            actions=np.stack(chunks),
            control_hz=self.embodiment.control_hz,
            timestamp=max(o.timestamp for o in observations),
        )

    def _request(self, observation: Observation, noise: np.ndarray, guide: Guidance | None) -> dict[str, Any]:
        message = self.request_format.write(observation, self.embodiment)
        if self.is_ours:
            wish = Wish(id=next(self._numbers), noise=np.asarray(noise, np.float32), guidance=guide)
            message[OURS] = {**wish.write(), "timestamp": float(observation.timestamp)}
        return message

    def close(self) -> None:
        """End the connection."""
        self.connection.close()
