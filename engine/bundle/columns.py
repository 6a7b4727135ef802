"""The columns of a sampler table, which the samplers write and the ``denoise`` graph reads.

One row of a table is one network call of one sample, float32, N = SLOTS::

    (t, embedded, w, v, advance, draw, E[N], A[N×N], B[N], B0[N], C[N], P[N], q, φ, r, η, zero, cap, perp)

    i   = index                                the sample's own row
    x   = Σ_k E_k s_k                          the network's input
    o_k = network(x, t, embedded; role k)      for the roles that the sample has rows of
    o   = o_0 + w (o_1 − o_0) + v (o_2 − o_0)  w > 0: guidance; w < 0: diffusion-negative sampling
    s'  = A s + B o + B0 o_0 + C z[draw]       z: standard normal noise that was made before
    x̂_0 = Σ_k P_k s_k + q o                    the clean latents, as they are expected now
    i'  = i + advance

``A`` is row-major: ``A[j, k]`` weighs old slot ``k`` in new slot ``j``. The last row of every table has ``advance`` 0
and changes nothing, so a sample that is finished, and a place without one, stand still by their own data. The
columns from ``φ`` on are parameters of guidance methods, for graphs that have them, and neutral unless asked for.
"""

from __future__ import annotations

from typing import Final

SLOTS: Final = 4
TIMESTEP: Final = 0  # t
EMBEDDED: Final = 1  # guidance as an input of the network (distilled models), w − 1 as they take it
GUIDANCE: Final = 2  # w, of the prompt's branch
THIRD: Final = 3  # v, of a third branch
ADVANCE: Final = 4  # 1, or 0 in the last row
DRAW: Final = 5  # which of the sample's noises this row uses, from 0
INPUT: Final = slice(6, 6 + SLOTS)  # E
STATE: Final = slice(INPUT.stop, INPUT.stop + SLOTS * SLOTS)  # A
OUTPUT: Final = slice(STATE.stop, STATE.stop + SLOTS)  # B
NEGATIVE_OUTPUT: Final = slice(OUTPUT.stop, OUTPUT.stop + SLOTS)  # B0, of the negative branch alone
NOISE: Final = slice(NEGATIVE_OUTPUT.stop, NEGATIVE_OUTPUT.stop + SLOTS)  # C
CLEAN_STATE: Final = slice(NOISE.stop, NOISE.stop + SLOTS)  # P
CLEAN_OUTPUT: Final = CLEAN_STATE.stop  # q
RESCALE: Final = CLEAN_OUTPUT + 1  # φ, arXiv 2305.08891; 0 changes nothing
NORM_LIMIT: Final = RESCALE + 1  # r, APG, arXiv 2410.02416; 0 is no limit
PARALLEL: Final = NORM_LIMIT + 1  # η, APG; 1 changes nothing
ZERO_STAR: Final = PARALLEL + 1  # 1 for CFG-Zero*, arXiv 2503.18886
NORM_CAP: Final = ZERO_STAR + 1  # the most of ‖o‖ in ‖o_1‖; 0 is no cap
PERPENDICULAR: Final = NORM_CAP + 1  # 1 for Perp-Neg, arXiv 2304.04968
ROW: Final = PERPENDICULAR + 1
