"""Tests of `deploy/triton/serve`: nothing outlives the server; ports, instances, loading and unloading, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_grpc
from tritonclient.utils import InferenceServerException

from tests.conftest import eventually
from tests.triton.support import READY_S, REPOSITORY, TritonServer, triton_server, triton_servers
from tests.triton.test_backend import MODELS, ask, example, same


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_kill_9_in_the_middle_of_a_call_leaves_no_stub_and_no_shared_memory() -> None:
    with triton_server() as triton:
        stubs = triton.stubs()
        assert len(stubs) == len(MODELS)
        assert triton.shared_memory()
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            feed = example("icons_denoiser", 64)
            call = asyncio.ensure_future(ask(client, "icons_denoiser", feed))
            await asyncio.sleep(0)
            os.kill(triton.pid, signal.SIGKILL)
            assert triton.supervisor.wait(10) == 128 + signal.SIGKILL
            with pytest.raises(InferenceServerException) as failure:
                await call
            assert failure.value.status() == "StatusCode.UNAVAILABLE"
        assert gone(stubs)
        assert not triton.shared_memory()
        triton.restart()
        await eventually(triton.ready, READY_S)


def leftovers(triton: TritonServer) -> list[Path]:
    """Temporary files of the server; those in /tmp only if no server runs, since their names do not tell their owner."""
    found = list(Path(tempfile.gettempdir()).glob(f"safelight-triton-{triton.grpc_port}-*"))
    names = set()
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.add(file.read_text().strip())
    if "tritonserver" not in names:
        for folder in Path("/tmp").glob("python_env_*"):
            with contextlib.suppress(FileNotFoundError):
                found += [folder] if folder.stat().st_uid == os.getuid() else []
    return found


async def test_no_end_leaves_temporary_files() -> None:
    with triton_server() as triton:
        assert leftovers(triton)
        triton.kill()
        assert not leftovers(triton)
        triton.start()
        triton.wait_ready()
        pid = triton.pid
        triton.supervisor.kill()
        triton.supervisor.wait(10)
        await eventually(lambda: gone([pid]))
        assert leftovers(triton)  # the next start on this port removes them
        triton.start()
        triton.wait_ready()
        triton.supervisor.terminate()
        assert triton.supervisor.wait(20) == 0
        assert not leftovers(triton)


def test_it_becomes_ready_where_a_proxy_is_set(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with triton_server(wait=False) as triton:
        until = time.monotonic() + READY_S
        while "serve: ready" not in triton.log():
            assert time.monotonic() < until
            time.sleep(0.02)


async def test_sigterm_ends_it_in_order() -> None:
    with triton_server() as triton:
        stubs = triton.stubs()
        triton.supervisor.send_signal(signal.SIGTERM)
        assert triton.supervisor.wait(20) == 0
        assert gone(stubs)
        assert not triton.shared_memory()


async def test_a_frozen_server_answers_again_when_it_goes_on() -> None:
    with triton_server() as triton:
        triton.stop()
        assert not triton.ready()
        triton.cont()
        await eventually(triton.ready)


def test_a_server_with_a_dead_stub_is_ended() -> None:
    with triton_server() as triton:
        os.kill(triton.stubs()[0], signal.SIGKILL)
        assert triton.supervisor.wait(20) == 128 + signal.SIGKILL
        assert "a stub died" in triton.log()


def processor_s(pid: int) -> float:
    """CPU time of a process in seconds."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def test_the_answer_to_a_call_that_triton_gave_up_is_never_another_calls() -> None:
    with triton_server() as triton:
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            [stub] = triton.stubs_of("icons_denoiser")
            before = processor_s(stub)
            given_up = asyncio.ensure_future(ask(client, "icons_denoiser", example("icons_denoiser", 64)))
            await eventually(lambda: processor_s(stub) >= before + 0.03)  # it computes the call
            os.kill(stub, signal.SIGSTOP)
            with pytest.raises(InferenceServerException, match="is not healthy"):
                await given_up
            os.kill(stub, signal.SIGCONT)
            await eventually(lambda: gone([stub]))  # a late answer would go to the next call
            with pytest.raises(InferenceServerException):
                await ask(client, "icons_denoiser", example("icons_denoiser", 2))
            assert triton.supervisor.wait(20) == 128 + signal.SIGKILL
        assert "has given up a call" in triton.log()


def frozen_stub(triton: TritonServer, model: str) -> int:
    """Freezes a stub of a model as soon as it exists, while the server loads it."""
    while True:
        for pid in triton.stubs_of(model) if triton.started else ():
            os.kill(pid, signal.SIGSTOP)
            return pid
        time.sleep(0.001)


def test_a_start_that_hangs_is_ended_and_begun_again() -> None:
    with triton_server("--start-timeout", "10", wait=False) as triton:
        first = frozen_stub(triton, "icons_denoiser")
        triton.wait_ready()
        assert "not ready after 10 s" in triton.log()
        assert gone([first])


def test_a_start_that_aborts_is_begun_again() -> None:
    with triton_server(wait=False) as triton:
        frozen_stub(triton, "icons_denoiser")
        os.kill(triton.pid, signal.SIGABRT)
        triton.wait_ready()
        assert f"ended with {128 + signal.SIGABRT}" in triton.log()


async def test_a_server_that_aborts_later_stays_away_without_restart() -> None:
    with triton_server() as triton:
        await eventually(lambda: "serve: ready" in triton.log())
        os.kill(triton.pid, signal.SIGABRT)
        assert triton.supervisor.wait(10) == 128 + signal.SIGABRT


async def test_restart_starts_a_dead_server_again() -> None:
    with triton_server("--restart") as triton:
        first = triton.pid
        triton.kill()
        await eventually(lambda: triton.ready() and triton.pid != first, READY_S)


async def test_the_supervisor_killed_takes_the_server_with_it() -> None:
    with triton_server() as triton:
        pids = [triton.pid, *triton.stubs()]
        triton.supervisor.kill()
        triton.supervisor.wait(10)
        await eventually(lambda: gone(pids))


async def test_servers_side_by_side_keep_their_hands_off_each_other() -> None:
    with triton_servers(2) as (one, other):
        one.kill()
        assert not one.shared_memory()
        assert other.shared_memory()
        async with triton_grpc.InferenceServerClient(other.grpc_url) as client:
            feed = example("icons_decoder", 2)
            assert same(await ask(client, "icons_decoder", feed), "icons_decoder", feed)


async def test_explicit_control_unloads_and_loads_a_model() -> None:
    with triton_server("--explicit") as triton:
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            await client.unload_model("icons_denoiser")
            assert not await client.is_model_ready("icons_denoiser")
            assert not triton.ready(), "strict readiness is not on"
            await client.load_model("icons_denoiser")
            assert await client.is_model_ready("icons_denoiser")
            feed = example("icons_denoiser", 1)
            assert np.isfinite((await ask(client, "icons_denoiser", feed))["prediction"]).all()


async def test_more_instances_without_another_repository() -> None:
    with triton_server("--instances", "2") as triton:
        assert len(triton.stubs()) == 2 * len(MODELS)
        async with triton_grpc.InferenceServerClient(triton.grpc_url) as client:
            config = await client.get_model_config("icons_denoiser")
            assert config.config.instance_group[0].count == 2
            assert config.config.max_batch_size == 64
    assert "count: 1" in (REPOSITORY / "icons_denoiser" / "config.pbtxt").read_text()


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with triton_server() as triton:
        argv = [*triton.supervisor.args]  # type: ignore[misc]
        second = subprocess.run(argv[: argv.index("--pid-file")], capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert second.stderr == f"serve: 127.0.0.1:{triton.grpc_port}: Address already in use\n"
        assert triton.ready()
        assert triton.shared_memory()
