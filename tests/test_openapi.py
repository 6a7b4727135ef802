"""The description at ``/openapi.json``, taken at its word by schemathesis: no fault of the server's, nothing unsaid."""

from __future__ import annotations

import subprocess
import sys

import pytest
from served import serving

from dnp.serving.settings import ServerSettings


def test_what_is_described_is_there(served):
    description = served.get("/openapi.json").json()
    assert {
        "/v1/images/generations", "/v1/images/negatives", "/v1/images/edits", "/v1/captions", "/v1/models",
        "/v1/models/{name}", "/healthz", "/readyz", "/metrics", "/sdapi/v1/txt2img",
    } <= set(description["paths"])  # fmt: skip
    answers = description["paths"]["/v1/images/generations"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "422", "429", "503"} <= set(answers)
    assert "HTTPValidationError" not in description["components"]["schemas"]  # FastAPI's own, which is never sent


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path):
    with serving(ServerSettings(sdapi=True, most_images=1, deadline=2.0)) as served:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--seed", "1",
                "--max-examples", "20", "--rate-limit", "auto", "--generation-database", "none", "--no-color",
                # No schema can say which numbers and words go together.
                "--exclude-checks", "positive_data_acceptance",
            ],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
