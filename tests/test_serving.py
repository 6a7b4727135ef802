"""The server as its clients see it: the official client, streams, the page's fields, keys, health, the end."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from served import PROMPT, QUICK, SLOW, serving

from dnp import Pipeline
from dnp.runtime.batching import BatchOptions
from dnp.serving import logs
from dnp.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def alone():
    """What the settings give by themselves."""
    with Pipeline.open(threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream, whose names are those of their types."""
    found = []
    for block in response.text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            data = json.loads(lines[1].removeprefix("data: "))
            assert lines[0] == f"event: {data.get('type', 'error')}"
            found.append(data)
    return found


def test_the_official_client_generates(client, alone):
    """Its answer is of its own types, and the image is the one that Python gives."""
    answer = client.images.generate(
        model="dall-e-2", prompt=PROMPT, n=2, size="64x64", response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 3, "dns_steps": 3, "guidance_scale": 2.0},
    )  # fmt: skip
    result = alone(PROMPT, seed=7, images=2, steps=3, dns_steps=3, guidance=2.0)
    for image, array in zip(answer.data, result.arrays, strict=True):
        np.testing.assert_array_equal(pixels(image.b64_json), array)
    assert [image.negative_prompt for image in answer.data] == result.negatives
    assert [image.seed for image in answer.data] == [7, 8]
    assert answer.size == "64x64" and answer.output_format == "png" and answer.usage.total_tokens > 0
    assert answer.request == result.request.to_dict()


def test_the_official_client_streams(client, alone):
    """Partial pictures of the final pass, then each image; nothing that the client does not know."""
    stream = client.images.generate(
        prompt=PROMPT, n=2, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 6, "dns_steps": 2}
    )
    seen = list(stream)
    partial = [event for event in seen if event.type == "image_generation.partial_image"]
    completed = [event for event in seen if event.type == "image_generation.completed"]
    assert partial + completed == seen
    assert sorted((event.index, event.partial_image_index) for event in partial) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {event.phase for event in partial} == {"final"}
    result = alone(PROMPT, seed=7, images=2, steps=6, dns_steps=2)
    for event, array in zip(completed, result.arrays, strict=True):
        np.testing.assert_array_equal(pixels(event.b64_json), array)
    assert all(pixels(event.b64_json).shape == (64, 64, 3) for event in partial)


def test_the_official_client_lists_models(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "dnp-tiny" and {"gpt-image-1", "dall-e-2", "dall-e-3"} < set(names)
    assert client.models.retrieve("dall-e-3").root == "dnp-tiny"
    assert client.models.retrieve("dnp-tiny").dnp["company"] == 0  # on a processor each image is made by itself
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("midjourney")
    assert caught.value.code == "model_not_found" and "dnp-tiny" in str(caught.value)


def test_the_official_client_understands_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 0})
    error = caught.value
    assert (error.code, error.param, error.type) == ("invalid_value", "num_inference_steps", "invalid_request_error")
    assert "steps" in str(error) and error.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=b"bytes", prompt=PROMPT)
    assert caught.value.code == "unsupported"


def test_the_official_client_hears_of_a_failure_in_a_stream(client):
    """What cannot be made is known only when the stream has begun."""
    stream = client.images.generate(prompt=PROMPT, stream=True, extra_body={"guidance": 1e38, "dnp": False, "steps": 8})
    with pytest.raises(openai.APIError, match="no longer finite"):
        list(stream)


def test_the_official_client_comes_again_when_the_queue_is_full(alone, go_on):
    """It is told when, waits, and is answered."""
    path, long = "/v1/images/generations", {**SLOW, "steps": 120, "n": 4, "stream": True}
    with (
        serving(batching=BatchOptions(samples=1, queue=1)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=5) as client,
        ThreadPoolExecutor() as pool,
    ):
        with served.http.stream("POST", path, json=long):
            served.until(lambda: served.engine.status.requests == 1)
            with served.http.stream("POST", path, json=long):
                full = served.http.post(path, json=QUICK)
                assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
                assert 1 <= int(full.headers["retry-after"]) <= 120
                settings = {"seed": 3, "steps": 2, "dns_steps": 2}
                coming = pool.submit(client.images.generate, prompt=PROMPT, extra_body=settings)
                served.until(lambda: served.engine.status.failures["Busy"] >= 2)
        go_on()
        answer = coming.result()
    np.testing.assert_array_equal(
        pixels(answer.data[0].b64_json), alone(PROMPT, seed=3, steps=2, dns_steps=2).arrays[0]
    )


def test_a_stream_with_progress_tells_everything(served, alone):
    body = {**QUICK, "stream": True, "progress": True, "partial_images": 1, "compare": True, "show": ["dns", "plain"]}
    seen = events(served.post("/v1/images/generations", body))
    result = alone(PROMPT, seed=3, steps=2, dns_steps=2, compare=True)
    by_type = {}
    for event in seen:
        by_type.setdefault(event["type"].removeprefix("image_generation."), []).append(event)
    phases = [event["phase"] for event in by_type["progress"]]
    assert list(dict.fromkeys(phases)) == ["dns", "caption", "plain", "final"]
    assert all(1 <= event["step"] <= event["steps"] for event in by_type["progress"])
    assert {event["phase"] for event in by_type["partial_image"]} == {"dns", "plain", "final"}
    (negative,) = by_type["negative"]
    assert negative["negative_prompt"] == result.negatives[0] and negative["seed"] == 3
    np.testing.assert_array_equal(pixels(negative["b64_json"]), result.dns_arrays[0])
    np.testing.assert_array_equal(pixels(by_type["plain"][0]["b64_json"]), result.plain_arrays[0])
    (completed,) = by_type["completed"]
    assert seen[-1] == completed
    for key, array in (("dns_image", result.dns_arrays), ("plain_image", result.plain_arrays)):
        np.testing.assert_array_equal(pixels(completed[key]["b64_json"]), array[0])


def test_a_picture_carries_its_settings(served, tmp_path, capsys):
    """``dnp generate --from-image`` makes it again, to the byte."""
    from dnp.cli import run

    answer = served.post("/v1/images/generations", QUICK).json()
    (tmp_path / "picture.png").write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    command = ["generate", "--from-image", str(tmp_path / "picture.png"), "--out", str(tmp_path / "out")]
    assert run([*command, "--threads", "1"]) == 0
    (made,) = (tmp_path / "out").glob("*-dnp.png")
    assert made.read_bytes() == (tmp_path / "picture.png").read_bytes()


@pytest.mark.parametrize(("form", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(served, form, kind):
    answers = [
        served.post("/v1/images/generations", {**QUICK, "output_format": form, "output_compression": quality}).json()
        for quality in (20, 95)
    ]
    files = [base64.b64decode(answer["data"][0]["b64_json"]) for answer in answers]
    assert {Image.open(io.BytesIO(file)).format for file in files} == {kind}
    assert (len(files[0]) < len(files[1])) == (form != "png")


def test_a_negative_prompt_of_ones_own_skips_dns(served, alone):
    answer = served.post("/v1/images/generations", {**QUICK, "negative_prompt": "a small circle"}).json()
    result = alone(PROMPT, seed=3, steps=2, negative="a small circle")
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), result.arrays[0])
    assert "dns" not in answer["timings"] and answer["data"][0]["negative_prompt"] == "a small circle"
    plain = served.post("/v1/images/generations", {**QUICK, "negative_prompt": ""}).json()
    np.testing.assert_array_equal(
        pixels(plain["data"][0]["b64_json"]), alone(PROMPT, seed=3, steps=2, dnp=False).arrays[0]
    )


def test_negatives_alone(served, alone):
    body = {"prompt": PROMPT, "dns_steps": 2, "seed": 5, "n": 2, "dns_seed": 9}
    answer = served.post("/v1/images/negatives", body).json()
    result = alone.dns(PROMPT, dns_steps=2, seed=5, images=2, dns_seed=9)
    assert [image["negative_prompt"] for image in answer["data"]] == result.negatives
    assert [image["seed"] for image in answer["data"]] == [9, 10]
    for image, array in zip(answer["data"], result.arrays, strict=True):
        np.testing.assert_array_equal(pixels(image["b64_json"]), array)
    streamed = events(served.post("/v1/images/negatives", {**body, "stream": True, "partial_images": 1}))
    assert [event["type"].rpartition(".")[2] for event in streamed] == ["partial_image"] * 2 + ["completed"] * 2


def test_captions(served, alone):
    image = alone.dns(PROMPT, dns_steps=4, seed=1).images[0]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    answer = served.post("/v1/captions", {"image": text, "images": [f"data:image/png;base64,{text}"], "beams": 2})
    assert [entry["text"] for entry in answer.json()["data"]] == alone.caption([image], beams=2) * 2


def test_a_seed_of_nobodys_choice_is_told_and_another_each_time(served):
    answers = [served.post("/v1/images/generations", {**QUICK, "seed": seed}).json() for seed in (None, -1, 0)]
    seeds = [answer["data"][0]["seed"] for answer in answers]
    assert len(set(seeds)) == 3 and seeds[2] == 0 and all(0 <= seed < 2**32 for seed in seeds)
    assert [answer["request"]["seed"] for answer in answers] == seeds


def test_what_the_model_does_not_read_is_told(served):
    answer = served.post("/v1/images/generations", {**QUICK, "prompt": "a circle " * 100}).json()
    (warning,) = answer["warnings"]
    assert warning["param"] == "prompt" and "circle" in warning["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_forgotten(served, stream):
    """Within a step: its place is free, and the request is counted as cancelled."""
    before = served.engine.status.failures.get("Cancelled", 0)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        data = json.dumps({**SLOW, "n": 4, "stream": stream}).encode()
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
        )  # fmt: skip
        served.until(lambda: served.engine.status.running)
    served.until(lambda: served.engine.status.failures.get("Cancelled", 0) > before)
    served.until(lambda: not served.service.active)


def test_a_client_that_goes_away_before_its_body_is_there_is_no_error(served, caplog):
    caplog.set_level(logging.INFO, "dnp.serving")
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\nX-Request-Id: left-early\r\n\r\n{")
        served.until(lambda: served.service.active)

    def told():
        return [r.fields for r in caplog.records if getattr(r, "fields", {}).get("id") == "left-early"]

    served.until(told)
    assert told()[0]["cause"] == "client_closed_request"


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/openapi.json"])
def test_what_can_be_got_can_be_asked_for_its_head_alone(served, path):
    """As probes and proxies do."""
    head, whole = served.http.head(path), served.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_deadline_ends_a_request(served):
    for options in (
        {"json": {**SLOW, "deadline": 0.02}},
        {"json": SLOW, "headers": {"x-stainless-read-timeout": "0.02"}},
    ):
        answer = served.http.post("/v1/images/generations", **options)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"


def test_a_stream_with_nothing_to_say_stays_alive():
    with serving(ServerSettings(keep_alive=0.01)) as served:
        text = served.post("/v1/images/generations", {**SLOW, "stream": True}).text
    assert ": still here\n\n" in text and "completed" in text


def test_requests_have_ids(served):
    assert served.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = [
        served.get("/healthz", headers={"x-request-id": odd}).headers["x-request-id"] for odd in ("", "a b", b"\xe4")
    ]
    assert len(set(ids)) == 3 and all(len(number) == 24 for number in ids)


def test_keys():
    """Every path of the API asks for one; health, metrics and the page do not."""
    with serving(ServerSettings(keys=("first-key-1", "second-key-2"), sdapi=True)) as served:
        body = json.dumps(QUICK).encode()
        for path in ("/v1/models", "/sdapi/v1/options"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic !"},
                {"Authorization": "x"},
            ):
                answer = served.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), headers
                assert "www-authenticate" in answer.headers
            assert served.get(path, headers={"Authorization": "Bearer second-key-2"}).status_code == 200
        basic = base64.b64encode(b"anybody:first-key-1").decode()
        assert served.get("/sdapi/v1/options", headers={"Authorization": f"Basic {basic}"}).status_code == 200
        assert served.http.post("/v1/images/generations", content=body).status_code == 401
        assert [served.get(path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 200]


def test_health_before_and_after_the_warm_up():
    with serving(warm=False) as served:
        assert served.get("/healthz").status_code == 200
        answer = served.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "warming")
        early = served.post("/v1/images/generations", QUICK)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "starting")
        assert int(early.headers["retry-after"]) > 0
        served.engine.warm_up()
        answer = served.get("/readyz")
        assert answer.status_code == 200 and "ONNX Runtime" in answer.json()["models"]["dnp-tiny"]["runs_on"]
        served.service.settings = ServerSettings(stall_seconds=-1)


def test_an_engine_that_stands_still_is_not_healthy():
    with serving(ServerSettings(stall_seconds=-1)) as served:
        answer = served.get("/healthz")
        assert (answer.status_code, answer.json()["stalled"]) == (503, ["dnp-tiny"])


def test_metrics_count(served):
    from prometheus_client.parser import text_string_to_metric_families

    def values():
        families = text_string_to_metric_families(served.get("/metrics").text)
        return {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}

    model = ("model", "dnp-tiny")
    before = values()
    served.post("/v1/images/generations", {**QUICK, "n": 2, "seed": 99})
    served.post("/v1/images/generations", {"prompt": ""})
    after = values()

    def grown(*key):
        return after[key] - before.get(key, 0)

    path = ("endpoint", "/v1/images/generations")
    assert grown("dnp_images_total", model) == 2
    assert (
        grown("dnp_requests_total", path, ("status", "200"))
        == grown("dnp_requests_total", path, ("status", "400"))
        == 1
    )
    assert grown("dnp_requests_failed_total", ("cause", "invalid_value")) == 1
    assert grown("dnp_request_latency_seconds_count", model) == 1
    assert grown("dnp_steps_total", model) >= 4
    assert grown("dnp_denoise_step_latency_seconds_count", model) == grown("dnp_steps_total", model)
    assert all(PROMPT not in str(key) for key in after)


def test_other_origins_are_let_in_only_where_it_is_said(served):
    asks = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    closed = served.http.options("/v1/images/generations", headers=asks)
    assert closed.status_code == 204 and "access-control-allow-origin" not in closed.headers
    with serving(ServerSettings(origins=("https://example.com",)), warm=False) as open_one:
        path, http = "/v1/images/generations", open_one.http
        assert http.options(path, headers=asks).headers["access-control-allow-origin"] == "https://example.com"
        other = http.options(path, headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert http.options(path).status_code == 204


def test_the_program_of_the_page_about_serving(served, capsys):
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert "http://127.0.0.1:8000" in program
    names = {}
    exec(compile(program.replace("http://127.0.0.1:8000", served.url), "docs/serving.md", "exec"), names)
    names["client"].close()  # or its connection is found open by whichever test runs when it is collected
    assert capsys.readouterr().out.count("image_generation.") == 3


def test_a_slow_reader_loses_what_is_stale_and_nothing_else():
    """What waits for it is bounded, and what it asked for is kept."""
    from dnp.runtime.batching import Negatives, Picture, Plain, Progress, Ticket
    from dnp.serving.engines import _WAITING, Mailbox

    kept = [Negatives(np.zeros((1, 2, 2, 3), np.uint8), ["n*"]), Plain(np.zeros((1, 2, 2, 3), np.uint8)), Ticket()]

    async def scenario():
        box = Mailbox(asyncio.get_running_loop())
        for event in kept:
            for index in range(50):
                box.hear(Progress("final", index, 50))
                box.hear(Picture("final", index, 0, np.zeros((2, 2, 3), np.uint8)))
            box.hear(event)
        await asyncio.sleep(0)
        return [await box.next() for _ in range(_WAITING + len(kept))]

    seen = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert [event for event in seen if isinstance(event, Negatives | Plain | Ticket)] == kept
    assert isinstance(seen[-2], Picture) and seen[-2].index == 49  # the newest ones stay


def test_nobody_is_woken_for_what_nobody_hears(served, monkeypatch):
    """Each step would wake the loop, of a server whose other clients are answered by it."""
    from dnp.serving.engines import Mailbox

    heard, hear = [], Mailbox.hear
    monkeypatch.setattr(Mailbox, "hear", lambda box, event: (heard.append(event), hear(box, event)))
    assert served.post("/v1/images/generations", QUICK).status_code == 200
    assert len(heard) == 1  # the end
    assert served.post("/v1/images/generations", {**QUICK, "stream": True}).status_code == 200
    assert len(heard) > 5


def test_the_log_is_one_line_for_each_request_whatever_a_client_sends():
    """No prompt, no second line, nothing that a terminal would obey."""
    for formatter in (logs.Json(), logs.Text()):
        record = logging.LogRecord("dnp.serving", logging.INFO, "", 0, "request", (), None)
        record.fields = {"path": "/v1\n\x1b[31m/x", "seconds": 0.5, "status": 404}
        line = formatter.format(record)
        assert "\n" not in line and "\x1b" not in line and "404" in line


def test_the_page_is_served_and_kept_to_itself(served):
    """Every file that it names is there, with a type that a browser takes; it may load nothing from elsewhere."""
    page = served.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    names = set(re.findall(r'(?:src|href)="\./([\w-]+\.(?:js|css|svg))"', page.text))
    assert names
    for name in names:
        answer = served.get(f"/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].split(";")[0] in ("text/javascript", "text/css", "image/svg+xml")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert served.get("/__init__.py").status_code == served.get("/docs").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_servers_says_nothing_of_what_was_asked(served, monkeypatch, caplog, stream):
    """Neither to the client nor in the log, and the server goes on; the id leads to the place in the code."""

    def fail(*_):
        raise RuntimeError(f"cannot do {PROMPT}")

    with monkeypatch.context() as broken:
        broken.setattr(served.engine, "tokens" if stream else "resolve", fail)
        try:
            answer = served.post("/v1/images/generations", {**QUICK, "stream": stream})
        except httpx.RemoteProtocolError:  # a stream that was begun ends in the middle
            assert stream
        else:
            assert not stream and answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error" and PROMPT not in answer.text
            assert answer.headers["x-request-id"]

    def told():
        return [r for r in caplog.records if r.name == "dnp.serving" and r.levelname == "ERROR"]

    served.until(told)  # the answer is there before the line
    (record,) = told()
    for formatter in (logs.Json(), logs.Text()):
        line = formatter.format(record)
        assert "RuntimeError" in line and "test_serving.py" in line
        assert PROMPT not in line and "\n" not in line
    assert PROMPT in logs.Json(prompts=True).format(record)
    assert served.post("/v1/images/generations", QUICK).status_code == 200
