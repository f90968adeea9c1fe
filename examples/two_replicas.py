"""Start a Redis and two servers, kill the server that runs a generation, and watch the other server continue it.

Needs redis-server and the environment that `make setup` makes. All servers listen on loopback, with the simulated
runtime, whose pictures are noise; give another runtime as the argument. The program ends only what it has started.
"""

import asyncio
import base64
import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import safelight

SAFELIGHT = Path(sys.executable).with_name("safelight")
LEASE_TTL_S = 2.0
"""Time in seconds after which another replica takes over the generations of a silent one."""


def free_port() -> int:
    """A port below those that Linux gives to outgoing connections, one of which could take it before the server."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port


def start_redis(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("there is no redis-server: install it, on Debian with tools/install-system-packages")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    return process, f"redis://127.0.0.1:{port}/0"


def write_keys(path: Path) -> None:
    """Writes the keys that encrypt entries in Redis. All replicas use the same file."""
    lines = [f"{name} {base64.b64encode(secrets.token_bytes(32)).decode()}\n" for name in ("names", "k1")]
    path.write_text("".join(lines))
    path.chmod(0o600)


def start_server(redis_url: str, keys: Path, runtime: str) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    settings = {
        "PORT": port,
        "RUNTIME": runtime,
        "SIMULATED_BASE_MS": 100,
        "REDIS_URL": redis_url,
        "REDIS_TIMEOUT_MS": 2000,
        "CACHE_KEY_FILE": keys,
        "LEASE_TTL_S": LEASE_TTL_S,
        "LOG_LEVEL": "error",
    }
    environment = os.environ | {f"SAFELIGHT_{name}": str(value) for name, value in settings.items()}
    return subprocess.Popen([SAFELIGHT, "serve"], env=environment, stdout=subprocess.DEVNULL), f"127.0.0.1:{port}"


async def ready(address: str) -> None:
    async with safelight.Client(address) as client:
        await asyncio.wait_for(client.channel.channel_ready(), 60)


async def main(runtime: str = "simulated") -> None:
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:

        def end_with_program(process: subprocess.Popen[bytes]) -> None:
            ends.callback(process.wait)  # callbacks run in reverse: first kill, then wait
            ends.callback(process.kill)

        folder = Path(scratch)
        redis, url = start_redis(folder)
        end_with_program(redis)
        keys = folder / "cache.keys"
        write_keys(keys)
        (first, address), (second, other) = (start_server(url, keys, runtime) for _ in range(2))
        end_with_program(first)
        end_with_program(second)
        await asyncio.gather(ready(address), ready(other))
        print(f"redis-server {redis.pid}, safelight {first.pid} at {address}, safelight {second.pid} at {other}")

        async with safelight.Client([address, other]) as client:  # uses the first one while it answers
            async for event in client.generate("a silver sword", seed=5, steps=40):
                if isinstance(event, safelight.Progress):
                    if event.step >= 10 and first.poll() is None:
                        first.kill()
                        first.wait()
                        print(f"killed {first.pid} after step {event.step}")
                    elif first.poll() is not None:
                        print(f"step {event.step} of {event.num_steps}, by the other replica")
                elif isinstance(event, safelight.Picture):
                    print(f"picture: {len(event.data)} bytes")


asyncio.run(main(*sys.argv[1:]))
