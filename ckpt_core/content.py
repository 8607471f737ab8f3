"""What an update is about: the checkpoint in the agents' host pools, its manifest, and the digests that ranks compare with.

Parts of the plan of last time are digested before the pause, and before the tensors: bytes that change after that are not what
the digests say. Those of a new plan come later; then tensors are digested once more when all is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ckpt_core.agent_peers import AgentPeers, PreparedPool
from ckpt_core.agreement import KnownPlan, version_digest
from ckpt_core.config import UpdateConfig, VerifyLevel
from ckpt_core.errors import VerificationError
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.layout import Layout
from ckpt_core.leaf_digest import Digests
from ckpt_core.manifest import Manifest
from ckpt_core.plan_parts import NO_PARTS, PlanParts
from ckpt_core.source import SourceIndex


@dataclass(slots=True, kw_only=True)
class Content:
    """See the module.

    Attributes:
        index: where the bytes are.
        structure, manifest: without and with digests, once it is prepared.
        pool: what preparing gave.
        parts: of the plan that is agreed on; None where none are compared.
    """

    index: SourceIndex
    agents: AgentPeers
    config: UpdateConfig
    structure: Manifest = field(init=False)
    manifest: Manifest = field(init=False)
    pool: PreparedPool = field(init=False)
    parts: PlanParts | None = None
    _digests: Digests | None = None
    _late: bool = False

    def prepare(self, known: KnownPlan | None) -> None:
        """Before the pause: map and digest it."""
        self.structure = Manifest.from_index(self.index)
        if known is not None and known.plan.structure_digest == self.structure.structure_digest:
            self.parts = known.parts if self._compares else None
        remote = self.index.remote
        self.pool = self._asked(digest=self.config.digest_content and remote is None, parts=self.parts or NO_PARTS)
        self._digests = self.pool.parts if self.parts is not None else None
        names = (extent.name for extent in self.index.extents)
        told = dict(zip(names, remote.digests, strict=True)) if remote is not None else self.pool.digests
        self.manifest = self.structure.with_digests(told)

    @property
    def digest(self) -> str:
        """That the version is bound to."""
        return version_digest(self.manifest)

    @property
    def label(self) -> str:
        """To publish it under where nobody chose one: that of the peers it is read from, or the start of its digest."""
        remote = self.index.remote
        return remote.version if remote is not None else self.digest.removeprefix("structure-")[:12]

    def take_plan(self, plan: FleetPlan, layouts: Sequence[Layout]) -> None:
        """All agreed on this new plan; by rank: what each takes."""
        if not self._compares:
            return
        self.parts = PlanParts(self.structure)
        for rank, layout in enumerate(layouts):
            self.parts.add(plan.plan_of(rank), plan.host_of[:rank].count(plan.host_of[rank]), layout)
        self._digests = self.digests_of(self.parts)

    def digests_of(self, parts: PlanParts) -> Digests:
        """Of these parts of it, after the tensors: `check_again` when they are not needed any more."""
        self._late = True
        return self._asked(digest=False, parts=parts).parts

    def expected_by(self, rank: int) -> dict[int, bytes]:
        """What it will compare with: see `wire.Begin`."""
        if self.parts is None or self._digests is None:
            return {}
        return self.parts.of_rank(rank, self._digests)

    def check_again(self) -> None:
        """After all is sent: where parts were digested after the tensors, whether these are still what they were.

        Raises:
            VerificationError: one is not.
        """
        if not self._late:
            return
        again = self._asked(digest=True, parts=NO_PARTS).digests
        if changed := sorted(name for name, digest in self.pool.digests.items() if again[name] != digest):
            raise VerificationError(
                f"tensor {changed[0]!r:.200} and {len(changed) - 1} others: expected digest {self.pool.digests[changed[0]]} in the "
                f"host pool, got {again[changed[0]]}: the checkpoint was written during the update; write a new one beside it"
            )

    @property
    def _compares(self) -> bool:
        return self.config.level is not VerifyLevel.NONE

    def _asked(self, *, digest: bool, parts: PlanParts) -> PreparedPool:
        return self.agents.prepare(self.index, digest=digest, parts=parts, timeout_s=self.config.prepare_timeout_s)
