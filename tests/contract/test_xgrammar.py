"""What the gateway takes for a schema, the xgrammar that is installed takes too: else an engine would fail of it."""

import json
import os
import subprocess
import sys
from random import Random
from typing import Any

import msgspec

from gateway.dialects.schemas import SchemaBudget
from gateway.errors import RequestInvalid

KINDS = ("object", "array", "string", "number", "integer", "boolean", "null")
BOUNDS = (0, 1, -1, 5, 3, 0.5, -2.5, 1e18, 1e19, -1e30, 1e300, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2.0**63))
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SCHEMAS = 6_000
# in a process of its own: it imports torch
PROGRAM = """
import json, sys
import xgrammar

refused = []
for line in sys.stdin:
    try:
        xgrammar.Grammar.from_json_schema(line)
    except Exception as error:
        refused.append([line, str(error)])
print(json.dumps(refused))
"""


class Schemas:
    """Small ones, of everything that may stand in one, most of them odd."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)

    def _often(self, share: float) -> bool:
        return self._chance.random() < share

    def _several(self, depth: int) -> list[Any]:
        return [self.one(depth) for _ in range(self._chance.randint(0, 3))]

    def one(self, depth: int) -> Any:
        chance = self._chance
        if self._often(0.05):
            return chance.random() < 0.5
        schema: dict[str, Any] = {}
        if self._often(0.85):
            schema["type"] = chance.choice(KINDS) if self._often(0.85) else chance.sample(KINDS, chance.randint(0, 3))
        if depth:
            if self._often(0.3):
                schema["properties"] = {name: self.one(depth - 1) for name in ("a", "", "\0", "é") if self._often(0.4)}
                schema["required"] = chance.sample(["a", "", "z"], chance.randint(0, 3))
            for name in ("additionalProperties", "items"):
                if self._often(0.2):
                    schema[name] = self.one(depth - 1)
            for name in ("prefixItems", "anyOf", "oneOf"):
                if self._often(0.1):
                    schema[name] = self._several(depth - 1)
            if self._often(0.06):
                schema["allOf"] = [self.one(depth - 1)]
        if self._often(0.1):
            schema["enum"] = [chance.choice(["a", 1, None, True, 1.5, '"']) for _ in range(chance.randint(0, 3))]
        if self._often(0.06):
            schema["const"] = chance.choice(["a", 1, None, True])
        if self._often(0.06):
            schema["format"] = chance.choice(["email", "date", "uuid", "ipv4", "uri", "time"])
        for name in ("minLength", "maxLength", "minItems", "maxItems"):
            if self._often(0.15):
                schema[name] = chance.randint(0, 4)
        for name in NUMBERS:
            if self._often(0.2):
                schema[name] = chance.choice(BOUNDS)
        return schema


def test_xgrammar_takes_each_schema_that_the_gateway_takes() -> None:
    """And refuses some of the others by itself, so that the comparison says something."""
    schemas = Schemas(1)
    taken, others = [], []
    for _ in range(SCHEMAS):
        schema = json.dumps(schemas.one(2))
        try:
            taken.append(bytes(SchemaBudget(16_384).take(msgspec.Raw(schema.encode()), "schema")).decode())
        except RequestInvalid as error:
            if "no value fits" in error.message:
                others.append(schema)
    assert len(taken) > SCHEMAS // 4
    refused = json.loads(_told(taken + others))
    assert [each for each in refused if each[0].rstrip() in set(taken)] == []
    assert len(refused) > SCHEMAS // 10


def _told(schemas: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(schemas),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]
