"""Guidance methods in requests: what is refused, and which prompt goes into which branch."""

from __future__ import annotations

import math

import pytest
from small import small_bundle

from dnp.cli import run
from dnp.engine.bundle.manifest import GuidanceSpec
from dnp.engine.errors import SettingsError
from dnp.runtime.batching.work import sampling
from dnp.runtime.job import resolve
from dnp.runtime.request import Request
from dnp.runtime.sampling.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Small bundles by (roles, methods)."""
    return {
        (roles, methods): small_bundle(
            tmp_path_factory.mktemp("bundle"), guidance=GuidanceSpec(roles, methods=methods, embedded=False)
        )
        for roles, methods in ((2, False), (2, True), (3, True))
    }


def job_of(bundle, **settings):
    return resolve(Request("a star", **settings), bundle, NoiseSchedule())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ((2, False), {"methods": {"perp_neg": 1.0}}, "no guidance methods; export the model again"),
        ((2, True), {"methods": {"perp_neg": 1.0}}, "perp_neg needs a third branch, and this bundle's graph has two"),
        ((3, True), {"methods": {"perp_neg": 1.0}, "dnp": False}, "perp_neg weighs a negative prompt, but DNP is"),
        ((3, True), {"methods": {"perp_ng": 1.0}}, "'perp_ng' is unknown; did you mean 'perp_neg'"),
        ((3, True), {"methods": {"perp_neg": -1.0}}, "perp_neg is -1.0; give a number from 0 up"),
        ((3, True), {"methods": {"norm_cap": -0.5}}, "norm_cap is -0.5; give a number from 0 up"),
        ((3, True), {"methods": {"rescale": 1.5}}, "rescale is 1.5; give a number from 0 to 1"),
        ((3, True), {"methods": {"rescale": math.nan}}, "methods must be numbers by name"),
        ((3, True), {"methods": ["rescale"]}, "methods must be numbers by name"),
    ],
)
def test_what_a_request_cannot_have_is_refused(bundles, kind, settings, message):
    with pytest.raises(SettingsError, match=message):
        job_of(bundles[kind], **settings)


def joined(job):
    """The texts of each role, and the largest role of a row."""
    texts = sampling("final", job, ["a star"], ["a cross"]).texts(0)
    return texts, max(max(roles) for roles in job.final.roles)


def test_perp_neg_leaves_the_first_branch_to_the_empty_prompt(bundles):
    job = job_of(bundles[3, True], methods={"perp_neg": 1.5})
    assert joined(job) == (("", "a star", "a cross"), 2)
    assert not job.dns.perp_neg  # the DNS pass has no negative prompt to weigh


@pytest.mark.parametrize("methods", [{}, {"rescale": 0.7}])
def test_without_it_the_negative_prompt_is_the_first_branch(bundles, methods):
    job = job_of(bundles[3, True], methods=methods)
    assert joined(job) == (("a cross", "a star"), 1)


def test_the_command_line_takes_it_and_passes_the_refusal_on(tmp_path, capsys):
    assert run(["generate", "a star", "--method", "perp_neg=1.0", "--out", str(tmp_path), "--steps", "2"]) == 2
    assert "this bundle's graph has no guidance methods" in capsys.readouterr().err
