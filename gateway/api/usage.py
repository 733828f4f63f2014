"""`/v1/usage` and `/admin/v1/usage`: what the ledger holds, as JSON or CSV."""

import time
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel

from adapter_store.ids import TenantId
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator, Parts
from gateway.errors import RequestInvalid, ScopeMissing, authorization_of
from gateway.limits.terms import month_of
from gateway.spreadsheet import csv_of
from gateway.tenants import Scope
from gateway.usage import UsageQuestion, UsageRow, read_usage

router = LazyRouter(tags=["usage"])
LAST_SECOND: Final = 253_402_300_799  # of the year 9999
LONGEST_S: Final = 10 * 366 * 86_400
COLUMNS: Final = ("start", "adapter", "requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")

Second = Annotated[int | None, Query(ge=0, le=LAST_SECOND)]
By = Literal["hour", "day", "month"]
Format = Literal["json", "csv"]
Limit = Annotated[int, Query(ge=1, le=10_000)]
Name = Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")]
Page = Annotated[str | None, Query(max_length=256)]


class AdapterUsage(BaseModel):
    """Use of one adapter from `start` (Unix seconds) on, for an hour, a day or a month; the base model's name is ''.

    `cached_tokens` are among `prompt_tokens`, `failed` among `requests`.
    """

    start: int
    adapter: str
    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TenantUsage(AdapterUsage):
    """The same with its tenant; `tenant` is null where that is deleted."""

    tenant_id: str
    tenant: str | None


class UsageList(BaseModel):
    """A page; `next_page`, if any, is the `page` of the next."""

    object: str = "list"
    data: list[AdapterUsage]
    next_page: str | None


class TenantUsageList(UsageList):
    data: list[TenantUsage]  # type: ignore[assignment]  # read only


async def _usage_reader(request: Request, parts: AppParts) -> TenantId:
    """A key for inference sees what its requests have used, and a tenant's administrator may have no such key."""
    key = await parts.auth.live_key(authorization_of(request.scope))
    if key.tenant_id is None:
        raise ScopeMissing("An operator's key stands for no tenant: use /admin/v1/usage.")
    if not key.scopes & {Scope.INFERENCE, Scope.ADMIN}:
        raise ScopeMissing("This key may not be used here: it lacks the scope 'inference' or 'admin'.")
    return key.tenant_id


UsageReader = Annotated[TenantId, Depends(_usage_reader)]


@router.get("/v1/usage", response_model=UsageList)
async def own_usage(
    request: Request,
    tenant_id: UsageReader,
    parts: AppParts,
    start: Second = None,
    end: Second = None,
    by: By = "day",
    adapter: Name = None,
    limit: Limit = 1_000,
    page: Page = None,
    form: Annotated[Format | None, Query(alias="format")] = None,
) -> Response:
    """The tenant's use by time and adapter: whole hours that begin in [start, end); default: this month (UTC)."""
    question = _question(start, end, by, tenant_id, adapter, page, limit)
    rows, next_page = await _read(parts, question)
    if _wants_csv(request, form):
        return _csv(COLUMNS, rows, next_page)
    found = [AdapterUsage(**{name: getattr(row, name) for name in COLUMNS}) for row in rows]
    return _json(UsageList(data=found, next_page=next_page))


@router.get("/admin/v1/usage", response_model=TenantUsageList)
async def all_usage(
    request: Request,
    _: Operator,
    parts: AppParts,
    start: Second = None,
    end: Second = None,
    by: By = "day",
    tenant: Name = None,
    adapter: Name = None,
    limit: Limit = 1_000,
    page: Page = None,
    form: Annotated[Format | None, Query(alias="format")] = None,
) -> Response:
    """Every tenant's use, or one's (name or id), by time, tenant and adapter."""
    tenant_id = None if tenant is None else (await parts.tenants.named(tenant)).id
    rows, next_page = await _read(parts, _question(start, end, by, tenant_id, adapter, page, limit))
    names = ("tenant_id", "tenant", *COLUMNS)
    if _wants_csv(request, form):
        return _csv(names, rows, next_page)
    found = [TenantUsage(**{name: getattr(row, name) for name in names}) for row in rows]
    return _json(TenantUsageList(data=found, next_page=next_page))


def _question(
    start: int | None, end: int | None, by: By, tenant_id: str | None, adapter: str | None, page: str | None, limit: int
) -> UsageQuestion:
    month_begin, month_end = month_of(time.time() if start is None else start)
    start = month_begin if start is None else start
    end = month_end if end is None else end
    if end <= start or end - start > LONGEST_S:
        raise RequestInvalid("end must be later than start, and at most ten years later.", param="end")
    return UsageQuestion(start, end, by, tenant_id, adapter, _place(page), limit)


def _place(page: str | None) -> tuple[int, str, str] | None:
    if page is None:
        return None
    at, _, rest = page.partition(":")
    tenant_id, found, adapter = rest.partition(":")
    if not found or not at.isascii() or not at.isdigit() or int(at) > LAST_SECOND or "\0" in rest:
        raise RequestInvalid("page is not one that an answer gave as next_page.", param="page")
    return int(at), tenant_id, adapter


async def _read(parts: Parts, question: UsageQuestion) -> tuple[Sequence[UsageRow], str | None]:
    rows = await read_usage(parts.engine, question)
    if len(rows) < question.limit:
        return rows, None
    last = rows[-1]
    return rows, f"{last.start}:{last.tenant_id}:{last.adapter}"


def _wants_csv(request: Request, form: Format | None) -> bool:
    return form == "csv" or (form is None and "text/csv" in request.headers.get("accept", ""))


def _json(body: UsageList) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _csv(names: Sequence[str], rows: Sequence[UsageRow], next_page: str | None) -> Response:
    text = csv_of(names, ([getattr(row, name) for name in names] for row in rows))
    headers = {"content-disposition": 'attachment; filename="usage.csv"'}
    if next_page is not None:
        headers["x-tailor-next-page"] = next_page
    return Response(text, media_type="text/csv", headers=headers)
