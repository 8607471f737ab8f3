"""Verify and adopt: looks at live engines, with the version that they are said to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckpt_core.agent_peers import AgentPeers
from ckpt_core.config import UpdateConfig
from ckpt_core.content import Content
from ckpt_core.conversation import Conversation
from ckpt_core.errors import ConfigError, EngineStateError, VerificationError
from ckpt_core.fleet import Fleet, Member
from ckpt_core.history import History
from ckpt_core.inspection import Inspection
from ckpt_core.look_findings import check_equal, engine_looks
from ckpt_core.look_report import EngineLook, LookReport
from ckpt_core.report import engine_records
from ckpt_core.source import SourceIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """Of one fleet, checked and locked.

    Attributes:
        agents: starts them, where a checkpoint must be digested.
    """

    fleet: Fleet
    history: History
    conversation: Conversation
    config: UpdateConfig
    agents: Callable[[], AgentPeers]

    def verify(self, name: str) -> LookReport:
        """See Updater.verify."""
        start, pause_s = time.perf_counter(), 0.0
        found: dict[str, EngineLook] = {}
        for (digest, label), members in self._groups(name).items():
            inspection, engines = self._look_at(members, digest, label)
            found |= engines
            pause_s += inspection.pause_s
        engines_in_order = tuple(found[member.endpoint.url] for member in self.fleet.members)
        return LookReport(engines=engines_in_order, seconds=time.perf_counter() - start, pause_s=pause_s)

    def adopt(self, index: SourceIndex, name: str, *, copy: bool) -> LookReport:
        """See Updater.adopt."""
        start = time.perf_counter()
        if not index.in_files:
            raise ConfigError(
                "expected a checkpoint in files to adopt, got tensors on a GPU; write them to files first"
            )
        self._check_recovered()
        content = self._prepared(index)
        label = name or self._known_label(content.digest) or content.digest[:12]
        self.history.store.check_label(label, content.digest)
        inspection = self._inspect(self.fleet, content)
        inspection.check_fit()
        recorded = self._recorded(self.fleet.members, content.digest)
        found = engine_looks(self.fleet, inspection, label, content.digest, recorded)
        for engine in found.values():
            check_equal(engine)
        records = engine_records(
            self.fleet,
            inspection.boarding,
            inspection.compared,
            content=content,
            version=label,
            update_id=inspection.look_id,
        )
        self.history.adopted(records, content, copy=copy)
        return LookReport(
            engines=tuple(found.values()), seconds=time.perf_counter() - start, pause_s=inspection.pause_s
        )

    def _check_recovered(self) -> None:
        """Raise EngineStateError where a dead controller left these engines in an update: it may still be finished."""
        urls = {member.endpoint.url for member in self.fleet.members}
        for update in self.history.left_behind():
            if left := sorted(urls & {endpoint.url for endpoint in update.endpoints}):
                raise EngineStateError(
                    f"expected nothing left behind, got update {update.update_id} of {left[0]}, whose controller died; run "
                    "`ckpt recover` first"
                )

    def _groups(self, name: str) -> dict[tuple[str, str], list[Member]]:
        """Members by digest and label of what they are to run."""
        if name:
            record = self.history.pool.find(name)
            return {(record.digest, record.label): list(self.fleet.members)}
        groups: dict[tuple[str, str], list[Member]] = {}
        for member in self.fleet.members:
            runs = self.history.ran(member.endpoint.url, member.instance_id)
            if runs is None:
                raise ConfigError(
                    f"expected {member.endpoint} in the store, got nothing about its present life; name a --version, or tell by "
                    "`ckpt adopt` what it runs"
                )
            groups.setdefault((runs.digest, runs.version), []).append(member)
        return groups

    def _look_at(self, members: Sequence[Member], digest: str, label: str) -> tuple[Inspection, dict[str, EngineLook]]:
        fleet, recorded, warm = Fleet(members=members), self._recorded(members, digest), self.history.warm(digest)
        if warm is None and not any(any(prints) for prints in recorded.values()):
            raise VerificationError(
                f"version {label or digest} is cold, and no fingerprints of it were written down for {members[0].endpoint}: there "
                "is nothing to compare with; name its files to `ckpt adopt`"
            )
        content = None if warm is None else self._prepared(warm.index)
        if content is not None and content.digest != digest:
            raise VerificationError(
                f"expected version {digest} in its files, got {content.digest}: they were written since; restore them"
            )
        inspection = self._inspect(fleet, content)
        return inspection, engine_looks(fleet, inspection, label, digest, recorded)

    def _prepared(self, index: SourceIndex) -> Content:
        """Before the pause: mapped and digested."""
        content = Content(index=index, agents=self.agents(), config=replace(self.config, digest_content=True))
        content.prepare(None)
        return content

    def _inspect(self, fleet: Fleet, content: Content | None) -> Inspection:
        inspection = Inspection(fleet=fleet, conversation=self.conversation, config=self.config, content=content)
        inspection.run()
        return inspection

    def _known_label(self, digest: str) -> str:
        return next((record.label for record in self.history.pool.versions() if record.digest == digest), "")

    def _recorded(self, members: Sequence[Member], digest: str) -> dict[str, tuple[str, ...]]:
        """Fingerprints of that version as these engines committed it, by URL."""
        runs = {member.endpoint.url: self.history.ran(member.endpoint.url, member.instance_id) for member in members}
        return {url: record.fingerprints for url, record in runs.items() if record and record.digest == digest}
