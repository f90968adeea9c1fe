"""GET /v1/models: the models as OpenAI's API lists them; the object `safelight` of each is ModelService's Model."""

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
"""Unix time at which a model was made: OpenAI's API requires one, and manifests have none."""


class ModelListing:
    """Answers requests about models, by the handlers of ModelService."""

    def __init__(self, rpcs: Rpcs) -> None:
        self._list = rpcs.find(MODEL_SERVICE, "ListModels")
        self._get = rpcs.find(MODEL_SERVICE, "GetModel")

    async def list_models(self, call: HttpCall) -> JSONResponse:
        """All models, in the order of their names."""
        models, token = list[models_pb2.Model](), ""
        while True:
            message = models_pb2.ListModelsRequest(page_size=MAX_PAGE_SIZE, page_token=token)
            page = models_pb2.ListModelsResponse.FromString(await call.context.unary(self._list, message))
            models.extend(page.models)
            token = page.next_page_token
            if not token:
                return JSONResponse({"object": "list", "data": [self._model(model) for model in models]})

    async def get_model(self, call: HttpCall) -> JSONResponse:
        """The model of the path."""
        message = models_pb2.GetModelRequest(name=f"models/{call.request.path_params['model']}")
        answer = models_pb2.GetModelResponse.FromString(await call.context.unary(self._get, message))
        return JSONResponse(self._model(answer.model))

    def _model(self, model: models_pb2.Model) -> dict[str, Any]:
        return {
            "id": model.name.removeprefix("models/"),
            "object": "model",
            "created": CREATED,
            "owned_by": OWNER,
            "safelight": MessageToDict(model, preserving_proto_field_name=True),
        }
