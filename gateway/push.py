"""`tailor adapter push`: a folder's two files to a gateway, small ones at once, large ones in parts that resume."""

import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from gateway.api_client import ApiClient, ApiError

FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
IN_PARTS_FROM_BYTES: Final = 64 << 20
READ_BYTES: Final = 1 << 20
PARTS_AT_ONCE: Final = 2  # one travels while the gateway waits for its disk to keep the other
TRIES: Final = 6
LONGEST_WAIT_S: Final = 20.0
Advance = Callable[[int], None]
P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file as it was when it was hashed."""

    path: Path
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name


class Push:
    """One folder on its way to one adapter; `stage` is told what is being done, and how many bytes there are to do."""

    def __init__(
        self,
        client: ApiClient,
        name: str,
        folder: Path,
        *,
        stage: Callable[[str, int], Advance],
        alias: str = "default",
        in_parts_from_bytes: int = IN_PARTS_FROM_BYTES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._path = f"/v1/adapters/{name}"
        self._folder = folder
        self._stage = stage
        self._alias = {"alias": alias}
        self._in_parts_from_bytes = in_parts_from_bytes
        self._sleep = sleep

    def run(self) -> Any:
        """The version that was published.

        Raises:
            ApiError: the gateway refused, or stayed away; what it has acknowledged is not sent again by the next run.
        """
        size_bytes = sum((self._folder / name).stat().st_size for name in FILES)
        if size_bytes < self._in_parts_from_bytes:
            return self._at_once(size_bytes, str(uuid.uuid4()))
        return self._in_parts()

    def _at_once(self, size_bytes: int, key: str) -> Any:
        def send() -> Any:
            advance = self._stage("sending", size_bytes)
            with ExitStack() as opened:
                files = {
                    name: (name, opened.enter_context(closing(Counted(self._folder / name, advance)))) for name in FILES
                }
                headers = {"idempotency-key": key}
                place = f"{self._path}/versions"
                return self._client.call("POST", place, files=files, headers=headers, params=self._alias)

        return self._patiently(send)

    def _in_parts(self) -> Any:
        files = self._hashed()
        upload = self._begun(files)
        left = [(file, number) for file in files for number in _told(upload, file)["missing"]]
        part_bytes: int = upload["part_bytes"]
        advance = self._stage("sending", sum(file.size_bytes for file in files))
        advance(sum(file.size_bytes for file in files) - sum(_size(file, number, part_bytes) for file, number in left))
        place = f"{self._path}/uploads/{upload['id']}"

        def send(file: LocalFile, number: int) -> None:
            part = _read(file, number, part_bytes)
            self._patiently(lambda: self._put(f"{place}/{file.name}/{number}", part))
            advance(len(part))

        send_all(lambda one: send(*one), left)
        self._stage("checking", 0)
        return self._patiently(lambda: self._client.call("POST", f"{place}/complete", params=self._alias))

    def _begun(self, files: list[LocalFile]) -> Any:
        """The upload of these very files that an earlier run has begun, or a new one."""
        declared = [{"name": file.name, "bytes": file.size_bytes, "sha256": file.sha256} for file in files]
        for upload in self._patiently(lambda: self._client.call("GET", f"{self._path}/uploads"))["data"]:
            if all({key: _told(upload, file)[key] for key in ("bytes", "sha256")} == _declared(file) for file in files):
                return upload
        key = str(uuid.uuid4())
        body = {"files": declared}
        return self._patiently(
            lambda: self._client.call("POST", f"{self._path}/uploads", body, headers={"idempotency-key": key})
        )

    def _put(self, path: str, part: bytes) -> Any:
        headers = {"x-content-sha256": hashlib.sha256(part).hexdigest()}
        return self._client.call("PUT", path, content=part, headers=headers)

    def _hashed(self) -> list[LocalFile]:
        paths = [self._folder / name for name in FILES]
        advance = self._stage("hashing", sum(path.stat().st_size for path in paths))
        return [_hashed(path, advance) for path in paths]

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(call, self._sleep)


def send_all(send: Callable[[P], T], parts: Sequence[P]) -> list[T]:
    """What `send` gives for each of the parts, some at once; the first failure ends it."""
    senders = ThreadPoolExecutor(PARTS_AT_ONCE)
    try:
        sent = [senders.submit(send, part) for part in parts]
        for one in as_completed(sent):
            one.result()
        return [one.result() for one in sent]
    finally:
        senders.shutdown(cancel_futures=True)


def patiently(call: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Again, after a while, where that may help: for calls that may be repeated. Raises ApiError."""
    for tried in range(TRIES):
        try:
            return call()
        except ApiError as error:
            may_pass = error.status is None or error.status in (408, 429, 502, 503, 507)
            if not may_pass or tried == TRIES - 1:
                raise
            sleep(min(LONGEST_WAIT_S, 2**tried * random.uniform(0.5, 1.0)))
    raise AssertionError


class Counted:
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._file: BinaryIO = path.open("rb")
        self._advance = advance

    def close(self) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data

    def fileno(self) -> int:
        """httpx asks the file's size by it."""
        return self._file.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _hashed(path: Path, advance: Advance) -> LocalFile:
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
            advance(len(piece))
    return LocalFile(path, size_bytes, digest.hexdigest())


def _told(upload: Any, file: LocalFile) -> Any:
    return next(told for told in upload["files"] if told["name"] == file.name)


def _declared(file: LocalFile) -> dict[str, Any]:
    return {"bytes": file.size_bytes, "sha256": file.sha256}


def _size(file: LocalFile, number: int, part_bytes: int) -> int:
    return min(part_bytes, file.size_bytes - (number - 1) * part_bytes)


def _read(file: LocalFile, number: int, part_bytes: int) -> bytes:
    with file.path.open("rb") as opened:
        opened.seek((number - 1) * part_bytes)
        return opened.read(_size(file, number, part_bytes))


@contextmanager
def shown() -> Iterator[Callable[[str, int], Advance]]:
    """Bars on standard error: what is being done, how much of it is done, how fast."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def stage(what: str, size_bytes: int) -> Advance:
            task = progress.add_task(what, total=size_bytes or None)
            return lambda more: progress.update(task, advance=more)

        yield stage
