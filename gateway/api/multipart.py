"""Uploads as `multipart/form-data`, streamed: no part is ever whole in memory."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Final, Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapter_store.archives import ArchiveFile
from adapter_store.bundle import BUNDLE_FILES, StagedBundle
from gateway.api.body import Body
from gateway.errors import RequestInvalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD_LIMIT_BYTES: Final = 1_024
HEADER_LIMIT_BYTES: Final = 4_096
PART_LIMIT: Final = 8
ARCHIVE: Final = "archive"


class Writes(Protocol):
    """Where the bytes of a part go."""

    async def write(self, data: bytes, /) -> None: ...


class Form(ABC):
    """Parses a body as it comes: large parts go where `_open` says, short text fields into `fields`."""

    def __init__(self, request: Request, body: Body, wanted: str) -> None:
        """`wanted`: what is to be sent, for who sends something else."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestInvalid(f"Send multipart/form-data with {wanted}.", code="content_type_invalid")
        self.fields: dict[str, str] = {}
        self.wanted = wanted
        self._body = body
        self._events: list[tuple[str, bytes]] = []
        try:
            self._parser = MultipartParser(boundary, self._callbacks())
        except FormParserError as error:
            raise RequestInvalid("The multipart boundary is too long.", code="multipart_invalid") from error

    @abstractmethod
    async def _open(self, name: str, filename: str, part: AsyncExitStack) -> Writes | None:
        """Where a part goes, closed with `part`; None: it is a text field. Raises for one that does not belong."""

    async def _finish(self, target: Writes) -> None:  # noqa: B027  most have nothing to do
        """A part is whole."""

    def _take_field(self, name: str, text: str) -> None:
        self.fields[name] = text

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": lambda: self._events.append(("begin", b"")),
            "on_part_data": self._on("data"),
            "on_part_end": lambda: self._events.append(("end", b"")),
            "on_header_field": self._on("header"),
            "on_header_value": self._on("value"),
            "on_header_end": lambda: self._events.append(("header_end", b"")),
            "on_headers_finished": lambda: self._events.append(("headers", b"")),
        }

    def _on(self, event: str):  # type: ignore[no-untyped-def]
        def note(data: bytes, start: int, end: int) -> None:
            self._events.append((event, data[start:end]))

        return note

    async def receive(self) -> None:
        """Read the whole body.

        Raises:
            RequestInvalid: the form is broken or has a part that does not belong.
            The store's BundleTooLarge, StorageFull, …: as they come, mid-stream.
        """
        state = _Part()
        async with AsyncExitStack() as part:
            async for event, data in self._parsed():
                await self._take(event, data, state, part)
        if not state.ended:
            raise RequestInvalid("The upload broke off: its last part is not whole.", code="upload_incomplete")

    async def _parsed(self) -> AsyncIterator[tuple[str, bytes]]:
        async for piece in self._body.pieces():
            try:
                self._parser.write(piece)
            except FormParserError as error:
                raise RequestInvalid("The multipart body is broken.", code="multipart_invalid") from error
            events, self._events = self._events, []
            for event in events:
                yield event

    async def _take(self, event: str, data: bytes, state: "_Part", part: AsyncExitStack) -> None:
        match event:
            case "begin":
                state.begin()
            case "header":
                state.add_header(data, b"")
            case "value":
                state.add_header(b"", data)
            case "header_end":
                state.end_header()
            case "headers":
                state.name, filename = state.disposition()
                state.target = await self._open(state.name, filename, part)
            case "data" if state.target is not None:
                await state.target.write(data)
            case "data":
                state.add_text(data)
            case "end":
                if state.target is not None:
                    await self._finish(state.target)
                else:
                    self._take_field(state.name, state.text())
                await part.aclose()
                state.ended = True

    def _unknown(self, name: str) -> RequestInvalid:
        return RequestInvalid(
            f"The form has a part '{name[:64]}': send {self.wanted}.", param=name[:64], code="unknown_parameter"
        )


class UploadForm(Form):
    """An adapter: its two files or an archive of them go to the staged bundle."""

    def __init__(self, request: Request, body: Body, bundle: StagedBundle, *, has_name: bool) -> None:
        """`has_name`: the form says what the adapter is called."""
        name = "the field name and " if has_name else ""
        super().__init__(request, body, f"{name}the files {' and '.join(BUNDLE_FILES)}, or one {ARCHIVE} of them")
        self._has_name = has_name
        self._bundle = bundle

    async def _open(self, name: str, filename: str, part: AsyncExitStack) -> Writes | None:
        if name == ARCHIVE:
            return part.enter_context(closing(ArchiveFile(self._bundle)))
        if name in BUNDLE_FILES or filename in BUNDLE_FILES:
            return await part.enter_async_context(self._bundle.open(name if name in BUNDLE_FILES else filename))
        if name != "name" or not self._has_name:
            raise self._unknown(name)
        return None

    async def _finish(self, target: Writes) -> None:
        if isinstance(target, ArchiveFile):
            await target.finish()


class _Part:
    """The part that is being read."""

    def __init__(self) -> None:
        self.count = 0
        self.ended = False
        self._clear()

    def _clear(self) -> None:
        self.name = ""
        self.target: Writes | None = None
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._text = bytearray()

    def begin(self) -> None:
        self._clear()
        self.count += 1
        self.ended = False
        if self.count > PART_LIMIT:
            raise RequestInvalid("The form has too many parts.", code="multipart_invalid")

    def add_header(self, name: bytes, value: bytes) -> None:
        self._header += name
        self._value += value
        if len(self._header) + len(self._value) > HEADER_LIMIT_BYTES:
            raise RequestInvalid("A part's headers are too long.", code="multipart_invalid")

    def end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def disposition(self) -> tuple[str, str]:
        """The part's field name and file name; neither is used as anything but a word to compare."""
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name, filename = options.get(b"name", b""), options.get(b"filename", b"")
        return name.decode("utf-8", "replace"), filename.decode("utf-8", "replace")

    def add_text(self, data: bytes) -> None:
        self._text += data
        if len(self._text) > FIELD_LIMIT_BYTES:
            raise RequestInvalid(f"The field '{self.name[:64]}' is too long.", param=self.name[:64])

    def text(self) -> str:
        try:
            return self._text.decode()
        except UnicodeDecodeError:
            raise RequestInvalid(f"The field '{self.name[:64]}' is not UTF-8.", param=self.name[:64]) from None
