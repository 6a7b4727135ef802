/** The page: a form, the round that it asked for, and the history of this tab. */

import { ApiError, hasKey, models, pause, readiness, stream, useKey } from "./api.js";
import { $, h, say } from "./dom.js";
import * as rounds from "./rounds.js";
import { Settings } from "./settings.js";
import { RoundView, Viewer, listHistory, listMakes, showState, welcome } from "./view.js";

const PARTIAL_PICTURES = 3; // of each picture that takes steps

const history = new rounds.History();
const viewer = new Viewer($("viewer"));
const settings = new Settings($("groups"), () => {
  const count = Object.keys(settings.typed()).length;
  say($("changed"), count ? `${count} changed` : "");
});
let served = []; // the models
let model = null; // the id of the chosen one
let shown = null; // the view of the round on the page
let connecting = null; // a promise as long as the server is not ready
let job = null; // what runs: {round, rows, kinds, again, controller, over}; `again` where one picture is drawn again
let ended = ""; // how the last one did

// The server ---------------------------------------------------------------------------------------------------------

/** By state: a word or two for it, and what a person should know. */
const STATES = {
  ready: ["ready", ""],
  warming: ["warming up", "The server is warming up: it opens the model. This page goes on by itself."],
  draining: ["stopping", "The server is about to stop and takes nothing new. This page goes on when it is back."],
  gone: ["no answer", "The server does not answer. Is dnp serve running? This page goes on when it is back."],
  locked: ["locked", "This server wants an API key. It is kept in this tab alone."],
};

/** Waits until the server is ready, telling what it waits for, and learns which models it has. */
function connect() {
  connecting ??= look().finally(() => (connecting = null));
}

async function look() {
  for (;;) {
    const state = await readiness();
    if (state !== "ready") tell(state);
    else if (await learn()) return open();
    else if ($("server").dataset.state === "locked") return undefined; // until there is a key
    await pause(2000);
  }
}

/** Asks which models there are; false where the server does not say. */
async function learn() {
  try {
    served = await models();
    return true;
  } catch (error) {
    if (error.status === 401) lock(error);
    else tell("gone");
    return false;
  }
}

function tell(state, words = STATES[state][1]) {
  $("server").dataset.state = state;
  say($("server"), STATES[state][0]);
  say($("notice-text"), words);
  $("notice").hidden = !words;
  $("unlock").hidden = state !== "locked";
  $("generate").disabled = state !== "ready";
}

/** Asks for a key, saying what was wrong with the one that was sent. */
function lock(error) {
  tell("locked", hasKey() ? error.message : undefined);
  $("key").focus();
}

function open() {
  const unlocking = $("unlock").contains(document.activeElement);
  tell("ready");
  const last = history.rounds[0]?.ask;
  const first = model === null;
  take(model ?? last?.model);
  if (first && last) fill(last);
  else if (first) $("prompt").value ||= chosen().dnp.examples[0] ?? "";
  if (unlocking) $("prompt").focus();
  grow();
}

const chosen = () => served.find(({ id }) => id === model);

/** Takes the model of that id, or the first. What was typed stays, as far as this model has it. */
function take(id) {
  model = (served.find((each) => each.id === id) ?? served[0]).id;
  const { name, backend, runs_on: runsOn, fingerprint, description, examples } = chosen().dnp;
  say($("server"), `${name} on ${backend}`);
  $("server").title = `${runsOn}; bundle ${fingerprint}`;
  const typed = settings.typed();
  settings.show(served, model, take);
  settings.fill(typed);
  $("settings").hidden = false;
  adapt();
  $("examples").replaceChildren(
    ...(description ? [h("li", { className: "aside" }, description)] : []),
    ...examples.map((prompt) =>
      h("li", {}, h("button", { type: "button", className: "quiet", onclick: () => example(prompt) }, prompt)),
    ),
  );
  list();
}

function example(prompt) {
  $("prompt").value = prompt;
  grow();
  $("prompt").focus();
}

// The form -----------------------------------------------------------------------------------------------------------

/** Why no negative prompt can be written, by what is made. */
const GIVEN = { plain: "Plain guidance has none", dns: "Found by DNS" };

function asked() {
  const make = $("make").value;
  const typed = settings.typed();
  const negative = (!(make in GIVEN) && $("negative").value.trim()) || null;
  return { prompt: $("prompt").value.trim(), negative, make, model, typed };
}

function fill(ask) {
  if (ask.model !== model && served.some(({ id }) => id === ask.model)) take(ask.model);
  $("prompt").value = ask.prompt;
  $("negative").value = ask.negative ?? "";
  $("make").value = ask.make;
  settings.fill(ask.typed);
  adapt();
}

/** Switches off what has no effect on what is asked for. */
function adapt() {
  const given = GIVEN[$("make").value];
  $("negative").disabled = given !== undefined;
  $("negative").placeholder = given ?? "Found by DNS when left empty";
  settings.finds = rounds.findsNegative(asked());
  grow();
}

/** Makes the text fields as high as their text, where the style sheet cannot. */
function grow() {
  for (const area of document.querySelectorAll("textarea")) {
    area.style.height = "";
    area.style.height = `${area.scrollHeight + 2}px`;
  }
}

/** Says what went wrong: at the field to blame, or below the form. */
function complain(error) {
  const fields = { prompt: $("prompt"), negative_prompt: $("negative") };
  if (settings.blame(error.param, error.message)) return;
  say($("problem"), error.message);
  fields[error.param]?.setAttribute("aria-invalid", "true");
  fields[error.param]?.focus();
}

function forgive() {
  settings.forgive();
  say($("problem"), "");
  for (const field of [$("prompt"), $("negative")]) field.removeAttribute("aria-invalid");
}

// The work -----------------------------------------------------------------------------------------------------------

/** Asks for what the form says. */
async function generate() {
  if (job || model === null) return;
  forgive();
  const ask = asked();
  const round = rounds.begin(ask, settings.values(rounds.findsNegative(ask)), chosen().dnp);
  history.add(round);
  show(round);
  const { top } = $("results").getBoundingClientRect();
  if (top > innerHeight / 2) $("results").scrollIntoView(); // on a phone the form fills the window
  await work({ round, rows: round.rows, kinds: rounds.kindsOf(round) }, complain, async (signal) => {
    const { path, body } = rounds.first(round);
    for await (const event of stream(path, { ...body, partial_images: PARTIAL_PICTURES }, signal)) {
      rounds.take(round, event);
      refresh();
    }
    if (!round.request) throw new ApiError("The server ended before the pictures were complete. Ask again.");
    for (const row of ask.make === "panels" ? round.rows : []) await addAlone(round, row, signal);
  });
}

/** Draws the final picture of a row again, against another n*; one that was drawn before is shown. */
async function regenerate(round, row, negative) {
  while (job) {
    cancel();
    await job.over;
  }
  row.problem = "";
  const before = row.takes.findIndex((take) => take.negative === negative);
  if (before >= 0) return choose(row, before);
  const complainThere = (error) => {
    row.problem = error.message;
  };
  const kinds = round.ask.make === "panels" ? ["final", "alone"] : ["final"];
  await work({ round, rows: [row], kinds, again: true }, complainThere, async (signal) => {
    const final = await retake(round, row, "final", rounds.again(round, row, negative), signal);
    rounds.keep(row, { negative, final });
    if (kinds.includes("alone")) await addAlone(round, row, signal);
  });
}

function choose(row, number) {
  if (job?.rows.includes(row)) cancel();
  rounds.choose(row, number);
  refresh();
}

/** Draws the panel of n* alone for the take that is shown. */
async function addAlone(round, row, signal) {
  const shot = row.takes[row.chosen];
  if (!shot.negative) return; // ∅ against ∅ says nothing
  const picture = await retake(round, row, "alone", rounds.alone(round, row, shot.negative), signal);
  shot.alone = picture;
  rounds.choose(row, row.chosen);
}

/** Asks for one picture of a row, showing it as it comes; the picture. */
async function retake(round, row, kind, body, signal) {
  let picture = null;
  for await (const event of stream("./v1/images/generations", { ...body, partial_images: PARTIAL_PICTURES }, signal)) {
    if (event.type === "busy") round.busyFor = event.seconds;
    else Object.assign(round, { busyFor: null, status: "running", phase: kind });
    picture = rounds.retake(row, kind, event) ?? picture;
    refresh();
  }
  if (!picture) throw new ApiError("The server ended before the picture was complete. Draw it again.");
  return picture;
}

/** Runs `ask(signal)` for a job, and brings the page to rest however it ends: what was made before that stays. */
async function work(what, complainAt, ask) {
  const { round } = what;
  const controller = new AbortController();
  const { promise: over, resolve } = Promise.withResolvers();
  job = { ...what, controller, over };
  round.status = "waiting";
  swap($("generate"), $("cancel"));
  refresh();
  try {
    await ask(controller.signal);
    ended = "Done.";
  } catch (error) {
    ended = controller.signal.aborted ? "Cancelled." : "";
    if (!controller.signal.aborted) fail(error, complainAt);
  } finally {
    job = null;
    resolve();
    swap($("cancel"), $("generate"));
    if (!rounds.settle(round)) {
      history.remove(round);
      if (shown?.round === round) rest();
    }
    history.store();
    list();
    refresh();
  }
}

/** Puts a button in the place of another, which may have had the focus. */
function swap(from, to) {
  const focused = document.activeElement === from;
  from.hidden = true;
  to.hidden = false;
  if (focused) to.focus();
}

function fail(error, complainAt) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) return lock(error);
  complainAt(error);
  if (error.status === 503 || error.code === "unreachable") connect();
}

const cancel = () => job?.controller.abort();

// What is shown ------------------------------------------------------------------------------------------------------

function show(round) {
  shown = new RoundView(round, {
    regenerate: (row, negative) => regenerate(round, row, negative),
    choose,
    look: (row, kind) => viewer.open(round, row, kind),
    reuse: () => {
      const { ask, rows } = round;
      fill({ ...ask, typed: { ...ask.typed, seed: String(rows[0].seed) } });
      $("prompt").focus();
    },
    remove: () => {
      if (job?.round === round) cancel();
      history.remove(round);
      rest();
      $("prompt").focus();
    },
  });
  $("results").replaceChildren(shown.element);
  list();
  draw(); // at once: whoever shows it may want to scroll to it
}

/** Shows the newest round, or what the page is for. */
function rest() {
  if (history.rounds.length > 0) return show(history.rounds[0]);
  shown = null;
  $("results").replaceChildren(welcome());
  list();
  refresh();
}

/** Lists the history; as long as there is none, the examples. */
function list() {
  $("examples").hidden = history.rounds.length > 0 || $("examples").children.length === 0;
  listHistory(history.rounds, shown?.round, (round) => {
    show(round);
    $("results").focus();
  });
}

/** Brings the page up to date. */
function draw() {
  shown?.update(job !== null && !job.again);
  showState(job, ended);
  grow();
}

let drawn = 0;

/** Draws, at most once a frame. */
function refresh() {
  cancelAnimationFrame(drawn);
  drawn = requestAnimationFrame(draw);
}

// Hands and keys -----------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("ask").addEventListener("input", adapt);
$("cancel").addEventListener("click", cancel);
$("reset").addEventListener("click", () => settings.fill({}));
$("forget").addEventListener("click", () => {
  cancel();
  history.clear();
  rest();
  $("prompt").focus();
});
$("unlock").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  await connecting; // it may have asked with the key before this one
  connect();
});
for (const field of [$("prompt"), $("negative")]) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && job && !$("viewer").open) cancel();
});
document.addEventListener("visibilitychange", async () => {
  if (!document.hidden && !job && (await readiness()) !== "ready") connect();
});

listMakes($("make"));
$("settings").open = matchMedia("(min-width: 70rem)").matches;
$("generate").disabled = true;
rest();
connect();
