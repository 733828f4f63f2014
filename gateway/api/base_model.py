"""`GET /v1/base-model`: what a tenant's adapters are checked against, for checking them at home."""

import msgspec
from pydantic import BaseModel

from adapter_store.base_description import describe
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterTenant, AppParts

router = LazyRouter(prefix="/v1/base-model", tags=["adapters"])


class BaseModelObject(BaseModel):
    """`modules`: path of every linear layer → [in, out]; `dtype` is the one it is served in."""

    object: str
    name: str
    fingerprint: str
    architecture: str
    dtype: str
    modules: dict[str, list[int]]
    limits: dict[str, int]


@router.get("")
async def show_base_model(tenant_id: AdapterTenant, parts: AppParts) -> BaseModelObject:
    """The base model as adapters see it, and the bounds on them; `tailor adapter check` asks for it."""
    told = describe(parts.base, parts.inspector.bounds)
    return BaseModelObject(**msgspec.to_builtins(told))
