"""A user who requests pictures, watches previews, thinks, and sometimes cancels: `make locust`.

Metrics, in ms, each a row of locust's table:

- `first preview`: from the request to the first preview;
- `preview gap`: between a preview and the previous one;
- `first recognisable preview`: from the request to that preview, see docs/load-testing.md; to the picture, if there
  was no such preview;
- `picture (computed)`, `picture (cached)`: from the request to the end, by whether it was developed for this request;
- `cancel`: from the cancel to the end of the stream;
- `refused REASON`: from the request to a refusal that says when to retry. It does not count as a failure.

Any other end of a request is a failure of `picture`.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import gevent
import grpc
import grpc.experimental.gevent
from google.rpc import error_details_pb2, status_pb2
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from safelight.v1 import generation_pb2 as pb
from safelight.v1 import generation_pb2_grpc as stubs

from load_tests.locust.prompts import PROMPTS, Prompts
from load_tests.locust.recognition import first_recognisable

grpc.experimental.gevent.init_gevent()  # before the first channel; otherwise a call blocks all users

MAX_CANCEL_PREVIEW = 5
"""A user who cancels does so at a random preview among the first so many."""
COMPUTED = {pb.CacheResult.DISPOSITION_MISS, pb.CacheResult.DISPOSITION_LATENT, pb.CacheResult.DISPOSITION_BRANCHED}


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # mypy's environment has no locust
def add_options(parser: LocustArgumentParser) -> None:
    """Adds the options of these users to those of locust."""
    group = parser.add_argument_group("Safelight's users")
    # Paths are strings, since locust sends the options to the workers of --processes and accepts only plain values.
    group.add_argument("--prompts", default=str(PROMPTS), help="file of prompts, one a line, the most popular first")
    group.add_argument("--zipf", type=float, default=1.0, help="exponent of their popularity; 0: all alike")
    group.add_argument("--seeds", type=int, default=0, help="seeds a prompt; 0: always a new one, so nothing is cached")
    group.add_argument("--think", type=float, default=5.0, help="mean seconds between a user's requests, exponential")
    group.add_argument("--cancels", type=float, default=0.05, help="share of the requests that are cancelled")
    group.add_argument("--steps", type=int, help="denoising steps; the model's default where absent")
    group.add_argument("--ca-file", help="PEM of the server's certificate authority; enables TLS")
    group.add_argument("--server-name", default="", help="in the certificate, if it is not the host's")
    parser.add_argument(
        "--api-key", default=os.environ.get("SAFELIGHT_API_KEY"), is_secret=True, help="or SAFELIGHT_API_KEY"
    )


@events.init.add_listener  # type: ignore[untyped-decorator]  # likewise
def check_options(environment: Environment, **_: object) -> None:
    """Checks the options before the first user starts.

    Raises:
        SystemExit: an option is out of its range, or the file of prompts cannot be used.
    """
    gevent.get_hub().loop.update_now()  # otherwise --run-time would include the seconds of the imports
    options = environment.parsed_options
    if options.think < 0 or not 0 <= options.cancels <= 1:
        raise SystemExit("--think must be at least 0, --cancels from 0 to 1")
    try:
        SafelightUser.prompts = Prompts(Path(options.prompts), options.zipf, options.seeds)
        SafelightUser.channel = channel(environment)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--prompts, --zipf, --seeds or --ca-file: {error}") from None


def channel(environment: Environment) -> grpc.Channel:
    """The connection that all users of this process share."""
    options = environment.parsed_options
    target = environment.host or "127.0.0.1:8421"
    if options.ca_file is None:
        return grpc.insecure_channel(target)
    name = [("grpc.ssl_target_name_override", options.server_name)] if options.server_name else []
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(Path(options.ca_file).read_bytes()), name)


@dataclass(slots=True)
class Watched:
    """What a user has received of one generation. Times are on `time.perf_counter`."""

    began: float = field(default_factory=time.perf_counter)
    generation: str = ""
    previews: list[tuple[float, bytes]] = field(default_factory=list)
    cancelled: float | None = None
    picture: bytes = b""
    computed: bool = True


class SafelightUser(User):  # type: ignore[misc]  # likewise
    """One person at a screen."""

    prompts: ClassVar[Prompts]
    channel: ClassVar[grpc.Channel]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        self._options = options
        self._rng = random.Random()
        self._stub = stubs.GenerationServiceStub(self.channel)
        self._metadata = (("authorization", f"Bearer {options.api_key}"),) if options.api_key else ()

    def wait_time(self) -> float:
        """Seconds that the user thinks before the next request."""
        return self._rng.expovariate(1 / self._options.think) if self._options.think else 0.0

    @task  # type: ignore[untyped-decorator]  # likewise
    def ask(self) -> None:
        """Requests a picture, watches it to its end, and reports the latencies to Locust."""
        seen = Watched()
        try:
            self._watch(seen)
        except grpc.RpcError as error:
            self._ended(seen, error)
            return
        now = time.perf_counter()
        if seen.computed:
            found = first_recognisable(seen.previews, seen.picture)
            self._report("first recognisable preview", (now if found is None else found) - seen.began)
        self._report("picture (computed)" if seen.computed else "picture (cached)", now - seen.began, len(seen.picture))

    def _watch(self, seen: Watched) -> None:
        prompt, seed = self.prompts.draw(self._rng)
        spec = pb.GenerationSpec(prompt=prompt, num_inference_steps=self._options.steps)
        spec.outputs.add(seed=seed)
        cancel_at = self._rng.randint(1, MAX_CANCEL_PREVIEW) if self._rng.random() < self._options.cancels else None
        for response in self._stub.Generate(pb.GenerateRequest(spec=spec), metadata=self._metadata):
            event = response.event
            seen.generation = event.generation
            if event.HasField("preview"):
                self._saw_preview(seen, event.preview.data)
                if len(seen.previews) == cancel_at:
                    seen.cancelled = time.perf_counter()
                    self._stub.CancelGeneration(
                        pb.CancelGenerationRequest(name=seen.generation), metadata=self._metadata
                    )
            elif event.HasField("artifact_chunk"):
                seen.picture += event.artifact_chunk.data
            elif event.HasField("finished"):
                seen.computed = any(result.disposition in COMPUTED for result in event.finished.cache_results)

    def _saw_preview(self, seen: Watched, data: bytes) -> None:
        now = time.perf_counter()
        if seen.previews:
            self._report("preview gap", now - seen.previews[-1][0], len(data))
        else:
            self._report("first preview", now - seen.began, len(data))
        seen.previews.append((now, data))

    def _ended(self, seen: Watched, error: grpc.RpcError) -> None:
        now = time.perf_counter()
        reason, retry_s = refusal(error)
        if seen.cancelled is not None and error.code() is grpc.StatusCode.CANCELLED:
            self._report("cancel", now - seen.cancelled)
        elif not seen.generation and retry_s is not None:
            self._report(f"refused {reason}", now - seen.began)
            gevent.sleep(retry_s)
        else:
            self._report("picture", now - seen.began, error=f"{reason or error.code().name}: {error.details()}")

    def _report(self, name: str, seconds: float, num_bytes: int = 0, error: str | None = None) -> None:
        self.environment.events.request.fire(
            request_type="generate",
            name=name,
            response_time=1e3 * seconds,
            response_length=num_bytes,
            exception=None if error is None else RuntimeError(error),
            context={},
        )


def refusal(error: Any) -> tuple[str, float | None]:
    """The reason of a failed call ("" if it has none), and after how many seconds a retry may succeed."""
    reason, retry_s = "", None
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    for detail in status_pb2.Status.FromString(details).details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToMilliseconds() / 1e3
    return reason, retry_s
