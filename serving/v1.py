"""The handlers of ``/v1``: a body becomes a request of the engine's, its result an answer or a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dnp.engine.errors import SettingsError
from dnp.runtime.batching import Event, Negatives, Picture, Plain, Progress
from dnp.runtime.job import Job
from dnp.runtime.pictures import settings_inside
from dnp.runtime.result import MADE_WITH, Result
from dnp.serving.bodies import JsonRoute, read
from dnp.serving.engines import Engine, Order, What, Work, result_of
from dnp.serving.errors import ApiError, ErrorAnswer, api_error
from dnp.serving.openai import (
    CaptionsAnswer,
    CaptionsBody,
    ImagesAnswer,
    ImagesBody,
    Model,
    ModelList,
    NegativesBody,
    Settings,
    param_of,
)
from dnp.serving.pictures import MAX_PIXELS
from dnp.serving.service import Service, while_there

_NAMES: Final = {"n": "images", "negative_prompt": "negative"}  # of the body, where Request has another
_SSE: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_SENTENCES: Final = {
    400: "The request cannot be honoured; the sentence says why.",
    401: "A key is asked for.",
    404: "There is no such model.",
    408: "The deadline passed, or the body came too slowly.",
    409: "Somebody cancelled it.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    422: "These settings give no image.",
    429: "The queue is full; Retry-After says when to ask again.",
    500: "A fault of the server's.",
    503: "The server is warming up or stopping; Retry-After says when to ask again.",
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _SENTENCES.items()
}
# Where FastAPI would describe a 422 of its own, which is never sent.
REFUSED: Final[dict[int | str, dict[str, Any]]] = {"4XX": {"model": ErrorAnswer, "description": "It is refused."}}
_EVENTS: Final = {"text/event-stream": {"schema": {"type": "string", "description": "With `stream`: events."}}}


@dataclass(frozen=True)
class _Asked:
    """A body, resolved.

    Attributes:
        job: what is asked for, resolved.
        kind: of its main images, as pictures name it: ``dnp``, ``plain`` or ``dns``.
    """

    body: Settings
    engine: Engine
    job: Job
    order: Order
    kind: str

    @property
    def shows(self) -> list[str]:
        return list(getattr(self.body, "show", None) or [])


def router(service: Service) -> APIRouter:
    """The paths below ``/v1``."""
    routes = APIRouter(prefix="/v1", route_class=JsonRoute)

    def asked(request: Request, body: Settings, what: What) -> _Asked:
        """Raises ApiError, or DnpError for what cannot be honoured or not now."""
        form = body.format  # which refuses some
        engine = service.admit(body.model)
        job = engine.resolve(body.request(service.settings.most_images))
        if service.settings.log_prompts:
            request.state.log["prompt"] = job.prompt
        request.state.log |= {"model": engine.name, "images": job.images, "format": form}
        order = Order(
            request.state.id,
            what=what,
            priority=body.priority or 0,
            deadline=service.deadline(request, body.deadline, stream=bool(body.stream)),
            previews=body.partial_images or 0 if body.stream else 0,
            heard=bool(body.stream),
        )
        return _Asked(body, engine, job, order, "dns" if what == "negatives" else "dnp" if job.request.dnp else "plain")

    async def answer(request: Request, body: Settings, what: What) -> Response:
        try:
            it = asked(request, body, what)
            work = await it.engine.submit(it.job, it.order)
            if body.stream:
                return _EventStream(_events(service, request, it, work), work)
            try:
                return JSONResponse(await while_there(request, whole(it, work)))
            finally:
                await work.aclose()
        except SettingsError as error:
            names = {name: _NAMES.get(name, name) for name in type(body).model_fields}
            raise api_error(error, param_of(error, body.sent, names)) from error

    async def whole(it: _Asked, work: Work) -> dict[str, Any]:
        result = await result_of(work)
        service.metrics.made(it.engine.name, result)
        images = [_image(service, it, result, index) for index in range(len(result.arrays))]
        return {"created": int(time.time()), "data": await asyncio.gather(*images), **_form(it), **_made(it, result)}

    @routes.post(
        "/images/generations",
        response_model=ImagesAnswer,
        responses={**ERRORS, 200: {"content": _EVENTS}},
        response_model_exclude_unset=True,
    )
    async def generations(request: Request, body: ImagesBody) -> Response:
        """Images for a prompt by diffusion-negative prompting, in OpenAI's form."""
        return await answer(request, body, "images")

    @routes.post("/images/negatives", response_model=ImagesAnswer, responses={**ERRORS, 200: {"content": _EVENTS}})
    async def negatives(request: Request, body: NegativesBody) -> Response:
        """The DNS images of a prompt and their captions n*, for a person to look at and to edit."""
        return await answer(request, body, "negatives")

    @routes.post("/captions", response_model=CaptionsAnswer, responses=ERRORS)
    async def captions(request: Request, body: CaptionsBody) -> Response:
        """Images in words."""
        engine = service.admit(body.model)
        texts = [text for text in [body.image, *(body.images or [])] if text is not None]
        if not texts:
            raise ApiError(400, "missing_field", "there is no image; send one as image, or several as images", "image")
        order = Order(request.state.id, priority=body.priority or 0, deadline=service.deadline(request, body.deadline))
        settings = body.model_dump(include={"beams", "prefix", "min_length", "max_length"}, exclude_none=True)

        async def described() -> list[str]:
            images, room = [], MAX_PIXELS
            for text in texts:
                images.append(await service.encoder.decode(text, room))
                room -= images[-1].width * images[-1].height
            return await engine.caption(images, order, **settings)

        try:
            found = await while_there(request, described())
        except SettingsError as error:
            raise api_error(error, param_of(error, body.sent, {name: name for name in settings})) from error
        return JSONResponse({"data": [{"text": text} for text in found], "id": request.state.id})

    @routes.get("/models", response_model=ModelList, responses={401: ERRORS[401]}, response_model_exclude_unset=True)
    async def models() -> dict[str, Any]:
        """The models by name, and the aliases of the default one."""
        return {"object": "list", "data": [model(name, engine) for name, engine in service.engines.names]}

    @routes.get(
        "/models/{name}",
        response_model=Model,
        responses={401: ERRORS[401], 404: ERRORS[404], **REFUSED},
        response_model_exclude_unset=True,
    )
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return model(name, service.engines.find(name))

    def model(name: str, engine: Engine) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": int(service.started), "owned_by": "dnp", "root": engine.name}
        if name != engine.name:
            return found
        card = dict(engine.card)
        card["limits"] = {**card["limits"], "n": service.settings.most_images, "partial_images": 3}
        return {**found, "dnp": card}

    return routes


def edits(service: Service) -> APIRouter:
    """OpenAI's path for editing images, which no model here can."""
    routes = APIRouter()

    @routes.post("/v1/images/edits", responses={status: ERRORS[status] for status in (400, 401, 408, 413)})
    async def edit(request: Request) -> Response:
        """Not supported yet."""
        await read(request)  # or the client would not hear the answer
        raise ApiError(
            400, "unsupported", "images cannot be edited here yet; /v1/images/generations makes them from a prompt"
        )

    return routes


async def _image(service: Service, it: _Asked, result: Result, index: int) -> dict[str, Any]:
    """What the answer says of one image."""
    body, encode = it.body, service.encoder.encode
    made, negative = result.made_with, result.negatives[index]

    async def picture(array: npt.NDArray[np.uint8], kind: str) -> str:
        inside = settings_inside(result.request, made, kind, index, negative)
        return await encode(array, body.format, body.output_compression, inside)

    first = result.request.dns_seed if it.kind == "dns" else result.request.seed
    found: dict[str, Any] = {
        "b64_json": await picture(result.arrays[index], it.kind),
        "revised_prompt": None,
        "seed": (first or 0) + index,
        "negative_prompt": negative,
    }
    for kind, arrays in (("dns", result.dns_arrays), ("plain", result.plain_arrays)):
        if kind in it.shows and arrays is not None:
            found[f"{kind}_image"] = {"b64_json": await picture(arrays[index], kind)}
    return found


def _form(it: _Asked) -> dict[str, Any]:
    return {
        "output_format": it.body.format,
        "size": f"{it.job.width}x{it.job.height}",
        "quality": "high",
        "background": "opaque",
    }


def _made(it: _Asked, result: Result) -> dict[str, Any]:
    tokens = it.engine.tokens(it.job.request)
    texts = {"prompt": "prompt", "negative": "negative_prompt"}
    cut = it.engine.truncated(it.job.request)
    return {
        "usage": {
            "input_tokens": tokens,
            "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": tokens,
        },
        "request": result.request.to_dict(),
        "timings": {name: round(seconds, 6) for name, seconds in result.seconds.items()},
        "warnings": [
            {"param": texts[name], "message": f"too long for the model; left out: {lost[:60]!r}; windows 2 reads on"}
            for name, lost in cut.items()
        ],
        "model": it.engine.name,
        **result.made_with,
        "id": it.order.id,
    }


class _EventStream(StreamingResponse):
    """Server-sent events of a request, which is cancelled when the stream ends early."""

    def __init__(self, events: AsyncIterator[str], work: Work) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_SSE)
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._work.aclose()


def _sse(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


async def _events(service: Service, request: Request, it: _Asked, work: Work) -> AsyncIterator[str]:
    """The stream: what is told as the work goes on, each image at its end, comments where there is nothing to tell."""
    writer = _Writer(service, it)
    coming: asyncio.Future[Event | Result] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(work))
            while not (await asyncio.wait({coming}, timeout=service.settings.keep_alive))[0]:
                yield ": still here\n\n"
            event = coming.result()
            async for line in writer.told(event):
                yield line
            if isinstance(event, Result):
                return
    except Exception as error:
        answer = api_error(error)
        yield f"event: error\ndata: {json.dumps(answer.body)}\n\n"
        if answer.status_code >= 500:
            raise
        request.state.log["cause"] = answer.code
    finally:
        if coming is not None:
            coming.cancel()


class _Writer:
    """Events of the engine's as lines of a stream."""

    def __init__(self, service: Service, it: _Asked) -> None:
        self._service, self._it = service, it
        self._encode = service.encoder.encode
        self._partials = [0] * it.job.images
        self._common = {"created_at": int(time.time()), **_form(it)}

    async def told(self, event: Event | Result) -> AsyncIterator[str]:
        """The lines of one event; without ``progress`` only OpenAI's own."""
        more = bool(self._it.body.progress)
        match event:
            case Result():
                async for line in self._completed(event):
                    yield line
            case Picture() if more or event.phase == "final" or self._it.kind == "dns":
                yield await self._partial(event)
            case Progress() if more:
                yield _sse("image_generation.progress", phase=event.phase, step=event.index, steps=event.total)
            case Negatives() if more:
                for index, (pixels, text) in enumerate(zip(event.images, event.texts, strict=True)):
                    picture = await self._picture(pixels, "dns", index, text)
                    seed = self._it.job.dns_seeds[index]
                    yield _sse(
                        "image_generation.negative", index=index, negative_prompt=text, seed=seed, b64_json=picture
                    )
            case Plain() if more:
                for index, pixels in enumerate(event.images):
                    picture = await self._picture(pixels, "plain", index)
                    yield _sse("image_generation.plain", index=index, b64_json=picture)

    async def _picture(self, pixels: npt.NDArray[np.uint8], kind: str, index: int, negative: str | None = None) -> str:
        card, body = self._it.engine.card, self._it.body
        made = {name: card[name] for name in MADE_WITH}
        inside = settings_inside(self._it.job.request, made, kind, index, negative)
        return await self._encode(pixels, body.format, body.output_compression, inside)

    async def _partial(self, event: Picture) -> str:
        number = self._partials[event.number]
        self._partials[event.number] += 1
        return _sse(
            "image_generation.partial_image",
            b64_json=await self._encode(event.image, "jpeg", 90),
            partial_image_index=number,
            index=event.number,
            phase=event.phase,
            **{**self._common, "output_format": "jpeg"},
        )

    async def _completed(self, result: Result) -> AsyncIterator[str]:
        self._service.metrics.made(self._it.engine.name, result)
        made = _made(self._it, result)
        for index in range(len(result.arrays)):
            image = await _image(self._service, self._it, result, index)
            yield _sse("image_generation.completed", index=index, **image, **self._common, **made)
