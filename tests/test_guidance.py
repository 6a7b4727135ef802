"""The guidance methods of the step graph against diffusers' own guiders, and against the formulas where it has none."""

from __future__ import annotations

import diffusers.guiders as guiders
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from dnp.engine.bundle import columns
from dnp.export.families.guidance import combine

W = 4.5
NEUTRAL = {columns.PARALLEL: 1.0}


@pytest.fixture(scope="module")
def outputs():
    """o_0, o_1, o_2 of two places, alike as a network's are, and of a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 8, 6, generator=generator) + 0.3
    return [base + 0.5 * torch.randn(base.shape, generator=generator) for _ in range(3)]


def rows(w=W, **of_columns):
    row = torch.zeros(2, columns.ROW)
    for column, value in {columns.GUIDANCE: w, **NEUTRAL}.items():
        row[:, column] = value
    for name, value in of_columns.items():
        row[:, getattr(columns, name)] = value
    return row


def guided(outputs, w=W, **of_columns):
    return combine(outputs, rows(w, **of_columns), methods=True).double()


def by_guider(guider, outputs):
    """What a guider of diffusers gives in the middle of a run; two predictions, in its order."""
    guider.set_state(step=2, num_inference_steps=5, timestep=torch.tensor(500))
    return guider.forward(outputs[1].double(), outputs[0].double()).pred


@pytest.mark.parametrize("w", [-3.0, 0.0, 1.0, 7.5])
def test_neutral_columns_give_plain_guidance(outputs, w):
    plain = by_guider(guiders.ClassifierFreeGuidance(w), outputs) if w not in (0, 1) else outputs[int(w)].double()
    for methods in (False, True):
        found = combine(outputs[:2], rows(w), methods=methods)
        torch.testing.assert_close(found.double(), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescale_is_diffusers(outputs, share):
    theirs = by_guider(guiders.ClassifierFreeGuidance(W, share), outputs)
    torch.testing.assert_close(guided(outputs[:2], RESCALE=share), theirs, atol=1e-5, rtol=0)
    assert (theirs - by_guider(guiders.ClassifierFreeGuidance(W), outputs)).abs().max() > 0.1


@pytest.mark.parametrize("limit", [0.0, 2.0, 1e6])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_projected_guidance_is_diffusers(outputs, limit, eta):
    guider = guiders.AdaptiveProjectedGuidance(
        W, adaptive_projected_guidance_rescale=limit, eta=eta, adaptive_projected_guidance_momentum=None
    )
    found = guided(outputs[:2], NORM_LIMIT=limit, PARALLEL=eta)
    torch.testing.assert_close(found, by_guider(guider, outputs), atol=1e-5, rtol=0)


def test_zero_star_is_diffusers(outputs):
    theirs = by_guider(guiders.ClassifierFreeZeroStarGuidance(W), outputs)
    torch.testing.assert_close(guided(outputs[:2], ZERO_STAR=1.0), theirs, atol=1e-5, rtol=0)
    assert (theirs - guided(outputs[:2])).abs().max() > 0.1


@pytest.mark.parametrize("cap", [0.5, 1.0, 100.0])
def test_the_norm_cap_is_that_of_z_image(outputs, cap):
    """``cfg_normalization`` of diffusers' ZImagePipeline, sample by sample."""
    found = guided(outputs[:2], NORM_CAP=cap)
    for negative, prompt, result in zip(outputs[0], outputs[1], found, strict=True):
        pred = prompt + (W - 1) * (prompt - negative)
        most = torch.linalg.vector_norm(prompt) * cap
        norm = torch.linalg.vector_norm(pred)
        expected = pred * (most / norm) if norm > most else pred
        torch.testing.assert_close(result, expected.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_perp_neg_is_its_formula(outputs, scale):
    """Arxiv 2304.04968: o_∅ + w (p − s (n − ⟨n, p⟩/‖p‖² p)), with p and n of the prompts less ∅; here ∅ is role 0."""
    found = guided(outputs, THIRD=-W * scale, PERPENDICULAR=1.0)
    for empty, positive, negative, result in zip(*(o.double() for o in outputs), found, strict=True):
        p, n = positive - empty, negative - empty
        perpendicular = n - (n * p).sum() / torch.linalg.vector_norm(p) ** 2 * p
        torch.testing.assert_close(result, empty + W * (p - scale * perpendicular), atol=1e-5, rtol=0)


@pytest.mark.parametrize("methods", [False, True])
def test_a_third_prompt_is_added_with_a_weight_of_its_own(outputs, methods):
    found = combine(outputs, rows(THIRD=-2.0), methods=methods)
    o_0, o_1, o_2 = outputs
    torch.testing.assert_close(found, o_0 + W * (o_1 - o_0) - 2 * (o_2 - o_0), atol=1e-5, rtol=0)


def test_methods_together_are_taken_in_diffusers_order(outputs):
    projected = guiders.AdaptiveProjectedGuidance(
        W, adaptive_projected_guidance_rescale=3.0, eta=0.2, guidance_rescale=0.6,
        adaptive_projected_guidance_momentum=None,
    )  # fmt: skip
    found = guided(outputs[:2], NORM_LIMIT=3.0, PARALLEL=0.2, RESCALE=0.6)
    torch.testing.assert_close(found, by_guider(projected, outputs), atol=1e-5, rtol=0)
    assert (found - rescale_noise_cfg(outputs[1], outputs[1], 0.6)).abs().max() > 0.1


@pytest.mark.parametrize("columns_", [{}, {"RESCALE": 0.7, "NORM_LIMIT": 1.0, "ZERO_STAR": 1.0, "NORM_CAP": 1.0}])
def test_outputs_that_are_equal_or_zero_stay_numbers(outputs, columns_):
    """As of a place with one row, or of one that stands still."""
    same = [outputs[0], outputs[0], outputs[0]]
    torch.testing.assert_close(guided(same, PERPENDICULAR=1.0, **columns_), outputs[0].double(), atol=1e-5, rtol=0)
    still = [torch.zeros_like(outputs[0])] * 3
    assert (guided(still, PERPENDICULAR=1.0, **columns_) == 0).all()
