/**
 * What was asked for and what came of it, round by round, and the history that this tab keeps of them.
 *
 * A round is plain data, so that it can be stored:
 *
 *   ask      what the form held: {prompt, negative, make, model, typed}; `negative` is null where DNS finds it
 *   body     the settings that it shares with everything drawn again, as the API takes them
 *   size     [width, height] of its pictures, in pixels
 *   status   "waiting", "running" or "done", as soon as nothing more comes
 *   busyFor  in how many seconds a server that is full is asked again; null where it is not
 *   phase    "dns", "caption", "plain", "final" or "alone", while something runs
 *   rows     one for each picture asked for:
 *     seed       of its starting noise
 *     found      n* as the captioner said it; null where it was not looked for
 *     pictures   by kind ("plain", "dns", "alone", "final"): {picture, step, steps}
 *     takes      the final pictures made so far, each with its n*: [{negative, final, alone}]
 *     chosen     which take is shown
 *   request, seconds, warnings   as the server gave them: settings, times by phase, what was cut
 *
 * A picture is {data, type, partial}: base64, its media type, and whether it is an early view.
 */

const HISTORY = "dnp.rounds"; // in sessionStorage: this tab's, and gone with it
const ROOM = 4_000_000; // characters; browsers give a page 5 million or more

/** What can be made: its name, and the pictures of a row in the order they are shown. */
export const MAKES = {
  compare: { name: "Plain, DNS and DNP", kinds: ["plain", "dns", "final"] },
  panels: { name: "Four panels, with n* alone", kinds: ["plain", "dns", "alone", "final"] },
  dnp: { name: "DNS and DNP", kinds: ["dns", "final"] },
  dns: { name: "DNS image and n* alone", kinds: ["dns"] },
  plain: { name: "Plain guidance alone", kinds: ["final"] },
};

const FINAL = ["sampler", "steps", "guidance", "eta", "spacing", "methods"]; // settings of the final pass
const FINDING = /^(dns_|beams$|prefix$|min_length$|max_length$)/; // and of what finds n*

/** Whether what is asked for has n* found by DNS. */
export const findsNegative = ({ make, negative }) => make !== "plain" && negative === null;

/** The kinds of pictures that a round shows. */
export function kindsOf({ ask, rows }) {
  const kinds = MAKES[ask.make].kinds.filter((kind) => kind !== "dns" || findsNegative(ask));
  // A round that began with DNS alone has final pictures as soon as somebody wrote n*.
  return ask.make === "dns" && rows.some((row) => row.takes.length > 0 || row.pictures.final)
    ? ["dns", "final"]
    : kinds;
}

/**
 * A new round of `ask`, with `settings` as the API takes them, where they are not the defaults of `model`. Its seed
 * is chosen here, so that every picture can be drawn again whatever becomes of the rest.
 */
export function begin(ask, settings, { defaults, limits }) {
  const { n = defaults.images, seed = crypto.getRandomValues(new Uint32Array(1))[0] } = settings;
  const row = (_, i) => ({ seed: seed + i, found: null, pictures: {}, takes: [], chosen: 0 });
  return {
    ask,
    body: { model: ask.model, prompt: ask.prompt, ...settings, seed },
    size: [settings.width ?? defaults.width, settings.height ?? defaults.height],
    status: "waiting",
    rows: Array.from({ length: Math.min(Math.max(n, 1), limits.n) }, row), // what is refused needs no room
    warnings: [],
  };
}

/** The first request of a round: its path, and its body. */
export function first({ ask, body }) {
  if (ask.make === "dns") return { path: "./v1/images/negatives", body: without(body, (name) => FINAL.includes(name)) };
  const negative =
    ask.make === "plain" ? { dnp: false } : ask.negative === null ? {} : { negative_prompt: ask.negative };
  const show = MAKES[ask.make].kinds.filter((kind) => kind === "plain" || (kind === "dns" && findsNegative(ask)));
  return { path: "./v1/images/generations", body: { ...body, ...negative, show } };
}

/** Takes in one event of the stream that answers `round.body`. */
export function take(round, event) {
  const row = round.rows[event.index ?? 0];
  round.busyFor = event.type === "busy" ? event.seconds : null;
  switch (event.type) {
    case "image_generation.progress":
      round.status = "running";
      round.phase = event.phase;
      if (event.phase === "caption") break; // the words have no picture
      for (const each of round.rows) at(each, event.phase, { step: event.step, steps: event.steps });
      break;
    case "image_generation.partial_image":
      round.status = "running";
      at(row, event.phase ?? "final", { picture: { ...pictureOf(event), partial: true } });
      break;
    case "image_generation.negative":
      row.found = event.negative_prompt;
      at(row, "dns", { picture: pictureOf(event) });
      break;
    case "image_generation.plain":
      at(row, "plain", { picture: pictureOf(event) });
      break;
    case "image_generation.completed":
      Object.assign(round, { request: event.request, seconds: event.timings });
      round.warnings.push(...(event.warnings ?? []));
      // These, unlike those that came early, have their settings inside.
      for (const kind of ["plain", "dns"]) {
        if (event[`${kind}_image`]) at(row, kind, { picture: pictureOf({ ...event, ...event[`${kind}_image`] }) });
      }
      if (round.ask.make === "dns") {
        row.found = event.negative_prompt;
        at(row, "dns", { picture: pictureOf(event) });
      } else {
        keep(row, { negative: event.negative_prompt, final: pictureOf(event) });
      }
  }
}

/** The request for the final picture of a row alone: the same seed and settings, and n* as `negative` says, or ∅. */
export function again(round, row, negative) {
  const body = without(round.body, (name) => name === "n" || FINDING.test(name));
  return { ...body, seed: row.seed, ...(negative ? { negative_prompt: negative } : { dnp: false }) };
}

/** The request for the panel of n* alone: the negative prompt with nothing to draw. */
export function alone(round, row, negative) {
  return { ...again(round, row, negative), prompt: "" };
}

/** Takes in one event of a request of `again` or `alone`, whose picture is of `kind`; the new picture at its end. */
export function retake(row, kind, event) {
  if (event.type === "image_generation.progress") at(row, kind, { step: event.step, steps: event.steps });
  if (event.type === "image_generation.partial_image")
    at(row, kind, { picture: { ...pictureOf(event), partial: true } });
  return event.type === "image_generation.completed" ? pictureOf(event) : null;
}

/** Adds a take to a row and shows it. */
export function keep(row, shot) {
  row.takes.push(shot);
  choose(row, row.takes.length - 1);
}

/** Shows the take of that number, or what is left of the row where there is none. */
export function choose(row, number) {
  row.chosen = number;
  for (const kind of ["final", "alone"]) {
    const picture = row.takes[number]?.[kind];
    if (picture) row.pictures[kind] = { picture };
    else delete row.pictures[kind];
  }
}

/** n* of the take that is shown, or before there is one what was found or given. */
export const negativeOf = ({ ask }, row) => row.takes[row.chosen]?.negative ?? row.found ?? ask.negative ?? "";

/** Ends a round, however it went: what is half made goes. False where nothing is left. */
export function settle(round) {
  round.status = "done";
  round.phase = round.busyFor = null;
  for (const row of round.rows) {
    choose(row, row.chosen);
    for (const [kind, shot] of Object.entries(row.pictures)) {
      if (!shot.picture || shot.picture.partial) delete row.pictures[kind];
      delete shot.step;
    }
  }
  return round.rows.some((row) => Object.keys(row.pictures).length > 0);
}

/** How much of the pictures of `kinds` in `rows` is done, 0 to 1, each counting the same. */
export function progress({ rows, kinds }) {
  const done = rows.flatMap((row) =>
    kinds.map((kind) => {
      const { step, steps, picture } = row.pictures[kind] ?? {};
      return step ? step / steps : picture && !picture.partial ? 1 : 0;
    }),
  );
  return done.reduce((sum, each) => sum + each, 0) / done.length;
}

/** The rounds of this tab, newest first. Those that ended survive a reload, as far as there is room. */
export class History {
  rounds = read();

  add(round) {
    this.rounds.unshift(round);
  }

  remove(round) {
    this.rounds = this.rounds.filter((each) => each !== round);
    this.store();
  }

  clear() {
    this.rounds = [];
    this.store();
  }

  /** Writes the newest rounds that there is room for. */
  store() {
    const kept = [];
    let room = ROOM;
    for (const round of this.rounds.filter(({ status }) => status === "done")) {
      const text = JSON.stringify(round);
      room -= text.length;
      if (room < 0) break;
      kept.push(text);
    }
    sessionStorage.setItem(HISTORY, `[${kept.join(",")}]`);
  }
}

function read() {
  try {
    return JSON.parse(sessionStorage.getItem(HISTORY)) ?? [];
  } catch {
    return []; // written by another version of this page
  }
}

function at(row, kind, news) {
  row.pictures[kind] = { ...row.pictures[kind], ...news };
}

function pictureOf({ b64_json: data, output_format: format = "png" }) {
  return { data, type: `image/${format}`, partial: false };
}

/** An object without the entries whose names `left` says are left out. */
function without(object, left) {
  return Object.fromEntries(Object.entries(object).filter(([name]) => !left(name)));
}
