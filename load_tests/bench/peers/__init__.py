"""Servers that Safelight is compared with: they make the same pictures, each as a separate program.

`litserve_server.py`: the same ONNX sessions behind LitServe with request-level
batching. `diffusers_server.py`: a plain grpc.aio server around diffusers'
StableDiffusionPipeline. `start.py` starts them and asks them. All bind
loopback and end with the block that started them.
"""
