"""Step-level batching: many requests on one set of graphs, which join and leave between steps."""

from dnp.engine.errors import Busy, Cancelled, DeadlineExceeded, Draining
from dnp.runtime.batching.batcher import Batcher, BatchOptions, Status
from dnp.runtime.batching.events import Event, Negatives, Picture, Plain, Progress, Ticket
from dnp.runtime.batching.negatives import NegativeCache

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
