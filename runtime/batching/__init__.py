"""Step-level batching: many requests on one set of graphs, which join and leave between steps."""

from dnp.engine.errors import Busy, Cancelled, DeadlineExceeded, Draining
from dnp.runtime.batching.batcher import Batcher
from dnp.runtime.batching.events import Event, Negatives, Picture, Plain, Progress, Ticket
from dnp.runtime.batching.negatives import NegativeCache
from dnp.runtime.batching.options import BatchOptions
from dnp.runtime.batching.status import Status

__all__ = [
    "BatchOptions",
    "Batcher",
    "Busy",
    "Cancelled",
    "DeadlineExceeded",
    "Draining",
    "Event",
    "NegativeCache",
    "Negatives",
    "Picture",
    "Plain",
    "Progress",
    "Status",
    "Ticket",
]
