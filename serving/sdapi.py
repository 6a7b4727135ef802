"""AUTOMATIC1111's ``/sdapi/v1``, as far as Open WebUI, SillyTavern and LibreChat speak it.

There every client shares one checkpoint, one progress bar and one stop button. Here each has its own: whoever asks is
told apart by the API key, or by the address where there are no keys.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from dnp.engine.errors import SettingsError
from dnp.runtime import request as asked
from dnp.runtime.batching import Event, Progress
from dnp.runtime.pictures import settings_inside
from dnp.runtime.result import Result
from dnp.serving.bodies import JsonRoute
from dnp.serving.engines import Engine, Order, Work, result_of
from dnp.serving.errors import ApiError, api_error
from dnp.serving.openai import Flag, Number, Text, Whole, param_of, random_seed
from dnp.serving.service import Service, while_there
from dnp.serving.v1 import ERRORS, REFUSED

SAMPLERS: Final = {
    "DDIM": "ddim", "DDPM": "ddpm", "DEIS": "deis", "DPM++ 2M": "dpmpp_2m", "DPM++ 2M Karras": "dpmpp_2m_karras",
    "DPM++ 2M SDE": "dpmpp_2m_sde", "Euler": "euler", "Euler a": "euler_a", "Heun": "heun", "LCM": "lcm", "LMS": "lms",
    "PLMS": "pndm", "UniPC": "unipc",
}  # fmt: skip
_SCHEDULES: Final = ("automatic", "karras")
_NAMES: Final = {
    "negative_prompt": "negative",
    "cfg_scale": "guidance",
    "sampler_name": "sampler",
    "batch_size": "images",
}
_CALLERS: Final = 1024  # whose choice of a model is remembered


class Txt2Img(BaseModel):
    """POST /sdapi/v1/txt2img. Fields that there are not here are passed over, as they are there."""

    model_config = ConfigDict(extra="ignore")

    prompt: Annotated[Text, Field(max_length=32_000)]
    negative_prompt: Annotated[Text, Field(max_length=32_000)] | None = Field(
        None, description="Your own n*. Empty: DNS finds it."
    )
    seed: Whole | None = Field(None, description="Random when left out or -1.")
    steps: Whole | None = None
    cfg_scale: Number | None = None
    width: Whole | None = None
    height: Whole | None = None
    sampler_name: Text | None = None
    sampler_index: Text | None = Field(None, description="An older name of sampler_name.")
    scheduler: Text | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=256)] | None = None
    n_iter: Annotated[Whole, Field(ge=1, le=256)] | None = None
    eta: Number | None = None
    enable_hr: Flag | None = None
    restore_faces: Flag | None = None
    tiling: Flag | None = None
    override_settings: dict[str, Any] | None = None


class Options(BaseModel):
    """POST /sdapi/v1/options: of all options the model alone."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: Annotated[Text, Field(max_length=200)] | None = None


@dataclass(eq=False)
class _Running:
    """A request of somebody's."""

    work: Work
    images: int
    step: int = 0
    steps: int = 0
    phase: str = ""
    began: float = field(default_factory=time.monotonic)


def router(service: Service) -> APIRouter:
    """The paths below ``/sdapi/v1``."""
    routes = APIRouter(prefix="/sdapi/v1", route_class=JsonRoute, responses={401: ERRORS[401]})
    chosen: OrderedDict[str, str] = OrderedDict()  # models, by caller
    running: dict[str, list[_Running]] = {}  # by caller

    def model_of(caller: str, named: str | None = None) -> Engine:
        return service.engines.find(named or chosen.get(caller))

    @routes.post("/txt2img", responses=ERRORS, response_model=None)
    async def txt2img(request: Request, body: Txt2Img) -> JSONResponse:
        """Images for a prompt."""
        for name in ("enable_hr", "restore_faces", "tiling"):
            if getattr(body, name):
                raise ApiError(400, "unsupported_value", f"{name} is not to be had here; leave it out", name)
        caller = request.state.caller
        named = (body.override_settings or {}).get("sd_model_checkpoint")
        if not isinstance(named, str | None):
            raise ApiError(400, "invalid_value", "sd_model_checkpoint must be text", "override_settings")
        engine = service.admit(model_of(caller, named).name)
        if service.settings.log_prompts:
            request.state.log["prompt"] = body.prompt
        try:
            job = engine.resolve(_request(body, service.settings.most_images))
            work = await engine.submit(job, Order(request.state.id, deadline=service.deadline(request, None)))
        except SettingsError as error:
            names = {name: _NAMES.get(name, name) for name in Txt2Img.model_fields}
            raise api_error(error, param_of(error, body.model_fields_set, names)) from error
        request.state.log |= {"model": engine.name, "images": job.images}
        mine = _Running(work, job.images)
        running.setdefault(caller, []).append(mine)
        try:
            return JSONResponse(await while_there(request, answer(body, engine, mine)))
        finally:
            running[caller].remove(mine)
            if not running[caller]:
                del running[caller]
            await work.aclose()

    async def answer(body: Txt2Img, engine: Engine, mine: _Running) -> dict[str, Any]:
        def hear(event: Event) -> None:
            if isinstance(event, Progress):
                mine.phase, mine.step, mine.steps = event.phase, event.index, event.total

        result = await result_of(mine.work, hear)
        service.metrics.made(engine.name, result)
        kind = "dnp" if result.request.dnp else "plain"
        inside = [
            settings_inside(result.request, result.made_with, kind, index, negative)
            for index, negative in enumerate(result.negatives)
        ]
        encode = service.encoder.encode
        images = await asyncio.gather(*map(lambda array, own: encode(array, "png", None, own), result.arrays, inside))
        return {
            "images": images,
            "parameters": body.model_dump(exclude_unset=True),
            "info": json.dumps(_info(result, engine.name)),
        }

    @routes.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        """The caller's model."""
        return {"sd_model_checkpoint": model_of(request.state.caller).name, "samples_format": "png"}

    @routes.post("/options", responses={400: ERRORS[400], 404: ERRORS[404], **REFUSED})
    async def choose(request: Request, body: Options) -> dict[str, Any]:
        """Choose a model, for this caller alone."""
        if body.sd_model_checkpoint is not None:
            caller = request.state.caller
            chosen[caller] = service.engines.find(body.sd_model_checkpoint).name
            chosen.move_to_end(caller)
            while len(chosen) > _CALLERS:
                chosen.popitem(last=False)
        return {}

    @routes.get("/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        """The models."""
        return [
            {"title": engine.name, "model_name": engine.name, "hash": engine.card["fingerprint"][:10],
             "sha256": engine.card["fingerprint"], "filename": engine.name, "config": None}
            for engine in service.engines
        ]  # fmt: skip

    @routes.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers."""
        return [{"name": name, "aliases": [ours], "options": {}} for name, ours in SAMPLERS.items()]

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """Schedules of noise levels."""
        return [
            {"name": name, "label": name.capitalize(), "aliases": None, "default_rho": -1, "need_inner_model": False}
            for name in _SCHEDULES
        ]

    @routes.get("/upscalers")
    @routes.get("/latent-upscale-modes")
    @routes.get("/sd-vae")
    async def nothing() -> list[Any]:
        """None of these are here, and clients ask for them."""
        return []

    @routes.get("/progress")
    async def progress(request: Request) -> dict[str, Any]:
        """How far the caller's own requests are; the oldest one's steps."""
        own = running.get(request.state.caller, [])
        first = own[0] if own else None
        share = first.step / first.steps if first and first.steps else 0.0
        return {
            "progress": min(share, 0.99) if first else 0.0,
            "eta_relative": 0.0,
            "state": {
                "skipped": False, "interrupted": False, "job": first.phase if first else "",
                "job_count": sum(one.images for one in own), "job_timestamp": "", "job_no": 0,
                "sampling_step": first.step if first else 0, "sampling_steps": first.steps if first else 0,
            },
            "current_image": None,
            "textinfo": None,
        }  # fmt: skip

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(request: Request) -> dict[str, int]:
        """Stop the caller's own requests, and nobody else's."""
        own = list(running.get(request.state.caller, []))
        for one in own:
            await one.work.aclose()
        return {"interrupted": len(own)}

    return routes


def _request(body: Txt2Img, most: int) -> asked.Request:
    images = (body.batch_size or 1) * (body.n_iter or 1)
    if images > most:
        raise ApiError(
            400, "invalid_value", f"batch_size times n_iter is {images}, this server makes at most {most} images at "
            "once; send more requests", "batch_size"
        )  # fmt: skip
    settings: dict[str, Any] = {
        "images": images,
        "seed": random_seed() if body.seed in (None, -1) else body.seed,
        "negative": body.negative_prompt or None,
        "sampler": _sampler(body.sampler_name or body.sampler_index, body.scheduler),
        "guidance": body.cfg_scale,
        "steps": body.steps,
        "width": body.width,
        "height": body.height,
        "eta": body.eta,
    }
    return asked.Request(body.prompt, **{name: value for name, value in settings.items() if value is not None})


def _sampler(name: str | None, schedule: str | None) -> str | None:
    """Our name of a sampler; a schedule of Karras' noise levels is part of one. Names of ours are taken, too."""
    if name is None:
        return None
    by_name = {theirs.lower(): ours for theirs, ours in SAMPLERS.items()}
    ours = by_name.get(name.lower(), name)
    if schedule is None or schedule.lower() in ("", "automatic"):
        return ours
    wanted = f"{ours.removesuffix('_karras')}_{schedule.lower()}"
    if wanted not in SAMPLERS.values():
        raise ApiError(
            400, "unsupported_value", f"{name[:60]} has no schedule {schedule[:60]!r} here; leave scheduler out, or "
            "take DPM++ 2M with karras", "scheduler"
        )  # fmt: skip
    return wanted


def _info(result: Result, model: str) -> dict[str, Any]:
    """What clients read the seed and the size from; ``infotexts`` are A1111's own lines."""
    request = result.request
    seeds = [request.seed + index for index in range(len(result.negatives))]
    shown = {ours: theirs for theirs, ours in SAMPLERS.items()}.get(str(request.sampler), request.sampler)
    lines = [
        f"{request.prompt}\nNegative prompt: {negative}\nSteps: {request.steps}, Sampler: {shown}, "
        f"CFG scale: {request.guidance}, Seed: {seed}, Size: {request.width}x{request.height}, Model: {model}"
        for seed, negative in zip(seeds, result.negatives, strict=True)
    ]
    return {
        "prompt": request.prompt, "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": result.negatives[0], "all_negative_prompts": result.negatives,
        "seed": seeds[0], "all_seeds": seeds, "subseed": seeds[0], "all_subseeds": seeds, "subseed_strength": 0,
        "width": request.width, "height": request.height, "sampler_name": shown, "cfg_scale": request.guidance,
        "steps": request.steps, "batch_size": len(seeds), "restore_faces": False, "face_restoration_model": None,
        "sd_model_name": model, "sd_model_hash": result.bundle[:10], "denoising_strength": 0,
        "extra_generation_params": {}, "index_of_first_image": 0, "infotexts": lines, "styles": [], "clip_skip": 1,
    }  # fmt: skip
