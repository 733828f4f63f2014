"""`/v1/adapters/{name}/versions/{number}/evaluation`: what was found of a job's result before it was published."""

from typing import Any

from pydantic import BaseModel

from adapter_store.aliases import main_of
from gateway.api.adapters import Number
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterTenant, AppParts

router = LazyRouter(prefix="/v1/adapters", tags=["adapters"])


class EvaluationObject(BaseModel):
    """`report`: the version beside its base and what it took the place of, docs/api.md; null: it was not evaluated."""

    object: str = "evaluation"
    adapter: str
    version: int
    report: dict[str, Any] | None


@router.get("/{name}/versions/{number}/evaluation")
async def show(name: str, number: Number, tenant_id: AdapterTenant, parts: AppParts) -> EvaluationObject:
    """How good a version was on its job's validation file."""
    version = main_of(await parts.store.resolve(tenant_id, f"{name}@{number}"))
    return EvaluationObject(adapter=name, version=number, report=await parts.jobs.evaluation(version.id))
