"""What must not come in: each with its status, its code, and a sentence that names the value and the remedy."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib

import httpx
import pytest
from PIL import Image
from served import PROMPT, QUICK, serving

from dnp.serving.settings import ServerSettings

JSON = {"Content-Type": "application/json"}
IMAGES, CAPTIONS, NEGATIVES = "/v1/images/generations", "/v1/captions", "/v1/images/negatives"
TXT2IMG = "/sdapi/v1/txt2img"


def body(**fields) -> bytes:
    return json.dumps({"prompt": PROMPT, **fields}).encode()


def raw(text: str) -> bytes:
    return text.encode()


def picture(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A PNG of few bytes that says it is 60000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


# path, body, status, code, param, what the sentence says
BAD = {
    "no body": (IMAGES, b"", 400, "missing_body", None, "empty"),
    "only spaces": (IMAGES, b" \n ", 400, "missing_body", None, "empty"),
    "no JSON": (IMAGES, b"prompt=x", 400, "invalid_json", None, "character 0"),
    "JSON cut off": (IMAGES, b'{"prompt": "x"', 400, "invalid_json", None, "character 14"),
    "two documents": (IMAGES, body() + body(), 400, "invalid_json", None, "Extra data"),
    "no UTF-8": (IMAGES, b'{"prompt": "\xff\xfe"}', 400, "invalid_json", None, "UTF-8 at byte 12"),
    "UTF-16": (IMAGES, '{"prompt": "x"}'.encode("utf-16"), 400, "invalid_json", None, "UTF-8"),
    "a byte order mark": (IMAGES, b"\xef\xbb\xbf" + body(), 400, "invalid_json", None, "BOM"),
    "a list": (IMAGES, b"[]", 400, "invalid_value", None, "an object"),
    "a number": (IMAGES, b"7", 400, "invalid_value", None, "an object, not 7"),
    "null": (IMAGES, b"null", 400, "invalid_value", None, "an object, not None"),
    "NaN": (IMAGES, body(guidance=float("nan")), 400, "invalid_json", None, "NaN"),
    "Infinity": (IMAGES, body(eta=float("inf")), 400, "invalid_json", None, "Infinity"),
    "beyond a float": (IMAGES, raw('{"prompt": "x", "guidance": 1e999}'), 400, "invalid_json", None, "1e999"),
    "a huge integer": (IMAGES, raw('{"prompt": "x", "seed": ' + "9" * 5000 + "}"), 400, "invalid_json", None, "5000"),
    "beyond 64 bits": (IMAGES, body(seed=2**63), 400, "invalid_value", "seed", "less than"),
    "half a surrogate": (IMAGES, raw('{"prompt": "\\ud800"}'), 400, "invalid_unicode", None, "ud800"),
    "half a surrogate as a name": (IMAGES, raw('{"\\udfff": 1}'), 400, "invalid_unicode", None, "udfff"),
    "NUL": (IMAGES, raw('{"prompt": "a\\u0000b"}'), 400, "invalid_unicode", None, "NUL"),
    "deep": (IMAGES, raw('{"prompt": ' + "[" * 50 + "]" * 50 + "}"), 400, "invalid_json", None, "16 deep"),
    "very deep": (IMAGES, raw("[" * 100_000), 400, "invalid_json", None, "16 deep"),
    "twice the same": (IMAGES, raw('{"prompt": "x", "prompt": "y"}'), 400, "duplicate_field", None, "'prompt' twice"),
    "a field too many": (
        IMAGES, body(methods={f"m{i}": 1 for i in range(1001)}), 400, "invalid_json", None, "1000 fields",
    ),
    "fields without end": (IMAGES, body(**{f"a{i}": 1 for i in range(200_000)}), 400, "invalid_json", None, "values"),
    "values without end": (IMAGES, body(guidance=[1] * 100_001), 400, "invalid_json", None, "100000 values"),
    "a field twice among many": (
        IMAGES, raw("{" + "".join(f'"a{i}": 1, ' for i in range(90_000)) + '"z": 1, "z": 1}'), 400, "invalid_json",
        None, "fields",
    ),
    "no prompt": (IMAGES, b"{}", 400, "missing_field", "prompt", "prompt is missing"),
    "prompt null": (IMAGES, body(prompt=None), 400, "missing_field", "prompt", "prompt is missing"),
    "prompt empty": (IMAGES, body(prompt=""), 400, "invalid_value", "prompt", "empty"),
    "prompt of spaces": (IMAGES, body(prompt=" \t"), 400, "invalid_value", "prompt", "empty"),
    "prompt a number": (IMAGES, body(prompt=7), 400, "invalid_value", "prompt", "text, not 7"),
    "prompt a list": (IMAGES, body(prompt=["x"]), 400, "invalid_value", "prompt", "text, not a list"),
    "prompt too long": (IMAGES, body(prompt="x" * 32_001), 400, "invalid_value", "prompt", "32000 characters"),
    "unknown field": (IMAGES, body(guidence=3), 400, "unknown_field", "guidence", "did you mean 'guidance'"),
    "quite unknown": (IMAGES, body(zzzz=3), 400, "unknown_field", "zzzz", "openapi"),
    "n zero": (IMAGES, body(n=0), 400, "invalid_value", "n", "at least 1"),
    "n negative": (IMAGES, body(n=-1), 400, "invalid_value", "n", "at least 1"),
    "n beyond the server's": (IMAGES, body(n=5), 400, "invalid_value", "n", "at most 4"),
    "n huge": (IMAGES, body(n=10**12), 400, "invalid_value", "n", "at most 256"),
    "n false": (IMAGES, body(n=False), 400, "invalid_value", "n", "a whole number, not False"),
    "n text": (IMAGES, body(n="2"), 400, "invalid_value", "n", "a whole number, not '2'"),
    "n a fraction": (IMAGES, body(n=1.5), 400, "invalid_value", "n", "a whole number, not 1.5"),
    "n two ways": (IMAGES, body(n=1, batch_size=2), 400, "invalid_value", None, "n and batch_size"),
    "steps zero": (IMAGES, body(steps=0), 400, "invalid_value", "steps", "steps"),
    "steps by another name": (IMAGES, body(num_inference_steps=-3), 400, "invalid_value", "num_inference_steps", "-3"),
    "steps true": (IMAGES, body(steps=True), 400, "invalid_value", "steps", "a whole number, not True"),
    "steps beyond the table": (IMAGES, body(steps=500), 400, "invalid_value", "steps", "127"),
    "steps huge": (IMAGES, body(steps=10**9), 400, "invalid_value", "steps", "steps"),
    "guidance text": (IMAGES, body(guidance="7"), 400, "invalid_value", "guidance", "a number"),
    "guidance false": (IMAGES, body(cfg_scale=False), 400, "invalid_value", "guidance", "not False"),
    "guidance for other steps": (IMAGES, body(guidance=[1, 2], steps=3), 400, "invalid_value", "guidance", "3"),
    "guidance of a million steps": (IMAGES, body(guidance=[1] * 5000), 400, "invalid_value", "guidance", "1000"),
    "sampler unknown": (IMAGES, body(sampler="ddimm"), 400, "invalid_value", "sampler", "ddim"),
    "eta too large": (IMAGES, body(eta=2), 400, "invalid_value", "eta", "eta"),
    "spacing unknown": (IMAGES, body(spacing="wide"), 400, "invalid_value", "spacing", "leading"),
    "methods without the graph": (IMAGES, body(methods={"rescale": 0.5}), 400, "invalid_value", "methods", "export"),
    "methods a list": (IMAGES, body(methods=[1]), 400, "invalid_value", "methods", "an object"),
    "size of words": (IMAGES, body(size="big"), 400, "invalid_value", "size", "WIDTHxHEIGHT in pixels, or auto"),
    "size of other digits": (IMAGES, body(size="٦٤x٦٤"), 400, "invalid_value", "size", "size"),
    "size not served": (IMAGES, body(size="128x128"), 400, "invalid_value", "size", "64x64"),
    "another not served": (IMAGES, body(width=128, height=64), 400, "invalid_value", "width", "--size 128x64"),
    "size beyond the model": (IMAGES, body(size="512x512"), 400, "invalid_value", "size", "256"),
    "size huge": (IMAGES, body(size="999999x999999"), 400, "invalid_value", "size", "999999"),
    "size zero": (IMAGES, body(size="0x64"), 400, "invalid_value", "size", "0x64"),
    "size two ways": (IMAGES, body(size="64x64", width=128), 400, "invalid_value", "size", "128"),
    "width odd": (IMAGES, body(width=63), 400, "invalid_value", "width", "63"),
    "seed negative": (IMAGES, body(seed=-2), 400, "invalid_value", "seed", "seed"),
    "model unknown": (IMAGES, body(model="flux"), 404, "model_not_found", "model", "dnp-tiny"),
    "model a number": (IMAGES, body(model=3), 400, "invalid_value", "model", "text"),
    "url": (IMAGES, body(response_format="url"), 400, "unsupported_value", "response_format", "b64_json"),
    "response format": (IMAGES, body(response_format="file"), 400, "invalid_value", "response_format", "'b64_json'"),
    "gif": (IMAGES, body(output_format="gif"), 400, "unsupported_value", "output_format", "png"),
    "tiff": (IMAGES, body(output_format="tiff"), 400, "invalid_value", "output_format", "'webp'"),
    "quality of 101": (IMAGES, body(output_compression=101), 400, "invalid_value", "output_compression", "at most 100"),
    "transparent": (IMAGES, body(background="transparent"), 400, "unsupported_value", "background", "opaque"),
    "four partial images": (IMAGES, body(partial_images=4), 400, "invalid_value", "partial_images", "at most 3"),
    "stream a word": (IMAGES, body(stream="yes"), 400, "invalid_value", "stream", "true or false"),
    "show nothing known": (IMAGES, body(show=["final"]), 400, "invalid_value", "show", "'dns'"),
    "deadline zero": (IMAGES, body(deadline=0), 400, "invalid_value", "deadline", "more than 0"),
    "priority huge": (IMAGES, body(priority=10**6), 400, "invalid_value", "priority", "at most 100"),
    "n* without DNP": (IMAGES, body(negative_prompt="x", dnp=False), 400, "invalid_value", "negative_prompt", "drop"),
    "too many windows": (IMAGES, body(windows=9), 400, "invalid_value", "windows", "windows"),
    "windows not served": (IMAGES, body(windows=2), 400, "invalid_value", "windows", "--windows"),
    "beams": (IMAGES, body(beams=1000), 400, "invalid_value", "beams", "1 to"),
    "prefix too long": (IMAGES, body(prefix="word " * 60), 400, "invalid_value", "prefix", "shorten"),
    "DNS of one's own n*": (NEGATIVES, body(negative_prompt="x"), 400, "unknown_field", "negative_prompt", "no field"),
    "no image": (CAPTIONS, b"{}", 400, "missing_field", "image", "image"),
    "no images": (CAPTIONS, raw('{"images": []}'), 400, "invalid_value", "images", "empty"),
    "no base64": (CAPTIONS, raw('{"image": "###"}'), 400, "invalid_image", "image", "base64"),
    "no picture": (CAPTIONS, raw('{"image": "aGVsbG8="}'), 400, "invalid_image", "image", "PNG"),
    "a link": (CAPTIONS, raw('{"image": "http://127.0.0.1/x"}'), 400, "invalid_image", "image", "fetches nothing"),
    "a file": (CAPTIONS, raw('{"image": "file:///etc/passwd"}'), 400, "invalid_image", "image", "fetches nothing"),
    "a bomb": (CAPTIONS, json.dumps({"image": bomb()}).encode(), 400, "invalid_image", "image", "60000"),
    "half a picture": (
        CAPTIONS, json.dumps({"image": picture(Image.effect_noise((64, 64), 9))[:400]}).encode(), 400, "invalid_image",
        "image", "read",
    ),
    "16 bits": (
        CAPTIONS, json.dumps({"image": picture(Image.new("I;16", (8, 8)))}).encode(), 400, "invalid_image", "image",
        "RGB",
    ),
    "edits": ("/v1/images/edits", body(), 400, "unsupported", None, "generations"),
    "txt2img without": (TXT2IMG, b"{}", 400, "missing_field", "prompt", "prompt"),
    "txt2img larger later": (TXT2IMG, body(enable_hr=True), 400, "unsupported_value", "enable_hr", "enable_hr"),
    "txt2img too many": (TXT2IMG, body(batch_size=2, n_iter=3), 400, "invalid_value", "batch_size", "6"),
    "txt2img sampler": (TXT2IMG, body(sampler_name="Restart"), 400, "invalid_value", "sampler_name", "Restart"),
    "txt2img schedule": (
        TXT2IMG, body(sampler_name="Euler", scheduler="Karras"), 400, "unsupported_value", "scheduler", "Karras"
    ),
    "txt2img model": (
        TXT2IMG, body(override_settings={"sd_model_checkpoint": 7}), 400, "invalid_value", "override_settings", "text"
    ),
    "no such path": ("/v1/images/variations", body(), 404, "not_found", None, "openapi"),
    "out of the page": ("/../../etc/passwd", b"", 404, "not_found", None, "/etc/passwd"),
}  # fmt: skip


@pytest.fixture(scope="module")
def http(served):
    return served.http


def refused(answer: httpx.Response, status: int, code: str, param: str | None, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert words in error["message"], error["message"]
    assert len(error["message"]) < 400 and answer.headers["x-request-id"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input(http, name):
    path, content, status, code, param, words = BAD[name]
    refused(http.post(path, content=content, headers=JSON), status, code, param, words)


@pytest.mark.parametrize(
    "media", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_is_not_sent_as_json(http, media):
    """Also what a page of another origin could send without asking."""
    headers = {"Content-Type": media} if media else {}
    refused(http.post(IMAGES, content=body(), headers=headers), 415, "unsupported_media_type", None, "application/json")


def test_a_method_that_there_is_not(http):
    refused(http.get(IMAGES), 405, "method_not_allowed", None, "GET")
    refused(http.delete("/v1/models"), 405, "method_not_allowed", None, "DELETE")


def test_a_body_that_is_too_large():
    """Whether its length is told or not."""
    with serving(ServerSettings(body_limit=1000), warm=False) as served:
        large = body(prompt="x" * 2000)
        for content in (large, (part for part in [large[:900], large[900:]])):
            answer = served.http.post(IMAGES, content=content, headers=JSON)
            refused(answer, 413, "body_too_large", None, "0.001 MB")


def test_a_flood():
    """Requests beyond the limit are refused before they are read; the others go on."""
    with serving(ServerSettings(most_active=2), warm=False) as served:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        with (
            socket.create_connection(("127.0.0.1", served.port)) as one,
            socket.create_connection(("127.0.0.1", served.port)) as two,
        ):
            for connection in (one, two):
                connection.sendall(head.encode())
            served.until(lambda: served.service.active == 2)
            answer = served.post(IMAGES, QUICK)
            refused(answer, 429, "too_many_requests", None, "2 requests")
            assert answer.headers["retry-after"] == "1"
        served.until(lambda: served.service.active == 0)
        assert served.post(IMAGES, QUICK).status_code == 503  # it is not warm


def test_a_body_that_does_not_come():
    with serving(ServerSettings(body_seconds=0.05), warm=False) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            headers = "Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 99"
            connection.sendall(f"POST {IMAGES} HTTP/1.1\r\n{headers}\r\n\r\n{{".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_too_slow" in answer


@pytest.mark.parametrize(
    "lines",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000,
    ],
)
def test_what_is_no_http(served, lines):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(lines)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert served.get("/healthz").status_code == 200


def test_nothing_of_it_stays(http, served):
    """After all of that the server does what it did before."""
    assert http.post(IMAGES, json=QUICK).status_code == 200
    served.until(lambda: served.service.active == 0 and served.engine.status.requests == 0)
