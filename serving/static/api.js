/** Talks to the server: JSON, server-sent events, errors and the API key. Knows nothing of the page. */

const KEY = "dnp.key"; // in sessionStorage: gone with the tab

/** What went wrong, in the server's words where it has any. */
export class ApiError extends Error {
  /**
   * @param {string} message A sentence for people.
   * @param {{status?: number, param?: ?string, code?: ?string, retryAfter?: ?number}} about The HTTP status, or 0
   *   where no answer came; the field to blame; and after how many seconds to ask again, where that may help.
   */
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** Sends `key` with every request of this tab from now on. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Whether a key is sent. */
export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** The models that the server has, as `GET /v1/models` lists them, without names that only point to another. */
export async function models() {
  const { data } = await (await call("./v1/models")).json();
  return data.filter((model) => model.dnp && (model.root ?? model.id) === model.id);
}

/** `ready`, `warming`, `draining`, or `gone` where nobody answers. */
export async function readiness() {
  try {
    const response = await fetch("./readyz", { cache: "no-store" });
    if (response.ok) return "ready";
    if (response.status !== 503) return "gone";
    return (await response.json()).status === "draining" ? "draining" : "warming";
  } catch {
    return "gone";
  }
}

/**
 * The events that answer `body`, each as the object that the server sent, from the first to the last.
 *
 * A server that is full is asked again when it says so; until then there is `{type: "busy", seconds}` every second.
 * Aborting `signal` closes the connection, and with it the server ends the work. Throws ApiError, and what `signal`
 * was aborted with.
 */
export async function* stream(path, body, signal) {
  let response;
  while (!response) {
    try {
      response = await call(path, { body: { ...body, stream: true, progress: true }, signal });
    } catch (error) {
      if (error.status !== 429) throw error;
      for (let seconds = Math.ceil(error.retryAfter ?? 5); seconds > 0; seconds--) {
        yield { type: "busy", seconds };
        await pause(1000, signal);
      }
    }
  }
  for await (const data of messages(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error);
    yield event;
  }
}

/** Resolves after so many milliseconds; rejects at once when `signal` is aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal?.removeEventListener("abort", stop), resolve()), milliseconds);
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/** POSTs `body`, or GETs without one; the response, if it is a good one. Throws ApiError. */
async function call(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server does not answer.", { code: "unreachable" });
  }
  if (response.ok) return response;
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const { error } = await response.json().catch(() => ({}));
  throw new ApiError(error?.message ?? `The server answered ${response.status} ${response.statusText}`, {
    ...error,
    status: response.status,
    retryAfter,
  });
}

/**
 * The data of each server-sent event in `body`. EventSource reads such streams too, but can only GET.
 *
 * Lines may end in `\n` or `\r\n`. Names, ids and comments are skipped: each event's data says its type.
 */
export async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A picture is one long line in many chunks: only what is new can hold its end.
      const lines = value.split("\n");
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke off.", { code: "unreachable" });
  } finally {
    reader.cancel().catch(() => {}); // a connection that broke cannot be closed again
  }
}
