"""GET /v1/models: the models as OpenAI's API lists them; `safelight` has what each offers, as ModelService says it."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict
from safelight.v1 import models_pb2
from starlette.responses import JSONResponse

from safelight_server.api.paging import MAX_PAGE_SIZE
from safelight_server.api.service import MODEL_SERVICE
from safelight_server.http.calls import HttpCall
from safelight_server.http.context import Rpcs

OWNER = "safelight"
CREATED = 0
"""Unix time at which a model was made: manifests have none, and OpenAI's API wants one."""


class ModelListing:
    """Answers requests about models, by the handlers of ModelService."""

    def __init__(self, rpcs: Rpcs) -> None:
        self._list = rpcs.find(MODEL_SERVICE, "ListModels")
        self._get = rpcs.find(MODEL_SERVICE, "GetModel")

    async def list_models(self, call: HttpCall) -> JSONResponse:
        """All models, in the order of their names."""
        models, token = list[models_pb2.Model](), ""
        while True:
            asked = models_pb2.ListModelsRequest(page_size=MAX_PAGE_SIZE, page_token=token)
            page = models_pb2.ListModelsResponse.FromString(await call.context.unary(self._list, asked))
            models.extend(page.models)
            token = page.next_page_token
            if not token:
                return JSONResponse({"object": "list", "data": [self._model(model) for model in models]})

    async def get_model(self, call: HttpCall) -> JSONResponse:
        """The model of the path."""
        asked = models_pb2.GetModelRequest(name=f"models/{call.request.path_params['model']}")
        answer = models_pb2.GetModelResponse.FromString(await call.context.unary(self._get, asked))
        return JSONResponse(self._model(answer.model))

    def _model(self, model: models_pb2.Model) -> dict[str, Any]:
        return {
            "id": model.name.removeprefix("models/"),
            "object": "model",
            "created": CREATED,
            "owned_by": OWNER,
            "safelight": MessageToDict(model, preserving_proto_field_name=True),
        }
