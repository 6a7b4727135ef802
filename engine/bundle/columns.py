"""The layout of a sampler table's row, which the ``denoise`` graph reads and the samplers write.

    row = (t, w, E[N], A[N×N], B[N], C[N])        float32, N = SLOTS

``A`` is row-major: ``A[j, k]`` weighs old slot ``k`` in new slot ``j``. ``B`` and ``C`` weigh the network's output
and the fresh noise in each new slot.
"""

from __future__ import annotations

from typing import Final

SLOTS: Final = 4
TIMESTEP: Final = 0
GUIDANCE: Final = 1
INPUT: Final = slice(2, 2 + SLOTS)
STATE: Final = slice(INPUT.stop, INPUT.stop + SLOTS * SLOTS)
OUTPUT: Final = slice(STATE.stop, STATE.stop + SLOTS)
NOISE: Final = slice(OUTPUT.stop, OUTPUT.stop + SLOTS)
ROW: Final = NOISE.stop
