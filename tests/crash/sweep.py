"""Kills a process that works on the store before each of its file operations, and looks at what is left (D1).

`python -m tests.crash.sweep FOLDER [--points N] [--all-losses] [--without FUNCTION]` prints JSON. A process of its own:
it forks, traces and waits for children.
"""

import argparse
import asyncio
import errno
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy  # noqa: F401  imported here, once, and not after each fork
import obstore.store  # noqa: F401
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store import blobs as blobs_module
from adapter_store.aliases import Aliases
from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, StagedFile, Staging
from adapter_store.catalog import Fallback, Provenance, Version
from adapter_store.engine import AsyncConnection, create_async_engine
from adapter_store.erasure import Erasure
from adapter_store.errors import StorageError
from adapter_store.faults import Bounds, Inspection
from adapter_store.ids import TenantId
from adapter_store.inspection import inspect
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from adapter_store.together import Together
from adapter_store.uploads import DeclaredFile, Upload, Uploads
from gateway.database import migrate, open_engine
from gateway.tenants import Tenants
from tests.bad_adapters import write_base, write_good
from tests.crash.tracer import Durable, Loss, Trouble, trace
from training import queue, saved_runs
from training.file_uploads import FileUpload, FileUploads, NewUpload
from training.files import NO_QUOTA, File, Files, NewFile, Purpose, create_result, keep_blob
from training.job_erasure import JobErasures
from training.jobs import Jobs, NewJob
from training.queue import CheckpointWith, Claimed, EndWith

TENANT = TenantId("ten_a")
OPERATIONS: tuple[tuple[str, ...], ...] = (
    ("publish", "bot", "1"),
    ("publish", "bot", "2"),  # the alias moves on
    ("publish", "bot", "1"),  # and back
    ("publish", "twin", "2"),  # the same files under another name
    ("fallback", "bot"),
    ("move", "bot", "2"),
    ("split", "bot"),
    ("rollback", "bot"),
    ("delete", "twin"),
    ("tenant", "acme"),
    ("publish", "third", "3"),
    ("delete", "bot"),
    ("create job", "third"),
    ("claim job",),
    ("save job", "1"),
    ("save job", "2"),
    ("checkpoint", "1"),
    ("end job", "2"),
    ("erase job",),
    ("publish", "bot", "1"),  # the name again, after its blobs went
    ("publish", "third", "1"),
    ("in parts", "old", "3"),
    ("file", "train.jsonl", "1"),
    ("file in parts", "parts.jsonl", "2"),
    ("delete", "third"),
    ("publish", "old", "2"),
    ("tenant", "globex"),
    ("delete", "old"),
    ("erase file", "train.jsonl"),
    ("erase file", "parts.jsonl"),
    ("delete", "bot"),  # the last: no blob is left
    ("publish", "bot", "2"),
)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
WIDTHS = (1, 30)  # operations that fail: one, and as many as an upload has
TRIES = 60
REFUSED = "-"
SEEDS = ("1", "2", "3")
PART_BYTES = 16 << 10
FILE_BYTES = 3_000
NOW = 1_000_000_000


class InProcess(Inspector):
    """The real inspection without its child process, which would be another process to trace."""

    async def inspect(self, folder: Path) -> Inspection:
        return inspect(folder, self.base, self.bounds)


class _Ending(Together[Version]):
    """The upload is over in the transaction that publishes it."""

    def __init__(self, uploads: Uploads, upload: Upload) -> None:
        self._uploads = uploads
        self._upload = upload

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        await self._uploads.close_in(connection, self._upload, made.id)


class _FileEnding(Together[File]):
    """The same for a file."""

    def __init__(self, uploads: FileUploads, upload: FileUpload) -> None:
        self._uploads = uploads
        self._upload = upload

    async def after(self, connection: AsyncConnection, made: File) -> None:
        await self._uploads.close_in(connection, self._upload, "{}", made.id)


def new_job(name: str, fingerprint: str) -> NewJob:
    return NewJob(TENANT, "key_1", "base", fingerprint, "supervised", "file-1", 7, {"rank": 8}, adapter=name)


def _new_file(name: str, sha256: str) -> NewFile:
    return NewFile(TENANT, Purpose.FINE_TUNE, name, sha256, FILE_BYTES)


class Home:
    """A store on SQLite and a folder, opened anew."""

    def __init__(self, path: Path, base: BaseModel, adapters: Path) -> None:
        self.adapters = adapters
        self.fingerprint = base.fingerprint
        self.blobs_folder = path / "blobs"
        self.staging = Staging(path / "staging")
        self.engine: AsyncEngine = open_engine(f"sqlite+aiosqlite:///{path / 'tailor.db'}")
        self.blobs = Blobs.open(str(self.blobs_folder))
        self.store = AdapterStore(self.engine, self.blobs, InProcess(base, Bounds()))
        self.aliases = Aliases(self.engine, base)
        self.tenants = Tenants(self.engine)
        self.uploads = Uploads(self.engine, self.blobs, part_bytes=PART_BYTES)
        self.files = Files(self.engine, self.blobs)
        self.file_uploads = FileUploads(self.engine, self.blobs)
        self.jobs = Jobs(self.engine)
        self.job_erasures = JobErasures(self.engine)

    async def do(self, operation: tuple[str, ...]) -> None:
        match operation:
            case ("publish", name, seed):
                async with self.staging.stage() as bundle:
                    for file in BUNDLE_FILES:
                        async with bundle.open(file) as staged:
                            await staged.write((self.adapters / seed / file).read_bytes())
                    await self.store.publish(TENANT, name, bundle)
            case ("in parts", name, seed):
                await self._upload_in_parts(name, self.adapters / seed)
            case ("fallback", name):
                await self.aliases.set_fallback(TENANT, name, "default", Fallback.BASE)
            case ("move", name, number):
                await self.aliases.move(TENANT, name, "staging", [(int(number), 1)], moved_by="key_1")
            case ("split", name):
                await self.aliases.move(TENANT, name, "default", [(1, 9), (2, 1)], moved_by="key_1")
            case ("rollback", name):
                await self.aliases.roll_back(TENANT, name, "default", moved_by="key_1")
            case ("delete", name):
                await self.store.delete(TENANT, name)
            case ("tenant", name):
                await self.tenants.create(name)
            case ("file", name, seed):
                async with self._staged(seed.encode() * FILE_BYTES) as staged:
                    await self.files.create(_new_file(name, staged.sha256), staged.path)
            case ("file in parts", name, seed):
                await self._file_in_parts(name, seed.encode() * FILE_BYTES)
            case ("erase file", name):
                (file_id,) = [file.id for file in await self.files.page(TENANT) if file.filename == name]
                await self._carry_on(await self.files.erase(TENANT, file_id))
            case ("create job", name):
                await self.jobs.create(new_job(name, self.fingerprint))
            case ("claim job",):
                await queue.claim(self.engine, "w1", base_fingerprint=self.fingerprint, now=NOW, most=1)
            case ("save job", step):
                async with self._staged(step.encode() * FILE_BYTES) as staged:
                    await saved_runs.keep(self.engine, self.blobs, await self._claimed(), int(step), staged.path)
            case ("checkpoint", seed):
                await self._publish_for(await self._claimed(), seed, is_end=False)
            case ("end job", seed):
                await self._publish_for(await self._claimed(), seed, is_end=True)
            case ("erase job",):
                (job,) = await self.jobs.page(TENANT)
                await self._carry_on(await self.job_erasures.erase(TENANT, job.id))

    async def _carry_on(self, erasure: Erasure) -> None:
        await self.store.erasures.drop_blobs(erasure)
        await self.store.erasures.complete(erasure.id)

    async def _claimed(self) -> Claimed:
        (job,) = await self.jobs.page(TENANT)
        return Claimed(job, NOW)

    async def _publish_for(self, claimed: Claimed, seed: str, *, is_end: bool) -> None:
        """A checkpoint, or the end of the job with a result file."""
        async with self._staged(seed.encode() * FILE_BYTES) as staged:
            blob = await keep_blob(self.engine, self.blobs, TENANT, staged.path)

        async def also(connection: AsyncConnection, _: Version) -> list[str]:
            return [(await create_result(connection, self.blobs, TENANT, "result.csv", blob, NOW)).id]

        name_of = self.store.fine_tuned_name
        together: Together[Version] = EndWith(claimed, now=lambda: NOW, name_of=name_of, also=also)
        if not is_end:
            together = CheckpointWith(claimed, 1, {}, now=lambda: NOW, name_of=name_of)
        async with self.staging.stage() as bundle:
            for file in BUNDLE_FILES:
                async with bundle.open(file) as staged:
                    await staged.write((self.adapters / seed / file).read_bytes())
            await self.store.publish(
                TENANT,
                claimed.job.adapter,
                bundle,
                alias="default" if is_end else None,
                provenance=Provenance.JOB,
                together=together,
                provisional=not is_end,
            )

    @asynccontextmanager
    async def _staged(self, data: bytes) -> AsyncIterator[StagedFile]:
        async with self.staging.stage({"data": len(data)}) as bundle, bundle.open("data") as file:
            await file.write(data)
            await file.flush()
            yield file

    async def _file_in_parts(self, name: str, data: bytes) -> None:
        """Two parts, the last first."""
        new = NewUpload(TENANT, Purpose.FINE_TUNE, name, len(data), None)
        upload = await self.file_uploads.create(new, NO_QUOTA, Together())
        ids: list[str] = []
        for half in (data[len(data) // 3 :], data[: len(data) // 3]):
            async with self._staged(half) as file:
                ids.insert(0, (await self.file_uploads.keep_part(upload, file.path, file.sha256, len(half))).id)
        parts = await self.file_uploads.parts_in_order(upload, ids)
        async with self._staged(b"".join([piece async for piece in self.file_uploads.read(upload, parts)])) as file:
            await self.files.create(
                _new_file(name, file.sha256), file.path, together=_FileEnding(self.file_uploads, upload)
            )
        await self.file_uploads.drop_parts(upload)

    async def _upload_in_parts(self, name: str, folder: Path) -> None:
        """Each part staged, stored and noted; the last of a file first."""
        data = {file: (folder / file).read_bytes() for file in BUNDLE_FILES}
        declared = {file: DeclaredFile(len(read), sha256(read).hexdigest()) for file, read in data.items()}
        upload = await self.uploads.create(TENANT, name, declared, Together())
        for file, read in data.items():
            for number in range(upload.part_count(file), 0, -1):
                async with self.staging.stage() as bundle, bundle.open(file) as staged:
                    await staged.write(read[(number - 1) * PART_BYTES : number * PART_BYTES])
                    await staged.flush()
                    upload = await self.uploads.keep_part(upload, file, number, staged.path, staged.sha256)
        async with self.staging.stage() as bundle:
            await self.uploads.assemble(upload, bundle)
            await self.store.publish(TENANT, name, bundle, together=_Ending(self.uploads, upload))
        await self.uploads.drop_parts(upload)

    async def state(self) -> Any:
        """What a client can see, without ids and times."""
        found = {}
        for adapter in await self.store.list(TENANT):
            _, versions = await self.store.show(TENANT, adapter.name)
            numbers = {str(version.number): version.digest for version in versions}
            names = [[alias.name, alias.shares] for alias in await self.aliases.list(TENANT, adapter.name)]
            moves = [
                [move.number, move.before, move.after] for move in await self.aliases.history(TENANT, adapter.name)
            ]
            found[adapter.name] = [adapter.default.number, adapter.default.fallback.value, numbers, names, moves]
        tenants = [tenant.name for tenant in await self.tenants.page(None, 10)]
        files = sorted((file.filename, file.sha256) for file in await self.files.page(TENANT))
        jobs = [
            [
                job.status,
                job.saved and job.saved.step,
                len(job.result_files),
                len(await self.jobs.checkpoints(TENANT, job.id)),
            ]
            for job in await self.jobs.page(TENANT)
        ]
        return json.loads(json.dumps([found, tenants, files, jobs]))  # lists throughout, as what it is compared with

    async def faults(self, acknowledged: int, expected: list[Any]) -> list[str]:
        """What is not as it should be after a restart."""
        await migrate(self.engine)
        self.staging.sweep()
        state = await self.state()
        if state not in expected[acknowledged : acknowledged + 2]:
            return [f"{acknowledged} were acknowledged, and this is there: {state}"]
        faults = []
        named = set()
        for adapter in await self.store.list(TENANT):
            for version in (await self.store.show(TENANT, adapter.name))[1]:
                for file in version.files:
                    named.add(file.key)
                    if not await self.blobs.exists(file.key, file.size_bytes):
                        faults.append(f"{adapter.name}@{version.number}: {file.name} is gone or short")
                    elif await self.blobs.sha256(file.key) != file.sha256:
                        faults.append(f"{adapter.name}@{version.number}: {file.name} is not what was published")
        for sent in await self.files.page(TENANT):
            named.add(sent.blob.key)
            if await self.blobs.sha256(sent.blob.key) != sent.sha256:
                faults.append(f"{sent.filename} is not what was sent")
        for job in await self.jobs.page(TENANT):
            if job.saved is not None:
                key = job.saved.blob(TENANT).key
                named.add(key)
                if await self.blobs.sha256(key) != job.saved.sha256:
                    faults.append(f"what was saved at step {job.saved.step} is not what was saved")
        await FileUploads(self.engine, self.blobs, clock=lambda: time.time() + 1e9).sweep()
        await self.store.collect_orphans(older_than_s=-1e9)
        await Uploads(self.engine, self.blobs, clock=lambda: time.time() + 1e9).sweep()
        folders = (self.blobs_folder, self.staging.root)
        kept = {str(path.relative_to(root)) for root in folders for path in root.rglob("*") if path.is_file()}
        if kept != named:
            faults.append(f"left over: {sorted(kept - named)}, missing: {sorted(named - kept)}")
        return faults


def in_child(work: Callable[[], Awaitable[Any]]) -> Any:
    """Runs it in a forked process, so that this one stays without threads; what it gives."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            told = json.dumps(asyncio.run(work())).encode()  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001  told to the parent
            told = json.dumps([f"it does not start again: {error!r}"]).encode()
        with os.fdopen(writes, "wb") as pipe:
            pipe.write(told)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


class Sweep:
    """`losses`: all at each point, or one in turn."""

    def __init__(self, folder: Path, without: str | None) -> None:
        self.folder = folder
        self.without = without
        self.base = BaseModel.read(write_base(folder / "base"))
        self.adapters = folder / "adapters"
        for seed in SEEDS:
            write_good(self.adapters / seed, seed=int(seed))
        self.template = folder / "template"
        self.expected: list[Any] = in_child(self._rehearse)

    def open(self, path: Path) -> Home:
        return Home(path, self.base, self.adapters)

    async def _rehearse(self) -> list[Any]:
        """Makes the home that every point begins with, and notes what is there after each operation."""
        home = self.open(self.template)
        await migrate(home.engine)
        await home.do(("publish", "old", "2"))
        shutil.copytree(self.template, self.folder / "rehearsal")
        await home.engine.dispose()
        home = self.open(self.folder / "rehearsal")
        states = [await home.state()]
        for operation in OPERATIONS:
            await home.do(operation)
            states.append(await home.state())
        await home.engine.dispose()
        return states

    def point(self, kill_at: int | None, losses: tuple[Loss, ...]) -> tuple[list[str], list[str]]:
        """(the operations that were let through, what was wrong afterwards)"""
        root = self.folder / "home"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.template, root)
        durable = Durable(root)
        reads, writes = os.pipe()
        done = trace(lambda: self._work(root, writes), root, kill_at, durable.sync)
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            acknowledged = len(pipe.read())
        faults = []
        for loss in losses:
            left = self.folder / "left"
            shutil.rmtree(left, ignore_errors=True)
            durable.write_to(left, loss, seed=kill_at or 0)
            found = in_child(lambda left=left: self.open(left).faults(acknowledged, self.expected))  # type: ignore[misc]
            where = f"before {kill_at} (after {done[-1] if done else 'nothing'}), {loss.value}"
            faults += [f"{where}: {fault}" for fault in found]
        durable.close()
        return done, faults

    def trouble(self, trouble: Trouble) -> tuple[int, list[str]]:
        """How often an operation on the store was refused, and what was wrong then or after all worked again."""
        root = self.folder / "home"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.template, root)
        reads, writes = os.pipe()
        done = trace(lambda: self._work_on(root, writes), root, None, lambda _: None, trouble)
        os.close(writes)
        with os.fdopen(reads, "rb") as pipe:
            told = pipe.read().decode().splitlines()
        faults = [line for line in told if line != REFUSED]
        faults += in_child(lambda: self.open(root).faults(len(OPERATIONS), self.expected))
        hit = done[trouble.first] if trouble.first < len(done) else "nothing"
        where = f"{os.strerror(trouble.errno)}, {trouble.count} from {trouble.first} ({hit})"
        return told.count(REFUSED), [f"{where}: {line}" for line in faults]

    def _work_on(self, root: Path, tell: int) -> None:
        """Does each operation until it succeeds; tells what fails otherwise than it may."""
        home = self.open(root)

        async def state() -> Any:
            for _ in range(TRIES):
                try:
                    return await home.state()
                except StorageError:
                    continue
            return "it does not answer"

        async def settle(number: int, operation: tuple[str, ...]) -> str | None:
            for _ in range(TRIES):
                try:
                    await home.do(operation)
                except StorageError:
                    os.write(tell, f"{REFUSED}\n".encode())
                    now = await state()
                    if now == self.expected[number + 1]:
                        return None
                    if now != self.expected[number]:
                        return f"{operation} was refused, and this is there: {now}"
                except Exception as error:  # noqa: BLE001  told
                    return f"{operation}: {error!r}"
                else:
                    return None
            return f"{operation} does not recover"

        async def work() -> None:
            for number, operation in enumerate(OPERATIONS):
                fault = await settle(number, operation)
                if fault is not None:
                    os.write(tell, f"{fault}\n".encode())
                    return

        asyncio.run(work())
        os._exit(0)

    def _work(self, root: Path, acknowledge: int) -> None:
        if self.without is not None:
            patch.object(blobs_module, self.without, lambda *_: None).start()  # raises where there is none of that name
        home = self.open(root)

        async def work() -> None:
            for operation in OPERATIONS:
                await home.do(operation)
                os.write(acknowledge, b".")

        asyncio.run(work())
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int)
    parser.add_argument("--all-losses", action="store_true")
    parser.add_argument("--errors", action="store_true", help="let operations fail instead of killing")
    parser.add_argument("--without")
    asked = parser.parse_args()
    create_async_engine("sqlite+aiosqlite://")
    gc.freeze()  # forks copy what they change, and the collector changes all it looks at
    sweep = Sweep(asked.folder.resolve(), asked.without)
    events, faults = sweep.point(None, tuple(Loss))
    count = len(events)
    wanted = min(asked.points or count, count)
    points = sorted({round(index * (count - 1) / max(1, wanted - 1)) for index in range(wanted)})
    losses = tuple(Loss)
    looked_at = 0
    refused = 0
    if asked.errors:
        for number, first in enumerate(points):
            width = WIDTHS[number % len(WIDTHS)]
            count, found = sweep.trouble(Trouble(first, width, ERRORS[number % len(ERRORS)]))
            refused, faults = refused + count, faults + found
        points, looked_at = points[:0], len(points)
    for number, kill_at in enumerate(points):
        chosen = losses if asked.all_losses else (losses[number % len(losses)],)
        faults += sweep.point(kill_at, chosen)[1]
        looked_at += len(chosen)
    figures = {"operations": len(events), "points": len(points), "states": looked_at, "refused": refused}
    json.dump({**figures, "faults": faults}, sys.stdout)


if __name__ == "__main__":
    main()
