"""An adapter as one archive (tar, tar.gz, zip), read as it comes: never extracted, never whole in memory.

Two member names mean something, at the top or inside one folder; what PEFT and its trainers write beside them is
passed over; anything else is refused. No member's name becomes a path: the bytes go to one of two staged files, or
nowhere. The parsers are generators that yield where they need more, so how a body is cut into pieces changes nothing.

A zip is read by its local headers, because its directory comes last; the directory then has to say the same.
"""

import re
import struct
import zlib
from collections.abc import Generator
from contextlib import suppress
from typing import Final, TypeVar

from adapter_store.bundle import BUNDLE_FILES, StagedBundle, StagedFile
from adapter_store.errors import ArchiveInvalid, ArchiveTooDense, ArchiveTruncated, MemberRefused
from adapter_store.faults import printable
from adapter_store.threads import in_thread

T = TypeVar("T")
Reading = Generator[None, None, T]

PIECE_BYTES: Final = 1 << 20
NAME_BYTES: Final = 1_024
MOST_MEMBERS: Final = 256
SKIPPED_BYTES: Final = 64 << 20  # a tokenizer of 256,000 words is half of that
DENSITY: Final = 100  # weights shrink to no less than half; a member of zeros shrinks to a thousandth
DENSE_BYTES: Final = 8 << 20  # what any archive may unpack to
TRAILING_BYTES: Final = 1 << 20  # tar pads its end to a multiple of what it writes at once

HARMLESS: Final = frozenset(
    [
        *("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
        *(".gitattributes", ".gitignore", ".DS_Store", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
        *("training_args.bin", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
    ]
)
"""What PEFT and transformers write beside an adapter; passed over unread."""


class _Source:
    """Bytes that are there or are still to come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def fill(self) -> Reading[bool]:
        """Gets at least a byte more; False where there is none."""
        raise NotImplementedError

    def peek(self, size: int) -> Reading[bytes]:
        """Up to `size` bytes, fewer only at the end; they stay."""
        while len(self._buffer) < size:
            if not (yield from self.fill()):
                break
        return bytes(self._buffer[:size])

    def exactly(self, size: int) -> Reading[bytes]:
        """Raises ArchiveTruncated."""
        data = yield from self.peek(size)
        if len(data) < size:
            raise ArchiveTruncated("the archive ends too early: send it whole")
        del self._buffer[:size]
        return data

    def some(self, most: int) -> Reading[bytes]:
        """What is there, at most so much; nothing at the end."""
        if not self._buffer:
            yield from self.fill()
        data = bytes(self._buffer[:most])
        del self._buffer[: len(data)]
        return data

    def unread(self, data: bytes) -> None:
        self._buffer[:0] = data


class _Input(_Source):
    """What has arrived of the archive."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = False

    def feed(self, data: bytes | bytearray) -> None:
        self._buffer += data

    def end(self) -> None:
        self._ended = True

    def fill(self) -> Reading[bool]:
        before = len(self._buffer)
        while len(self._buffer) == before:
            if self._ended:
                return False
            yield
        return True


class _Density:
    """Keeps a bomb from keeping a core busy: how much came out of how much."""

    def __init__(self) -> None:
        self._packed = 0
        self._unpacked = 0

    def count(self, packed: int, unpacked: int) -> None:
        """Raises ArchiveTooDense."""
        self._packed += packed
        self._unpacked += unpacked
        if self._unpacked > DENSE_BYTES + DENSITY * self._packed:
            raise ArchiveTooDense(f"the archive unpacks to more than {DENSITY} times its size: no adapter does")


class _Gunzip(_Source):
    """One gzip stream, whose checksum zlib compares."""

    def __init__(self, packed: _Source) -> None:
        super().__init__()
        self._packed = packed
        self._inflate = zlib.decompressobj(wbits=31)
        self._density = _Density()
        self._left = b""

    def fill(self) -> Reading[bool]:
        while not self._inflate.eof:
            taken = 0
            if not self._left:
                self._left = yield from self._packed.some(PIECE_BYTES)
                taken = len(self._left)
                if not taken:
                    raise ArchiveTruncated("the gzip stream ends too early: send it whole")
            data, self._left = _inflated(self._inflate, self._left)
            self._density.count(taken, len(data))
            if data:
                self._buffer += data
                return True
        if self._inflate.unused_data or (yield from self._packed.some(1)):
            raise ArchiveInvalid("something follows the gzip stream: send one archive alone")
        return False


def _inflated(inflate: "zlib._Decompress", data: bytes) -> tuple[bytes, bytes]:
    """At most a MiB of output, and the input that is left."""
    try:
        return inflate.decompress(data, PIECE_BYTES), inflate.unconsumed_tail
    except zlib.error as error:
        raise ArchiveInvalid("the archive's compressed data is damaged: make it again") from error


class _Members:
    """Which members are taken, which passed over, which refused; writes those that are taken."""

    def __init__(self, bundle: StagedBundle) -> None:
        self._bundle = bundle
        self._count = 0
        self._skipped = 0
        self._folder: tuple[str, ...] | None = None
        self._file: StagedFile | None = None

    def begin(self, raw: bytes, size_bytes: int | None) -> None:
        """A file's bytes are to come; how many, where that is known. Raises MemberRefused, BundleTooLarge."""
        name = self._taken(raw)
        if name is None:
            self._check_skipped(size_bytes or 0)
            return
        self._file = self._bundle.begin(name)
        if size_bytes is not None:
            self._file.check_size(size_bytes)

    def data(self, data: bytes) -> None:
        if self._file is None:
            self._skipped += len(data)
            self._check_skipped(0)
        else:
            self._file.take(data)

    def end(self) -> None:
        if self._file is not None:
            self._bundle.finish(self._file)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def folder(self, raw: bytes) -> None:
        """A folder's own entry. Raises MemberRefused."""
        if len(self._parts(raw)) > 1:
            raise _refused(raw, "lies too deep: an adapter's files are at the top or in one folder")

    def _taken(self, raw: bytes) -> str | None:
        parts = self._parts(raw)
        if parts[:1] == ("__MACOSX",):
            return None
        if len(parts) > 2:
            raise _refused(raw, "lies too deep: an adapter's files are at the top or in one folder")
        if not parts:
            raise _refused(raw, "has no name")
        name = parts[-1]
        if name in BUNDLE_FILES:
            return self._in_one_folder(raw, parts)
        if name in HARMLESS or name.startswith("._"):
            return None
        raise _refused(raw, f"is none of an adapter's files: send {' and '.join(BUNDLE_FILES)}")

    def _in_one_folder(self, raw: bytes, parts: tuple[str, ...]) -> str:
        *folder, name = parts
        if self._folder not in (None, tuple(folder)):
            raise _refused(raw, "lies in another folder than the first file: send one adapter")
        self._folder = tuple(folder)
        return name

    def _parts(self, raw: bytes) -> tuple[str, ...]:
        """A name in its parts, none of which leads up or out."""
        self._count += 1
        if self._count > MOST_MEMBERS:
            raise MemberRefused(f"the archive has more than {MOST_MEMBERS} members")
        if len(raw) > NAME_BYTES:
            raise _refused(raw, "has too long a name")
        if b"\0" in raw:
            raise _refused(raw, "has a NUL in its name")
        name = raw.decode("utf-8", "replace")
        if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
            raise _refused(raw, "has an absolute name, or one of another system's")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts:
            raise _refused(raw, "leads out of its folder")
        return parts

    def _check_skipped(self, more_bytes: int) -> None:
        if self._skipped + more_bytes > SKIPPED_BYTES:
            raise MemberRefused(
                f"the files beside the adapter's two have more than {SKIPPED_BYTES} bytes: leave them out"
            )


def _refused(raw: bytes, why: str) -> MemberRefused:
    return MemberRefused(f"the archive's member '{printable(raw[:160].decode('utf-8', 'replace'))}' {why}")


def _archive(source: _Source, members: _Members) -> Reading[None]:
    """Reads a whole archive of any kind, to its last byte."""
    start = yield from source.peek(512)
    if start.startswith(b"\x1f\x8b"):
        unzipped = _Gunzip(source)
        start = yield from unzipped.peek(512)
        if not _is_tar(start):
            raise ArchiveInvalid("what the gzip stream has is no tar archive")
        yield from _tar(unzipped, members)
    elif start.startswith((LOCAL, END)):
        yield from _zip(source, members)
    elif _is_tar(start):
        yield from _tar(source, members)
    elif not start:
        raise ArchiveTruncated("the body is empty: send an archive")
    else:
        raise ArchiveInvalid("this is neither a tar, a tar.gz nor a zip archive")


# tar

BLOCK: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK)
EXTENDED_BYTES: Final = 1 << 20  # of all headers with long names and the like
OCTAL: Final = re.compile(rb"[ \0]*([0-7]+)[ \0]*")
RECORD: Final = re.compile(rb"([0-9]{1,6}) ([^=\n]{1,256})=", re.DOTALL)
SPECIAL: Final = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"K": "a link",
    b"S": "a sparse file",
}


def _is_tar(block: bytes) -> bool:
    return len(block) == BLOCK and (block == ZERO_BLOCK or _checksum_holds(block))


def _checksum_holds(block: bytes) -> bool:
    found = OCTAL.fullmatch(block[148:156])
    return found is not None and int(found[1], 8) == sum(block) - sum(block[148:156]) + 8 * 0x20


def _tar(source: _Source, members: _Members) -> Reading[None]:
    long_name: bytes | None = None
    extended: dict[bytes, bytes] = {}
    left = EXTENDED_BYTES
    while True:
        block = yield from source.exactly(BLOCK)
        if block == ZERO_BLOCK:
            yield from _tar_end(source)
            return
        if not _checksum_holds(block):
            raise ArchiveInvalid("a header of the tar archive is damaged: make it again")
        kind, size = block[156:157], _octal(block[124:136])
        if kind in (b"L", b"x", b"g"):
            left -= size + BLOCK
            if left < 0:
                raise ArchiveInvalid("the tar archive has too much in its headers")
            text = yield from source.exactly(size)
            yield from source.exactly(-size % BLOCK)
            if kind == b"L":
                long_name = text.rstrip(b"\0")
            elif kind == b"x":
                extended = _records(text)
            else:
                _check_global(_records(text))
            continue
        name = extended.get(b"path", long_name if long_name is not None else _tar_name(block))
        size = _decimal(extended[b"size"]) if b"size" in extended else size
        yield from _tar_member(source, members, kind, name, size)
        long_name, extended = None, {}


def _tar_member(source: _Source, members: _Members, kind: bytes, name: bytes, size: int) -> Reading[None]:
    if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
        members.folder(name)
        if size:
            raise _refused(name, "is a folder with bytes")
        return
    if kind not in (b"0", b"\0"):
        raise _refused(name, f"is {SPECIAL.get(kind, 'of an unknown kind')}: send plain files")
    members.begin(name, size)
    yield from _copy(source, size, members)
    members.end()
    yield from source.exactly(-size % BLOCK)


def _copy(source: _Source, size: int, members: _Members) -> Reading[int]:
    """Hands on so many bytes; their CRC-32."""
    crc = 0
    while size:
        data = yield from source.some(min(size, PIECE_BYTES))
        if not data:
            raise ArchiveTruncated("the archive ends too early: send it whole")
        size -= len(data)
        crc = zlib.crc32(data, crc)
        members.data(data)
    return crc


def _tar_end(source: _Source) -> Reading[None]:
    left = TRAILING_BYTES
    while data := (yield from source.some(PIECE_BYTES)):
        left -= len(data)
        if left < 0 or data.strip(b"\0"):
            raise ArchiveInvalid("something follows the end of the tar archive: send one archive alone")


def _tar_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _octal(digits: bytes) -> int:
    found = OCTAL.fullmatch(digits)
    if found is None:  # the form for more than 8 GiB among them
        raise ArchiveInvalid("a size in the tar archive cannot be read")
    return int(found[1], 8)


def _decimal(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,15}", digits):
        raise ArchiveInvalid("a size in the tar archive cannot be read")
    return int(digits)


def _records(data: bytes) -> dict[bytes, bytes]:
    """A POSIX header's `length key=value` lines."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        found = RECORD.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ArchiveInvalid("an extended header of the tar archive is damaged")
        records[found[2]] = data[found.end() : end - 1]
        at = end
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise MemberRefused("the archive has a sparse file: send plain files")
    return records


def _check_global(records: dict[bytes, bytes]) -> None:
    if records.keys() & {b"path", b"size", b"linkpath"}:
        raise ArchiveInvalid("a header of the tar archive names or sizes all its members")


# zip

LOCAL: Final = b"PK\x03\x04"
CENTRAL: Final = b"PK\x01\x02"
END: Final = b"PK\x05\x06"
END_64: Final = b"PK\x06\x06"
LOCATOR_64: Final = b"PK\x06\x07"
DESCRIPTOR: Final = b"PK\x07\x08"
ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13
DESCRIBED: Final = 1 << 3  # sizes and checksum come after the data
STORED, DEFLATED = 0, 8
IN_EXTRA: Final = 0xFFFFFFFF
UNIX_SYSTEMS: Final = (3, 19)
PLAIN_KINDS: Final = (0, 0o040000, 0o100000)  # unsaid, folder, file


class _Entry:
    """A member as its local header has it, then as it was."""

    def __init__(self, header: bytes, name: bytes, extra: bytes) -> None:
        _, self.flags, self.method, _, _, self.crc, self.packed, self.size, _, _ = struct.unpack("<HHHHHIIIHH", header)
        self.name = name
        self.is_64 = False
        for kind, value in _extras(extra):
            if kind == 1 and len(value) >= 16:
                self.is_64 = True
                size, packed = struct.unpack("<QQ", value[:16])
                self.size = size if self.size == IN_EXTRA else self.size
                self.packed = packed if self.packed == IN_EXTRA else self.packed

    @property
    def is_folder(self) -> bool:
        return self.name.endswith(b"/")

    @property
    def is_described(self) -> bool:
        return bool(self.flags & DESCRIBED)

    def check(self) -> None:
        """Raises ArchiveInvalid for what cannot be read as it comes."""
        if self.flags & ENCRYPTED:
            raise ArchiveInvalid("the zip archive is encrypted: send it without a password")
        if self.method not in (STORED, DEFLATED):
            raise ArchiveInvalid(
                f"the zip archive is compressed in a way ({self.method}) that is not read: use deflate"
            )
        if self.is_described and self.method == STORED and not self.is_folder:
            raise ArchiveInvalid(
                "the zip archive has uncompressed members of unknown length: write it to a file, or compress it"
            )


def _extras(extra: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        found.append((kind, extra[4 : 4 + size]))
        extra = extra[4 + size :]
    return found


def _zip(source: _Source, members: _Members) -> Reading[None]:
    entries: dict[bytes, _Entry] = {}
    density = _Density()
    while (signature := (yield from source.exactly(4))) == LOCAL:
        entry = yield from _local_header(source)
        if entry.name in entries:
            raise _refused(entry.name, "is there twice")
        entries[entry.name] = entry
        yield from _zip_member(source, members, entry, density)
    yield from _zip_directory(source, signature, entries)


def _local_header(source: _Source) -> Reading[_Entry]:
    header = yield from source.exactly(26)
    name_bytes, extra_bytes = struct.unpack("<HH", header[22:])
    name = yield from source.exactly(name_bytes)
    extra = yield from source.exactly(extra_bytes)
    entry = _Entry(header, name, extra)
    entry.check()
    return entry


def _zip_member(source: _Source, members: _Members, entry: _Entry, density: _Density) -> Reading[None]:
    size = None if entry.is_described else entry.size
    if entry.is_folder:
        members.folder(entry.name)
        if size:
            raise _refused(entry.name, "is a folder with bytes")
    else:
        members.begin(entry.name, size)
    if entry.method == STORED:
        packed = unpacked = 0 if entry.is_described else entry.packed
        crc = yield from _copy(source, packed, members)
    else:
        packed, unpacked, crc = yield from _inflate_member(source, members, entry, density)
    if entry.is_described:
        yield from _descriptor(source, entry, crc, packed, unpacked)
    elif (crc, packed, unpacked) != (entry.crc, entry.packed, entry.size):
        raise _damaged(entry)
    entry.crc, entry.packed, entry.size = crc, packed, unpacked
    if not entry.is_folder:
        members.end()


def _inflate_member(
    source: _Source, members: _Members, entry: _Entry, density: _Density
) -> Reading[tuple[int, int, int]]:
    """Bytes taken, bytes given, CRC-32."""
    inflate = zlib.decompressobj(wbits=-15)
    packed = unpacked = crc = 0
    data = b""
    while not inflate.eof:
        taken = 0
        if not data:
            most = PIECE_BYTES if entry.is_described else min(PIECE_BYTES, entry.packed - packed)
            data = (yield from source.some(most)) if most else b""
            taken = len(data)
            if most and not taken:
                raise ArchiveTruncated("the archive ends too early: send it whole")
            packed += taken
        piece, data = _inflated(inflate, data)
        if not (piece or taken or inflate.eof):  # zlib may have had more in itself
            raise _damaged(entry)
        density.count(taken - len(inflate.unused_data), len(piece))
        if entry.is_folder and piece:
            raise _refused(entry.name, "is a folder with bytes")
        if piece:
            unpacked += len(piece)
            crc = zlib.crc32(piece, crc)
            members.data(piece)
    source.unread(inflate.unused_data)
    return packed - len(inflate.unused_data), unpacked, crc


def _descriptor(source: _Source, entry: _Entry, crc: int, packed: int, unpacked: int) -> Reading[None]:
    """Its signature may be absent, and its sizes have 8 bytes where the header or its writer says so."""
    if (yield from source.peek(4)) == DESCRIPTOR:
        yield from source.exactly(4)
    short = struct.pack("<III", crc, packed & IN_EXTRA, unpacked & IN_EXTRA)
    long = struct.pack("<IQQ", crc, packed, unpacked)
    for expected in (long,) if entry.is_64 else (short, long):
        if (yield from source.peek(len(expected))) == expected:
            yield from source.exactly(len(expected))
            return
    raise _damaged(entry)


def _zip_directory(source: _Source, signature: bytes, entries: dict[bytes, _Entry]) -> Reading[None]:
    """It has to list what was there, as plain files and folders, and end the archive."""
    listed: list[bytes] = []
    while signature == CENTRAL and len(listed) <= len(entries):
        listed.append((yield from _listed(source, entries)))
        signature = yield from source.exactly(4)
    if sorted(listed) != sorted(entries):
        raise ArchiveInvalid("the zip archive's directory does not list what it has: make it again")
    if signature == END_64:
        (size,) = struct.unpack("<Q", (yield from source.exactly(8)))
        if size > NAME_BYTES:
            raise ArchiveInvalid("the zip archive's end is damaged")
        yield from source.exactly(size)
        signature = yield from source.exactly(4)
    if signature == LOCATOR_64:
        yield from source.exactly(16)
        signature = yield from source.exactly(4)
    if signature != END:
        raise ArchiveInvalid("the zip archive is damaged: make it again")
    end = yield from source.exactly(18)
    yield from source.exactly(struct.unpack("<H", end[16:])[0])
    if (yield from source.some(1)):
        raise ArchiveInvalid("something follows the end of the zip archive: send one archive alone")


def _listed(source: _Source, entries: dict[bytes, _Entry]) -> Reading[bytes]:
    header = yield from source.exactly(42)
    made_by, _, _, method, _, _, crc, _, _, name_bytes, extra_bytes, comment_bytes, _, _, attributes, _ = struct.unpack(
        "<HHHHHHIIIHHHHHII", header
    )
    name = yield from source.exactly(name_bytes)
    yield from source.exactly(extra_bytes + comment_bytes)
    entry = entries.get(name)
    if entry is None or (entry.method, entry.crc) != (method, crc):
        raise ArchiveInvalid("the zip archive's directory does not list what it has: make it again")
    if made_by >> 8 in UNIX_SYSTEMS and attributes >> 16 & 0o170000 not in PLAIN_KINDS:
        raise _refused(name, "is a link or a device: send plain files")
    return name


def _damaged(entry: _Entry) -> ArchiveInvalid:
    name = printable(entry.name[:160].decode("utf-8", "replace"))
    return ArchiveInvalid(f"the zip archive's member '{name}' is damaged: make the archive again")


ARCHIVE_TYPES: Final = frozenset(
    [
        *("application/octet-stream", "application/zip", "application/x-zip-compressed"),
        *("application/x-tar", "application/tar", "application/gzip", "application/x-gzip"),
        *("application/x-gtar", "application/x-tgz", "application/x-compressed-tar"),
    ]
)
"""Content types that a body may have which is an archive; which kind it is, its first bytes say."""


class ArchiveFile:
    """An archive on its way into a bundle: unpacked in a thread, a MiB at a time."""

    def __init__(self, bundle: StagedBundle) -> None:
        self._left = sum(bundle.limits.values()) + SKIPPED_BYTES + DENSE_BYTES
        self._input = _Input()
        self._members = _Members(bundle)
        self._parser = _archive(self._input, self._members)
        self._pending = bytearray()

    async def write(self, chunk: bytes) -> None:
        """Raises ArchiveInvalid, BundleTooLarge, BundleIncomplete, StorageError, and what the bundle is capped with."""
        self._pending += chunk
        if len(self._pending) >= PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await in_thread(self.feed, pending)

    async def finish(self) -> None:
        """The archive is whole. Raises as `write` does."""
        await self.flush()
        await in_thread(self.end)

    def feed(self, data: bytes | bytearray) -> None:
        """`write` at once, in a thread of the caller's."""
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveInvalid("the archive is larger than an adapter may be")
        self._input.feed(data)
        self._advance()

    def end(self) -> None:
        """`finish` in a thread of the caller's."""
        self._input.end()
        self._advance()

    def close(self) -> None:
        """To be called on every way out."""
        self._parser.close()
        self._members.close()

    def _advance(self) -> None:
        with suppress(StopIteration):
            next(self._parser)
