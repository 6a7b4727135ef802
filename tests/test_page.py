"""The page of the server in Chromium: what a person sees and does, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import base64
import io
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from served import LONG, serving

from dnp import Pipeline, Request
from dnp.runtime.batching import BatchOptions
from dnp.runtime.pictures import read_settings
from dnp.serving.settings import ServerSettings

pytestmark = pytest.mark.slow

PROMPT = "a large blue cross on a plain red background"
QUICK = {"seed": 3, "steps": 4, "dns_steps": 3}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
WIDE = {"viewport": {"width": 1440, "height": 900}}

expect.set_options(timeout=120_000)  # milliseconds, for machines that are busy


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def pipeline():
    with Pipeline.open(threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("NOBODY LOOKED AT THE PAGE: there is no chromium here; install it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Opens the page in a tab of its own. Whatever breaks in it, its policy forbids, or comes from elsewhere, fails."""
    troubles, contexts = [], []

    def opened(url=server.url, **options):
        context = chromium.new_context(**(options or WIDE))
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if "Policy" in message.text else None)
        page.on("request", lambda it: it.url.startswith((url, "data:", "blob:")) or troubles.append(it.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def fill(page, prompt=PROMPT, make="compare", **settings):
    """Fills in the form."""
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    if not page.locator("#groups").is_visible():
        page.locator("#settings > summary").click()
    page.get_by_label("Prompt p").fill(prompt)
    page.locator("#make").select_option("compare")  # which every setting is for
    for name, value in {**QUICK, **settings}.items():
        page.locator(f"#set-{name}").fill(str(value))
    page.locator("#make").select_option(make)


def generate(page, prompt=PROMPT, make="compare", **settings):
    """A round of these settings, made."""
    fill(page, prompt, make, **settings)
    page.get_by_role("button", name="Generate").click()
    at_rest(page)


def at_rest(page):
    """Wait until what was asked for is made."""
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#phase")).to_have_text("Done.")


def pixels(page, kind, row=0):
    """What a card shows, uint8 [h, w, 3]."""
    data = page.locator(".row").nth(row).locator(f'[data-kind="{kind}"] img').get_attribute("src")
    assert data.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))


def kinds(page):
    """The cards that show a picture."""
    return [card.get_attribute("data-kind") for card in page.locator(".card:has(img:visible)").all()]


@contextmanager
def asked(page):
    """The bodies of what the block sends."""
    bodies = []
    hear = lambda it: bodies.append(it.post_data_json) if it.method == "POST" else None  # noqa: E731
    page.on("request", hear)
    yield bodies
    page.remove_listener("request", hear)


# The three pictures and n* ------------------------------------------------------------------------------------------


def test_a_round_is_what_the_library_makes(visit, pipeline):
    page = visit()
    generate(page, n=2)
    ours = pipeline(PROMPT, compare=True, images=2, **QUICK)
    for i in range(2):
        assert np.array_equal(pixels(page, "plain", i), ours.plain_arrays[i])
        assert np.array_equal(pixels(page, "dns", i), ours.dns_arrays[i])
        assert np.array_equal(pixels(page, "final", i), ours.arrays[i])
        expect(page.locator(f"#negative-{i}")).to_have_value(ours.negatives[i])


def test_another_n_star_draws_the_last_picture_again_and_nothing_else(visit, pipeline):
    page = visit()
    generate(page)
    before = {kind: pixels(page, kind) for kind in ("plain", "dns", "final")}
    field = page.locator("#negative-0")
    found = field.input_value()
    with asked(page) as bodies:
        field.fill("a small white circle")
        field.press("Enter")
        expect(page.locator(".takes li")).to_have_count(2)
        at_rest(page)
    (body,) = bodies
    assert (body["negative_prompt"], body["seed"]) == ("a small white circle", QUICK["seed"])
    ours = pipeline(PROMPT, negative="a small white circle", **QUICK).arrays[0]
    assert np.array_equal(pixels(page, "final"), ours)
    assert not np.array_equal(ours, before["final"])
    assert all(np.array_equal(pixels(page, kind), before[kind]) for kind in ("plain", "dns"))

    page.get_by_role("button", name=found).click()  # what was tried before is still there
    expect(field).to_have_value(found)
    assert np.array_equal(pixels(page, "final"), before["final"])


def test_an_empty_n_star_is_plain_guidance(visit):
    page = visit()
    generate(page)
    page.locator("#negative-0").fill("")
    page.locator("#negative-0").press("Enter")
    expect(page.locator(".takes li")).to_have_count(2)
    at_rest(page)
    assert np.array_equal(pixels(page, "final"), pixels(page, "plain"))


def test_escape_takes_a_change_of_n_star_back(visit):
    page = visit()
    generate(page)
    field = page.locator("#negative-0")
    found = field.input_value()
    field.fill("something else")
    field.press("Escape")
    expect(field).to_have_value(found)


def test_the_four_panels(visit, pipeline):
    page = visit()
    generate(page, make="panels")
    assert kinds(page) == ["plain", "dns", "alone", "final"]
    negative = page.locator("#negative-0").input_value()
    assert np.array_equal(pixels(page, "alone"), pipeline("", negative=negative, **QUICK).arrays[0])


def test_dns_alone_and_then_a_picture_by_hand(visit, pipeline):
    page = visit()
    generate(page, make="dns", dns_seed=5)
    assert kinds(page) == ["dns"]
    assert np.array_equal(pixels(page, "dns"), pipeline.dns(PROMPT, dns_steps=QUICK["dns_steps"], dns_seed=5).arrays[0])
    page.locator("#negative-0").fill("a small white circle")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator('[data-kind="final"] img')).to_be_visible()
    at_rest(page)
    assert np.array_equal(pixels(page, "final"), pipeline(PROMPT, negative="a small white circle", **QUICK).arrays[0])


@pytest.mark.parametrize(
    ("make", "negative", "shown"), [("plain", "", ["final"]), ("compare", "a small circle", ["plain", "final"])]
)
def test_no_dns_where_n_star_need_not_be_found(visit, make, negative, shown):
    page = visit()
    fill(page, make=make)
    if negative:
        page.locator("#negative").fill(negative)
    expect(page.locator("#set-dns_steps")).to_be_disabled()
    with asked(page) as bodies:
        page.get_by_role("button", name="Generate").click()
        at_rest(page)
    assert kinds(page) == shown
    assert not [name for name in bodies[0] if name.startswith("dns_")]


def test_partial_pictures_and_steps_are_shown_on_the_way(visit, go_on):
    page = visit()
    fill(page, dns_steps=LONG)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#phase")).to_have_text(re.compile("^DNS: "))
    expect(page.locator("#step")).to_have_text(re.compile(f"^step [0-9]+ of {LONG}$"))
    expect(page.locator('[data-kind="dns"] img')).to_have_attribute("src", re.compile("^data:image/jpeg"))
    expect(page.locator('[data-kind="dns"] .frame')).to_be_disabled()
    go_on()
    at_rest(page)
    expect(page.locator('[data-kind="dns"] .frame')).to_be_enabled()


# What a person keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "inside"), [("plain", "plain"), ("dns", "dns"), ("final", "dnp")])
def test_a_saved_picture_holds_what_makes_it_again(visit, pipeline, tmp_path, kind, inside):
    page = visit()
    generate(page)
    with page.expect_download() as download:
        page.locator(f'[data-kind="{kind}"]').get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == f"a-large-blue-cross-on-a-plain-red-background-3-{inside}.png"
    download.value.save_as(tmp_path / "picture.png")
    settings = read_settings(tmp_path / "picture.png")
    assert settings["kind"] == inside
    again = pipeline.run(Request.from_dict(settings["request"]))
    arrays = {"plain": again.plain_arrays, "dns": again.dns_arrays, "dnp": again.arrays}[inside]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png")), arrays[0])


def test_the_history_of_a_tab_survives_a_reload_and_can_be_forgotten(visit):
    page = visit()
    generate(page)
    generate(page, prompt="a small white cross on a plain black background", seed=4)
    page.reload()
    rounds = page.locator("#made button")
    expect(rounds).to_have_count(2)
    expect(page.get_by_label("Prompt p")).to_have_value("a small white cross on a plain black background")
    rounds.nth(1).click()
    expect(page.locator(".round h2")).to_have_text(PROMPT)
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Prompt p")).to_have_value(PROMPT)
    expect(page.locator("#set-seed")).to_have_value("3")
    page.get_by_role("button", name="Remove").click()
    expect(rounds).to_have_count(1)
    page.get_by_role("button", name="Forget them all").click()
    expect(page.locator("#history")).to_be_hidden()
    page.reload()
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    expect(page.locator("#history")).to_be_hidden()


def test_what_a_reload_keeps_is_bounded(visit):
    kept = visit().evaluate(
        """async () => {
            const { History } = await import("./rounds.js");
            const history = new History();
            for (let i = 0; i < 10; i++) history.add({ status: "done", i, picture: "x".repeat(600_000) });
            history.store();
            return new History().rounds.map(({ i }) => i);
        }"""
    )
    assert kept == [9, 8, 7, 6, 5, 4]


def test_a_prompt_is_text_wherever_it_is_shown(visit):
    page = visit()
    evil = "a <img src=x onerror=alert(1)> & a \"red\" 'circle' – 赤い円"
    generate(page, prompt=evil)
    expect(page.locator(".round h2")).to_have_text(evil)
    expect(page.locator("#made .words")).to_have_text(evil)


# Hands, keys, eyes --------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_is_enough(visit):
    page = visit()
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")

    def tab_to(selector, key="Tab"):
        for _ in range(80):
            if page.locator(selector).first.evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{key} never comes to {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for name, value in QUICK.items():
        tab_to(f"#set-{name}")
        page.keyboard.press("ControlOrMeta+A")
        page.keyboard.type(str(value))
    tab_to("#prompt", "Shift+Tab")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    at_rest(page)
    tab_to("#negative-0")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a small circle")
    page.keyboard.press("Enter")
    expect(page.locator(".takes li")).to_have_count(2)
    at_rest(page)
    tab_to('[data-kind="plain"] .frame', "Shift+Tab")
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("heading")).to_contain_text("Plain")
    page.keyboard.press("ArrowRight")
    expect(viewer.get_by_role("heading")).to_contain_text("DNS")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.locator('[data-kind="plain"] .frame')).to_be_focused()


def test_on_a_phone_nothing_is_cut_off_and_cancel_stays_in_sight(visit, go_on):
    page = visit(**PHONE)
    fill(page, dns_steps=LONG)
    page.get_by_role("button", name="Generate").tap()
    expect(page.locator("#step")).not_to_be_empty()
    assert page.locator("#results").bounding_box()["y"] < PHONE["viewport"]["height"] / 2
    for wanted in ("#cancel", "#phase", '[data-kind="dns"] .frame'):
        expect(page.locator(wanted)).to_be_in_viewport()
    go_on()
    at_rest(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    for button in page.locator("button:visible, select:visible, summary:visible").all():
        assert button.bounding_box()["height"] >= 24  # WCAG 2.2, target size


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(visit, go_on, size, scheme):
    def check(state):
        results = Axe().run(page, options={"resultTypes": ["violations", "passes"]}).response
        assert len(results["passes"]) > 20, state
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in results["violations"]] == [], state

    page = visit(**size, color_scheme=scheme)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    check("first visit")
    fill(page, n=2, dns_steps=LONG)
    page.locator("#generate").click()
    expect(page.locator("#step")).not_to_be_empty()
    check("running")
    page.locator("#cancel").click()
    go_on()
    generate(page, n=2, make="panels")
    page.locator("#negative-1").fill("a small circle")
    page.locator("#negative-1").press("Enter")
    expect(page.locator("#negative-1 ~ .takes li")).to_have_count(2)
    at_rest(page)
    page.get_by_text("Every setting of this round").click()
    check("done")
    page.locator(".frame").first.click()
    check("a close look")
    page.keyboard.press("Escape")
    fill(page, make="plain", steps=0)
    page.locator("#generate").click()
    expect(page.locator("#set-steps")).to_have_attribute("aria-invalid", "true")
    check("an error")


def test_axe_would_find_something(visit):
    page = visit()
    page.evaluate("document.querySelector('label[for=prompt]').remove()")
    page.locator("#prompt").evaluate("field => field.removeAttribute('placeholder')")
    assert "label" in [each["id"] for each in Axe().run(page).response["violations"]]


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("set-steps", "0", "steps"),
        ("set-dns_steps", "0", "steps"),
        ("set-steps", "2.5", "whole number"),
        ("set-guidance", "strong", "number"),
        ("set-dns_guidance", "1 2", "steps"),
        ("set-eta", "3", "fresh noise"),
        ("set-n", "99", "at most"),
        ("set-n", "-3", "n must"),
        ("set-n", "1000000", "n must"),
        ("set-seed", "-3", "-3"),
        ("set-beams", "99", "beams"),
        ("set-max_length", "1000", "1000"),
        ("prompt", "", "empty"),
    ],
)
def test_an_error_is_told_at_its_field(visit, field, value, words):
    page = visit()
    fill(page)
    page.locator(f"#{field}").fill(value)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".error:visible")).to_contain_text(re.compile(words, re.IGNORECASE))
    expect(page.locator("#history")).to_be_hidden()
    page.get_by_role("button", name="Back to the model").click()
    generate(page)  # what is mended is no longer told
    expect(page.locator(".error:visible")).to_have_count(0)


@pytest.mark.parametrize("way", ["button", "escape", "leave"])
def test_cancel_stops_the_work_on_the_server(visit, server, go_on, way):
    page = visit()
    fill(page, n=8, steps=LONG, dns_steps=LONG)
    before = server.engine.status.failures.get("Cancelled", 0)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#step")).not_to_be_empty()
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
    elif way == "escape":
        page.keyboard.press("Escape")
    else:
        page.close()
    go_on()
    server.until(lambda: server.engine.status.failures.get("Cancelled", 0) > before)
    if way != "leave":
        expect(page.locator("#phase")).to_have_text("Cancelled.")
        generate(page)


def test_what_dns_found_stays_after_cancelling(visit, pipeline, go_on):
    page = visit()
    fill(page, make="dnp", steps=LONG)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#phase")).to_have_text(re.compile("^DNP: "))
    page.get_by_role("button", name="Cancel").click()
    go_on()
    expect(page.locator("#negative-0")).to_have_value(pipeline.dns(PROMPT, seed=3, dns_steps=3).negatives[0])
    page.get_by_role("button", name="Draw").click()
    at_rest(page)
    assert kinds(page) == ["dns", "final"]


def test_the_page_waits_for_a_server_that_warms_up(visit):
    with serving(warm=False) as served:
        page = visit(served.url)
        expect(page.locator("#notice")).to_contain_text("warming up")
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        page.get_by_label("Prompt p").fill("typed meanwhile")
        served.engine.warm_up()
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        expect(page.get_by_label("Prompt p")).to_have_value("typed meanwhile")


def test_the_page_says_when_the_server_is_gone_and_goes_on_when_it_is_back(visit):
    page = visit()
    fill(page)
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#notice")).to_contain_text("does not answer")
    page.context.set_offline(False)
    expect(page.locator("#notice")).to_be_hidden()
    generate(page)


def test_a_full_queue_is_asked_again_by_itself(visit, go_on):
    with serving(batching=BatchOptions(samples=1, queue=1)) as served:
        page, others = visit(served.url), [visit(served.url) for _ in range(2)]
        for other, taken in zip(others, [(1, 0), (1, 1)], strict=True):
            fill(other, steps=LONG, dns_steps=LONG)
            other.get_by_role("button", name="Generate").click()
            served.until(lambda taken=taken: (served.engine.status.requests, served.engine.status.queued) == taken)
        fill(page)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#phase")).to_contain_text("busy")
        for other in others:
            other.get_by_role("button", name="Cancel").click()
        go_on()
        at_rest(page)


def test_a_key_is_asked_for_and_kept_in_the_tab(visit):
    with serving(ServerSettings(keys=frozenset({"right"}))) as served:
        page = visit(served.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_label("API key").press("Enter")
        expect(page.locator("#notice-text")).to_contain_text("none that it knows")
        expect(page.get_by_label("API key")).to_be_empty()
        page.get_by_label("API key").fill("right")
        page.get_by_label("API key").press("Enter")
        generate(page)
        page.reload()
        expect(page.locator("#server")).to_have_attribute("data-state", "ready")


# The stream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_events_are_read_however_they_are_cut(visit, end):
    """By every cut of two, and byte by byte."""
    page = visit()
    lines = [
        ": a comment",
        "event: x",
        'data: {"n": "∅ 赤"}',
        "",
        "data: 1",
        "data:2",
        "",
        "id: 7",
        "",
        "data: [DONE]",
        "",
        "",
    ]
    text = list(end.join(lines).encode())
    read = """async ([bytes, cuts]) => {
        const { messages } = await import("./api.js");
        const pieces = [0, ...cuts, bytes.length].slice(1).map((to, i) => bytes.slice([0, ...cuts][i], to));
        const body = new ReadableStream({
            start(controller) {
                for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
                controller.close();
            },
        });
        const found = [];
        for await (const data of messages(body)) found.push(data);
        return found;
    }"""
    for cuts in [*([cut] for cut in range(1, len(text))), list(range(1, len(text)))]:
        assert page.evaluate(read, [text, cuts]) == ['{"n": "∅ 赤"}', "1\n2", "[DONE]"]
