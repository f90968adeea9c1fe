"""What Safelight is compared with: other servers for the same pictures, each a program of its own.

`litserve_server.py`: the same ONNX sessions behind LitServe with request-level
batching. `diffusers_server.py`: a plain grpc.aio server around diffusers'
StableDiffusionPipeline. `start.py` starts them and asks them. All bind
loopback and end with the block that started them.
"""
