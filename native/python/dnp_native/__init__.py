"""Diffusion-negative prompting by libdnp, which lies beside this file: ``Pipeline.open``, ``generate``, ``caption``.

Settings, results and errors are those of ``dnp.h``; images are numpy arrays, uint8 ``[height, width, 3]``.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]


class DnpError(Exception):
    """What libdnp refused or could not do.

    Attributes:
        code: 2 settings, 3 bundle, 4 backend, 130 cancelled, 1 anything else.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Image(ctypes.Structure):
    """``dnp_image``."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("height", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("pixels", ctypes.c_void_p),
    )

    def array(self) -> Array:
        """A copy of the pixels."""
        shape = self.height, self.width, 3
        return np.frombuffer(ctypes.string_at(self.pixels, int(np.prod(shape))), np.uint8).reshape(shape)


class CStep(ctypes.Structure):
    """``dnp_step``."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("phase", ctypes.c_char_p),
        ("index", ctypes.c_uint32),
        ("total", ctypes.c_uint32),
        ("images", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
    )


PROGRESS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(CStep))


class Callbacks(ctypes.Structure):
    """``dnp_callbacks``."""

    _fields_ = (("size", ctypes.c_size_t), ("user_data", ctypes.c_void_p), ("progress", PROGRESS))


def load(file: Path) -> ctypes.CDLL:
    """The library in a file, its functions declared."""
    library = ctypes.CDLL(str(file))
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    declared: tuple[tuple[Any, ...], ...] = (
        ("dnp_abi_version", ctypes.c_uint32),
        ("dnp_version", text),
        ("dnp_error_code", ctypes.c_int, handle),
        ("dnp_error_message", text, handle),
        ("dnp_error_free", None, handle),
        ("dnp_open", handle, text, text, handle),
        ("dnp_close", handle, handle),
        ("dnp_cancel", None, handle),
        ("dnp_info", text, handle),
        ("dnp_warm_up", handle, handle, ctypes.c_int),
        ("dnp_generate", handle, handle, text, handle, handle),
        ("dnp_find_negatives", handle, handle, text, handle, handle),
        ("dnp_caption", handle, handle, handle, text, handle),
        ("dnp_text_free", None, handle),
        ("dnp_step_preview", handle, handle, ctypes.c_uint32, handle),
        ("dnp_result_count", ctypes.c_size_t, handle, ctypes.c_int),
        ("dnp_result_image", handle, handle, ctypes.c_int, ctypes.c_size_t, handle),
        ("dnp_result_json", text, handle),
        ("dnp_result_free", None, handle),
    )
    for name, result, *arguments in declared:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


LIBRARY = load(Path(__file__).with_name("libdnp.so"))


def check(error: int | None) -> None:
    """Raise the error that a call gave, if it did."""
    if error:
        code, message = LIBRARY.dnp_error_code(error), LIBRARY.dnp_error_message(error).decode()
        LIBRARY.dnp_error_free(error)
        raise DnpError(code, message)


class Step:
    """Where a request is: ``index`` of ``total`` steps of ``phase`` are done. Only while the callback hears of it."""

    def __init__(self, step: Any) -> None:
        told = step.contents
        self.phase: str = told.phase.decode()
        self.index: int = told.index
        self.total: int = told.total
        self.images: int = told.images
        self._step = step

    def preview(self, index: int = 0) -> Array:
        """The present state of an image, decoded."""
        image = Image(ctypes.sizeof(Image))
        check(LIBRARY.dnp_step_preview(self._step, index, ctypes.byref(image)))
        return image.array()


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        images, dns_images, plain_images: what was asked for, where n* was sought, and the same with plain guidance.
        negatives: n* of each image.
        told: everything else, by name: ``request``, ``seconds``, ``runs_on``, ``warnings``, …
    """

    images: list[Array]
    dns_images: list[Array]
    plain_images: list[Array]
    negatives: list[str]
    told: dict[str, Any]


class Pipeline:
    """An opened bundle. One request at a time; ``cancel`` may be called by any thread."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._handle = handle

    @classmethod
    def open(cls, bundle: str | Path, **options: Any) -> Pipeline:
        """Open and verify a bundle. The options are those of ``dnp_open``.

        ONNX Runtime is that of the installed package, unless ``onnxruntime`` or the system names another.
        """
        if "onnxruntime" not in options and (found := onnxruntime_library()) is not None:
            options["onnxruntime"] = str(found)
        handle = ctypes.c_void_p()
        check(LIBRARY.dnp_open(str(bundle).encode(), json.dumps(options).encode(), ctypes.byref(handle)))
        return cls(handle)

    @property
    def info(self) -> dict[str, Any]:
        """What was opened."""
        told: dict[str, Any] = json.loads(LIBRARY.dnp_info(self._open))
        return told

    def warm_up(self, *, captioner: bool = True) -> None:
        """Load the graphs now."""
        check(LIBRARY.dnp_warm_up(self._open, int(captioner)))

    def generate(self, prompt: str, progress: Callable[[Step], object] | None = None, **settings: Any) -> Result:
        """Generate images. ``progress`` hears each step; ``False`` stops the work there."""
        return self._run(LIBRARY.dnp_generate, {"prompt": prompt, **settings}, progress)

    def find_negatives(self, prompt: str, progress: Callable[[Step], object] | None = None, **settings: Any) -> Result:
        """Only the diffusion-negative images, and their captions n*."""
        return self._run(LIBRARY.dnp_find_negatives, {"prompt": prompt, **settings}, progress)

    def caption(self, image: Array, **settings: Any) -> str:
        """An image in words."""
        pixels = np.ascontiguousarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise DnpError(2, f"an image is a uint8 array [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        given = Image(ctypes.sizeof(Image), pixels.shape[0], pixels.shape[1], pixels.ctypes.data)
        text = ctypes.c_void_p()
        check(LIBRARY.dnp_caption(self._open, ctypes.byref(given), json.dumps(settings).encode(), ctypes.byref(text)))
        try:
            return ctypes.string_at(text.value or 0).decode()
        finally:
            LIBRARY.dnp_text_free(text)

    def cancel(self) -> None:
        """Stop what is done now; the call that asked for it raises a ``DnpError`` of code 130."""
        LIBRARY.dnp_cancel(self._open)

    def close(self) -> None:
        """Free it. Results live on."""
        if self._handle:
            check(LIBRARY.dnp_close(self._handle))
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise DnpError(1, "this pipeline is closed; open another one")
        return self._handle

    def _run(self, call: Any, settings: dict[str, Any], progress: Callable[[Step], object] | None) -> Result:
        raised: list[BaseException] = []

        def hear(_: object, step: Any) -> int:
            try:  # nothing may be thrown through the library; Ctrl-C comes here too
                return int(progress is not None and progress(Step(step)) is False)
            except BaseException as error:
                raised.append(error)
                return 1

        callbacks = Callbacks(ctypes.sizeof(Callbacks), None, PROGRESS(hear))
        result = ctypes.c_void_p()
        try:
            check(call(self._open, json.dumps(settings).encode(), ctypes.byref(callbacks), ctypes.byref(result)))
        except DnpError:
            if raised:
                raise raised[0] from None
            raise
        try:
            final, dns, plain = ([_image(result, kind, i) for i in range(_count(result, kind))] for kind in range(3))
            told = json.loads(LIBRARY.dnp_result_json(result))
        finally:
            LIBRARY.dnp_result_free(result)
        return Result(final, dns, plain, told["negatives"], told)


def _count(result: ctypes.c_void_p, kind: int) -> int:
    return int(LIBRARY.dnp_result_count(result, kind))


def _image(result: ctypes.c_void_p, kind: int, index: int) -> Array:
    image = Image(ctypes.sizeof(Image))
    check(LIBRARY.dnp_result_image(result, kind, index, ctypes.byref(image)))
    return image.array()


def onnxruntime_library() -> Path | None:
    """The library in the installed package ``onnxruntime`` or ``onnxruntime-gpu``, which is not imported."""
    package = find_spec("onnxruntime")
    places = [] if package is None else list(package.submodule_search_locations or ())
    return next((file for place in places for file in Path(place, "capi").glob("libonnxruntime.so*")), None)
