"""The directory as owners and those who join see it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import msgspec

from ckpt_core.config import Environment
from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.errors import EngineUnavailable
from ckpt_core.membership import FleetVersion, Membership, Offering, OwnerEntry, OwnerRow
from ckpt_core.p2p.offers import MAX_OFFER_BYTES, Offer
from ckpt_core.store_records import EngineRecord

T = TypeVar("T")
_POLL_S = 0.2
_log = logging.getLogger(__name__)


class DirectoryClient:
    """Calls to `ckpt serve`. A context manager.

    Args:
        url: where it listens.
        options: TLS and token; by default what the environment says (CKPT_DIRECTORY_TOKEN, CKPT_CA_FILE, ...).

    Raises (any call):
        EngineUnavailable: it does not answer, or nobody offers what was asked for.
        EngineStateError: a later life of this owner is registered.
        EngineError: any other refusal.
    """

    def __init__(self, url: str, options: EndpointOptions | None = None) -> None:
        environment = Environment.read()
        options = options or replace(EndpointOptions.of(environment), bearer_token=environment.directory_token)
        options = replace(options, max_answer_bytes=MAX_OFFER_BYTES)
        self._endpoint = Endpoint(url=url.rstrip("/"), engine="directory", options=options)

    def __enter__(self) -> DirectoryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the HTTP client."""
        self._endpoint.close()

    def __str__(self) -> str:
        return str(self._endpoint)

    # -- owners ------------------------------------------------------------------------------------------------------
    def register(self, entry: OwnerEntry) -> Membership:
        """This owner lives."""
        answer = self._endpoint.request("PUT", f"/owners/{_path(entry.instance)}", json=msgspec.to_builtins(entry))
        return msgspec.json.decode(answer.content, type=Membership)

    def leave(self, instance: str) -> None:
        """This owner is gone."""
        self._endpoint.request("DELETE", f"/owners/{_path(instance)}")

    def offer(self, instance: str, offer: Offer) -> None:
        """This owner offers a version."""
        self._endpoint.request("PUT", _offer_path(instance, offer.digest), json=msgspec.to_builtins(offer))

    def withdraw(self, instance: str, digest: str) -> None:
        """This owner does not offer it any more."""
        self._endpoint.request("DELETE", _offer_path(instance, digest))

    # -- those who join ----------------------------------------------------------------------------------------------
    def owners(self) -> list[OwnerRow]:
        """All that live."""
        return msgspec.json.decode(self._endpoint.request("GET", "/owners").content, type=list[OwnerRow])

    def fleet(self) -> FleetVersion:
        """What the fleet runs."""
        return msgspec.json.decode(self._endpoint.request("GET", "/fleet").content, type=FleetVersion)

    def settled(self, within_s: float) -> FleetVersion:
        """What the fleet runs when no update is under way.

        Raises:
            EngineUnavailable: one is, to the end of the time.
        """
        return self._until(within_s, self._settled)

    def newest(self) -> str:
        """Digest of the version that was offered last.

        Raises:
            EngineUnavailable: there is none.
        """
        answer = self._endpoint.request("GET", "/offering", params={"version": ""})
        return msgspec.json.decode(answer.content, type=Offering).digest

    def offers(self, version: str, within_s: float) -> tuple[Offering, list[Offer]]:
        """All offers of a version, as soon as there is one.

        Args:
            version: digest, label, or beginning of a digest; "" for what was offered last.

        Raises:
            EngineUnavailable: nobody offers it, to the end of the time.
        """
        return self._until(within_s, lambda: self._offers(version))

    def changed(self, epoch: int, within_s: float) -> bool:
        """Whether owners or what they offer are not those of an epoch any more, or change in time."""

        def look() -> bool:
            if self.fleet().epoch == epoch:
                raise EngineUnavailable(f"{self}: the same owners as before")
            return True

        try:
            return self._until(within_s, look)
        except EngineUnavailable:
            return False

    def joined(self, records: Sequence[EngineRecord]) -> None:
        """Engines run this now."""
        self._endpoint.request("PUT", "/engines", json=msgspec.to_builtins(list(records)))

    def _settled(self) -> FleetVersion:
        fleet = self.fleet()
        if fleet.updating:
            raise EngineUnavailable(f"{self}: an update of the fleet is under way; join when it is over")
        return fleet

    def _offers(self, version: str) -> tuple[Offering, list[Offer]]:
        answer = self._endpoint.request("GET", "/offering", params={"version": version})
        offering = msgspec.json.decode(answer.content, type=Offering)
        found = [self._offered(owner, offering.digest) for owner in offering.owners]
        offers = [offer for offer in found if offer is not None]
        if not offers:
            raise EngineUnavailable(f"{self}: those who offered {version!r:.200} have left")
        return offering, offers

    def _offered(self, instance: str, digest: str) -> Offer | None:
        """None where that owner left meanwhile."""
        try:
            answer = self._endpoint.request("GET", _offer_path(instance, digest))
        except EngineUnavailable as error:
            _log.info("an owner left meanwhile: %s", error)
            return None
        return msgspec.json.decode(answer.content, type=Offer)

    def _until(self, within_s: float, ask: Callable[[], T]) -> T:
        deadline = time.monotonic() + within_s
        while True:
            try:
                return ask()
            except EngineUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)


def _offer_path(instance: str, digest: str) -> str:
    return f"/owners/{_path(instance)}/offers/{_path(digest)}"


def _path(text: str) -> str:
    return quote(text, safe="")
