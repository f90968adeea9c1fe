"""A plain grpc.aio server around diffusers' StableDiffusionPipeline: one request after another, all cores for each.

Classes and sizes are those of the shipped model (`training/networks.py`). The
weights are random, since the repository has only ONNX files: the computation
costs the same, but the pictures show nothing. Its one method maps bytes to bytes:
JSON {"prompt", "seed", "num_steps"} -> raw RGB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch
from diffusers import StableDiffusionPipeline

from load_tests.bench.peers.ask import DIFFUSERS_METHOD
from load_tests.bench.peers.start import SERVING
from load_tests.bench.requests import PROMPT
from training import networks
from training.recipe import RECIPE

GUIDANCE_SCALE = 3.0


def build() -> StableDiffusionPipeline:
    """Makes the pipeline with random weights; its tokenizer knows the benchmarks' prompt."""
    networks.seed_everything(0)
    tokens = networks.tokenizer(RECIPE, [PROMPT])
    pipeline = StableDiffusionPipeline(
        vae=networks.autoencoder(RECIPE, RECIPE.decoder_channels, RECIPE.decoder_blocks).eval(),
        text_encoder=networks.text_encoder(RECIPE, tokens).eval(),
        tokenizer=tokens,
        unet=networks.denoiser(RECIPE).eval(),
        scheduler=networks.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def develop(pipeline: StableDiffusionPipeline, prompt: str, seed: int, num_steps: int) -> bytes:
    """Develops one picture with the settings of the shipped model."""
    image = pipeline(
        prompt,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
    ).images[0]
    return bytes(image.tobytes())


async def serve() -> None:
    """Prints its address, then serves until it is ended."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = build()
    develop(pipeline, PROMPT, 0, 2)
    turn = ThreadPoolExecutor(1)

    async def generate(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        asked = json.loads(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(turn, develop, pipeline, asked["prompt"], asked["seed"], asked["num_steps"])

    server = grpc.aio.server()
    service, method = DIFFUSERS_METHOD.strip("/").split("/")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(generate)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"{SERVING}127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    asyncio.run(serve())


if __name__ == "__main__":
    main()
