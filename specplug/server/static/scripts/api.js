// The requests to the server that sent this page. No other server is asked.

/** The server does not answer, or its answer broke off. */
export class ServerGone extends Error {}

/** The server refused the request; the message says why. */
export class Refused extends Error {}

/** The events of a streamed chat completion. Throws ServerGone, Refused, or AbortError after `signal`. */
export async function* streamAnswer(body, signal) {
  const response = await reached(
    fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      signal,
      body: JSON.stringify({ ...body, stream: true }),
    }),
  );
  if (!response.ok) throw new Refused(await reason(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unfinished = "";
  for (;;) {
    const { value, done } = await reached(reader.read());
    if (done) throw new ServerGone("the answer broke off");
    const parts = (unfinished + value).split("\n\n");
    unfinished = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}

/** The server's figures. Throws ServerGone. */
export async function getStats() {
  const response = await reached(fetch("specplug/stats"));
  if (!response.ok) throw new ServerGone(await reason(response));
  return response.json();
}

async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerGone(error.message);
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}
