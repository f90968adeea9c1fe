"""Slots of tensors: outputs never affect each other's latents."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from safelight_server.catalog.manifest import AdapterRoom, ImagePromptRoom
from safelight_server.engine.adapters import RowAdapter
from safelight_server.engine.latents import CleanLatent, Latents, RowControl, RowImagePrompt
from safelight_server.runtime.base import StableRows
from safelight_server.sampler import NoiseSchedule, SamplerSpec, compile_table, gaussian

from tests.support.adapters import ROOM

SHAPE, CONTEXT = (2, 4, 4), (3, 5)
CONTEXTS = {"last_hidden_state": CONTEXT}
SCHEDULE = NoiseSchedule(rescale_zero_terminal_snr=True)


def table(name="dpmpp_2m", steps=6, first_step=0):
    return compile_table(SamplerSpec(name), SCHEDULE, "v_prediction", steps, first_step)


def context(value):
    return {"last_hidden_state": np.full(CONTEXT, value, np.float32)}


def predict(sample, timestep):
    """A fake denoiser: some function of each row alone."""
    return (np.tanh(sample) * (timestep[:, None, None, None] / 999)).astype(np.float32)


def arrays(rows):
    return {name: given.array() if isinstance(given, StableRows) else given for name, given in rows.items()}


def step(latents, slots, at, parts=(0,)):
    slots, at = np.array(slots), np.array(at)
    for part in parts:
        rows = latents.rows(slots, np.full(len(slots), part), at)
        latents.put(slots, np.full(len(slots), part), predict(rows["sample"], rows["timestep"]) * (1 + part))
    return latents.advance(slots, at)


def test_outputs_in_a_batch_are_as_alone():
    together, alone = Latents(4, SHAPE, CONTEXTS, 50), Latents(4, SHAPE, CONTEXTS, 50)
    kinds = [("ddim", 6), ("euler_ancestral", 8), ("dpmpp_2m", 7)]
    slots = [together.claim(table(*kind), seed, 1.0, [context(seed)]) for seed, kind in enumerate(kinds)]
    for at in range(6):
        step(together, slots, [at] * 3)
    for seed, kind in enumerate(kinds):
        slot = alone.claim(table(*kind), seed, 1.0, [context(seed)])
        for at in range(6):
            step(alone, [slot], [at])
        assert np.array_equal(alone.latent(np.array([slot]))[0], together.latent(np.array([slots[seed]]))[0])


def test_how_many_are_stepped_together_changes_no_bits(monkeypatch):
    kinds = [("ddim", 1.0), ("euler_ancestral", 3.0), ("dpmpp_2m", 1.0), ("euler", 2.0), ("euler_ancestral", 1.0)]

    def develop():
        latents = Latents(5, SHAPE, CONTEXTS, 50)
        slots = [latents.claim(table(name), 7, scale, [context(1), context(0)]) for name, scale in kinds]
        finite = [step(latents, slots, [at] * 5, parts=(0, 1)) for at in range(6)]
        return latents.latent(np.array(slots)), np.array(finite)

    whole = develop()
    monkeypatch.setattr("safelight_server.engine.latents.BLOCK_BYTES", 2 * whole[0][0].nbytes)
    blocks = develop()
    assert np.array_equal(whole[0], blocks[0])
    assert whole[1].shape == blocks[1].shape == (6, 5)


def test_guidance_combines_both_rows():
    latents = Latents(2, SHAPE, CONTEXTS, 50)
    guided = latents.claim(table(), 1, 3.0, [context(1), context(0)])
    plain = latents.claim(table(), 1, 1.0, [context(1)])
    step(latents, [guided], [0], parts=(0, 1))
    step(latents, [plain], [0])
    assert not np.array_equal(latents.denoised(guided), latents.denoised(plain))


def test_a_snapshot_goes_on_with_the_same_bits():
    latents = Latents(3, SHAPE, CONTEXTS, 50)
    whole = latents.claim(table(), 9, 1.0, [context(1)])
    for at in range(6):
        step(latents, [whole], [at])
    first = latents.claim(table(), 9, 1.0, [context(1)])
    for at in range(3):
        step(latents, [first], [at])
    snapshot = latents.snapshot(first, 3)
    latents.release(first)
    second = latents.claim(table(), 9, 1.0, [context(1)], snapshot)
    for at in range(3, 6):
        step(latents, [second], [at])
    assert np.array_equal(latents.latent(np.array([whole])), latents.latent(np.array([second])))


def test_a_slot_in_flight_is_not_handed_out_again():
    latents = Latents(2, SHAPE, CONTEXTS, 50)
    slot = latents.claim(table(), 1, 1.0, [context(1)])
    latents.depart(np.array([slot]))
    latents.release(slot)
    assert latents.claim(table(), 2, 1.0, [context(1)]) != slot
    latents.arrive(np.array([slot]))
    assert latents.claim(table(), 3, 1.0, [context(1)]) == slot


def test_a_latent_that_is_not_finite_is_seen():
    latents = Latents(2, SHAPE, CONTEXTS, 50)
    slots = np.array([latents.claim(table(), seed, 1.0, [context(1)]) for seed in (1, 2)])
    bad = np.zeros((2, *SHAPE), np.float32)
    bad[1, 0, 0, 0] = np.nan
    latents.put(slots, np.zeros(2, np.intp), bad)
    assert latents.advance(slots, np.zeros(2, np.intp)).tolist() == [True, False]


CLEAN = np.linspace(-1, 1, 32, dtype=np.float32).reshape(SHAPE)
MASK = np.linspace(0, 1, 16, dtype=np.float32).reshape(SHAPE[1:])


def test_what_starts_from_a_picture_is_as_alone_in_a_batch_with_others():
    kinds = [
        (table("dpmpp_2m", 6, 2), CleanLatent(CLEAN, None)),
        (table("euler_ancestral", 6, 2), CleanLatent(CLEAN, MASK)),
        (table("ddim", 6), None),
        (table("euler", 6, 2), CleanLatent(CLEAN, MASK)),
    ]

    def developed(kinds):
        latents = Latents(6, SHAPE, CONTEXTS, 50)
        slots = [latents.claim(kind, 7, 1.0, [context(1)], picture=picture) for kind, picture in kinds]
        for at in range(6):
            due = [slot for slot, (kind, _) in zip(slots, kinds) if at >= kind.first_step]
            if due:
                step(latents, due, [at] * len(due))
        return latents.latent(np.array(slots))

    together = developed(kinds)
    for place, kind in enumerate(kinds):
        assert np.array_equal(together[place], developed([kind])[0])


def test_a_picture_is_noised_to_the_level_of_the_first_step():
    for name in ("ddim", "euler", "dpmpp_2m", "euler_ancestral"):
        made, latents = table(name, 6, 4), Latents(1, SHAPE, CONTEXTS, 50)
        slot = latents.claim(made, 7, 1.0, [context(1)], picture=CleanLatent(CLEAN, None))
        signal, noise = made.levels[4]
        assert np.array_equal(latents.latent(np.array([slot]))[0], signal * CLEAN + noise * gaussian(7, 0, 0, SHAPE))


def test_the_first_step_that_is_made_follows_no_step_before_it():
    whole, late = table("dpmpp_2m", 6), table("dpmpp_2m", 6, 3)
    assert whole.coefficients[3, 2] != 0
    assert late.coefficients[3, 2] == 0
    assert np.array_equal(whole.coefficients[4:], late.coefficients[4:])
    assert np.array_equal(table("ddim", 6).coefficients, table("ddim", 6, 3).coefficients)


def test_outside_of_the_mask_the_picture_is_what_it_was():
    latents, hard = Latents(2, SHAPE, CONTEXTS, 50), np.array(MASK > 0.5, np.float32)
    made = table("ddim", 6, 2)
    slot = latents.claim(made, 7, 1.0, [context(1)], picture=CleanLatent(CLEAN, hard))
    outside = np.broadcast_to(hard == 0, SHAPE)
    for at in range(2, 6):
        step(latents, [slot], [at])
        signal, noise = made.levels[at + 1]
        kept = signal * CLEAN + noise * gaussian(7, 0, 0, SHAPE)
        assert np.array_equal(latents.latent(np.array([slot]))[0][outside], kept[outside])
    assert np.array_equal(latents.latent(np.array([slot]))[0][outside], CLEAN[outside])


def test_a_mask_goes_with_its_slot_and_with_its_snapshot():
    latents, made = Latents(1, SHAPE, CONTEXTS, 50), table("ddim", 6, 2)
    picture = CleanLatent(CLEAN, MASK)

    def rest(slot, first):
        for at in range(first, 6):
            step(latents, [slot], [at])
        x = latents.latent(np.array([slot]))[0]
        latents.release(slot)
        return x

    slot = latents.claim(made, 7, 1.0, [context(1)], picture=picture)
    for at in (2, 3):
        step(latents, [slot], [at])
    snapshot = latents.snapshot(slot, 4)
    whole = rest(slot, 4)
    assert np.array_equal(rest(latents.claim(made, 7, 1.0, [context(1)], snapshot, picture), 4), whole)
    plain = rest(latents.claim(table("ddim", 6), 7, 1.0, [context(1)]), 0)
    assert np.array_equal(rest(latents.claim(table("ddim", 6), 7, 1.0, [context(1)]), 0), plain)
    assert not np.array_equal(rest(latents.claim(made, 7, 1.0, [context(1)], snapshot), 4), whole)


def test_each_input_of_a_denoiser_has_its_source():
    inputs = {"x": "latent", "t": "timestep", "context": "encoder:last_hidden_state"}
    inputs |= {"pooled": "encoder:pooled_output", "ids": "size_ids"}
    shapes, size_ids = CONTEXTS | {"pooled_output": (2,)}, np.array([64, 96, 0, 0, 64, 96], np.float32)
    latents = Latents(3, SHAPE, shapes, 50, inputs, size_ids)
    made, embeddings = table(), [context(n) | {"pooled_output": np.full(2, 10 * n, np.float32)} for n in range(2)]
    latents.claim(made, 1, 1.0, embeddings)
    slot = latents.claim(made, 2, 3.0, embeddings)
    rows = latents.rows(np.array([slot, slot]), np.array([0, 1]), np.array([4, 4]))
    assert rows.keys() == inputs.keys()
    assert rows["t"].tolist() == [made.timesteps[4]] * 2
    assert rows["ids"].tolist() == [size_ids.tolist()] * 2
    assert rows["context"].array()[:, 0, 0].tolist() == [0, 1]
    assert rows["pooled"].array().tolist() == [[0, 0], [10, 10]]
    assert np.array_equal(rows["x"], latents.latent(np.array([slot, slot])) * made.in_scale[4])


def develop_together(kinds, steps=6):
    """The latents after all steps of outputs that share their batches; `kinds` are the arguments of `claim`."""
    latents = Latents(len(kinds), SHAPE, CONTEXTS, 50)
    slots = [latents.claim(table("ddim"), 7, 5.0, [context(1), context(0)], **kind) for kind in kinds]
    for at in range(steps):
        step(latents, slots, [at] * len(slots), parts=(0, 1))
    return list(latents.latent(np.array(slots)))


RESCALED = {"guidance_rescale": 0.7}
LIMITED = {"guided_steps": range(2, 4)}


def test_kinds_of_guidance_in_one_batch_are_as_alone():
    kinds = [{}, LIMITED, RESCALED, LIMITED | RESCALED, {"guided_steps": range(6)}, {"guided_steps": range(1)}]
    together = develop_together(kinds)
    for kind, latent in zip(kinds, together, strict=True):
        assert np.array_equal(develop_together([kind])[0], latent)
    assert np.array_equal(together[0], together[4]), "an interval of all steps is none"
    assert len({latent.tobytes() for latent in together}) == 5


def test_a_step_outside_of_the_interval_is_one_without_guidance():
    """The unconditional row of the slot, which holds values of an earlier step, must have no effect."""
    latents = Latents(2, SHAPE, CONTEXTS, 50)
    limited = latents.claim(table(), 1, 3.0, [context(1), context(0)], guided_steps=range(1))
    plain = latents.claim(table(), 1, 3.0, [context(1), context(0)])
    step(latents, [limited, plain], [0, 0], parts=(0, 1))
    snapshot = latents.snapshot(plain, 1)
    latents.release(plain)
    plain = latents.claim(table(), 1, 1.0, [context(1)], snapshot)
    for at in range(1, 6):
        step(latents, [limited, plain], [at, at])
    first, second = latents.latent(np.array([limited, plain]))
    assert np.array_equal(first, second)


def test_guidance_does_not_stay_in_a_slot():
    latents = Latents(1, SHAPE, CONTEXTS, 50)
    latents.release(latents.claim(table("ddim"), 1, 9.0, [context(1), context(0)], **RESCALED))
    slot = latents.claim(table("ddim"), 7, 5.0, [context(1), context(0)], **LIMITED)
    for at in range(6):
        step(latents, [slot], [at], parts=(0, 1))
    assert np.array_equal(latents.latent(np.array([slot]))[0], develop_together([LIMITED])[0])


ADAPTED = {"w": "adapter_weights", "s": "adapter_scales", "x": "latent"}
ROOMY = AdapterRoom.model_validate(ROOM)


def adapter(rank, value, scale):
    return RowAdapter(np.full((rank, ROOMY.width), value, np.float32), scale)


def test_rows_bring_their_adapters_one_below_the_other():
    latents = Latents(3, SHAPE, CONTEXTS, 50, ADAPTED, room=ROOMY)
    both = latents.claim(table(), 1, 3.0, [context(1), context(0)], adapters=[adapter(2, 5, 0.5), adapter(1, 7, -2)])
    none = latents.claim(table(), 1, 1.0, [context(1)])
    one = latents.claim(table(), 1, 1.0, [context(1)], adapters=[adapter(6, 9, 1)])
    rows = arrays(latents.rows(np.array([both, none, one, both]), np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])))
    assert rows["w"].shape == (4, 6, ROOMY.width)
    assert rows["w"].dtype == rows["s"].dtype == np.float32
    assert rows["w"][:, :, 0].tolist() == [[5, 5, 7, 0, 0, 0], [0] * 6, [9] * 6, [5, 5, 7, 0, 0, 0]]
    assert (rows["w"] == rows["w"][:, :, :1]).all()
    assert rows["s"].tolist() == [[0.5, 0.5, -2, 0, 0, 0], [0] * 6, [1] * 6, [0.5, 0.5, -2, 0, 0, 0]]


def test_an_adapter_does_not_stay_in_a_slot():
    latents = Latents(1, SHAPE, CONTEXTS, 50, ADAPTED, room=ROOMY)
    latents.release(latents.claim(table(), 1, 1.0, [context(1)], adapters=[adapter(2, 5, 0.5)]))
    slot = latents.claim(table(), 1, 1.0, [context(1)])
    rows = arrays(latents.rows(np.array([slot]), np.array([0]), np.array([0])))
    assert not rows["w"].any()
    assert not rows["s"].any()


def test_weights_that_nobody_uses_any_more_are_let_go():
    latents, brought = Latents(1, SHAPE, CONTEXTS, 50, ADAPTED, room=ROOMY), adapter(2, 5, 0.5)
    seen = weakref.ref(brought.weights)
    slot = latents.claim(table(), 1, 1.0, [context(1)], adapters=[brought])
    latents.depart(np.array([slot]))
    latents.release(slot)
    del brought
    gc.collect()
    assert seen() is None


def test_a_denoiser_distilled_for_guidance_is_given_the_scale_and_nothing_is_combined():
    inputs = {"sample": "latent", "timestep": "timestep", "guidance": "scalar:guidance"}
    latents, plain = Latents(3, SHAPE, CONTEXTS, 50, inputs), Latents(3, SHAPE, CONTEXTS, 50)
    slots = [latents.claim(table(), seed, scale, [context(1)]) for seed, scale in ((7, 3.5), (8, 1.0))]
    rows = latents.rows(np.array(slots), np.zeros(2, int), np.zeros(2, int))
    assert rows["guidance"].tolist() == [3.5, 1.0]
    assert rows["guidance"].dtype == np.float32
    alone = plain.claim(table(), 7, 1.0, [context(1)])
    for at in range(6):
        step(latents, slots, [at] * 2)
        step(plain, [alone], [at])
    assert np.array_equal(latents.latent(np.array(slots))[0], plain.latent(np.array([alone]))[0])
    latents.release(slots[0])
    again = latents.claim(table(), 9, 2.0, [context(1)])
    assert latents.rows(np.array([again]), np.zeros(1, int), np.zeros(1, int))["guidance"].tolist() == [2.0]


CONTROLLED = {"i": "control_images", "s": "control_scales", "x": "latent"}
PICTURES = (2, 3, 4, 6)


def control(place, value, scale, steps):
    return RowControl(place, np.full((4, 6, 3), value, np.uint8), scale, steps)


def test_rows_bring_the_pictures_of_their_controls_and_the_scales_of_those_that_act_in_their_step():
    latents = Latents(3, SHAPE, CONTEXTS, 50, CONTROLLED, pictures=PICTURES)
    both = latents.claim(
        table(),
        1,
        3.0,
        [context(1), context(0)],
        controls=[control(1, 51, 0.5, range(1, 3)), control(0, 255, 2, range(6))],
    )
    none = latents.claim(table(), 1, 1.0, [context(1)])
    rows = arrays(latents.rows(np.array([both, none, both, both]), np.array([0, 0, 1, 0]), np.array([0, 1, 1, 3])))
    assert rows["i"].shape == (4, *PICTURES)
    assert rows["i"].dtype == rows["s"].dtype == np.float32
    assert rows["s"].tolist() == [[2, 0], [0, 0], [2, 0.5], [2, 0]]
    assert (rows["i"] == rows["i"][:, :, :1, :1, :1]).all()
    assert rows["i"][:, :, 0, 0, 0].tolist() == [[1, np.float32(0.2)], [0, 0], *[[1, np.float32(0.2)]] * 2]


def test_what_a_row_brings_has_a_version_of_its_own_and_none_is_0():
    """So a runtime that holds a row need not copy it again, and rows without anything share their zeros."""
    inputs = {"x": "latent", "w": "adapter_weights", "i": "control_images", "t": "image_prompt_tokens"}
    rooms = {"room": ROOMY, "pictures": PICTURES, "image_prompt_room": PROMPT_ROOM}
    latents = Latents(3, SHAPE, CONTEXTS, 50, inputs, **rooms)

    def claimed(**given):
        return latents.claim(table(), 1, 3.0, [context(1), context(0)], **given)

    def brought():
        controls = [control(0, 255, 2, range(2)), control(1, 51, 1, range(6))]
        return {"adapters": [adapter(2, 5, 0.5)], "controls": controls, "image_prompt": image_prompt(5, 0.5)}

    slots = [claimed(**brought()), claimed(), claimed(**brought())]
    at, parts = np.repeat(slots, 2), np.tile([0, 1], 3)
    rows = latents.rows(at, parts, np.zeros(6, int))
    later = latents.rows(at, parts, np.full(6, 3))
    for name, given in rows.items():
        if name != "x":
            assert given.versions.tolist() == later[name].versions.tolist()
            found = {}
            for row, version in enumerate(given.versions.tolist()):
                array = given.take(np.array([row]))[0]
                assert np.array_equal(found.setdefault(version, array), array)
            assert not found[0].any()
            assert len(found) == (5 if name == "t" else 3), "each output's, and with its negative prompt other tokens"
    latents.release(slots[0])
    again = latents.rows(np.array([claimed()]), np.array([1]), np.array([0]))
    assert [again[name].versions.tolist() for name in ("w", "i", "t")] == [[0]] * 3


def test_rows_are_those_of_their_call_also_when_an_output_ends_meanwhile():
    """A runtime takes them later, in a thread of its own."""
    latents = Latents(1, SHAPE, CONTEXTS, 50, ADAPTED, room=ROOMY)
    slot = latents.claim(table(), 1, 1.0, [context(1)], adapters=[adapter(2, 5, 0.5)])
    rows = latents.rows(np.array([slot]), np.array([0]), np.array([0]))
    latents.depart(np.array([slot]))
    latents.release(slot)
    assert rows["w"].array()[0, :, 0].tolist() == [5, 5, 0, 0, 0, 0]


def test_an_output_that_could_not_begin_leaves_nothing_in_its_slot():
    latents = Latents(1, SHAPE, CONTEXTS, 50, PROMPTED, image_prompt_room=PROMPT_ROOM)
    with pytest.raises(KeyError):
        latents.claim(table(), 1, 1.0, [{}], image_prompt=image_prompt(5, 0.5))
    slot = latents.claim(table(), 1, 1.0, [context(1)])
    rows = arrays(latents.rows(np.array([slot]), np.zeros(1, int), np.zeros(1, int)))
    assert not rows["t"].any()
    assert not rows["s"].any()


def test_the_channels_and_lines_of_a_picture_stay_in_their_order():
    latents = Latents(1, SHAPE, CONTEXTS, 50, CONTROLLED, pictures=(1, *PICTURES[1:]))
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    slot = latents.claim(table(), 1, 1.0, [context(1)], controls=[RowControl(0, pixels, 1.0, range(6))])
    [[image]] = arrays(latents.rows(np.array([slot]), np.zeros(1, int), np.zeros(1, int)))["i"]
    assert np.array_equal(image, pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_a_control_does_not_stay_in_a_slot():
    latents, brought = Latents(1, SHAPE, CONTEXTS, 50, CONTROLLED, pictures=PICTURES), control(1, 5, 0.5, range(6))
    seen = weakref.ref(brought.pixels)
    latents.release(latents.claim(table(), 1, 1.0, [context(1)], controls=[brought]))
    del brought
    gc.collect()
    assert seen() is None
    slot = latents.claim(table(), 1, 1.0, [context(1)])
    rows = arrays(latents.rows(np.array([slot]), np.array([0]), np.array([0])))
    assert not rows["i"].any()


PROMPTED = {"t": "image_prompt_tokens", "s": "image_prompt_scale", "x": "latent"}
PROMPT_ROOM = ImagePromptRoom(edge_px=8, num_tokens=2, width=3)


def image_prompt(value, scale):
    tokens = np.stack([np.full((2, 3), value, np.float32), np.full((2, 3), -value, np.float32)])
    return RowImagePrompt(tokens, scale)


def test_rows_bring_the_tokens_of_their_image_prompt():
    """The row with the negative prompt has the negative tokens; a row without a picture has zeros."""
    latents = Latents(3, SHAPE, CONTEXTS, 50, PROMPTED, image_prompt_room=PROMPT_ROOM)
    slots = [
        latents.claim(table(), 1, 3.0, [context(1), context(0)], image_prompt=prompt)
        for prompt in (image_prompt(5, 0.5), None, image_prompt(7, 2.0))
    ]
    rows = arrays(latents.rows(np.array([slots[0], slots[0], *slots[1:]]), np.array([0, 1, 1, 0]), np.zeros(4, int)))
    assert rows["t"].shape == (4, 2, 3)
    assert rows["t"].dtype == rows["s"].dtype == np.float32
    assert rows["t"][:, 0, 0].tolist() == [5, -5, 0, 7]
    assert (rows["t"] == rows["t"][:, :1, :1]).all()
    assert rows["s"].tolist() == [0.5, 0.5, 0, 2]


def test_an_image_prompt_does_not_stay_in_a_slot():
    latents = Latents(1, SHAPE, CONTEXTS, 50, PROMPTED, image_prompt_room=PROMPT_ROOM)
    given = image_prompt(5, 0.5)
    held = weakref.ref(given.tokens)
    latents.release(latents.claim(table(), 1, 1.0, [context(1)], image_prompt=given))
    del given
    gc.collect()
    assert held() is None, "its memory is free before another output has the slot"
    slot = latents.claim(table(), 1, 1.0, [context(1)])
    rows = arrays(latents.rows(np.array([slot]), np.array([0]), np.array([0])))
    assert not rows["t"].any()
    assert not rows["s"].any()
