"""Uploads that strangers might send, made from seeds: archives, safetensors files, configs, and in parts. No torch.

Each generator gives an endless variety from a few dozen ways to harm; the same seed gives the same bytes. Names that
try to leave the quarantine all have ESCAPE in them, so that a file that did is found.
"""

import gzip
import io
import itertools
import json
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from adapter_store.bundle import BUNDLE_FILES, CONFIG_FILE, WEIGHTS_FILE
from tests.bad_adapters import pack_raw

ESCAPE = "tailor-escape"
BOUNDARY = "frontier"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
TAR, GZIP, ZIP = "application/x-tar", "application/gzip", "application/zip"


@dataclass(frozen=True)
class Upload:
    """One request's body; `way` says what is wrong with it, `files` are the two that a form was made of."""

    way: str
    body: bytes
    content_type: str
    files: tuple[bytes, bytes] = (b"", b"")


@dataclass(frozen=True)
class Good:
    """The two files of an adapter that is taken."""

    config: bytes
    weights: bytes

    @classmethod
    def read(cls, folder: Path) -> "Good":
        return cls((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body; `parts` are dispositions and contents."""
    heads = (
        f"--{BOUNDARY}\r\ncontent-disposition: form-data; {disposition}\r\n\r\n".encode() for disposition, _ in parts
    )
    return b"".join(head + data + b"\r\n" for head, (_, data) in zip(heads, parts, strict=True)) + (
        f"--{BOUNDARY}--\r\n".encode()
    )


def two_files(config: bytes, weights: bytes, way: str) -> Upload:
    body = form((f'name="{CONFIG_FILE}"; filename="{CONFIG_FILE}"', config),
                (f'name="{WEIGHTS_FILE}"; filename="{WEIGHTS_FILE}"', weights))  # fmt: skip
    return Upload(way, body, MULTIPART, (config, weights))


def mutated(draw: random.Random, data: bytes, *, within: int | None = None) -> bytes:
    """Some bytes changed, put in, cut out or moved, or the rest left away; `within` the first so many."""
    raw = bytearray(data)
    for _ in range(draw.randint(1, 12)):
        end = min(len(raw), within or len(raw))
        if end < 2:
            break
        at = draw.randrange(end)
        match draw.randrange(6):
            case 0 | 1:
                raw[at] ^= 1 << draw.randrange(8)
            case 2:
                raw[at : at + draw.randint(1, 16)] = draw.randbytes(draw.randint(0, 16))
            case 3:
                raw[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]))
            case 4:
                piece = raw[at : at + draw.randint(1, 512)]
                to = draw.randrange(end)
                raw[to : to + len(piece)] = piece
            case _:
                if draw.randrange(4) == 0:
                    del raw[draw.randrange(len(raw)) :]
    return bytes(raw)


# Archives

HOSTILE_NAMES: tuple[str, ...] = (
    f"../{ESCAPE}", f"../../../../../../../../tmp/{ESCAPE}", f"/tmp/{ESCAPE}", f"/{ESCAPE}", f"a/../../{ESCAPE}",
    f"..\\{ESCAPE}", f"C:\\{ESCAPE}", f"./././../{ESCAPE}", f"adapter/{ESCAPE}/..", f"{CONFIG_FILE}/../../{ESCAPE}",
    f"{CONFIG_FILE}\0{ESCAPE}", f"{ESCAPE}\0{CONFIG_FILE}", "", ".", "..", "/", "//", "\\", "a/" * 200 + ESCAPE,
    ESCAPE * 300, f"\u202e{ESCAPE}", f"{CONFIG_FILE} ", f" {CONFIG_FILE}", CONFIG_FILE.upper(), f"{CONFIG_FILE}.",
    f"x/y/{CONFIG_FILE}", f"../{CONFIG_FILE}", f"/{CONFIG_FILE}", f"{WEIGHTS_FILE}/", "adapter_model.bin",
    "pytorch_model.bin", f"~/{ESCAPE}", f"$HOME/{ESCAPE}", f"`touch {ESCAPE}`", "con", "%2e%2e/" + ESCAPE,
)  # fmt: skip
TAR_KINDS = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
    tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z", b"\0",
)  # fmt: skip
Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(good: Good, folder: str = "") -> Members:
    return [file(folder + CONFIG_FILE, good.config), file(folder + WEIGHTS_FILE, good.weights)]


def file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


def tar(members: Members, layout: Literal[1, 2] = tarfile.PAX_FORMAT) -> bytes:
    """As tarfile writes headers, whatever they say of their data."""
    out = io.BytesIO()
    for member, data in members:
        out.write(member.tobuf(layout, "utf-8", "surrogateescape"))
        out.write(data + bytes(-len(data) % 512))
    return out.getvalue() + bytes(1_024)


def zipped(members: Members, draw: random.Random) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice is what is meant
        for member, data in members:
            entry = zipfile.ZipInfo()
            entry.filename = member.name
            entry.compress_type = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            if member.type == tarfile.SYMTYPE:
                entry.external_attr = 0o120777 << 16
            archive.writestr(entry, data)
    return out.getvalue()


def packed(draw: random.Random, members: Members, way: str) -> Upload:
    """As tar, tar.gz or zip; as the body or as a part of a form."""
    match draw.randrange(3):
        case 0:
            data, kind = tar(members, draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])), TAR
        case 1:
            data, kind = gzip.compress(tar(members), 1), GZIP
        case _:
            data, kind = zipped(members, draw), ZIP
    return sent(draw, data, kind, way)


def sent(draw: random.Random, data: bytes, kind: str, way: str) -> Upload:
    if draw.randrange(4):
        return Upload(f"{way}, {kind}", data, kind)
    return Upload(f"{way}, a part", form(('name="archive"; filename="adapter"', data)), MULTIPART)


def hostile_name(draw: random.Random, good: Good) -> Upload:
    name = draw.choice(HOSTILE_NAMES)
    extra = file(name, draw.randbytes(draw.choice([0, 1, 100])))
    members = members_of(good)
    members.insert(draw.randrange(3), extra)
    try:
        return packed(draw, members, f"a member {name[:40]!r}")
    except ValueError:  # tarfile itself refuses a name like it
        return Upload("a name", zipped(members, draw), ZIP)


def no_plain_file(draw: random.Random, good: Good) -> Upload:
    member = tarfile.TarInfo(draw.choice([f"{ESCAPE}-link", CONFIG_FILE, WEIGHTS_FILE]))
    member.type = draw.choice(TAR_KINDS)
    member.linkname = draw.choice(["/etc/passwd", "../../../tailor.db", f"/tmp/{ESCAPE}", CONFIG_FILE, "x" * 300])
    member.devmajor, member.devminor = 1, 3
    members = members_of(good)
    at = draw.randrange(3)
    members.insert(at, (member, b""))
    if draw.randrange(2):  # a link first, then a file through it
        members.insert(at + 1, file(f"{member.name}/{ESCAPE}", b"x"))
    return sent(draw, tar(members), TAR, f"a member of type {member.type!r}")


def twice(draw: random.Random, good: Good) -> Upload:
    members = members_of(good)
    name = draw.choice([CONFIG_FILE, WEIGHTS_FILE])
    folder = draw.choice(["", "./", "adapter/", "a/", "A/"])
    members.insert(draw.randrange(3), file(folder + name, draw.choice([b"{}", good.config, good.weights])))
    return packed(draw, members, "a file twice")


def bomb(draw: random.Random, good: Good) -> Upload:
    """Little that becomes much: zeros, members without end, archives in archives."""
    much = draw.choice([3 << 20, 9 << 20, 24 << 20])
    match draw.randrange(5):
        case 0:
            return Upload("zeros in a tar.gz", gzip.compress(tar([file(WEIGHTS_FILE, bytes(much))]), 9), GZIP)
        case 1:
            return Upload("zeros in a zip", zipped([file(draw.choice([CONFIG_FILE, WEIGHTS_FILE, "README.md"]),
                                                         bytes(much))], random.Random(1)), ZIP)  # fmt: skip
        case 2:
            inner = gzip.compress(gzip.compress(bytes(much), 9), 9)
            return Upload("gzip in gzip", inner, GZIP)
        case 3:
            members = [file(f"README{number}.md" if draw.randrange(2) else "README.md", b"") for number in range(3_000)]
            return packed(draw, members_of(good) + members, "thousands of members")
        case _:
            return packed(draw, [file("adapter.zip", zipped(members_of(good), draw))], "an archive in an archive")


def lying_sizes(draw: random.Random, good: Good) -> Upload:
    """Headers that promise other sizes than there are."""
    lie = draw.choice([0, 1, 511, 1 << 20, 1 << 33, (1 << 62) - 1])
    if draw.randrange(2):
        members = members_of(good)
        member, _ = members[draw.randrange(2)]
        if draw.randrange(2):
            member.pax_headers = {"size": str(draw.choice([lie, -1, "x", "9" * 400])), "path": f"../{ESCAPE}"}
        else:
            member.size = lie
        return sent(draw, tar(members), TAR, "a size that lies")
    data = bytearray(zipped(members_of(good), draw))
    for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"):
        at = data.find(mark)
        if at >= 0 and draw.randrange(2):
            data[at + 18 : at + 26] = struct.pack("<II", lie & 0xFFFFFFFF, draw.choice([0, 0xFFFFFFFF]))
    return sent(draw, bytes(data), ZIP, "a size that lies")


def broken_archive(draw: random.Random, good: Good) -> Upload:
    whole = packed(draw, members_of(good, draw.choice(["", "adapter/"])), "mutated")
    body = mutated(draw, whole.body)
    return Upload(
        whole.way, body[: draw.randrange(len(body) + 1)] if draw.randrange(3) == 0 else body, whole.content_type
    )


def broken_stream(draw: random.Random, good: Good) -> Upload:
    """What is inside is mutated, and packed properly."""
    inside = mutated(draw, tar(members_of(good)), within=2_048)
    if draw.randrange(2):
        return Upload("a mutated tar, gzipped", gzip.compress(inside, 1), GZIP)
    raw = zlib.compressobj(wbits=31).compress(inside)
    return Upload("a gzip without an end", raw, GZIP)


def broken_form(draw: random.Random, good: Good) -> Upload:
    names = [*HOSTILE_NAMES, CONFIG_FILE, WEIGHTS_FILE, "name", "archive"]
    parts = []
    for _ in range(draw.randint(0, 6)):
        name, filename = (draw.choice(names).encode("unicode_escape").decode() for _ in range(2))
        parts.append((f'name="{name}"; filename="{filename}"', draw.choice([b"", b"{}", good.config, good.weights])))
    body = form(*parts)
    return Upload("a form", mutated(draw, body) if draw.randrange(2) else body, MULTIPART)


def noise(draw: random.Random, good: Good) -> Upload:
    kind = draw.choice(
        [TAR, GZIP, ZIP, MULTIPART, "application/octet-stream", "text/plain", "multipart/form-data", "", "x"]
    )
    start = draw.choice([b"", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"BZh9", b"\xfd7zXZ\x00", b"7z\xbc\xaf", b"ustar"])
    return Upload(f"noise as {kind!r}", start + draw.randbytes(draw.choice([0, 1, 100, 5_000])), kind)


ARCHIVES: tuple[Callable[[random.Random, Good], Upload], ...] = (
    hostile_name, no_plain_file, twice, bomb, lying_sizes, broken_archive, broken_archive, broken_stream, broken_form,
    noise,
)  # fmt: skip


def hostile_archive(seed: int, good: Good) -> Upload:
    draw = random.Random(seed)
    return ARCHIVES[seed % len(ARCHIVES)](draw, good)


# Weights


def hostile_weights(seed: int, good: Good) -> Upload:
    """Truncated, mutated, and headers that are JSON but not what the format has."""
    draw = random.Random(seed)
    raw = good.weights
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = raw[8 : 8 + length], raw[8 + length :]
    match seed % 6:
        case 0:
            return two_files(good.config, raw[: draw.randrange(len(raw))], "truncated weights")
        case 1:
            return two_files(good.config, mutated(draw, raw, within=8 + length), "a mutated header")
        case 2:
            return two_files(good.config, mutated(draw, raw), "mutated weights")
        case 3:
            lie = draw.choice([0, 1, 2, length - 1, length + 1, 1 << 20, 1 << 33, 1 << 63, (1 << 64) - 1])
            return two_files(good.config, struct.pack("<Q", lie) + raw[8:], "a length that lies")
        case 4:
            members = json.loads(header)
            for name in draw.sample(sorted(members), draw.randint(1, 3)):
                _spoil_entry(draw, members, name)
            return two_files(good.config, pack_raw(json.dumps(members).encode(), body), "entries that lie")
        case _:
            return two_files(good.config, pack_raw(_costly(draw), body), "a costly header")


def _spoil_entry(draw: random.Random, members: dict[str, Any], name: str) -> None:
    entry = members.pop(name)
    numbers: list[Any] = [-1, 0, 1, 1 << 31, 1 << 48, 1 << 63, 10**19, True, 1.5, None, "8", [1], {}]
    if isinstance(entry, dict) and "shape" in entry:
        match draw.randrange(4):
            case 0:
                entry["shape"] = [draw.choice(numbers) for _ in range(draw.randint(0, 12))]
            case 1:
                entry["data_offsets"] = [
                    draw.choice([*numbers, *entry["data_offsets"]]) for _ in range(draw.randint(0, 3))
                ]
            case 2:
                entry["dtype"] = draw.choice(["F64", "I8", "BOOL", "F32", "", "f32", 7, None, ["F32"], "F8_E4M3"])
            case _:
                entry["extra"] = draw.choice(numbers)
    members[draw.choice([name, f"../{ESCAPE}", "", name + "\0", "\ud800", name[:-1], "__metadata__"])] = entry


def _costly(draw: random.Random) -> bytes:
    """Headers that are dear to parse, up to the limit and past it."""
    size = draw.choice([1_000, 100_000, 1 << 20, (4 << 20) + 8])
    match draw.randrange(6):
        case 0:
            return b'{"a":' + b"[" * size
        case 1:
            return b'{"a":[' + b"1," * (size // 2) + b"1]}"
        case 2:
            return b'{"' + b"\\" * size + b'"}'
        case 3:
            return b'{"a":' + b"9" * size + b"}"
        case 4:
            return b"{" + b",".join(b'"%x":{}' % number for number in range(size // 12)) + b"}"
        case _:
            return b"[]" * (size // 2)


# Configs

REGEXES = (
    "(a+)+$", "(([a-z._0-9])+)+!", ".*", "^q_proj$", "q_proj|v_proj", "(?P<x>q)(?P=x)", "q_proj(", "[", "\\",
    "(?:" * 400, "(.*)*\\1", "a{1,99999}" * 20, "q_proj\n", "q.proj", "(?i)Q_PROJ", "\\d+\\.self_attn", "x" * 60_000,
)  # fmt: skip


def hostile_config(seed: int, good: Good) -> Upload:
    """Deep, huge, of odd numbers, with regular expressions, mutated."""
    draw = random.Random(seed)
    config = json.loads(good.config)
    match seed % 7:
        case 0:
            depth = draw.choice([7, 100, 1_000, 20_000, 100_000])
            opening, closing = draw.choice([(b'{"a":', b"}"), (b"[", b"]")])
            text = good.config[:-1] + b',"x":' + opening * depth + b"1" + closing * depth + b"}"
            return two_files(text, good.weights, "a deep config")
        case 1:
            huge = draw.choice(
                [b'"' + b"x" * 300_000 + b'"', b"[" + b"1," * 120_000 + b"1]", b"9" * 200_000, b"1e" + b"9" * 9_999]
            )
            return two_files(good.config[:-1] + b',"x":' + huge + b"}", good.weights, "a huge config")
        case 2:
            field = draw.choice(["rank_pattern", "alpha_pattern"])
            config[field] = {draw.choice(REGEXES): draw.choice([8, 1, 0, "x"]) for _ in range(draw.choice([1, 3, 300]))}
            return two_files(json.dumps(config).encode(), good.weights, "regular expressions in a pattern")
        case 3:
            regex = draw.choice(REGEXES)
            config["target_modules"] = draw.choice([regex, [regex], [regex, *config["target_modules"]]])
            return two_files(json.dumps(config).encode(), good.weights, "regular expressions as targets")
        case 4:
            for name in draw.sample(
                [*sorted(config), "use_dora", "layers_to_transform", "x", "vllm_lora_scaling_factor"], 3
            ):
                config[name] = _odd_value(draw)
            return two_files(json.dumps(config).encode(), good.weights, "odd values")
        case 5:
            name = draw.choice(sorted(config))
            literal = draw.choice(
                ["NaN", "-Infinity", "1e400", "-0", "0x10", "1_000", "9" * 5_000, "1e-400", "'8'", "\ufeff8"]
            )
            config[name] = "PLACE"
            spelled = json.dumps(config).replace('"PLACE"', literal)
            return two_files(
                spelled.encode(draw.choice(["utf-8", "utf-16", "utf-8-sig"])), good.weights, "odd literals"
            )
        case _:
            return two_files(mutated(draw, good.config), good.weights, "a mutated config")


def _odd_value(draw: random.Random, depth: int = 0) -> Any:
    plain = [None, True, False, 0, -1, 1 << 70, 1e308, "", "\0", "../" + ESCAPE, "\ud800", "LORA", "é" * 500, 0.1]
    if depth > 3 or draw.randrange(2):
        return draw.choice(plain)
    if draw.randrange(2):
        return [_odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(draw.choice(plain)): _odd_value(draw, depth + 1) for _ in range(draw.randrange(4))}


# In parts

PART_BYTES = 4_096
MOST_BYTES_IN_PARTS = 128 << 10  # each part is durable before it is answered: more of them show nothing more
NUMBERS = (
    "0", "-1", "1.5", "x", "", " 1", "1e3", "10000", str(1 << 31), str(1 << 63), "9" * 400, "0x1", "\u0661", "1\0",
    f"../../{ESCAPE}", f"..%2f{ESCAPE}", "1/2", ".", "..",
)  # fmt: skip
CHECKSUMS = ("", "x", "0" * 63, "0" * 64, "F" * 64, "0" * 65, "g" * 64, f"../{ESCAPE}", "0" * 4_000)


@dataclass(frozen=True)
class Part:
    """One PUT; `is_cut`: its sender goes away in the middle."""

    file: str
    number: str
    body: bytes
    checksum: str
    is_cut: bool = False


@dataclass(frozen=True)
class InParts:
    """An upload in parts. What one round has is sent at once, and so are the calls that end it.

    `by_stranger`: another tenant sends it; `starved`: the quota shrinks before its end.
    """

    way: str
    declared: Any
    rounds: tuple[tuple[Part, ...], ...] = ()
    ending: tuple[str, ...] = ("complete",)
    by_stranger: bool = False
    starved: bool = False


@dataclass(frozen=True)
class _Whole:
    """An upload as it should be, for something to be spoiled."""

    draw: random.Random
    files: dict[str, bytes]
    sizes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def declared(self) -> dict[str, Any]:
        return {
            "files": [
                {
                    "name": name,
                    "bytes": self.sizes.get(name, len(data)),
                    "sha256": self.digests.get(name, sha256(data).hexdigest()),
                }
                for name, data in self.files.items()
            ]
        }

    @property
    def parts(self) -> list[Part]:
        return [
            _part(name, at // PART_BYTES + 1, data[at : at + PART_BYTES])
            for name, data in self.files.items()
            for at in range(0, len(data), PART_BYTES)
        ]

    def one(self) -> Part:
        return self.draw.choice(self.parts)

    def sent(self, way: str, *before: tuple[Part, ...], **how: Any) -> InParts:
        """All parts, in any order, after those."""
        parts = self.parts
        self.draw.shuffle(parts)
        return InParts(way, self.declared, (*before, *((part,) for part in parts)), **how)


def hostile_parts(seed: int, good: Good) -> InParts:
    """Parts that are not what they say, come where or when they should not, or make up what no gateway should take."""
    draw = random.Random(seed)
    whole = _Whole(draw, {CONFIG_FILE: good.config, WEIGHTS_FILE: good.weights})
    return IN_PARTS[seed % len(IN_PARTS)](whole, good)


def _part(file: str, number: int, body: bytes) -> Part:
    return Part(file, str(number), body, sha256(body).hexdigest())


def _wrong_length(whole: _Whole, good: Good) -> InParts:
    one, draw = whole.one(), whole.draw
    body = draw.choice([b"", one.body[:-1], one.body + b"x", one.body * 3, bytes(1 << 20), one.body[: PART_BYTES // 2]])
    checksum = draw.choice([one.checksum, sha256(body).hexdigest()])
    return whole.sent("a part of another length", (replace(one, body=body, checksum=checksum),))


def _wrong_checksum(whole: _Whole, good: Good) -> InParts:
    one, draw = whole.one(), whole.draw
    spoiled = draw.choice(
        [replace(one, checksum=draw.choice(CHECKSUMS)), replace(one, body=bytes(len(one.body))),
         replace(one, body=mutated(draw, one.body)), replace(one, checksum=one.checksum.upper())]
    )  # fmt: skip
    return whole.sent("a part of another checksum", (spoiled,))


def _no_such_part(whole: _Whole, good: Good) -> InParts:
    one, draw = whole.one(), whole.draw
    names = [one.file, *HOSTILE_NAMES[:12], "adapter_model.bin"]
    spoiled = [replace(one, number=draw.choice(NUMBERS), file=draw.choice(names)) for _ in range(4)]
    spoiled += [replace(one, number=draw.choice(NUMBERS)) for _ in range(4)]
    return whole.sent("parts of no number", *((part,) for part in spoiled))


def _other_size(whole: _Whole, good: Good) -> InParts:
    size = len(good.weights)
    lie = whole.draw.choice([1, size - 1, size + 1, size // 2, size * 2, PART_BYTES, 4 << 20])
    return replace(whole, sizes={WEIGHTS_FILE: lie}).sent("another size than declared")


def _other_digest(whole: _Whole, good: Good) -> InParts:
    digests = {whole.draw.choice(BUNDLE_FILES): sha256(b"other").hexdigest()}
    return replace(whole, digests=digests).sent("another file than declared", ending=("complete", "complete"))


def _odd_declaration(whole: _Whole, good: Good) -> InParts:
    draw = whole.draw
    declared = whole.declared
    for _ in range(draw.randint(1, 3)):
        told = draw.choice(declared["files"])
        told[draw.choice(["name", "bytes", "sha256", "x"])] = draw.choice([_odd_value(draw), 1 << 62, -1, "0" * 64])
    if draw.randrange(3) == 0:
        declared["files"] = draw.choice([[], declared["files"] * 2, declared["files"][:1], None, _odd_value(draw)])
    return InParts("an odd declaration", declared)


def _other_bytes_again(whole: _Whole, good: Good) -> InParts:
    one = whole.one()
    other = _part(one.file, int(one.number), bytes(len(one.body)))
    return whole.sent("a part again with other bytes", (one,), (other,), (one, other))


def _all_at_once(whole: _Whole, good: Good) -> InParts:
    """The same part from many, some with bytes of their own; the first decides, and the whole is checked."""
    one = whole.one()
    others = [_part(one.file, int(one.number), bytes([n]) * len(one.body)) for n in range(whole.draw.randint(0, 3))]
    crowd = [*[one] * 4, *others]
    whole.draw.shuffle(crowd)
    return whole.sent("one part from many at once", tuple(crowd), ending=("complete",) * 3)


def _broken_off(whole: _Whole, good: Good) -> InParts:
    cut = tuple(replace(part, is_cut=True) for part in whole.parts[:3])
    return whole.sent("parts broken off", cut)


def _cancelled(whole: _Whole, good: Good) -> InParts:
    """While parts come, or while it is completed."""
    ending = whole.draw.choice([("cancel", "complete"), ("complete", "cancel"), ("cancel",) * 3 + ("complete",) * 3])
    if whole.draw.randrange(2):
        return whole.sent("cancelled while it is completed", ending=ending)
    return InParts("cancelled between parts", whole.declared, (tuple(whole.parts[:4]),), ending)


def _too_early(whole: _Whole, good: Good) -> InParts:
    parts = whole.parts
    return InParts("completed too early", whole.declared, (tuple(parts[: whole.draw.randrange(len(parts))]),))


def _starved(whole: _Whole, good: Good) -> InParts:
    """A value of the last tensor's is another by a rounding: no version has those bytes yet."""
    weights = bytearray(good.weights)
    weights[-4] ^= whole.draw.randint(1, 255)
    files = {CONFIG_FILE: good.config, WEIGHTS_FILE: bytes(weights)}
    return replace(whole, files=files).sent("a quota that shrinks", starved=True)


def _of_a_stranger(whole: _Whole, good: Good) -> InParts:
    parts = whole.parts[:3]
    return InParts(
        "a stranger's", whole.declared, (tuple(parts),), ("show", "complete", "cancel", "list"), by_stranger=True
    )


def _hostile_files(whole: _Whole, good: Good, make: Callable[[int, Good], Upload]) -> InParts:
    """Every part is as its checksum says: only completing sees what they make up."""
    seeds = itertools.count(whole.draw.randrange(1 << 20))
    uploads = (make(seed, good) for seed in seeds)
    upload = next(one for one in uploads if all(one.files) and sum(map(len, one.files)) <= MOST_BYTES_IN_PARTS)
    files = dict(zip(BUNDLE_FILES, upload.files, strict=True))
    return replace(whole, files=files).sent(f"{upload.way}, in parts", ending=("complete",) * whole.draw.randint(1, 2))


def _hostile_weights(whole: _Whole, good: Good) -> InParts:
    return _hostile_files(whole, good, hostile_weights)


def _hostile_config(whole: _Whole, good: Good) -> InParts:
    return _hostile_files(whole, good, hostile_config)


IN_PARTS: tuple[Callable[[_Whole, Good], InParts], ...] = (
    _wrong_length, _wrong_checksum, _no_such_part, _other_size, _other_digest, _odd_declaration, _other_bytes_again,
    _all_at_once, _broken_off, _cancelled, _too_early, _starved, _of_a_stranger, _hostile_weights, _hostile_config,
    _hostile_weights, _hostile_config,
)  # fmt: skip
