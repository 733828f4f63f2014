"""`GET /v1/models`: the base model and the tenant's own adapters, as OpenAI lists models."""

from fastapi import APIRouter
from pydantic import BaseModel

from adapter_store.aliases import main_of
from gateway.dependencies import AppParts, InferenceTenant
from gateway.errors import ModelUnknown

router = APIRouter(prefix="/v1/models", tags=["models"])


class Model(BaseModel):
    """OpenAI's model object; `created` in Unix seconds."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


@router.get("")
async def list_models(tenant_id: InferenceTenant, parts: AppParts) -> ModelList:
    """What this key can use."""
    return ModelList(data=await _models(tenant_id, parts))


@router.get("/{model:path}")
async def show_model(model: str, tenant_id: InferenceTenant, parts: AppParts) -> Model:
    """One of them."""
    if model == parts.models.base_name:
        return _base(parts)
    version = await parts.models.resolve(tenant_id, model)
    if version is None:
        raise ModelUnknown(model)
    return Model(id=model, created=main_of(version).created_at, owned_by=tenant_id)


def _base(parts: AppParts) -> Model:
    return Model(id=parts.models.base_name, created=0, owned_by="tailor")


async def _models(tenant_id: InferenceTenant, parts: AppParts) -> list[Model]:
    found = [_base(parts)]
    after: str | None = None
    while page := await parts.store.list(tenant_id, after=after, limit=1_000):
        found += [Model(id=a.name, created=a.created_at, owned_by=tenant_id) for a in page]
        after = page[-1].name
    return found
