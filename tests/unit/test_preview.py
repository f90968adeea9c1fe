"""When a preview is due, its budget, and that it is made only once."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safelight_server.catalog.pixels import to_pixels
from safelight_server.domain.component import Component
from safelight_server.domain.picture import encode, scaled
from safelight_server.domain.request import MediaType, PixelEncoding, PreviewMethod, PreviewPolicy
from safelight_server.engine.jobs import InitImage
from safelight_server.preview import Budget, Cadence, Frame, FrameFeed, choose_method
from safelight_server.preview.frames import MAX_PREVIEW_BYTES
from safelight_server.runtime.simulated import LATENT, SIZE_PX, simulated_pipeline
from safelight_server.stream import serialization

from tests.support.streams import settle

CLIENTS_TAKE = 4 << 20
JPEG, RAW, WEBP = (PixelEncoding(kind) for kind in (MediaType.JPEG, MediaType.RAW_RGBA8, MediaType.WEBP))
TINY, FULL, AUTO, LINEAR = (
    PreviewMethod.TINY_DECODER,
    PreviewMethod.FULL_DECODER,
    PreviewMethod.AUTO,
    PreviewMethod.LINEAR,
)


@given(every=st.integers(1, 20), steps=st.integers(1, 60), busy=st.booleans())
def test_cadence_by_steps_takes_the_first_and_every_nth(every, steps, busy):
    cadence = Cadence(PreviewPolicy(every_n_steps=every))
    due = [step for step in range(1, steps + 1) if cadence.due(step, 0.0, busy=busy)]
    assert due == sorted({1} | set(range(every, steps + 1, every)))


@given(gaps=st.lists(st.floats(0, 1), min_size=1, max_size=40), interval=st.floats(0.01, 2), delay=st.floats(0, 3))
def test_cadence_by_interval_counts_from_one_sent_to_the_next_made(gaps, interval, delay):
    cadence, now, sent, taken_at = Cadence(PreviewPolicy(min_interval_s=interval)), 0.0, -math.inf, None
    for step, gap in enumerate(gaps, 1):
        now += gap
        if taken_at is not None and now >= taken_at + delay:
            sent, taken_at = now, None
            cadence.sent(now)
        due = cadence.due(step, now, busy=taken_at is not None)
        assert due == (taken_at is None and now - sent >= interval)
        if due:
            taken_at = now


@given(
    sizes=st.lists(st.integers(1, 50_000), min_size=1, max_size=60),
    rate=st.integers(1024, 100_000),
    at_once=st.integers(1, 8),
    data=st.data(),
)
def test_a_budget_is_kept_over_any_time(sizes, rate, at_once, data):
    """Bytes sent from any moment on are at most a second's budget, plus the rate over time, plus one running preview."""
    budget, now, sent, held = Budget(rate, 0.0), 0.0, [], 0
    for size in sizes:
        now += data.draw(st.floats(0, 0.2))
        while held < at_once and budget.hold(now):
            held += 1
        if held:
            held -= 1
            budget.settle(size)
            sent.append((now, size))
    for first, (begin, _) in enumerate(sent):
        for last in range(first, len(sent)):
            spent = sum(size for _, size in sent[first : last + 1])
            assert spent <= rate * (sent[last][0] - begin + 1) + at_once * max(sizes)


@given(size=st.integers(1, 50_000), rate=st.integers(1024, 20_000))
def test_previews_of_one_size_overrun_a_budget_by_at_most_one(size, rate):
    budget, spent = Budget(rate, 0.0), 0
    assert budget.hold(0.0)
    assert not budget.hold(0.0), "the first is held for the whole bucket: its size is not known"
    budget.settle(size)
    spent += size
    for tenth in range(1, 60):
        held = 0
        while budget.hold(tenth / 10):
            held += 1
            assert held <= rate
        for _ in range(held):
            budget.settle(size)
            spent += size
        assert spent <= rate * (tenth / 10 + 1) + size + 1e-6


def test_no_budget_is_no_limit():
    budget = Budget(None, 0.0)
    assert all(budget.hold(0.0) for _ in range(1000))


def test_what_came_to_nothing_costs_nothing():
    budget = Budget(1024, 0.0)
    for _ in range(100):
        assert budget.hold(0.0)
        budget.settle(0)


@pytest.mark.parametrize(
    ("wanted", "load", "has_preview_decoder", "method"),
    [
        (AUTO, 0.2, True, TINY),
        (AUTO, 0.7, True, TINY),
        (AUTO, 0.71, True, LINEAR),
        (AUTO, 2.0, True, LINEAR),
        (AUTO, 0.2, False, FULL),
        (AUTO, 0.5, False, FULL),
        (AUTO, 0.51, False, LINEAR),
        (FULL, 9.0, True, FULL),
        (TINY, 9.0, True, TINY),
        (LINEAR, 0.0, True, LINEAR),
    ],
)
def test_auto_takes_the_best_that_the_load_leaves_room_for(wanted, load, has_preview_decoder, method):
    assert choose_method(wanted, load, has_preview_decoder) is method


class Decoder:
    """Counts its calls; the image is as large as the simulated runtime's."""

    def __init__(self) -> None:
        self.asked: list[Component] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.superseded = False
        self.image = np.zeros((3, SIZE_PX, SIZE_PX), np.float32)

    async def __call__(self, latent, component):
        self.asked.append(component)
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return None if self.superseded else self.image


def frame(step: int = 3) -> Frame:
    return Frame(step, np.zeros(LATENT, np.float32))


@pytest.fixture
def made():
    """A feed, its decoder, and its load."""
    decoder, load = Decoder(), [0.0]
    with ThreadPoolExecutor(2) as pool:
        yield FrameFeed(simulated_pipeline(), decoder, lambda: load[0], pool), decoder, load


async def test_a_frame_is_decoded_once_per_method_and_encoded_once_per_encoding_and_size(made):
    feed, decoder, _ = made
    seen = frame()
    asked = [(TINY, JPEG, None)] * 5 + [(TINY, RAW, 16)] * 3 + [(TINY, RAW, None), (LINEAR, RAW, None)]
    rendered = await asyncio.gather(*(feed.render(seen, *what) for what in asked))
    assert decoder.asked == [Component.PREVIEW_DECODER], "an encoding of its own is no reason to decode again"
    assert feed.num_rendered == 4
    assert len({id(one) for one in rendered}) == 4
    assert [one.picture.width_px for one in rendered] == [SIZE_PX] * 5 + [16] * 3 + [SIZE_PX, LATENT[2]]
    assert {one.method for one in rendered} == {TINY, LINEAR}
    assert await feed.render(seen, TINY, JPEG, None) is rendered[0], "also for those who come later"
    assert await feed.render(frame(4), TINY, JPEG, None) is not rendered[0]


async def test_auto_means_the_same_for_all_streams_of_a_frame(made):
    feed, _, load = made
    seen = frame()
    first = await feed.render(seen, AUTO, JPEG, None)
    load[0] = 5.0
    assert await feed.render(seen, AUTO, JPEG, None) is first
    later = await feed.render(frame(4), AUTO, JPEG, None)
    assert (first.method, later.method) == (TINY, LINEAR)


@pytest.mark.parametrize(
    ("method", "edge_px", "handed_over"),
    [(LINEAR, 32, 0), (LINEAR, 33, 1), (TINY, 8, 1)],
)
async def test_only_the_smallest_linear_previews_are_made_on_the_loop(method, edge_px, handed_over):
    class Counting(ThreadPoolExecutor):
        count = 0

        def submit(self, *what):
            self.count += 1
            return super().submit(*what)

    with Counting(1) as pool:
        feed = FrameFeed(simulated_pipeline(), Decoder(), lambda: 0.0, pool)
        seen = Frame(3, np.zeros((LATENT[0], edge_px, edge_px), np.float32))
        rendered = await feed.render(seen, method, JPEG, None)
        assert rendered.method is method
        assert pool.count == handed_over


async def test_a_preview_is_mixed_with_the_picture_that_is_kept_as_the_finished_one_is():
    rng, decoder = np.random.default_rng(0), Decoder()
    photo, mask = rng.integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8), np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    mask[:, SIZE_PX // 2 :], mask[:8] = 255, 100
    init, seen = InitImage("photo", photo, mask), []
    with ThreadPoolExecutor(1) as pool:
        feed = FrameFeed(
            simulated_pipeline(), decoder, lambda: 0.0, pool, lambda _, pixels: seen.append(pixels), init.finish
        )
        full = await feed.render(frame(), FULL, RAW, None)
        await feed.render(frame(), LINEAR, RAW, None)
    assert full.picture == encode(init.finish(to_pixels(decoder.image)), RAW)
    assert np.array_equal(seen[0][8:, : SIZE_PX // 2], photo[8:, : SIZE_PX // 2])
    small = seen[1]
    assert small.shape == (LATENT[1], LATENT[2], 3)
    kept = scaled(mask, LATENT[2], LATENT[1]) == 0
    assert kept.any()
    assert np.array_equal(small[kept], scaled(photo, LATENT[2], LATENT[1])[kept])


async def test_a_superseded_frame_gives_nothing(made):
    feed, decoder, _ = made
    decoder.superseded = True
    assert await feed.render(frame(), FULL, JPEG, None) is None
    assert feed.num_rendered == 0


async def test_a_stream_that_lags_does_not_take_the_place_of_a_newer_frame(made):
    """The engine decodes the frame of the last request, so a request for an older frame is never made."""
    feed, decoder, _ = made
    older, newer = frame(3), frame(5)
    decoder.gate.clear()
    healthy = feed.render(newer, TINY, JPEG, None)
    await settle()
    assert decoder.asked
    assert await feed.render(older, TINY, JPEG, None) is None
    decoder.gate.set()
    assert (await healthy).step == 5
    assert len(decoder.asked) == 1
    assert (await feed.render(newer, TINY, RAW, None)).step == 5
    assert (await feed.render(older, LINEAR, RAW, None)).step == 3, "what needs no decoder takes nobody's place"


@pytest.mark.parametrize("alignment", [4, 256, 4096])
async def test_a_huge_raw_preview_fits_into_a_message_that_clients_take(made, alignment):
    feed, decoder, _ = made
    decoder.image = np.random.default_rng(0).uniform(-1, 1, (3, 1024, 2048)).astype(np.float32)
    encoding = PixelEncoding(MediaType.RAW_RGBA8, row_alignment_bytes=alignment)
    rendered = await feed.render(frame(), TINY, encoding, None)
    picture = rendered.picture
    assert picture.width_px == pytest.approx(2 * picture.height_px, abs=1)
    assert picture.stride_bytes % alignment == 0
    assert len(picture.data) == picture.stride_bytes * picture.height_px > 0.5 * MAX_PREVIEW_BYTES
    assert len(serialization.preview("generations/" + "a" * 32, 0, rendered, 1 << 30)) < CLIENTS_TAKE


async def test_a_failure_reaches_all_who_asked_and_is_logged_once(made, capsys):
    feed, decoder, _ = made
    decoder.failure = RuntimeError("no memory for pixels")
    seen = frame()
    tasks = {feed.render(seen, TINY, JPEG, None) for _ in range(3)}
    assert len(tasks) == 1
    with pytest.raises(RuntimeError, match="no memory"):
        await tasks.pop()
    await asyncio.sleep(0)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("preview_failed") == 1
