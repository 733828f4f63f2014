"""Who the tenants of a load test are at the server, and which version of their adapters may answer when."""

from dataclasses import dataclass, field, replace

from loadtests.recording import ABSENT, VersionLife
from loadtests.scenario import Tenants


@dataclass(frozen=True, slots=True)
class Version:
    """One that was published."""

    number: int
    digest: str


@dataclass(slots=True)
class Adapter:
    """An adapter of a tenant of the load test, with what it is to the server."""

    tenant: str
    name: str
    versions: list[Version] = field(default_factory=list)
    """Those that can be published, oldest first."""
    current: Version | None = None
    seeds: int = 0
    """Versions that were made so far."""


@dataclass(slots=True)
class Tenant:
    """A tenant of the load test at the server."""

    place: int  # of the schedule's tenants
    name: str  # in the schedule
    group: Tenants
    id: str
    key_id: str
    key: str
    adapters: list[Adapter] = field(default_factory=list)
    file: str = ""
    """What its fine-tuning jobs are trained on."""


class Lives:
    """The versions' lives so far, by which `isolation` judges; times in ns since the run's begin, 0 before it."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self._lives: list[VersionLife] = []

    def begin(self, adapter: Adapter, version: Version, since: int) -> None:
        """From then on its name may stand for the version."""
        self._lives.append(VersionLife(adapter.tenant, adapter.name, version.digest, since, ABSENT, None))

    def end(self, adapter: Adapter, digest: str, until: int, *, leaving: int = ABSENT) -> None:
        """The name stands for the version no longer; all its lives that are open end.

        `leaving`: when its deletion began, if it was deleted.
        """
        for place, life in enumerate(self._lives):
            mine = (life.tenant, life.model, life.digest) == (adapter.tenant, adapter.name, digest)
            if mine and life.until == ABSENT:
                self._lives[place] = replace(life, until=until, leaving=leaving)

    def all(self) -> tuple[VersionLife, ...]:
        """With the answers that are known by now."""
        return tuple(replace(life, answer=self.answers.get(life.digest)) for life in self._lives)
