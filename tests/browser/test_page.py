"""Tests of the contact sheet (the server's page) in a real browser, with the real model."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2
from playwright.async_api import expect
from safelight.v1 import generation_pb2 as pb
from safelight_server.api.identity import new_key
from safelight_server.app import server as app
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.manifest import INPAINTING_INPUTS, STABLE_DIFFUSION_INPUTS
from safelight_server.catalog.pipeline import assemble
from safelight_server.runtime.simulated import simulated_pipeline

from tests.browser.conftest import visit
from tests.conftest import eventually
from tests.integration.test_cache import kept
from tests.support.http import http_server
from tests.support.pause import steps_paused
from tests.support.relay import Relay

pytestmark = pytest.mark.asyncio(loop_scope="package")
AXE = Path(__file__).parent.parent.parent / "node_modules" / "axe-core" / "axe.min.js"
POTION = "a glowing red potion on a dark background"
SLOW = {"simulated_base_ms": 50.0}


async def finished(card, state: str = "Finished") -> None:
    """Waits until a picture has ended."""
    await expect(card.locator(".state")).to_have_text(state)
    await expect(card.get_by_role("button", name="Cancel")).to_be_hidden()


async def test_pictures_develop_side_by_side(browser, server):
    async with visit(browser, server.http_address) as seen:
        await seen.develop(POTION, 3, steps="12", seed="100")
        await expect(seen.page.locator("#sheet > li")).to_have_count(3)
        for at in range(3):
            card = seen.card(at)
            await finished(card)
            for fact in (f"Seed{100 + at}", "First preview", "Steps saved0 of 12", "Compute"):
                await expect(card.locator("dl")).to_contain_text(fact)
            assert await card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
                128,
                128,
            ]
        await expect(seen.page.get_by_role("img", name=f"Finished picture: {POTION}")).to_have_count(3)
        await expect(seen.page.locator("#totals")).to_contain_text("3 pictures, 0 steps saved")
        assert len({(await seen.card(at).bounding_box())["y"] for at in range(3)}) == 1, "side by side"


async def test_one_is_cancelled_and_the_others_go_on(browser):
    async with http_server(**SLOW) as slow, visit(browser, slow.http_address) as seen:
        await seen.develop(POTION, 3, steps="40")
        await expect(seen.card(1).locator("img")).to_be_visible()
        with steps_paused(slow):
            await seen.card(1).get_by_role("button", name="Cancel").click()
            await expect(seen.card(1).locator(".state")).to_contain_text("Cancelled after step")
        await expect(seen.card(1).locator("dl")).to_contain_text("Compute")
        await expect(seen.card(1).locator("img")).to_be_visible()
        await finished(seen.card(0))
        await finished(seen.card(2))
        assert sum(url.endswith("/CancelGeneration") for _, url in seen.requests) == 1


async def test_what_waits_in_the_page_can_be_cancelled_and_one_connection_is_left_for_that(browser):
    async with http_server(**SLOW) as slow, visit(browser, slow.http_address) as seen:
        with steps_paused(slow):
            await seen.develop(POTION, 4, steps="10")
            await seen.develop(POTION, 4, steps="10")
            waits = seen.page.locator("#sheet > li", has_text="Waits to be sent")
            await expect(waits).to_have_count(3)
            await waits.first.get_by_role("button", name="Cancel").click()
            await expect(waits).to_have_count(2)
            await seen.card(7).get_by_role("button", name="Cancel").click()
            await expect(seen.card(7).locator(".state")).to_contain_text("Cancelled")
            await expect(waits).to_have_count(1)  # it replaced the cancelled one
        await expect(seen.page.locator("#sheet > li .state", has_text="Finished")).to_have_count(6)


async def test_steps_are_scrubbed_and_one_is_branched_from(browser, server):
    async with visit(browser, server.http_address) as seen:
        await seen.develop(POTION, 1, steps="30")
        first = seen.card(0)
        await finished(first)
        last, steps = await first.locator("img").get_attribute("src"), first.get_by_role("slider", name="Steps")
        await expect(steps).to_have_attribute("aria-valuetext", "Finished picture")
        await steps.focus()
        await seen.page.keyboard.press("Home")
        # Which previews the page got depends on how fast it read, but the first always comes.
        await expect(steps).to_have_attribute("aria-valuetext", re.compile(r"Step \d+ of 30"))
        shown = await steps.get_attribute("aria-valuetext")
        await expect(first.locator("img")).to_have_attribute("alt", f"{shown}: {POTION}")
        assert await first.locator("img").get_attribute("src") != last
        await seen.page.keyboard.press("End")
        await expect(steps).to_have_attribute("aria-valuetext", "Finished picture")
        await seen.page.keyboard.press("ArrowLeft")  # a late step: before the first few none is kept
        await expect(steps).to_have_attribute("aria-valuetext", re.compile(r"Step \d+ of 30"))
        shown = await steps.get_attribute("aria-valuetext")
        await first.get_by_role("button", name=f"Branch from {shown.lower().partition(' of')[0]}", exact=True).click()
        await first.get_by_label("Go on from there with").fill("a glowing blue potion on a dark background")
        await kept(server)
        await first.get_by_role("button", name="Develop the branch").click()
        await expect(seen.page.locator("#sheet > li")).to_have_count(2)
        branch = seen.card(0)
        await finished(branch)
        await expect(branch.locator("dl")).to_contain_text("Branchedafter step")
        await expect(branch.locator("dl")).not_to_contain_text("Steps saved0 of")
        assert await branch.locator("dd").first.inner_text() == await seen.card(1).locator("dd").first.inner_text()


async def test_a_pinned_seed_gives_the_same_picture_and_saves_its_steps(browser, server):
    async with visit(browser, server.http_address) as seen:
        await seen.develop(POTION, 1, steps="6")
        await finished(seen.card(0))
        await seen.card(0).get_by_role("button", name="Pin seed").click()
        seed = await seen.page.get_by_role("textbox", name="Seed").input_value()
        await kept(server)
        await expect(seen.card(0).locator("dl")).to_contain_text(f"Seed{seed}")
        await seen.page.get_by_role("button", name="Develop", exact=True).click()
        await finished(seen.card(0))
        await expect(seen.card(0).locator("dl")).to_contain_text("Steps saved6 of 6")
        await expect(seen.card(0).locator("dl")).to_contain_text("there already")
        await seen.page.get_by_role("button", name="Unpin").click()
        await expect(seen.page.get_by_role("textbox", name="Seed")).to_have_value("")


async def test_the_keyboard_is_enough(browser, server):
    async with visit(browser, server.http_address) as seen:
        page, press = seen.page, seen.page.keyboard.press

        async def tab_to(selector: str) -> None:
            for _ in range(30):
                await press("Tab")
                if await page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    assert outline == "solid", "what has the focus shows it"
                    return
            raise AssertionError(f"Tab does not reach {selector}")

        await tab_to("#prompt")
        await page.keyboard.type("a golden key on a blue background")
        await tab_to("#count")
        await page.keyboard.type("1")
        await tab_to("#steps")
        await page.keyboard.type("20")
        await tab_to("#develop")
        await press("Enter")
        await finished(seen.card(0))
        await expect(page.get_by_role("status")).to_have_text("Finished: a golden key on a blue background")
        await tab_to("input[type=range]")
        await press("ArrowLeft")
        await expect(seen.card(0).get_by_role("slider")).not_to_have_attribute("aria-valuetext", "Finished picture")
        await tab_to("button.pin")
        await press("Enter")
        await expect(page.get_by_role("textbox", name="Seed")).not_to_have_value("")
        await tab_to("button.branch")
        await press("Enter")
        await expect(seen.card(0).get_by_label("Go on from there with")).to_be_focused()
        await kept(server)
        await press("Escape")
        await expect(seen.card(0).locator("button.branch")).to_be_focused()
        await press("Enter")
        await tab_to("button[type=submit]")
        await press("Enter")
        await expect(page.locator("#sheet > li")).to_have_count(2)
        await finished(seen.card(0))


async def test_the_focus_stays_on_a_picture_that_was_cancelled(browser):
    async with http_server(**SLOW) as slow, visit(browser, slow.http_address) as seen:
        await seen.develop(POTION, 1, steps="40")
        await expect(seen.card(0).locator(".state")).to_contain_text("of 40")
        with steps_paused(slow):
            await seen.card(0).get_by_role("button", name="Cancel").focus()
            await seen.page.keyboard.press("Enter")
            await expect(seen.card(0).locator(".state")).to_contain_text("Cancelled")
        assert await seen.card(0).evaluate("card => card.contains(document.activeElement)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(browser, server, scheme):
    async with visit(browser, server.http_address, color_scheme=scheme) as seen:
        await seen.develop(POTION, 2, steps="20")
        await finished(seen.card(0))
        await finished(seen.card(1))
        await seen.card(0).get_by_role("button", name="Branch from step").click()
        await seen.page.get_by_text("API key").click()
        await seen.page.locator("#steps").evaluate("steps => { steps.max = 9999; }")
        await seen.develop(POTION, 1, steps="9000")  # a refused request is shown on the sheet too
        await expect(seen.card(0).locator(".error")).to_be_visible()
        await seen.page.evaluate(AXE.read_text())
        found = json.loads(await seen.page.evaluate("axe.run().then(JSON.stringify)"))
        assert [
            (one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found["violations"]
        ] == []
        assert len(found["passes"]) > 20, "it has looked"


async def test_a_phone_needs_no_scrolling_sideways(browser, server):
    long = "a" * 120 + " potion"
    async with visit(
        browser, server.http_address, viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True
    ) as seen:
        await seen.develop(long, 2, steps="20", seed=str(2**64 - 2))
        await finished(seen.card(0))
        await finished(seen.card(1))
        await seen.card(0).get_by_role("button", name="Branch from step").tap()
        await seen.page.get_by_text("API key").tap()
        assert await seen.page.evaluate("document.documentElement.scrollWidth") == 320
        await expect(seen.card(1).locator("dl")).to_contain_text(f"Seed{2**64 - 1}")


async def test_a_refusal_says_why_and_when_to_come_back(browser, tmp_path):
    quotas = tmp_path / "quotas.json"
    quotas.write_text(json.dumps({"tenants": {"default": {"requests": {"per_s": 0.01, "burst": 1}}}}))
    async with http_server(quota_file=quotas) as limited, visit(browser, limited.http_address) as seen:
        await seen.develop(POTION, 2, steps="2")
        refused = seen.page.get_by_role("alert").filter(visible=True)
        await expect(refused).to_have_count(1)
        await expect(refused).to_contain_text("(REQUEST_RATE_EXCEEDED)")
        await expect(refused).to_contain_text("Try again in")
        await expect(refused.get_by_role("button", name="Try again")).to_be_visible()


async def test_faults_are_named_by_their_fields(browser, server):
    async with visit(browser, server.http_address) as seen:
        await seen.page.locator("#steps").evaluate("steps => { steps.max = 9999; }")
        await seen.develop(POTION, 1, steps="9000")
        await expect(seen.card(0).get_by_role("alert")).to_contain_text("spec.num_inference_steps: ")
        await expect(seen.card(0).get_by_role("alert")).to_contain_text("(INVALID_REQUEST)")


async def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, tmp_path):
    key, entry = new_key("ann", "studio")
    keys = tmp_path / "keys.json"
    keys.write_text(f'{{"keys": [{entry}]}}')
    async with http_server(api_key_file=keys) as guarded, visit(browser, guarded.http_address) as seen:
        field = seen.page.get_by_label("Key of this server")
        await expect(field).to_be_visible()
        await seen.develop(POTION, 1, steps="2")
        await expect(seen.card(0).get_by_role("alert")).to_contain_text("(UNAUTHENTICATED)")
        await field.fill(key)
        await seen.card(0).get_by_role("button", name="Try again").click()
        await finished(seen.card(0))
        await seen.page.reload()
        await expect(field).to_have_value(key)
        assert await seen.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other = await seen.page.context.new_page()
        await other.goto(f"{seen.origin}/")
        await expect(other.locator("#key")).to_have_value("")


@pytest.mark.parametrize("others", [True, False])
async def test_models_that_only_inpaint_are_not_offered(browser, monkeypatch, others):
    plain, build = simulated_pipeline(), app.build_runtime
    manifest = plain.manifest.model_copy(update={"name": "a", "inputs": STABLE_DIFFUSION_INPUTS | INPAINTING_INPUTS})
    pipelines = [assemble(manifest, {}, plain.tokenizer), *([plain] if others else [])]

    def built(settings):
        return Catalog(pipelines, settings.default_model), build(settings.model_copy(update={"default_model": ""}))[1]

    monkeypatch.setattr(app, "build_runtime", built)
    async with http_server(default_model="a") as server, visit(browser, server.http_address) as seen:
        if not others:
            for place in ("#news", "#empty"):
                await expect(seen.page.locator(place)).to_have_text(
                    "No model of this server makes pictures from text alone."
                )
            return
        await expect(seen.page.locator("#model option")).to_have_text(["simulated"])
        await seen.develop(POTION, 1, steps="4")
        await finished(seen.card(0))


async def test_a_server_that_is_gone_is_said_in_words(browser):
    async with http_server(**SLOW) as running, visit(browser, running.http_address) as seen:
        await seen.page.route("**/Generate", lambda route: route.abort())
        await seen.develop(POTION, 1)
        await expect(seen.card(0).get_by_role("alert")).to_contain_text("The server cannot be reached (UNAVAILABLE).")
        await seen.page.unroute("**/Generate")
        await seen.card(0).get_by_role("button", name="Try again").click()
        await finished(seen.card(0))
        seen.complaints.clear()  # the errors of the request that failed


async def test_a_lost_connection_is_resumed_where_it_stopped(browser):
    async with http_server(**SLOW) as running:
        relay = await Relay.start(running.http_address)
        try:
            async with visit(browser, relay.address) as seen:
                await seen.develop(POTION, 2, steps="40", seed="7")
                for at in range(2):
                    await expect(seen.card(at).locator(".state")).to_contain_text("of 40")
                with steps_paused(running):
                    relay.reset()
                    await eventually(lambda: sum(url.endswith("/WatchGeneration") for _, url in seen.requests) == 2)
                for at in range(2):
                    await finished(seen.card(at))
                    await expect(seen.card(at).locator("dl")).to_contain_text("Steps saved0 of 40")
                    await expect(seen.card(at).locator("dt", has_text="Seed")).to_have_count(1)
                calls = [url.rpartition("/")[2] for method, url in seen.requests if method == "POST"]
                assert (calls.count("Generate"), calls.count("WatchGeneration")) == (2, 2)
                seen.complaints.clear()  # the errors of the reset connections
        finally:
            relay.cut()


async def test_a_cancel_that_gets_no_connection_ends_its_picture(browser):
    """As when other tabs of the page have all connections that the browser makes."""
    async with http_server(**SLOW) as slow, visit(browser, slow.http_address) as seen:
        await seen.page.route("**/CancelGeneration", lambda route: None)  # never sent
        await seen.develop(POTION, 1, steps="40")
        await expect(seen.card(0).locator(".state")).to_contain_text("of 40")
        with steps_paused(slow):
            await seen.card(0).get_by_role("button", name="Cancel").click()
            await expect(seen.card(0).locator(".state")).to_contain_text("Cancelled after step")
        seen.complaints.clear()  # the cancel that was given up


async def test_a_server_that_was_started_anew_is_said_in_words(browser):
    async with http_server(**SLOW) as running, http_server(**SLOW) as anew:
        relay = await Relay.start(running.http_address)
        try:
            async with visit(browser, relay.address) as seen:
                watch = f"http://{anew.http_address}/safelight.v1.GenerationService/WatchGeneration"
                await seen.page.route("**/WatchGeneration", lambda route: route.continue_(url=watch))
                await seen.develop(POTION, 1, steps="40")
                await expect(seen.card(0).locator(".state")).to_contain_text("of 40")
                with steps_paused(running):
                    relay.reset()
                    alert = seen.card(0).get_by_role("alert")
                    await expect(alert).to_contain_text("The server no longer knows this picture")
                    await expect(alert).to_contain_text("(GENERATION_NOT_FOUND)")
                await alert.get_by_role("button", name="Try again").click()
                await finished(seen.card(0))
                seen.complaints.clear()  # the errors of the reset connection
        finally:
            relay.cut()


async def test_the_codec_reads_and_writes_what_protobuf_does(browser, server):
    """Encodes and decodes every kind of field, at its bounds."""
    request = pb.GenerateRequest(
        request_id="é\u20ac\U0001f511",
        spec=pb.GenerationSpec(
            prompt="x" * 300,
            num_inference_steps=0,
            guidance_scale=7.25,
            outputs=[pb.OutputSpec(seed=2**64 - 1), pb.OutputSpec(seed=0), pb.OutputSpec()],
        ),
        preview=pb.PreviewPolicy(every_n_steps=-1, max_bytes_per_second=-(2**63)),
        labels={"a": "b"},
    )
    status = status_pb2.Status(code=8, message="full")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", metadata={"a": "b"}))
    answer = pb.GenerateResponse(
        event=pb.GenerationEvent(sequence=2**53 + 1, preview=pb.Preview(step=3, data=bytes(range(256)) * 3))
    )
    async with visit(browser, server.http_address) as seen:
        for message in (request, status, answer):
            again = await seen.page.evaluate(
                """async ([name, data]) => {
                    const { decode, encode } = await import("/page/protobuf.js");
                    const message = decode(name, Uint8Array.from(atob(data), one => one.charCodeAt(0)));
                    return btoa(String.fromCharCode(...encode(name, message)));
                }""",
                [message.DESCRIPTOR.full_name, base64.b64encode(message.SerializeToString()).decode()],
            )
            assert type(message).FromString(base64.b64decode(again)) == message


async def test_the_codec_refuses_what_ends_early(browser, server):
    data = pb.GenerateResponse(event=pb.GenerationEvent(preview=pb.Preview(data=b"abc"))).SerializeToString()
    async with visit(browser, server.http_address) as seen:
        refused = await seen.page.evaluate(
            """async ([name, data]) => {
                const { decode } = await import("/page/protobuf.js");
                const refuses = length => { try { decode(name, Uint8Array.from(data.slice(0, length))); return false; } catch { return true; } };
                return data.map((_, length) => refuses(length));
            }""",
            ["safelight.v1.GenerateResponse", list(data)],
        )
        assert refused == [False] + [True] * (len(data) - 1)
