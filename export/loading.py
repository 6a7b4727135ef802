"""What transformers and diffusers load, with all that they warn of taken for an error: PyTorch would be as wrong."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError

_LIBRARIES = ("diffusers", "transformers", "peft")

# Tensors that a file may hold and the model may ignore: counters, and the half of CLIP that sees images.
_UNUSED = re.compile(r"(^|\.)position_ids$|^(vision_model|visual_projection|text_projection|logit_scale)\b")

# Warnings that say nothing of the numbers, or what the loading report says, too.
_HARMLESS = re.compile(
    r"LOAD REPORT|^Some weights of |deprecated|requires torchvision|low cpu memory usage"
    r"|must be `None` or an integer within the vocabulary|Ignoring clean_up_tokenization_spaces|so we will NOT"
    r"|has generative capabilities|loss_type=|Token indices sequence length"
)

_OF_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)


@contextmanager
def warnings_refused(place: Path) -> Iterator[None]:
    """Raises ExportError at the end when a library has warned meanwhile of what lies in ``place``, the first warning.

    Nothing reaches stderr. Warnings of old ways to call something are none of the user's.
    """
    heard = _Listener()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [heard], False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    told = heard.messages + [str(one.message) for one in caught if not issubclass(one.category, _OF_CODE)]
    if harmful := [message for message in told if not _HARMLESS.search(message)]:
        raise ExportError(f"{place} is not what the libraries expect, so it is not exported: {harmful[0].strip()}")


def load_model(kind: Any, folder: Path, **options: Any) -> Any:
    """``kind.from_pretrained(folder)``, from safetensors alone, with every weight of the model and no other.

    Raises ExportError for weights that are missing, of another shape, not known to the model, or not finite.
    """
    try:
        with warnings_refused(folder):
            model, report = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    except ExportError:
        raise
    except Exception as error:  # whatever diffusers, transformers and safetensors find wrong with a folder
        raise ExportError(f"the weights in {folder} cannot be loaded: {error}") from error
    unknown = [key for key in report["unexpected_keys"] if not _UNUSED.search(key)]
    shapes = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for keys, fault in (
        (report["missing_keys"], "lacks {} weights of the model"),
        (shapes, "has {} weights of another shape than its config.json says"),
        (unknown, "has {} weights that the model of its config.json has not"),
    ):
        if keys:
            raise ExportError(f"{folder} {fault.format(len(keys))}, {min(keys)} among them")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ExportError(
                f"{folder}: the weight {name} holds NaN or infinity, whatever the precision; get it again"
            )
    return model.eval().requires_grad_(False)


class _Listener(logging.Handler):
    """Keeps the messages of what is at least a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message, without the codes that colour it."""
        self.messages.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))
