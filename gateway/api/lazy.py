"""Routes that FastAPI makes of their functions with their first request."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.routing import compile_path


class LazyRouter(APIRouter):
    """FastAPI's, of lazy routes."""

    def __init__(self, *, prefix: str = "", tags: list[str]) -> None:
        super().__init__(prefix=prefix, tags=list(tags), route_class=_LazyRoute)


class _LazyRoute(APIRoute):
    """What tells which route a request is for is there from the start; all else when it is first asked for.

    Most gateways are asked for few of these routes, and what FastAPI makes of all of them takes 2 MiB of each worker
    and a tenth of its start. A first request waits a millisecond or two for its own.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], *, methods: set[str] | list[str], **told: Any) -> None:
        self.path = path
        self.endpoint = endpoint
        self.methods = set(methods)
        self.path_regex, self.path_format, self.param_convertors = compile_path(path)
        self._told = told

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: the first time, that is because this is not made yet."""
        told = self.__dict__.pop("_told", None)
        if told is None:
            raise AttributeError(f"a route has no {name}")
        super().__init__(self.path, self.endpoint, methods=self.methods, **told)
        return getattr(self, name)
