"""When a preview is due, and that it is made once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.preview import Budget, Cadence, Frame, Renderer, choose_method
from safelight_server.request import MediaType, PixelEncoding, PreviewMethod, PreviewPolicy
from safelight_server.runtime.simulated import LATENT, SIZE_PX, simulated_pipeline


@given(every=st.integers(1, 20), steps=st.integers(1, 60))
def test_cadence_by_steps_takes_the_first_and_every_nth(every, steps):
    cadence = Cadence(PreviewPolicy(every_n_steps=every))
    due = [step for step in range(1, steps + 1) if cadence.due(step, 0.0)]
    assert due == sorted({1} | set(range(every, steps + 1, every)))


@given(gaps=st.lists(st.floats(0, 1), min_size=1, max_size=40), interval=st.floats(0.01, 2))
def test_cadence_by_interval_keeps_it(gaps, interval):
    cadence, now, last = Cadence(PreviewPolicy(min_interval_s=interval)), 0.0, None
    for step, gap in enumerate(gaps, 1):
        now += gap
        if cadence.due(step, now):
            assert last is None or now - last >= interval
            cadence.taken(now)
            last = now


@given(sizes=st.lists(st.integers(1, 50_000), min_size=1, max_size=60), rate=st.integers(1024, 100_000))
def test_a_budget_is_kept_over_any_time(sizes, rate):
    budget, now, spent = Budget(rate, 0.0), 0.0, 0
    for size in sizes:
        now += 0.05
        if budget.allows(now):
            budget.spend(size)
            spent += size
            assert spent <= rate * (now + 1) + max(sizes)


def test_auto_takes_the_best_that_the_load_leaves_room_for():
    auto = PreviewMethod.AUTO
    assert choose_method(auto, 0.2, has_preview_decoder=True) is PreviewMethod.TINY_DECODER
    assert choose_method(auto, 0.2, has_preview_decoder=False) is PreviewMethod.FULL_DECODER
    assert choose_method(auto, 2.0, has_preview_decoder=True) is PreviewMethod.LINEAR
    assert choose_method(PreviewMethod.FULL_DECODER, 9.0, has_preview_decoder=True) is PreviewMethod.FULL_DECODER


async def test_a_frame_is_rendered_once_however_many_ask():
    decoded = []

    async def decode(output_id, latent, component):
        decoded.append(component)
        await asyncio.sleep(0)
        return np.zeros((3, SIZE_PX, SIZE_PX), np.float32)

    with ThreadPoolExecutor(2) as pool:
        renderer = Renderer(simulated_pipeline(), decode, lambda: 0.0, pool)
        frame = Frame(1, 0, 3, np.zeros(LATENT, np.float32))
        jpeg, raw = PixelEncoding(MediaType.JPEG), PixelEncoding(MediaType.RAW_RGBA8)
        asked = [(PreviewMethod.TINY_DECODER, jpeg, None)] * 5 + [(PreviewMethod.TINY_DECODER, raw, 16)] * 3
        rendered = await asyncio.gather(*(renderer.render(frame, *what) for what in asked))
        assert renderer.num_rendered == 2
        assert rendered[0] is rendered[4]
        assert rendered[5].picture.width_px == 16
        linear = await renderer.render(frame, PreviewMethod.LINEAR, raw, None)
        assert linear.picture.width_px == LATENT[2]
        assert len(decoded) == 2


async def test_a_superseded_frame_gives_nothing():
    async def decode(output_id, latent, component):
        return None

    with ThreadPoolExecutor(1) as pool:
        renderer = Renderer(simulated_pipeline(), decode, lambda: 0.0, pool)
        frame = Frame(1, 0, 3, np.zeros(LATENT, np.float32))
        assert await renderer.render(frame, PreviewMethod.FULL_DECODER, PixelEncoding(), None) is None
        assert renderer.num_rendered == 0
