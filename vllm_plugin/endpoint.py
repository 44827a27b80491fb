# SPDX-License-Identifier: Apache-2.0
"""`GET /v1/moe_tta/requests/{id}`: what became of a request's rounds.

vLLM loads endpoint plugins only where `VLLM_PLUGINS` names them: `moe_tta_http`. Paths
under /v1 are behind the server's API key.
"""

from __future__ import annotations

from typing import Any

from moe_tta.vllm_plugin.round_records import of_process

PATH = "/v1/moe_tta/requests/{response_id}"


class RoundsEndpoint:
    """vLLM's `EndpointPlugin`; it never reaches the engine."""

    name = "moe_tta_http"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the route to a FastAPI app."""
        from fastapi.responses import JSONResponse

        async def rounds(response_id: str) -> JSONResponse:
            found = of_process().find(response_id)
            if found:
                return JSONResponse({"id": response_id, "completions": found})
            message = (
                "no rounds of such a response are known here: it had none, is not the "
                "latest, or another API process served it"
            )
            error = {"message": message, "type": "NotFoundError", "code": 404}
            return JSONResponse({"error": error}, status_code=404)

        # FastAPI reads annotations as names: this one is known here alone
        rounds.__annotations__ = {"response_id": str}
        app.add_api_route(PATH, rounds, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing to prepare."""
