"""What an adapter is checked against, as a small JSON document: the base model's layers, and the bounds of this server.

The gateway gives it (`GET /v1/base-model`), so that `tailor adapter check` needs neither the base's weights nor the
server.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import msgspec

from adapter_store.base_model import CONFIG, INDEX, WEIGHTS, BaseModel
from adapter_store.errors import BaseModelInvalid
from adapter_store.faults import Bounds

DESCRIPTION_LIMIT_BYTES = 64 << 20


class Description(msgspec.Struct):
    """`modules`: path of every linear layer → [in_features, out_features]; `limits` as in `Bounds`."""

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    modules: dict[str, tuple[int, int]]
    limits: dict[str, int]
    object: str = "base_model"


def describe(base: BaseModel, bounds: Bounds) -> Description:
    return Description(base.name, base.fingerprint, base.architecture, base.dtype, dict(base.modules), asdict(bounds))


def read_description(document: object, *, source: str) -> tuple[BaseModel, Bounds]:
    """The document as decoded JSON. Raises BaseModelInvalid, which names `source`."""
    try:
        told = msgspec.convert(document, Description)
    except msgspec.ValidationError as error:
        raise BaseModelInvalid(f"{source}: not a base model's description: {error}") from None
    base = BaseModel(told.name, told.fingerprint, told.architecture, told.dtype, told.modules)
    return base, Bounds(**_known(told.limits))


def _known(limits: Mapping[str, int]) -> dict[str, int]:
    """A newer server may have limits that are not known here."""
    return {field.name: limits[field.name] for field in fields(Bounds) if field.name in limits}


def read_base(path: Path, *, name: str | None = None, dtype: str = "auto") -> tuple[BaseModel, Bounds]:
    """A description in a file, or a base model's folder, with its weights or with config.json alone.

    `name` and `dtype` are for a folder. Raises BaseModelInvalid, OSError.
    """
    if not path.is_dir():
        return _read_file(path)
    whole = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    if not whole and not (path / CONFIG).is_file():
        raise BaseModelInvalid(f"{path}: no {CONFIG}: name the base model's folder, or its description")
    read = BaseModel.read if whole else BaseModel.read_config
    return read(path, name=name, dtype=dtype), Bounds()


def _read_file(path: Path) -> tuple[BaseModel, Bounds]:
    if path.stat().st_size > DESCRIPTION_LIMIT_BYTES:
        raise BaseModelInvalid(f"{path}: larger than {DESCRIPTION_LIMIT_BYTES} bytes")
    try:
        return read_description(msgspec.json.decode(path.read_bytes()), source=str(path))
    except msgspec.DecodeError as error:
        raise BaseModelInvalid(f"{path}: {error}") from None
