"""Plans a generation: which outputs are in the cache, which are being developed, and which must be computed.

`plan` looks up the outputs and may wait for stores. `submit` then decides and
starts without waiting, so that two identical outputs cannot both become new.
Only what must be computed needs room and time: a full queue never refuses what
is cached or being developed. Uses `cache`, `execution` and `admission`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from safelight_server.cache.approximate.similar import SimilarPicture
from safelight_server.cache.approximate.warm_starts import WarmStart
from safelight_server.cache.cache import Cache, CacheQuery, Retention
from safelight_server.cache.namespaces import CacheKeys
from safelight_server.cache.pictures import CachedPicture, pointer
from safelight_server.catalog.catalog import Catalog
from safelight_server.catalog.pixels import sampler_table
from safelight_server.cluster.leased_runner import LeasedRunner
from safelight_server.cluster.leased_runners import ExecutionTicket, LeasedRunners, LoadWithPending
from safelight_server.domain.errors import (
    FailedPreconditionError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    SafelightError,
    UnavailableError,
)
from safelight_server.domain.events import Disposition, FinishReason, Origin
from safelight_server.domain.picture import EncodedPicture, Pixels
from safelight_server.domain.request import CacheMode, CachePolicy, Spec
from safelight_server.domain.tensors import Embedding
from safelight_server.engine.adapters import RowAdapter, prompt_adapters
from safelight_server.engine.engine import Engine
from safelight_server.engine.jobs import ImagePrompt, InitImage, Job
from safelight_server.engine.latents import RowControl, Snapshot
from safelight_server.generations.adapters import load_adapters
from safelight_server.generations.admission import Admission, AdmissionLimits
from safelight_server.generations.execution import Execution, Executions
from safelight_server.generations.generation import Generation
from safelight_server.generations.init_images import InitImages
from safelight_server.generations.output import Output
from safelight_server.runtime.base import Runtime
from safelight_server.storage.base import StoreError

MISS = Origin()
KEPT = {Disposition.LATENT: Retention.AS_SIMILAR, Disposition.BRANCHED: Retention.EMBEDDINGS}
"""How much of an output is kept for later; everything for the dispositions that are not here."""
APPROXIMATE = frozenset({Disposition.SIMILAR, Disposition.LATENT, Disposition.BRANCHED})
"""Outputs whose pixels differ from what their spec alone gives: no checkpoint of that spec belongs to them."""
SERVED = frozenset({Disposition.EXACT, Disposition.SIMILAR})
"""Outputs that got a picture of earlier work. A replica that takes one over may not have that picture."""


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What was found for an output before it is submitted.

    Attributes:
        picture: the finished picture, where the cache has it.
        start: the latent that the output begins from instead of noise.
        embeddings: the embeddings of its prompts, and of its image prompt, that are cached.
        gone: whether the latent that it began from at another replica is not kept any more.
        image: its init image.
        fault: why the output cannot be developed here: one of its pictures, or an adapter, is not there any more.
        adapters: the adapters of its spec.
        controls: likewise.
        image_prompt: its image prompt.
    """

    wanted: CacheQuery
    origin: Origin = MISS
    picture: EncodedPicture | None = None
    start: Snapshot | None = None
    embeddings: tuple[Embedding | None, ...] = ()
    gone: bool = False
    image: InitImage | None = None
    fault: SafelightError | None = None
    adapters: tuple[RowAdapter, ...] = ()
    controls: tuple[RowControl, ...] = ()
    image_prompt: ImagePrompt | None = None


class Planner:
    """Looks up, admits and starts the outputs of generations.

    Args:
        requested: called before admission with the class of what must be computed, and with the seconds that this
            takes on one instance.
        leased_runners: what replicas share; None: there is only this replica.
    """

    def __init__(
        self,
        catalog: Catalog,
        runtime: Runtime,
        engine: Engine,
        executions: Executions,
        cache: Cache,
        limits: AdmissionLimits,
        images: InitImages,
        requested: Callable[[str, float], None],
        leased_runners: LeasedRunners | None = None,
    ) -> None:
        self._catalog = catalog
        self._runtime = runtime
        self._engine = engine
        self._executions = executions
        self._cache = cache
        self._admission = Admission(limits)
        self._images = images
        self._requested = requested
        self._leased_runners = leased_runners

    @property
    def num_executions(self) -> int:
        """Executions that an identical output could join."""
        return len(self._executions)

    @property
    def num_keeping(self) -> int:
        """Finished pictures that are being encoded or kept, and writes of the cache in progress."""
        return self._executions.num_ending + self._cache.num_writes

    def numerics_id(self, generation: Generation) -> str:
        """Identifies everything that decides the bits of its pictures, apart from the spec and the pipeline."""
        return self._runtime.numerics_id(generation.request.spec.model)

    def batch_tolerance(self, generation: Generation) -> float:
        """How far its pictures' rows may be from what they are alone (`Runtime.batch_tolerance`)."""
        return self._runtime.batch_tolerance(generation.request.spec.model)

    def digest(self, generation: Generation) -> str:
        """The digest of the pipeline that develops it here.

        Raises:
            NotFoundError: there is no such model.
        """
        return self._catalog.get(generation.request.spec.model).digest

    # --- planning ---

    async def plan(self, generation: Generation, branched_from: Generation | None) -> list[OutputPlan]:
        """Looks up what is known of each output.

        Args:
            branched_from: the generation that its request's branch names.

        Raises:
            InvalidRequestError, FailedPreconditionError: the branch is not possible.
            NotFoundError: the tenant has no such picture, or an adapter has gone.
            UnavailableError: uploaded pictures cannot be read now, or the adapters in use leave no memory.
        """
        try:
            image, controls, image_prompt = await self._load_images(generation)
        except StoreError:
            what = "uploaded pictures cannot be read now; try again"
            raise UnavailableError(what, retry_after_s=1.0) from None
        adapters = await load_adapters(self._catalog, generation.request.spec, generation.caller.tenant)
        plans = await self._plan(generation, branched_from, adapters)
        if image is None and image_prompt is None and not adapters and not controls:
            return plans
        return [
            replace(plan, image=image, adapters=adapters, controls=controls, image_prompt=image_prompt)
            for plan in plans
        ]

    async def _load_images(
        self, generation: Generation
    ) -> tuple[InitImage | None, tuple[RowControl, ...], ImagePrompt | None]:
        tenant, spec = generation.caller.tenant, generation.request.spec
        manifest = self._catalog.get(spec.model).manifest
        return (
            await self._images.load(tenant, spec, needs_mask=manifest.is_inpainting),
            await self._images.load_controls(tenant, spec, manifest.controls),
            await self._images.load_image_prompt(tenant, spec, manifest.image_prompt),
        )

    async def _plan(
        self, generation: Generation, branched_from: Generation | None, adapters: Sequence[RowAdapter]
    ) -> list[OutputPlan]:
        if branched_from is not None:
            return [await self._branch(generation, branched_from, adapters)]
        queries = [self._query(generation, output.seed, adapters) for output in generation.outputs]
        excluded = {query.name.exact for query in queries}
        for query in queries:
            query.excluded = excluded
        if len(queries) == 1:  # without the task that `gather` makes
            return [await self._find(queries[0])]
        return list(await asyncio.gather(*(self._find(query) for query in queries)))

    async def _find(self, wanted: CacheQuery) -> OutputPlan:
        if wanted.policy.mode is CacheMode.BYPASS:
            return OutputPlan(wanted)
        kept = await self._cache.exact(wanted)
        if kept is not None:
            return OutputPlan(wanted, _origin(Disposition.EXACT, kept), kept.picture)
        if self._executions.find(wanted.name) is None:
            match await self._cache.approximate(wanted):
                case SimilarPicture() as similar:
                    origin = _origin(Disposition.SIMILAR, similar.kept, similar.similarity)
                    return OutputPlan(wanted, origin, similar.kept.picture)
                case WarmStart() as start:
                    step = start.snapshot.step
                    origin = Origin(
                        Disposition.LATENT, start.similarity, num_steps_skipped=step - wanted.spec.first_step
                    )
                    return OutputPlan(wanted, origin, None, start.snapshot, await self._cache.embeddings(wanted))
        return OutputPlan(wanted, embeddings=await self._cache.embeddings(wanted))

    def is_new(self, plans: Sequence[OutputPlan]) -> bool:
        """Whether every output would be developed: no picture, no latent to begin from, none identical under way."""
        return all(
            plan.picture is None
            and plan.origin.disposition is not Disposition.LATENT
            and self._executions.find(self._key(plan)) is None
            for plan in plans
        )

    async def plan_similar(self, plans: Sequence[OutputPlan], min_similarity: float) -> list[OutputPlan]:
        """Looks for a similar picture for each output that has none, whatever the cache mode of the request is."""
        policy = CachePolicy(CacheMode.ALLOW_SIMILAR, min_similarity)
        return list(await asyncio.gather(*(self._find_similar(plan, policy) for plan in plans)))

    async def _find_similar(self, plan: OutputPlan, policy: CachePolicy) -> OutputPlan:
        if plan.picture is not None or plan.start is not None or self._executions.find(self._key(plan)) is not None:
            return plan
        query = replace(plan.wanted, policy=policy)
        similar = await self._cache.approximate(query, latents=False)
        if isinstance(similar, SimilarPicture):
            origin = _origin(Disposition.SIMILAR, similar.kept, similar.similarity)
            return replace(plan, wanted=query, origin=origin, picture=similar.kept.picture)
        embeddings = await self._cache.embeddings(query)
        return replace(plan, wanted=replace(query, policy=plan.wanted.policy), embeddings=embeddings)

    async def _branch(self, generation: Generation, source: Generation, adapters: Sequence[RowAdapter]) -> OutputPlan:
        branch, spec = generation.request.branch, generation.request.spec
        assert branch is not None
        if branch.output_index >= len(source.outputs):
            what = f"{source.name} has {len(source.outputs)} outputs"
            raise InvalidRequestError([FieldViolation("branch.output_index", what)])
        if unlike := _unlike(spec, source.request.spec):
            what = f"must have the {', '.join(unlike)} of {source.name}"
            raise InvalidRequestError([FieldViolation("branch.generation", what)])
        output = source.outputs[branch.output_index]
        if output.origin.disposition in APPROXIMATE:
            what = (
                f"output {output.index} of {source.name} came from earlier work ({output.origin.disposition.value}),"
                " so none of its steps are kept; branch from the generation that developed it"
            )
            raise FailedPreconditionError(what, reason="CHECKPOINT_GONE")
        wanted = self._query(generation, spec.seeds[0], adapters)
        name = self._query(source, output.seed).name
        snapshot = await self._cache.checkpoints.at_or_before(name.namespace.name, name.exact, branch.step)
        if snapshot is None:
            what = f"no step of {source.name} up to {branch.step} is kept"
            raise FailedPreconditionError(what, reason="CHECKPOINT_GONE")
        embeddings = await self._cache.embeddings(wanted)
        origin = Origin(Disposition.BRANCHED, num_steps_skipped=snapshot.step - spec.first_step)
        return OutputPlan(wanted, origin, None, snapshot, embeddings)

    def _query(self, generation: Generation, seed: int, adapters: Sequence[RowAdapter] = ()) -> CacheQuery:
        """The query of an output. Without its adapters it has the output's names, but finds no embeddings for it."""
        request = generation.request
        pipeline = self._catalog.get(request.spec.model)
        numerics = self._runtime.numerics_id(request.spec.model)
        name = self._cache.namespaces.output(generation.caller.tenant, pipeline, numerics, request.spec, seed)
        changes = tuple(adapter.key for adapter in prompt_adapters(adapters))
        return CacheQuery(name, pipeline, request.spec, request.encoding, request.cache, generation.name, changes)

    # --- starting ---

    def submit(self, generation: Generation, plans: Sequence[OutputPlan], time_left_s: float | None) -> None:
        """Accepts a generation and starts what must be computed.

        Raises:
            QueueFullError, DeadlineUnreachableError, UnavailableError: it is refused; nothing was started.
        """
        new: dict[Hashable, Execution] = {}
        sources: list[EncodedPicture | Execution] = []
        for output, plan in zip(generation.outputs, plans, strict=True):
            output.origin = plan.origin
            key = self._key(plan)
            if plan.picture is not None:
                sources.append(plan.picture)
            elif (execution := self._executions.find(key) or new.get(key)) is not None:
                output.origin = Origin(Disposition.COALESCED)
                sources.append(execution)
            else:
                execution = new[key or output] = self._create(generation, output, plan, key)
                sources.append(execution)
        estimate_s = self._admit(generation, list(new.values()), time_left_s) if new else 0.0
        for execution in new.values():
            self._executions.publish(execution)
        generation.picture_bytes = _picture_bytes(plans) if new else 0
        generation.accept(self.numerics_id(generation), estimate_s, sources, self.batch_tolerance(generation))

    # --- taking over from another replica ---

    async def keep_starts(self, generation: Generation, plans: Sequence[OutputPlan]) -> bool:
        """Stores the latents that its outputs begin from where other replicas find them. Returns whether all are."""
        for output, plan in zip(generation.outputs, plans, strict=True):
            key = self._start_key(generation, output, plan.wanted)
            owner = self._cache.owner(plan.wanted)
            if plan.start is not None and not await self._cache.checkpoints.put(key, plan.start, owner):
                return False
        return True

    async def plan_again(self, generation: Generation, starts: Sequence[bool]) -> list[OutputPlan]:
        """Looks up what is known of each output of a generation that another replica has accepted.

        Raises:
            StoreError: a latent or a picture that an output began from cannot be read now.
        """
        plans, numerics = [], self.numerics_id(generation)
        others = "" if generation.numerics_id in ("", numerics) else numerics
        image, image_prompt, fault = None, None, None
        adapters: tuple[RowAdapter, ...] = ()
        controls: tuple[RowControl, ...] = ()
        try:
            image, controls, image_prompt = await self._load_images(generation)
            adapters = await load_adapters(self._catalog, generation.request.spec, generation.caller.tenant)
        except (NotFoundError, UnavailableError) as error:
            fault = error
        except InvalidRequestError as error:  # this replica has other bounds than the one that accepted it
            fault = NotFoundError(error.message, reason="IMAGE_NOT_FOUND")
        for output, started in zip(generation.outputs, starts, strict=True):
            wanted = self._query(generation, output.seed, adapters)
            start, gone = None, False
            if started and output.reason is None:
                start = await self._cache.checkpoints.get(self._start_key(generation, output, wanted))
                gone = start is None
            anew = gone or output.origin.disposition in SERVED
            origin = replace(MISS if anew else output.origin, numerics_id=others)
            embeddings = await self._cache.embeddings(wanted)
            found = image, fault, adapters, controls, image_prompt
            plans.append(OutputPlan(wanted, origin, None, start, embeddings, gone, *found))
        return plans

    def enter(self, generation: Generation, plans: Sequence[OutputPlan]) -> None:
        """Lets its outputs enter their executions; those that have ended or are being developed are left alone.

        An output whose latent is gone begins from noise and is a MISS, unless it is a branch, which fails.
        """
        generation.picture_bytes = 0
        for output, plan in zip(generation.outputs, plans, strict=True):
            missing = plan.gone or plan.fault is not None
            if not output.idle or (missing and not generation.owned):  # its owner may have what is missing here
                continue
            if plan.fault is not None:
                generation.on_output_ended(output, FinishReason.FAILED, plan.fault)
                continue
            if plan.gone and output.origin.disposition is Disposition.BRANCHED:
                what = f"output {output.index} branched from steps that are no longer kept"
                error = FailedPreconditionError(what, reason="CHECKPOINT_GONE")
                generation.on_output_ended(output, FinishReason.FAILED, error)
                continue
            output.origin, output.starts = plan.origin, plan.start is not None
            key = self._key(plan)
            execution = self._executions.find(key)
            if execution is None:
                execution = self._create(generation, output, plan, key, again=True)
                self._executions.publish(execution)
                generation.picture_bytes = _picture_bytes(plans)
            generation.enter([output], [execution])

    def start_keys(self, generation: Generation, starts: Sequence[bool]) -> list[str]:
        """The storage keys of the latents that its outputs begin from."""
        begun = [output for output, started in zip(generation.outputs, starts, strict=True) if started]
        return [self._start_key(generation, output, self._query(generation, output.seed)) for output in begun]

    def _start_key(self, generation: Generation, output: Output, wanted: CacheQuery) -> str:
        return f"{wanted.name.namespace.prefix}/start/{self._cache.namespaces.private(generation.name, output.index)}"

    def _admit(self, generation: Generation, new: Sequence[Execution], time_left_s: float | None) -> float:
        output = requested = self._engine.output(new[0].job)
        spec = generation.request.requested_spec
        if spec is not generation.request.spec:  # the scaler must see the full work, or a degrading fleet stays small
            num_steps, guided = spec.num_inference_steps, spec.guided_steps
            requested = replace(output, num_steps=num_steps, first_step=spec.first_step, guided_steps=guided)
        self._requested(output.priority.name.lower(), self._engine.scheduler.compute_s(requested) * len(new))
        self._engine.outage.check()
        load = self._engine.scheduler if self._leased_runners is None else LoadWithPending(self._leased_runners)
        if self._engine.outage.is_on:
            time_left_s = None  # an outage has no known end, so the deadline decides later
        request_id = generation.request.request_id
        key = f"{output.caller} {request_id}" if request_id else ""
        return self._admission.admit(load, output, len(new), time_left_s, key, generation.times.accepted)

    def _create(
        self, generation: Generation, output: Output, plan: OutputPlan, key: CacheKeys | None, *, again: bool = False
    ) -> Execution:
        bypass = plan.wanted.policy.mode is CacheMode.BYPASS
        keep = KEPT.get(plan.origin.disposition, Retention.EVERYTHING)
        recorder = None if bypass else self._cache.record(plan.wanted, keep)
        job, prompt = _job(generation, output, plan), generation.request.spec.prompt
        if self._leased_runners is None:
            return self._executions.create(job, key, recorder, prompt=prompt)
        ticket = self._ticket(generation, output, plan, key, again)
        ttl_s = self._leased_runners.private_s if key is None else None

        async def put(pixels: Pixels, compute_s: float) -> bool:
            there = await self._cache.replicate(plan.wanted, ticket.pointer, pixels, compute_s, ttl_s)
            if recorder is not None and key is not None:
                recorder.there = there
            return there

        return self._executions.create(job, key, recorder, LeasedRunner(self._leased_runners, ticket, put), prompt)

    def _ticket(
        self, generation: Generation, output: Output, plan: OutputPlan, key: CacheKeys | None, again: bool
    ) -> ExecutionTicket:
        """The ticket of an output's execution. Identical outputs share one name; any other output has its own."""
        namespace = plan.wanted.name.namespace
        disposition = plan.origin.disposition.value
        whose = generation.caller.tenant, generation.name, plan.wanted.revision, disposition
        if key is not None:
            at = (namespace.name, key.exact)
            return ExecutionTicket(f"{namespace.prefix}.{key.exact}", pointer(key), at, *whose, again)
        own = self._cache.namespaces.private(generation.name, output.index)
        return ExecutionTicket(own, f"{namespace.prefix}/result/{own}", None, *whose, again)

    @staticmethod
    def _key(plan: OutputPlan) -> CacheKeys | None:
        """The key that identical outputs share; None: no other output can share the execution."""
        if plan.start is not None or plan.wanted.policy.mode is CacheMode.BYPASS:
            return None
        return plan.wanted.name


def _job(generation: Generation, output: Output, plan: OutputPlan) -> Job:
    spec, pipeline, caller = generation.request.spec, plan.wanted.pipeline, generation.caller
    return Job(
        output_id=0,
        caller=f"{caller.tenant}/{caller.name}",
        priority=generation.request.priority,
        pipeline=pipeline,
        latent_shape=pipeline.latent_shape(spec.width_px, spec.height_px),
        table=sampler_table(pipeline, spec),
        seed=output.seed,
        guidance_scale=spec.guidance_scale,
        token_ids=spec.token_ids_by_row,
        deadline=generation.deadline,
        start=plan.start,
        embeddings=plan.embeddings,
        image=plan.image,
        guided_steps=spec.guided_steps,
        guidance_rescale=spec.guidance_rescale,
        adapters=plan.adapters,
        controls=plan.controls,
        image_prompt=plan.image_prompt,
    )


def _picture_bytes(plans: Sequence[OutputPlan]) -> int:
    """The memory of the pictures that a generation starts from or follows, which its outputs share."""
    if not plans:
        return 0
    plan = plans[0]
    arrays = [control.pixels for control in plan.controls]
    if plan.image is not None:
        arrays += [plan.image.pixels, *([] if plan.image.mask is None else [plan.image.mask])]
    if plan.image_prompt is not None:
        arrays.append(plan.image_prompt.pixels)
    return sum(array.nbytes for array in arrays)


def _origin(disposition: Disposition, kept: CachedPicture, similarity: float = 0.0) -> Origin:
    facts = kept.facts
    return Origin(disposition, similarity, facts.generation, facts.num_steps, facts.compute_s)


def _unlike(one: Spec, other: Spec) -> list[str]:
    """The names of those properties that a branch must not change and that differ."""
    facts = {
        "model": ((one.model, one.revision), (other.model, other.revision)),
        "size": ((one.width_px, one.height_px), (other.width_px, other.height_px)),
        "steps": (one.num_inference_steps, other.num_inference_steps),
        "sampler": (one.sampler, other.sampler),
        "init_image, strength and mask": (
            (one.init_image, one.strength, one.mask),
            (other.init_image, other.strength, other.mask),
        ),
    }
    return [name for name, (mine, theirs) in facts.items() if mine != theirs]
