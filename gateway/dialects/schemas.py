"""JSON Schemas of response formats and tools, within bounds.

The engine compiles a schema into a grammar for every token of its vocabulary; long choices, large repetitions, regular
expressions and references that unfold cost all tenants its time. Keywords are an allow-list: those that vLLM's xgrammar
reads, and annotations. A schema is taken as bytes and refused by its size before it is parsed.
"""

import re
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.errors import RequestInvalid

MOST_NODES: Final = 1_024
MOST_CHOICES: Final = 1_024
MOST_COST_MS: Final = 3_500.0
"""What all schemas of a request may cost xgrammar 0.2.8 to compile for 64,000 tokens, on one core."""
OPTIONAL_MS: Final = 0.08  # times the square of an object's optional properties
NAME_MS: Final = 15.0
"""Each byte of a property's name in an object that may have others: they are told apart letter by letter."""
RANGE_MS: Final = 5.5
FAR_RANGE_MS: Final = 30.0  # with a bound beyond `FAR`, which is written out in all its digits
FAR: Final = 1e18
ITEMS_MS: Final = 1.5
LENGTH_MS: Final = 15.625  # each unit of each different pair of `minLength` and `maxLength`
LONG: Final = 128
COSTLIEST_LENGTH: Final = 200
"""What any length above `LONG` costs as: xgrammar takes it apart."""
LARGEST_INTEGER: Final = (1 << 63) - 1
FORMAT_MS: Final = {"email": 45.0, "uri": 45.0, "uri-reference": 52.0, "uri-template": 120.0, "hostname": 22.0}
OTHER_FORMAT_MS: Final = 5.0
DEEPEST: Final = 16
DEEPEST_JSON: Final = 48  # vLLM's own bound is 64, with what it wraps around
SCHEMAS: Final = 4
"""All schemas of a request together may be so many times as large as one."""

Repeat = Annotated[int, Meta(ge=0, le=1_000)]
Format = Literal[
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "json-pointer",
    "relative-json-pointer",
    "time",
    "uri",
    "uri-reference",
    "uri-template",
    "uuid",
]
"""Those that xgrammar knows; vLLM would give others to a second compiler."""
Number = int | float
Scalar = str | int | float | bool | None
Example = (
    Scalar | list[Scalar | list[Scalar] | dict[str, Scalar]] | dict[str, Scalar | list[Scalar] | dict[str, Scalar]]
)
Type = Literal["object", "array", "string", "number", "integer", "boolean", "null"]
Key = Annotated[str, Meta(max_length=256)]


class Schema(Struct, forbid_unknown_fields=True, gc=False):
    """The keywords that are taken, with their types."""

    type: Type | Annotated[list[Type], Meta(max_length=7)] | None = None
    properties: "dict[Key, Schema | bool] | None" = None
    required: list[Key] | None = None
    additional_properties: "Schema | bool | None" = msgspec.field(default=None, name="additionalProperties")
    items: "Schema | bool | None" = None
    prefix_items: "list[Schema | bool] | None" = msgspec.field(default=None, name="prefixItems")
    any_of: "list[Schema | bool] | None" = msgspec.field(default=None, name="anyOf")
    one_of: "list[Schema | bool] | None" = msgspec.field(default=None, name="oneOf")
    all_of: "Annotated[list[Schema | bool], Meta(max_length=1)] | None" = msgspec.field(default=None, name="allOf")
    defs: "dict[Key, Schema | bool] | None" = msgspec.field(default=None, name="$defs")
    ref: Key | None = msgspec.field(default=None, name="$ref")
    enum: list[Scalar] | None = None
    const: Scalar = None
    format: Format | None = None
    min_length: Repeat | None = msgspec.field(default=None, name="minLength")
    max_length: Repeat | None = msgspec.field(default=None, name="maxLength")
    min_items: Repeat | None = msgspec.field(default=None, name="minItems")
    max_items: Repeat | None = msgspec.field(default=None, name="maxItems")
    minimum: Number | None = None
    maximum: Number | None = None
    exclusive_minimum: Number | None = msgspec.field(default=None, name="exclusiveMinimum")
    exclusive_maximum: Number | None = msgspec.field(default=None, name="exclusiveMaximum")
    # annotations
    title: str | None = None
    description: str | None = None
    default: Example = None
    examples: Annotated[list[Example], Meta(max_length=64)] | None = None
    comment: str | None = msgspec.field(default=None, name="$comment")
    schema: str | None = msgspec.field(default=None, name="$schema")
    id: str | None = msgspec.field(default=None, name="$id")
    deprecated: bool | None = None
    nullable: bool | None = None
    read_only: bool | None = msgspec.field(default=None, name="readOnly")
    write_only: bool | None = msgspec.field(default=None, name="writeOnly")
    discriminator: dict[str, Scalar | dict[str, str]] | None = None


class SchemaBudget:
    """What one request's schemas may cost together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._nodes = 0
        self._choices = 0
        self._lengths: set[tuple[int, int | None]] = set()
        self._cost_ms = {
            "optional properties": 0.0,
            "names beside additionalProperties": 0.0,
            "bounds of numbers": 0.0,
            "bounds of lists": 0.0,
            "maxLength": 0.0,
            "format": 0.0,
        }

    def take(self, raw: msgspec.Raw, param: str, *, compiled: bool = True, may_be_null: bool = False) -> msgspec.Raw:
        """The schema as it goes to the engine, its keywords in the client's order.

        One that is not `compiled` is only shown to the model: it may hold any keyword.

        Raises:
            RequestInvalid: it is no schema, has a keyword that is not taken, or passes a bound.
        """
        self._bytes += len(raw)
        if len(raw) > self._most_bytes or self._bytes > SCHEMAS * self._most_bytes:
            raise RequestInvalid(
                f"A schema may have at most {self._most_bytes} bytes, all of a request {SCHEMAS} times as many.",
                param=param,
            )
        try:
            if may_be_null and bytes(raw) == b"null":
                return raw
            plain = msgspec.json.decode(raw, type=dict[str, Any])
            if compiled:
                self._measure(msgspec.convert(plain, type=Schema), param)
            elif deeper_than(DEEPEST_JSON, plain):
                raise RequestInvalid(f"A schema may be at most {DEEPEST} levels deep.", param=param)
        except _Impossible as error:
            raise RequestInvalid(f"{param}: no value fits a part of it: {error}.", param=param) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestInvalid(f"{param}: {_told(str(error))}.", param=param) from None
        return msgspec.Raw(msgspec.json.encode(plain))

    def _measure(self, root: Schema, param: str) -> None:
        level: list[Schema | bool] = [root]
        nodes: list[Schema] = []
        refs = False
        for _ in range(DEEPEST):
            self._nodes += len(level)
            below: list[Schema | bool] = []
            for node in level:
                if isinstance(node, Schema):
                    nodes.append(node)
                    refs = refs or node.ref is not None
                    self._add(node, below)
                elif node is False:
                    raise _Impossible("false, where a value must stand")
            self._hold(param)
            if not below:
                if refs:
                    _check_references(root, nodes, param)
                return
            level = below
        raise RequestInvalid(f"A schema may be at most {DEEPEST} levels deep.", param=param)

    def _add(self, node: Schema, below: list[Schema | bool]) -> None:
        """Count what one part costs, and put what it holds into `below`.

        Raises:
            _Impossible: xgrammar would refuse it.
        """
        if node.enum is not None:
            self._choices += len(node.enum)
            if not node.enum:
                raise _Impossible("enum is empty")
        cost = self._cost_ms
        if node.format:
            cost["format"] += FORMAT_MS.get(node.format, OTHER_FORMAT_MS)
        if node.max_length is not None or node.min_length is not None:
            pair = (node.min_length or 0, node.max_length)
            if node.max_length is not None and pair[0] > node.max_length:
                raise _Impossible("minLength is above maxLength")
            if pair not in self._lengths:  # the same pair is compiled once, wherever it stands
                self._lengths.add(pair)
                length = pair[0] if node.max_length is None else node.max_length
                cost["maxLength"] += (length if length <= LONG else COSTLIEST_LENGTH) * LENGTH_MS
        cost["bounds of numbers"] += _range_ms(node)
        if node.min_items is not None or node.max_items is not None:
            cost["bounds of lists"] += ITEMS_MS
            _hold_items(node)
        if node.properties:
            if node.additional_properties is not None and node.additional_properties is not False:
                names = sum(len(name.encode()) for name in node.properties)
                cost["names beside additionalProperties"] += (1 + names) * NAME_MS
            optional = len(node.properties.keys() - (node.required or ()))
            cost["optional properties"] += optional**2 * OPTIONAL_MS
            below += node.properties.values()
        if isinstance(node.items, Schema):
            below.append(node.items)
        if isinstance(node.additional_properties, Schema):
            below.append(node.additional_properties)
        if node.any_of:
            below += node.any_of
        if node.one_of or node.all_of or node.prefix_items:
            if node.prefix_items and True in node.prefix_items:
                raise _Impossible("prefixItems holds true")
            below += (*(node.one_of or ()), *(node.all_of or ()), *(node.prefix_items or ()))
        if node.defs:
            below += node.defs.values()

    def _hold(self, param: str) -> None:
        passed = None
        if self._nodes > MOST_NODES:
            passed = f"{MOST_NODES} parts"
        elif self._choices > MOST_CHOICES:
            passed = f"{MOST_CHOICES} enum items"
        if passed is not None:
            raise RequestInvalid(f"The schemas of one request may have at most {passed}.", param=param)
        if sum(self._cost_ms.values()) > MOST_COST_MS:
            parts = ", ".join(f"{name}: {value:.0f}" for name, value in self._cost_ms.items() if value >= 1)
            raise RequestInvalid(
                f"The schemas of one request would take too long to compile: they may cost {MOST_COST_MS:.0f} ms, and "
                f"cost about this much ({parts}). Make properties required, bounds smaller, or objects closed.",
                param=param,
            )


class _Impossible(Exception):
    """No value fits, or xgrammar 0.2.8 finds none. It says so by an exception, for which vLLM 0.32 answers a stream of
    some APIs with 200 first."""


def _hold_items(node: Schema) -> None:
    least, most, first = node.min_items or 0, node.max_items, len(node.prefix_items or ())
    if most is not None and least > most:
        raise _Impossible("minItems is above maxItems")
    if most is not None and first > most:
        raise _Impossible("prefixItems are more than maxItems")
    if least > first and not node.items:
        raise _Impossible("minItems asks for more than prefixItems, and there is no schema in items")


def _hold_range(node: Schema) -> None:
    least, above, most, below = node.minimum, node.exclusive_minimum, node.maximum, node.exclusive_maximum
    if node.type == "integer" or (isinstance(node.type, list) and "integer" in node.type):
        for bound in (least, above, most, below):
            if bound is not None and bound != int(bound):
                raise _Impossible("a bound of an integer is no whole number")
        lows: tuple[Number, ...] = tuple(int(one) + more for one, more in ((least, 0), (above, 1)) if one is not None)
        highs: tuple[Number, ...] = tuple(int(one) - less for one, less in ((most, 0), (below, 1)) if one is not None)
        excluded: tuple[Number, ...] = ()
        if any(not _is_int64(bound) for bound in (least, above, most, below, *lows, *highs)):
            raise _Impossible("a bound of an integer is beyond 64 bits")
    else:
        try:  # compared as C compares them
            lows, highs = _floats(least, above), _floats(most, below)
            excluded = _floats(above, below)
        except OverflowError:
            raise _Impossible("a number's bound is too large") from None
    if lows and highs:
        low, high = max(lows), min(highs)
        if low > high or (low == high and low in excluded):
            raise _Impossible("a number's lower bound is above its upper one")


def _is_int64(bound: Number | None) -> bool:
    """As xgrammar sees it: a number with a point or an exponent is as far off as the far end of what it stands for."""
    least = -LARGEST_INTEGER - (1 if isinstance(bound, int) else 0)
    return bound is None or least <= bound <= LARGEST_INTEGER


def _floats(*bounds: Number | None) -> tuple[float, ...]:
    return tuple(float(bound) for bound in bounds if bound is not None)


def _range_ms(node: Schema) -> float:
    bounds = (node.minimum, node.maximum, node.exclusive_minimum, node.exclusive_maximum)
    given = [abs(bound) for bound in bounds if bound is not None]
    if not given:
        return 0.0
    _hold_range(node)
    return RANGE_MS if max(given) <= FAR else FAR_RANGE_MS


def deeper_than(depth: int, value: Any) -> bool:
    """Whether JSON is nested deeper than that."""
    level = [value]
    for _ in range(depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _check_references(root: Schema, nodes: list[Schema], param: str) -> None:
    """Each leads to a definition of the same schema, and none to itself before a property or an item is read."""
    defs = {f"#/$defs/{name}": found for name, found in (root.defs or {}).items()}
    done: set[str] = set()

    def walk(node: Schema | bool, within: tuple[str, ...]) -> None:
        if not isinstance(node, Schema):
            return
        if node.ref is not None:
            if node.ref not in defs:
                raise RequestInvalid(f"$ref may only name '#/$defs/…' of the same schema: {node.ref}.", param=param)
            if node.ref in within or len(within) == DEEPEST:
                raise RequestInvalid(f"{node.ref} refers to itself, or through too many references.", param=param)
            if node.ref not in done:
                walk(defs[node.ref], (*within, node.ref))
                done.add(node.ref)
        for choice in (*(node.any_of or ()), *(node.one_of or ()), *(node.all_of or ())):
            walk(choice, within)

    for node in nodes:
        walk(node, ())


_REGEXES: Final = re.compile(r"unknown field `(pattern|patternProperties)`")
_UNKNOWN: Final = re.compile(r"unknown field `([^`]{1,64})`")


def _told(text: str) -> str:
    """msgspec's sentence as ours."""
    if _REGEXES.search(text):
        return "a schema that the answer is held to may not hold regular expressions"
    unknown = _UNKNOWN.search(text)
    if unknown:
        return f"the keyword {unknown[1]} is not taken in schemas"
    return text[:200]
