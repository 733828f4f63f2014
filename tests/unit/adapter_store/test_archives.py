"""Archives: what is taken from them, what is passed over, what is refused, however they are cut into pieces."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_store.archives import ArchiveFile
from adapter_store.bundle import BUNDLE_FILES, CONFIG_FILE, WEIGHTS_FILE, StagedBundle
from adapter_store.errors import (
    AdapterStoreError,
    ArchiveInvalid,
    ArchiveTooDense,
    ArchiveTruncated,
    BundleIncomplete,
    BundleTooLarge,
    MemberRefused,
)

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = os.urandom(70_000) + bytes(5_000)
FILES = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
LIMITS = {CONFIG_FILE: 100_000, WEIGHTS_FILE: 1 << 20}


class Unseekable(io.RawIOBase):
    """A pipe: zipfile then writes sizes and checksums after the data."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.written += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **more: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            archive.addfile(member(name, len(data), **more), io.BytesIO(data))
    return out.getvalue()


def member(name: str, size: int = 0, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 1.5  # which POSIX's form tells in a header of its own
    for key, value in more.items():
        setattr(info, key, value)
    return info


def zipped(
    files: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED, piped: bool = False, big: bool = False
) -> bytes:
    out = Unseekable() if piped else io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=big) as file:
                file.write(data)
    return bytes(out.written) if isinstance(out, Unseekable) else out.getvalue()


def in_folder(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}{name}": data for name, data in files.items()}


BESIDE = {"README.md": b"# a card", **FILES, "tokenizer.json": bytes(100_000), "._README.md": b"mac"}
GOOD: dict[str, bytes] = {
    "tar": tar(FILES),
    "tar of a folder": tar(in_folder("bot/", FILES)),
    "tar of the folder .": tar(in_folder("./", FILES)),
    "GNU tar": tar(in_folder("bot/", FILES), tarfile.GNU_FORMAT),
    "old tar": tar(FILES, tarfile.USTAR_FORMAT),
    "tar with a long folder": tar(in_folder("b" * 200 + "/", FILES)),
    "GNU tar with a long folder": tar(in_folder("b" * 200 + "/", FILES), tarfile.GNU_FORMAT),
    "tar with a folder in the prefix": tar(in_folder("b" * 120 + "/", FILES), tarfile.USTAR_FORMAT),
    "tar with harmless files": tar(BESIDE),
    "tar.gz": gzip.compress(tar(BESIDE)),
    "zip": zipped(BESIDE),
    "stored zip": zipped(in_folder("bot/", BESIDE), method=zipfile.ZIP_STORED),
    "piped zip": zipped(BESIDE, piped=True),
    "zip64": zipped(BESIDE, big=True),
    "piped zip64": zipped(BESIDE, piped=True, big=True),
    "zip from a Mac": zipped({**in_folder("bot/", FILES), "__MACOSX/bot/._adapter_config.json": b"resource fork"}),
}


def with_folder_entries(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(member("./", type=tarfile.DIRTYPE))
            for name, data in FILES.items():
                archive.addfile(member(f"./{name}", len(data)), io.BytesIO(data))
    else:
        with zipfile.ZipFile(out, "w") as zip_archive:
            zip_archive.mkdir("bot")
            for name, data in FILES.items():
                zip_archive.writestr(f"bot/{name}", data)
    return out.getvalue()


GOOD |= {f"{kind} with its folder": with_folder_entries(kind) for kind in ("tar", "zip")}


def unpack(folder: Path, pieces: Iterator[bytes] | list[bytes]) -> dict[str, bytes]:
    """What is staged; no other file may be there."""
    folder.mkdir(parents=True)
    bundle = StagedBundle(folder, LIMITS)
    archive = ArchiveFile(bundle)
    try:
        for piece in pieces:
            archive.feed(piece)
        archive.end()
    finally:
        archive.close()
        assert {path.name for path in folder.rglob("*")} <= set(BUNDLE_FILES)
    return {name: (folder / name).read_bytes() for name in bundle.sizes}


@pytest.mark.parametrize("kind", GOOD)
def test_the_two_files_are_taken(kind: str, tmp_path: Path) -> None:
    """From each kind of archive, at its top or in one folder, with what PEFT writes beside them."""
    assert unpack(tmp_path / "bundle", [GOOD[kind]]) == FILES


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(GOOD)), cuts=st.lists(st.integers(0, 80_000), max_size=40))
def test_how_a_body_is_cut_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, kind: str, cuts: list[int]
) -> None:
    """Any pieces give the same files."""
    whole = GOOD[kind]
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(edges)]
    assert unpack(tmp_path_factory.mktemp("cut") / "bundle", pieces) == FILES


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "piped zip64", "stored zip"])
def test_an_archive_may_come_byte_by_byte(kind: str, tmp_path: Path) -> None:
    """The smallest pieces there are."""
    small = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS[:300]}
    made = {
        "tar": tar(small),
        "tar.gz": gzip.compress(tar(small)),
        "piped zip64": zipped(small, piped=True, big=True),
        "stored zip": zipped(small, method=zipfile.ZIP_STORED),
    }[kind]
    assert unpack(tmp_path / "bundle", [made[at : at + 1] for at in range(len(made))]) == small


def special(kind: bytes, name: str = CONFIG_FILE, link: str = "/etc/passwd") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member(name, type=kind, linkname=link))
    return out.getvalue()


def zip_link() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(CONFIG_FILE)
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def renamed(name: bytes) -> bytes:
    """A zip whose first member has a name that zipfile would not write."""
    placeholder = b"x" * len(name)
    return zipped({placeholder.decode(): b"1", **FILES}).replace(placeholder, name)


def flagged(flag: int) -> bytes:
    raw = bytearray(zipped(FILES))
    raw[6:8] = struct.pack("<H", flag)
    return bytes(raw)


def with_path_record(path: bytes) -> bytes:
    """A tar whose member is called so by its extended header alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member(CONFIG_FILE, 2, pax_headers={"path": "x" * len(path)}, mtime=0), io.BytesIO(b"{}"))
    return out.getvalue().replace(b"path=" + b"x" * len(path), b"path=" + path)


def bomb(member_bytes: int = 80 << 20) -> bytes:
    squeeze = zlib.compressobj(9, wbits=31)
    head = tarfile.TarInfo("README.md")
    head.size = 60 << 20
    out = squeeze.compress(head.tobuf())
    for _ in range(member_bytes >> 20):
        out += squeeze.compress(bytes(1 << 20))
    return out + squeeze.flush()


REFUSED: dict[str, tuple[Callable[[], bytes], type[AdapterStoreError]]] = {
    "nothing": (lambda: b"", ArchiveTruncated),
    "garbage": (lambda: os.urandom(2_000), ArchiveInvalid),
    "gzip of no tar": (lambda: gzip.compress(b"x" * 2_000), ArchiveInvalid),
    "a hard link": (lambda: special(tarfile.LNKTYPE), MemberRefused),
    "a symbolic link": (lambda: special(tarfile.SYMTYPE), MemberRefused),
    "a symbolic link with a long target": (lambda: special(tarfile.SYMTYPE, link="x" * 200), MemberRefused),
    "a device": (lambda: special(tarfile.CHRTYPE), MemberRefused),
    "a block device": (lambda: special(tarfile.BLKTYPE), MemberRefused),
    "a pipe": (lambda: special(tarfile.FIFOTYPE), MemberRefused),
    "a sparse file": (lambda: special(tarfile.GNUTYPE_SPARSE), MemberRefused),
    "a link in a zip": (zip_link, MemberRefused),
    "a name that leads up": (lambda: tar({"../adapter_config.json": CONFIG}), MemberRefused),
    "a name that leads up and down": (lambda: tar({"a/../adapter_config.json": CONFIG}), MemberRefused),
    "an absolute name": (lambda: tar({"/adapter_config.json": CONFIG}), MemberRefused),
    "an absolute name in a zip": (lambda: renamed(b"/etc/passwd"), MemberRefused),
    "a drive's name": (lambda: renamed(b"C:/x"), MemberRefused),
    "a backslash": (lambda: renamed(b"..\\x"), MemberRefused),
    "a NUL in a zip": (lambda: renamed(b"adapter_config.json\0x"), MemberRefused),
    "a NUL in a tar": (lambda: with_path_record(b"adapter_config.json\0x"), MemberRefused),
    "a path that leads up in a header": (lambda: with_path_record(b"../../adapter_config.json"), MemberRefused),
    "an unknown member": (lambda: tar({**FILES, "run.py": b"import os"}), MemberRefused),
    "an unknown member in a zip": (lambda: zipped({**FILES, "run.py": b"import os"}), MemberRefused),
    "two folders deep": (lambda: tar(in_folder("a/b/", FILES)), MemberRefused),
    "two adapters": (lambda: tar({**in_folder("a/", FILES), **in_folder("b/", FILES)}), MemberRefused),
    "a file twice": (lambda: tar({**FILES, "./adapter_config.json": CONFIG}), BundleIncomplete),
    "many members": (lambda: tar({f"._{n}": b"" for n in range(300)}), MemberRefused),
    "long headers": (lambda: tar(FILES, pax_headers={"comment": "x" * 1_100_000}), ArchiveInvalid),
    "much to pass over": (lambda: tar({"tokenizer.json": bytes((64 << 20) + 1)}), MemberRefused),
    "a config past its limit": (lambda: tar({CONFIG_FILE: bytes(100_001)}), BundleTooLarge),
    "weights past their limit, of unknown length": (
        lambda: zipped({WEIGHTS_FILE: os.urandom((1 << 20) + 1)}, piped=True),
        BundleTooLarge,
    ),
    "a tar cut off": (lambda: tar(FILES)[:70_000], ArchiveTruncated),
    "a tar without its end": (lambda: tar(FILES)[: 512 * 8 + len(WEIGHTS) // 512 * 512], ArchiveTruncated),
    "a tar.gz cut off": (lambda: gzip.compress(tar(FILES))[:-4], ArchiveTruncated),
    "a tar.gz with a wrong checksum": (lambda: gzip.compress(tar(FILES))[:-8] + bytes(8), ArchiveInvalid),
    "a zip cut off": (lambda: zipped(FILES)[:60_000], ArchiveTruncated),
    "a zip without its end": (lambda: zipped(FILES)[:-10], ArchiveTruncated),
    "a zip that something follows": (lambda: zipped(FILES) + b"x", ArchiveInvalid),
    "a tar that something follows": (lambda: tar(FILES) + tar(FILES), ArchiveInvalid),
    "a tar.gz that something follows": (lambda: gzip.compress(tar(FILES)) * 2, ArchiveInvalid),
    "an encrypted zip": (lambda: flagged(1), ArchiveInvalid),
    "a strongly encrypted zip": (lambda: flagged(1 << 6), ArchiveInvalid),
    "a masked zip": (lambda: flagged(1 << 13), ArchiveInvalid),
    "a bzip2 zip": (lambda: zipped(FILES, method=zipfile.ZIP_BZIP2), ArchiveInvalid),
    "a stored zip from a pipe": (lambda: zipped(FILES, method=zipfile.ZIP_STORED, piped=True), ArchiveInvalid),
    "a damaged zip": (lambda: zipped(FILES, method=zipfile.ZIP_STORED).replace(CONFIG, CONFIG[::-1]), ArchiveInvalid),
    "a zip whose directory has another checksum": (lambda: other_directory(zipped(FILES)), ArchiveInvalid),
    "a bomb": (bomb, ArchiveTooDense),
}


def other_directory(raw: bytes) -> bytes:
    at = raw.index(b"PK\x01\x02")
    return raw[: at + 16] + bytes(4) + raw[at + 20 :]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_adapter_is_refused(kind: str, tmp_path: Path) -> None:
    """With an error of the store's, whole or in pieces, and with no other file than the two."""
    make, error = REFUSED[kind]
    raw = make()
    for number, size in enumerate((len(raw) or 1, 4_093)):
        with pytest.raises(error) as caught:
            unpack(tmp_path / f"bundle-{number}", [raw[at : at + size] for at in range(0, len(raw), size)])
        assert type(caught.value) is error


@settings(max_examples=150)
@given(kind=st.sampled_from(sorted(GOOD)), data=st.data())
def test_a_mutated_archive_is_taken_or_told(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """Bytes changed, removed or doubled: nothing but an error of the store's comes of it."""
    raw = bytearray(GOOD[kind])
    interesting = [*range(700), *range(len(raw) - 1_500, len(raw))]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(interesting)) % len(raw)
        match data.draw(st.sampled_from("csd")):
            case "c":
                raw[at] = data.draw(st.integers(0, 255))
            case "s":
                del raw[at : at + data.draw(st.integers(1, 600))]
            case _:
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 600))]
    folder = tmp_path_factory.mktemp("mutated") / "bundle"
    with suppress(AdapterStoreError):
        unpack(folder, [bytes(raw[at : at + 5_000]) for at in range(0, len(raw), 5_000)])
