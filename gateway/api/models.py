"""`/v1/models`: the base model and the tenant's own adapters, as OpenAI lists models."""

from pydantic import BaseModel

from adapter_store.aliases import main_of
from gateway.api.adapters import erase_everywhere
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterKey, AppParts, InferenceTenant
from gateway.errors import ModelUnknown, RequestInvalid

router = LazyRouter(prefix="/v1/models", tags=["models"])


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


class ErasureTold(BaseModel):
    """Where the receipt is."""

    erasure: str


class ModelDeleted(BaseModel):
    id: str
    object: str = "model"
    deleted: bool = True
    tailor: ErasureTold


@router.delete("/{model:path}")
async def delete_model(model: str, key: AdapterKey, parts: AppParts) -> ModelDeleted:
    """Erase the version behind a fine-tuned name (`ft:…`, or `name@3`), in use or not, as OpenAI deletes models.

    Aliases go on with their other shares; without any, `default` falls to the newest version left, and the adapter
    goes with its last one.
    """
    if model == parts.models.base_name:
        raise RequestInvalid("The base model is not yours to delete.", param="model")
    answering = await parts.models.resolve(key.tenant_id, model)
    if answering is None or main_of(answering).tenant_id != key.tenant_id:
        raise ModelUnknown(model)
    found = main_of(answering)
    if not model.startswith("ft:") and "@" not in model:
        raise RequestInvalid(
            f"'{model[:128]}' stands now for one version and now for another: name one as '{found.adapter_name}@"
            f"{found.number}', or DELETE /v1/adapters/{found.adapter_name} with all of them.",
            param="model",
        )
    erasure = await erase_everywhere(parts, key, found.adapter_name, found.number, force=True)
    return ModelDeleted(id=model, tailor=ErasureTold(erasure=erasure.id))


def _base(parts: AppParts) -> Model:
    return Model(id=parts.models.base_name, created=0, owned_by="tailor")


async def _models(tenant_id: InferenceTenant, parts: AppParts) -> list[Model]:
    found = [_base(parts)]
    after: str | None = None
    while page := await parts.store.list(tenant_id, after=after, limit=1_000):
        found += [Model(id=a.name, created=a.created_at, owned_by=tenant_id) for a in page]
        after = page[-1].name
    return found
