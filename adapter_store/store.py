"""An adapter's life: published, resolved, listed, deleted. The one door by which an adapter becomes servable.

A version is immutable and named by its content; the alias `default` is what moves. Order of writing: blobs
first, then one transaction with all rows. So a crash leaves at most blobs that no row names, which
`collect_orphans` removes.
"""

import hashlib
import math
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_store import aliases, catalog, grants, proofs, scaling
from adapter_store.aliases import NAME, NOUN, MoveKind, NewMove, Split, main_of
from adapter_store.blob_rows import NamedBlob
from adapter_store.blobs import Blobs, blob_key
from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE, StagedBundle, bundle_digest, storage_errors
from adapter_store.catalog import DEFAULT_ALIAS, Adapter, BlobFile, Provenance, Version
from adapter_store.changes import record_change, take_turn
from adapter_store.content import PUT_TRIES, all_stored, drop_unreferenced, put_missing
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.erasure import Erasure, Erasures
from adapter_store.errors import (
    AdapterNotFound,
    AdapterRejected,
    BlobCorrupt,
    NameInvalid,
    NameReserved,
    OtherBaseModel,
    StorageError,
)
from adapter_store.faults import Inspection
from adapter_store.ids import TenantId, VersionId, new_version_id
from adapter_store.inspector import Inspector
from adapter_store.proofs import Reference
from adapter_store.quota import NO_QUOTA, Kept, Quota, kept_by
from adapter_store.scrub import forget
from adapter_store.signing import Signer, VersionSignature, sign_version, signatures_of
from adapter_store.threads import in_thread
from adapter_store.together import Together
from adapter_store.transactions import reading, writing

MODEL = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]{0,63})(?:@(?P<number>[1-9][0-9]{0,8})(?P<factor>\*[0-9.]{1,6})?|:(?P<alias>[a-z0-9][a-z0-9._-]{0,63}))?"
)
FINE_TUNED = "ft:"
FINE_TUNED_REST = re.compile(
    r":[a-z0-9._-]{0,64}:(?P<name>[a-z0-9][a-z0-9._-]{0,63}):(?P<id>[0-9a-f]{24})(?::ckpt-step-(?P<step>[1-9][0-9]{0,8}))?"
)
"""After `ft:` and the base model's name: an organisation, which selects nothing, the adapter, the version's id, and of
a checkpoint its step."""
CANONICAL = "canonical.json"


@dataclass(frozen=True, slots=True)
class _Checked:
    """A bundle that passed: its verdict and its two files, on disk and in the blob store."""

    inspection: Inspection
    digest: str
    files: tuple[BlobFile, BlobFile]
    paths: tuple[Path, ...]

    @property
    def named(self) -> list[tuple[NamedBlob, Path]]:
        blobs = [NamedBlob(file.key, file.sha256, file.size_bytes) for file in self.files]
        return list(zip(blobs, self.paths, strict=True))


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be published, for whom, and within what."""

    tenant_id: TenantId
    name: str
    alias: str | None
    checked: _Checked
    provenance: Provenance
    published_by: str | None
    quota: Quota
    reference: Reference | None
    together: Together[Version]
    provisional: bool


IsCheckpoint = Callable[[AsyncConnection, VersionId, int], Awaitable[bool]]
"""Whether the version is the checkpoint of a job at that step."""


async def _no_checkpoint(_: AsyncConnection, __: VersionId, ___: int) -> bool:
    return False


class AdapterStore:
    """Adapters of all tenants on one base model. Every call names the tenant.

    `moves_when_proved`: what is published for a name that stands for something already gets it once it is proved.
    `proof_delay_s`: where no name waits for that, a version's proof is due so long after its publish.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        blobs: Blobs,
        inspector: Inspector,
        *,
        signer: Signer | None = None,
        moves_when_proved: bool = False,
        proof_delay_s: float = 0,
        is_checkpoint: IsCheckpoint = _no_checkpoint,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`signer` None: versions are published without a signature."""
        self._moves_when_proved = moves_when_proved
        self._proof_delay_s = 0 if moves_when_proved else math.ceil(proof_delay_s)
        self._engine = engine
        self._blobs = blobs
        self._inspector = inspector
        self._base = inspector.base
        self._signer = signer
        self._is_checkpoint = is_checkpoint
        self._clock = clock
        self.erasures = Erasures(engine, blobs, signer, clock=clock)

    async def publish(
        self,
        tenant_id: TenantId,
        name: str,
        staged: StagedBundle,
        *,
        alias: str | None = DEFAULT_ALIAS,
        provenance: Provenance = Provenance.UPLOAD,
        published_by: str | None = None,
        quota: Quota = NO_QUOTA,
        reference: Reference | None = None,
        together: Together[Version] | None = None,
        provisional: bool = False,
    ) -> Version:
        """Checks the bundle and makes it the version that `alias` of the adapter stands for, signed.

        `alias` None: none is moved. An adapter's first version gets the default one in any case, but for a
        `provisional` one, which is asked for by its number and its id alone.
        The same content again gives the version that is there, without a new number. `published_by`: id of the key.
        `reference`: what it answered where it was trained, which its proof is held to.
        `together`: what is written in the same transaction, or nothing is.
        Raises NameInvalid, NameReserved, BundleIncomplete, AdapterRejected, QuotaExceeded, PromptsInvalid, StorageFull,
        StorageUnavailable.
        """
        self.check_name(name)
        if alias is not None:
            aliases.check_alias(alias)
        if reference is not None:
            reference.check()
        checked = await self._check(tenant_id, staged)
        quota.check_rank(checked.inspection.rank)
        order = _Order(
            tenant_id,
            name,
            alias,
            checked,
            provenance,
            published_by,
            quota,
            reference,
            together or Together(),
            provisional,
        )
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._undo, tenant_id, [file.sha256 for file in checked.files])
            version = await self._put_and_commit(order)
            undo.pop_all()
        return version

    async def kept(self, tenant_id: TenantId, name: str | None) -> Kept:
        """What the tenant has already, beside what it is about to publish as `name`; None: not known yet."""
        async with reading(self._engine) as connection:
            return await kept_by(connection, tenant_id, name)

    async def resolve(self, tenant_id: TenantId, model: str) -> Version | Split:
        """What answers for `model`.

        `name` → what its alias `default` stands for, `name:staging` → that alias, `name@3` → that version,
        `name@3*0.7` → what was made of it by that factor, and `ft:base:org:name:id` → the version of that id, the
        tenant's own or one that another has lent it; of a checkpoint with `:ckpt-step-<step>` after it.

        Raises AdapterNotFound (missing and foreign alike), OtherBaseModel.
        """
        async with reading(self._engine) as connection:
            found = await self._find(connection, tenant_id, model)
        if found is None:
            raise AdapterNotFound(model)
        if main_of(found).base_fingerprint != self._base.fingerprint:
            raise OtherBaseModel(
                f"adapter {model!r} was made for another base model than '{self._base.name}': train it again"
            )
        return found

    async def _find(self, connection: AsyncConnection, tenant_id: TenantId, model: str) -> Version | Split | None:
        if model.startswith(FINE_TUNED):
            return await self._find_fine_tuned(connection, tenant_id, model)
        parts = MODEL.fullmatch(model)
        if parts is None:
            return None
        if parts["factor"] is not None:
            asked = scaling.read_scaling(parts["number"] + parts["factor"])
            return None if asked is None else await scaling.find(connection, tenant_id, parts["name"], asked)
        if parts["number"] is not None:
            return await catalog.find_by_number(connection, tenant_id, parts["name"], int(parts["number"]))
        return await aliases.find(connection, tenant_id, parts["name"], parts["alias"] or DEFAULT_ALIAS)

    async def _find_fine_tuned(self, connection: AsyncConnection, tenant_id: TenantId, model: str) -> Version | None:
        parts = FINE_TUNED_REST.fullmatch(model.removeprefix(f"{FINE_TUNED}{self._base.name}"))
        if parts is None:
            return None
        found = await catalog.find_by_id(connection, tenant_id, parts["name"], parts["id"])
        if found is None:
            lent = await grants.find_lent(connection, tenant_id, parts["name"], parts["id"])
            found = None if lent is None else replace(lent, adapter_name=model)  # not to be taken for an own one
        if found is not None and parts["step"] is not None:
            is_one = await self._is_checkpoint(connection, found.id, int(parts["step"]))
            return found if is_one else None
        return found

    def fine_tuned_name(self, version: Version) -> str:
        """How OpenAI would call the version: it never stands for another."""
        return f"{FINE_TUNED}{self._base.name}::{version.adapter_name}:{version.id.removeprefix('ver_')}"

    async def previous(self, version: Version) -> Version | None:
        """The newest older version of the same adapter and base model. Raises StorageUnavailable."""
        async with reading(self._engine) as connection:
            return await catalog.find_previous(connection, version)

    async def list(self, tenant_id: TenantId, after: str | None = None, limit: int = 100) -> tuple[Adapter, ...]:
        """The tenant's adapters by name; the next page starts `after` the last name of this one."""
        async with reading(self._engine) as connection:
            return await catalog.list_adapters(connection, tenant_id, after, limit)

    async def show(
        self, tenant_id: TenantId, name: str, *, before: int | None = None, limit: int | None = None
    ) -> tuple[Adapter, tuple[Version, ...]]:
        """The adapter and its versions, newest first, those below number `before`. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            adapter = await self.find_in(connection, tenant_id, name)
            return adapter, await catalog.list_versions(connection, tenant_id, name, before, limit)

    async def find_in(self, connection: AsyncConnection, tenant_id: TenantId, name: str) -> Adapter:
        """The adapter as the caller's transaction sees it. Raises AdapterNotFound."""
        row = await catalog.find_adapter(connection, tenant_id, name)
        found = await aliases.find(connection, tenant_id, name)
        if row is None or found is None:
            raise AdapterNotFound(name)
        return Adapter(row.id, tenant_id, name, row.created_at, main_of(found))

    async def signatures(self, versions: Collection[Version]) -> dict[VersionId, VersionSignature]:
        """Who published the versions, and the signature of that; those from before there were signatures lack one."""
        async with reading(self._engine) as connection:
            return await signatures_of(connection, [version.id for version in versions])

    async def scalings(self, versions: Collection[Version]) -> dict[VersionId, scaling.Scaling]:
        """How those of the versions that are scaled ones came about."""
        async with reading(self._engine) as connection:
            return await scaling.of(connection, [version.id for version in versions])

    async def stage_scaled(self, source: Version, factor: int, staged: StagedBundle) -> None:
        """The files of the version scaled by so many ten-thousandths. Raises BlobCorrupt, StorageError."""
        await scaling.stage(self._blobs, source, factor, staged)

    async def delete(self, tenant_id: TenantId, name: str) -> Erasure:
        """Erases the adapter here; what replicas hold of it is the gateway's to erase. Raises AdapterNotFound."""
        erasure = await self.erasures.request(tenant_id, name)
        await self.erasures.drop_blobs(erasure)
        return await self.erasures.complete(erasure.id)

    async def collect_orphans(self, older_than_s: float) -> int:
        """Removes blobs of that age that no row names, left by crashes; how many.

        An age far above the longest publish keeps it from racing one.
        """
        before = self._clock() - older_than_s
        stale: dict[TenantId, set[str]] = defaultdict(set)
        async for blob in self._blobs.list():
            if blob.modified_at < before:
                stale[blob.tenant_id].add(blob.sha256)
        removed = await self._blobs.sweep_partial(before)
        for tenant_id, digests in stale.items():
            removed += len(await drop_unreferenced(self._engine, self._blobs, tenant_id, digests))
        return removed

    def check_name(self, name: str) -> None:
        """Raises NameInvalid, NameReserved; to be called before an upload is taken in."""
        if not NAME.fullmatch(name):
            raise NameInvalid(
                f"{name[:80]!r} is not an adapter's name: 1 to 64 of a-z, 0-9, '.', '_', '-', "
                "the first a letter or digit"
            )
        if name == self._base.name:
            raise NameReserved(f"'{name}' is the base model's name: choose another")

    async def _check(self, tenant_id: TenantId, staged: StagedBundle) -> _Checked:
        staged.check_complete()
        inspection = await self._inspector.inspect(staged.folder)
        if inspection.faults:
            raise AdapterRejected(inspection.faults)
        canonical = staged.folder / CANONICAL
        with storage_errors():
            await in_thread(canonical.write_bytes, inspection.config)
        config_sha256 = hashlib.sha256(inspection.config).hexdigest()
        weights_sha256 = staged.sha256[WEIGHTS_FILE]
        files = (
            _blob_file(tenant_id, CONFIG_FILE, config_sha256, len(inspection.config)),
            _blob_file(tenant_id, WEIGHTS_FILE, weights_sha256, staged.sizes[WEIGHTS_FILE]),
        )
        paths = (canonical, staged.folder / WEIGHTS_FILE)
        return _Checked(inspection, bundle_digest(config_sha256, weights_sha256), files, paths)

    async def _put_and_commit(self, order: _Order) -> Version:
        if self._signer is not None:
            await self._signer.ready()
        files = order.checked.named
        for _ in range(PUT_TRIES):
            await put_missing(self._engine, self._blobs, order.tenant_id, files)
            async with writing(self._engine) as connection:
                await take_turn(connection)
                if await all_stored(self._blobs, [blob for blob, _ in files]):
                    await forget(connection, order.tenant_id, [blob.sha256 for blob, _ in files])
                    return await self._commit(connection, order)
        raise BlobCorrupt(f"the blobs of '{order.name}' vanish as fast as they are stored")

    async def _commit(self, connection: AsyncConnection, order: _Order) -> Version:
        now = int(self._clock())
        await order.together.before(connection)
        version = await catalog.find_by_digest(connection, order.tenant_id, order.name, order.checked.digest)
        if version is None:
            await self._check_quota(connection, order)
            version = await self._new_version(connection, order, now)
            await catalog.insert_version(connection, version)
            await proofs.begin(connection, version, now + self._proof_delay_s, order.reference)
            if self._signer is not None:
                await sign_version(connection, self._signer, version)
        for alias in await self._to_move(connection, order, version):
            move = NewMove(version.adapter_id, alias, MoveKind.PUBLISH, order.published_by or "", "", now)
            if await aliases.point(connection, move, [(version.id, version.number, 1)]):
                await record_change(connection, NOUN, order.tenant_id, order.name)
        await order.together.after(connection, version)
        return version

    async def _to_move(self, connection: AsyncConnection, order: _Order, version: Version) -> set[str]:
        """The alias that was named, and the default one where the adapter is new; the others wait for the proof."""
        current = await aliases.find(connection, version.tenant_id, version.adapter_name, DEFAULT_ALIAS)
        if order.provisional:
            return set()
        if current is None:
            return {DEFAULT_ALIAS, order.alias or DEFAULT_ALIAS}
        if order.alias is None:
            return set()
        if self._moves_when_proved and main_of(current).id != version.id and not await _is_proved(connection, version):
            await proofs.move_when_proved(connection, version.id)
            await record_change(connection, NOUN, order.tenant_id, order.name)
            return set()
        return {order.alias}

    async def _check_quota(self, connection: AsyncConnection, order: _Order) -> None:
        if order.quota.counts:
            besides = order.together.besides_upload
            kept = await kept_by(connection, order.tenant_id, order.name, besides_upload=besides)
            kept.check(order.quota, sum(file.size_bytes for file in order.checked.files))

    async def _new_version(self, connection: AsyncConnection, order: _Order, now: int) -> Version:
        checked = order.checked
        config, weights = checked.files
        adapter_id = await catalog.ensure_adapter(connection, order.tenant_id, order.name, now)
        return Version(
            id=new_version_id(),
            adapter_id=adapter_id,
            tenant_id=order.tenant_id,
            adapter_name=order.name,
            number=await catalog.take_number(connection, adapter_id),
            digest=checked.digest,
            file_hashes=bytes.fromhex(config.sha256 + weights.sha256),
            config_bytes=config.size_bytes,
            weights_bytes=weights.size_bytes,
            rank=checked.inspection.rank,
            modules=checked.inspection.modules,
            base_fingerprint=self._base.fingerprint,
            provenance=order.provenance,
            created_at=now,
            published_by=order.published_by,
        )

    async def _undo(self, tenant_id: TenantId, digests: Collection[str]) -> None:
        with suppress(StorageError):  # the failure that led here is the one to tell; collect_orphans does the rest
            await drop_unreferenced(self._engine, self._blobs, tenant_id, digests)


async def _is_proved(connection: AsyncConnection, version: Version) -> bool:
    return (await proofs.find(connection, version.id)).status is proofs.Status.PROVED


def _blob_file(tenant_id: TenantId, name: str, sha256: str, size_bytes: int) -> BlobFile:
    return BlobFile(name, blob_key(tenant_id, sha256), sha256, size_bytes)
