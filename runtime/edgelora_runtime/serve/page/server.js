// The server's API: the list of models, and answers as a stream of events.

/** An answer of the server that is no success. status: of HTTP, or 0 if the server was not reached. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Check that `edgelora serve` still runs.");
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    const said = await response.json();
    message = said?.error?.message ?? message;
  } catch { /* a proxy's page, not the server's JSON */ }
  const wait = response.headers.get("Retry-After");
  throw new ServerError(response.status, wait ? `${message} (try again in ${wait} s)` : message);
}

/** Reads /v1/models. Returns its whole object. */
export async function listModels(key) {
  return (await call("v1/models", { headers: headers(key) })).json();
}

/**
 * Asks for an answer and passes on each event's object until the stream ends.
 * request: the body of /v1/chat/completions. signal: aborts it, which makes the server stop too.
 * Throws ServerError, or an AbortError.
 */
export async function streamAnswer(request, key, signal, onEvent) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (rest + (done ? "\n" : value)).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(response.status, event.error.message ?? "the answer broke off");
        onEvent(event);
      }
      if (done) throw new ServerError(0, "The answer broke off: the server closed the connection.");
    }
  } catch (error) {
    if (error instanceof SyntaxError) throw new ServerError(0, "The server sent an event that is no JSON.");
    if (error instanceof TypeError) throw new ServerError(0, "The answer broke off: the connection was lost.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
