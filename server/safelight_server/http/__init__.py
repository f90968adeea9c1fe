"""HTTP for callers without gRPC: the OpenAI-compatible image API and gRPC-Web, in the same process and event loop.

`server.py` listens: uvicorn, with bounds on connections and on slow clients.
`app.py` has the routes and what holds for all of them. `calls.py` runs one
request. `context.py` lets it call the handlers of the gRPC services, in this
process. `images.py` answers requests for pictures, `edits.py` those for pictures
from a picture, whose form `form.py` reads; `images_request.py` checks both and
makes a GenerateRequest of each. `models.py` lists the models, `errors.py` turns
statuses into responses. `grpc_web.py` has the methods of gRPC for pages in
browsers. `static.py` serves such a page, whose files are in `page/`.
"""
