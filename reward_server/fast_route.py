"""A route for requests that come by the thousand: those that are right take a short way through FastAPI."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

_JSON = "application/json"


class FastRoute(APIRoute):
    """Reads and writes by pydantic's own JSON, which halves the work of a request.

    For endpoints with the parameters `request` and `body`. What is not right goes the usual way, to get its error.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        usual = super().get_route_handler()
        hints = get_type_hints(self.endpoint, include_extras=True)
        read, write = TypeAdapter(hints["body"]), TypeAdapter(hints["return"])

        async def answer(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
                return await usual(request)
            try:
                body = read.validate_json(await request.body())
            except ValidationError:
                return await usual(request)
            return Response(write.dump_json(await self.endpoint(request=request, body=body)), media_type=_JSON)

        return answer
