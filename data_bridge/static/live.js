/**
 * A live query as a keyed collection: the documents that match now, and every change after.
 *
 *     import { live } from "/static/live.js";
 *     const orders = live("/orders/live", { sort: (a, b) => b.created.localeCompare(a.created) });
 *     orders.subscribe(() => render(orders.documents));
 *
 * The wire is plain server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html):
 * `snapshot` frames, `ready`, then `insert`, `update`, `replace`, `delete`, `enter` and `leave`, and
 * `reset` when the server can no longer tell what happened since: a new snapshot follows it.
 *
 * The one invariant: the rows are always the state at `lastEventId`. A snapshot is built aside and
 * put in place by its `ready`, so a cut at any moment leaves rows from which the stream can go on.
 */

const CHANGES = ["insert", "update", "replace", "delete", "enter", "leave"];
const KNOWN = new Set(["snapshot", "ready", "reset", ...CHANGES]);
const TICK = 20_000; // how often the clock is looked at, in milliseconds
const SLEPT = 60_000; // a clock this far ahead of its timer was asleep; throttled tabs tick once a minute
const LONGEST_DELAY = 30_000;
const SETTLED = 200; // an open connection that lasts this long is one: a server that is up but has
// no database answers with an empty stream, again and again

/** Open the live query at `url`; see live.d.ts for the options. */
export function live(url, options) {
  return new LiveCollection(url, options);
}

class LiveCollection {
  #rows = new Map(); // key -> { id, document }: what the page sees
  #pending = null; // the same, of a snapshot that is not complete yet
  #ordered = null; // the rows in order, until one of them changes
  #changed = new Map(); // key -> id, since the last frame
  #view = null;
  #subscribers = new Set();
  #listeners = new Map();
  #source = null;
  #mayResume = false; // the browser would send an id if it reconnected this source by itself
  #opened = false; // there was a connection before
  #ended = false; // close() was called
  #attempt = 0;
  #retryTimer;
  #settleTimer;
  #probe;
  #frame;
  #frameTimer;
  #awake = Date.now();
  #clock;
  #leaving = new AbortController();
  #options;
  #status = "connecting";
  #error = null;
  #sent = 0;
  #total = null;
  #version = 0;
  #lastEventId = "";

  constructor(url, options = {}) {
    this.url = String(url);
    this.#options = { key: "id", retry: 1000, withCredentials: false, ...options };
    this.#open();
    this.#watchThePage();
  }

  // -- reading ----------------------------------------------------------------------------------

  get size() {
    return this.#rows.size;
  }

  get(id) {
    return this.#rows.get(keyOf(id))?.document;
  }

  has(id) {
    return this.#rows.has(keyOf(id));
  }

  *keys() {
    for (const row of this.#inOrder()) yield row.id;
  }

  *values() {
    for (const row of this.#inOrder()) yield row.document;
  }

  *entries() {
    for (const row of this.#inOrder()) yield [row.id, row.document];
  }

  [Symbol.iterator]() {
    return this.entries();
  }

  forEach(fn, thisArg) {
    for (const [id, document] of this) fn.call(thisArg, document, id, this);
  }

  get documents() {
    this.#inOrder();
    return (this.#ordered.documents ??= Object.freeze(this.#ordered.map((row) => row.document)));
  }

  get status() {
    return this.#status;
  }

  get error() {
    return this.#error;
  }

  get sent() {
    return this.#sent;
  }

  get total() {
    return this.#total;
  }

  get version() {
    return this.#version;
  }

  get lastEventId() {
    return this.#lastEventId;
  }

  /** All of it as one frozen object, the same one until something changes. */
  snapshot() {
    return (this.#view ??= Object.freeze({
      documents: this.documents,
      status: this.#status,
      error: this.#error,
      sent: this.#sent,
      total: this.#total,
      version: this.#version,
    }));
  }

  #inOrder() {
    if (!this.#ordered) {
      this.#ordered = [...this.#rows.values()];
      const { sort } = this.#options;
      if (sort) this.#ordered.sort((a, b) => sort(a.document, b.document));
    }
    return this.#ordered;
  }

  // -- listening --------------------------------------------------------------------------------

  /** Call `fn(collection, changed)` in the next frame, then once for each frame with changes. */
  subscribe(fn) {
    const subscriber = { fn, isNew: true };
    this.#subscribers.add(subscriber);
    this.#schedule();
    return () => this.#subscribers.delete(subscriber);
  }

  /** Call `fn(event)` for each single event of a type, after it has been applied. */
  on(type, fn) {
    const listeners = this.#listeners.get(type) ?? new Set();
    if (!this.#listeners.has(type)) {
      this.#listeners.set(type, listeners);
      if (this.#source) this.#listen(this.#source, type);
    }
    listeners.add(fn);
    return () => listeners.delete(fn);
  }

  #emit(type, event) {
    for (const fn of [...(this.#listeners.get(type) ?? [])]) call(fn, event);
  }

  // A hidden tab runs no animation frames, and a tab may be hidden after it asked for one.
  #schedule() {
    if (this.#frameTimer !== undefined) return;
    const visible = globalThis.document?.visibilityState === "visible";
    if (visible) this.#frame = requestAnimationFrame(() => this.#flush());
    this.#frameTimer = setTimeout(() => this.#flush(), visible ? 1000 : 100);
  }

  #flush() {
    if (this.#frame !== undefined) cancelAnimationFrame(this.#frame);
    clearTimeout(this.#frameTimer);
    this.#frame = this.#frameTimer = undefined;
    const changed = new Set(this.#changed.values());
    this.#changed.clear();
    for (const subscriber of [...this.#subscribers]) {
      if (!this.#subscribers.has(subscriber)) continue; // another one unsubscribed it just now
      const ids = subscriber.isNew ? new Set([...this.keys(), ...changed]) : changed;
      subscriber.isNew = false;
      call(subscriber.fn, this, ids);
    }
  }

  #touch() {
    this.#version += 1;
    this.#view = null;
    this.#schedule();
  }

  #become(status, error = null) {
    const before = this.#status;
    this.#status = status;
    this.#error = error;
    this.#touch();
    if (status !== before) this.#emit("status", { type: "status", status, error });
  }

  // -- the stream -------------------------------------------------------------------------------

  #receive(event) {
    if (event.lastEventId) this.#mayResume = true;
    clearTimeout(this.#settleTimer);
    let applied;
    try {
      applied = this.#apply(event.type, JSON.parse(event.data), event.lastEventId);
    } catch (cause) {
      // A change that cannot be read is a change lost: better no rows follow than wrong ones.
      const error = new Error(`${this.url} sent a "${event.type}" that cannot be read`, { cause });
      this.#stop();
      this.#become("failed", error);
      return;
    }
    this.#emit(event.type, applied);
    if (CHANGES.includes(event.type)) this.#emit("change", applied);
  }

  #apply(type, data, lastEventId) {
    if (type === "snapshot") {
      this.#pending ??= new Map();
      for (const document of data.documents) {
        const id = document[this.#options.key];
        this.#pending.set(keyOf(id), { id, document });
      }
      this.#sent = data.sent;
      this.#total = data.total;
      this.#become("loading");
      return { type, ...data };
    }
    if (type === "reset") {
      this.#lastEventId = ""; // a cut from here on starts over: there is nothing to resume from
      this.#begin();
      this.#become("loading");
      return { type, ...data };
    }
    if (type === "ready") {
      this.#lastEventId = lastEventId;
      this.#swap();
      this.#become("live");
      return { type, ...data, lastEventId };
    }
    if (this.#pending && this.#sent === 0) this.#swap(); // a stream of changes alone: no snapshot
    if (!this.#pending) this.#lastEventId = lastEventId;
    const rows = this.#pending ?? this.#rows;
    const key = keyOf(data.id);
    const previous = rows.get(key)?.document ?? null;
    if (type === "delete" || type === "leave") rows.delete(key);
    // Without a document it does not fit the model or is gone already: its last known state stays.
    else if (data.document != null) rows.set(key, { id: data.id, document: data.document });
    if (rows === this.#rows) {
      this.#changed.set(key, data.id);
      this.#ordered = null;
      if (this.#status === "live") this.#touch();
      else this.#become("live");
    }
    return { type, ...data, previous, lastEventId };
  }

  #begin() {
    this.#pending = new Map();
    this.#sent = 0;
    this.#total = null;
  }

  #swap() {
    const rows = this.#pending;
    this.#pending = null;
    if (!rows) return;
    for (const [key, row] of this.#rows) if (!rows.has(key)) this.#changed.set(key, row.id);
    for (const [key, row] of rows) {
      const before = this.#rows.get(key);
      // An unchanged document stays the same object, so that nothing needs to be rendered for it.
      if (before && JSON.stringify(before) === JSON.stringify(row)) rows.set(key, before);
      else this.#changed.set(key, row.id);
    }
    this.#rows = rows;
    this.#ordered = null;
  }

  // -- the connection ---------------------------------------------------------------------------

  #address() {
    const url = new URL(this.url, globalThis.document?.baseURI ?? globalThis.location?.href);
    // A new EventSource cannot send the header Last-Event-ID, which wins over this when both come.
    if (this.#lastEventId) url.searchParams.set("last_event_id", this.#lastEventId);
    return url.href;
  }

  #open() {
    this.#stop();
    const Source = this.#options.EventSource ?? globalThis.EventSource;
    const source = new Source(this.#address(), { withCredentials: this.#options.withCredentials });
    this.#source = source;
    this.#mayResume = this.#lastEventId !== "";
    // `event: open` and `event: error` in the stream have data; the browser's own events have none.
    source.addEventListener("open", (event) => {
      if (source !== this.#source || event.data !== undefined) return;
      this.#opened = true;
      this.#attempt = 0;
      this.#pending = null; // half a snapshot of the connection before
      if (!this.#lastEventId) this.#begin();
      const status = this.#lastEventId ? "live" : "loading";
      this.#settleTimer = setTimeout(() => this.#become(status), SETTLED);
    });
    source.addEventListener("error", (event) => {
      if (source !== this.#source || event.data !== undefined) return;
      this.#lost(source);
    });
    for (const type of KNOWN) {
      source.addEventListener(type, (event) => source === this.#source && this.#receive(event));
    }
    for (const type of this.#listeners.keys()) this.#listen(source, type);
  }

  // Event types that this module does not know are handed on as they are.
  #listen(source, type) {
    if (KNOWN.has(type) || ["status", "change", "open", "error"].includes(type)) return;
    source.addEventListener(type, ({ data, lastEventId }) => {
      if (source === this.#source) this.#emit(type, { type, data: parsed(data), lastEventId });
    });
  }

  #stop() {
    this.#source?.close();
    this.#source = null;
    this.#probe?.abort();
    this.#probe = null;
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#settleTimer);
  }

  #lost(source) {
    clearTimeout(this.#settleTimer);
    this.#become(this.#opened ? "reconnecting" : "connecting", this.#error);
    if (source.readyState === 2) this.#askWhy(); // closed for good, as far as the browser goes
    // The browser reconnects by itself, but with an id that a reset has made worthless.
    else if (this.#mayResume && !this.#lastEventId) this.#later();
  }

  // EventSource does not tell the status that closed it, so ask again and look.
  async #askWhy() {
    this.#stop();
    const probe = (this.#probe = new AbortController());
    const credentials = this.#options.withCredentials ? "include" : "same-origin";
    const headers = { Accept: "text/event-stream" };
    let response = null;
    let error = null;
    try {
      response = await fetch(this.#address(), {
        headers,
        credentials,
        cache: "no-store",
        signal: probe.signal,
      });
    } catch (cause) {
      error = new Error(`${this.url} cannot be reached`, { cause });
    }
    if (probe !== this.#probe) return; // close(), or a reconnect meanwhile
    probe.abort(); // the body is an endless stream
    if (!response) return this.#later(error);
    const { status } = response;
    if (status === 204) return this.#become("closed"); // HTTP for: do not come back
    if (status === 200) {
      const type = response.headers.get("Content-Type") ?? "nothing";
      if (type.startsWith("text/event-stream")) return this.#later();
      error = new Error(`${this.url} answered ${type} instead of text/event-stream`);
      return this.#become("failed", Object.assign(error, { status }));
    }
    error = Object.assign(new Error(`${this.url} answered ${status}`), { status });
    if (status === 400 && this.#lastEventId) {
      this.#lastEventId = ""; // the position means nothing to this server (any more): start over
      return this.#later(error);
    }
    if (status >= 500 || [408, 425, 429].includes(status)) return this.#later(error);
    this.#become("failed", error);
  }

  #later(error = this.#error) {
    this.#stop();
    this.#become(this.#opened ? "reconnecting" : "connecting", error);
    const delay = Math.min(this.#options.retry * 2 ** this.#attempt, LONGEST_DELAY);
    this.#attempt += 1;
    // Jitter, so that a restarted server does not meet all its pages in the same instant.
    this.#retryTimer = setTimeout(() => this.#open(), delay * (0.5 + Math.random() / 2));
  }

  /** Open the connection anew, from the last position: also after it failed. */
  reconnect() {
    if (this.#ended) return;
    this.#attempt = 0;
    this.#open();
    this.#become(this.#opened ? "reconnecting" : "connecting");
  }

  /** End the connection for good; the documents stay readable. */
  close() {
    if (this.#ended) return;
    this.#ended = true;
    this.#leaving.abort();
    clearInterval(this.#clock);
    this.#stop();
    this.#become("closed");
  }

  [Symbol.dispose ?? Symbol("dispose")]() {
    this.close();
  }

  // -- the page ---------------------------------------------------------------------------------

  #watchThePage() {
    const { signal } = this.#leaving;
    const listen = (target, type, fn) => target?.addEventListener?.(type, fn, { signal });
    const revive = () => {
      if (this.#status !== "failed" && this.#status !== "closed") this.reconnect();
    };
    // A sleeping machine's connection is often dead without either side having been told.
    const checkTheClock = () => {
      const slept = Date.now() - this.#awake - TICK > SLEPT;
      this.#awake = Date.now();
      if (slept) revive();
    };
    this.#clock = setInterval(checkTheClock, TICK);
    listen(globalThis.document, "visibilitychange", checkTheClock);
    listen(globalThis, "online", revive);
    // A page in the back/forward cache must hold no connection; https://web.dev/articles/bfcache
    listen(globalThis, "pagehide", () => this.#stop());
    listen(globalThis, "pageshow", (event) => {
      this.#awake = Date.now();
      if (event.persisted) revive();
    });
  }
}

/** Ids are strings mostly, but any JSON: equal objects are equal ids, whatever their key order. */
function keyOf(id) {
  return typeof id === "object" && id !== null ? `\0${canonical(id)}` : id;
}

function canonical(value) {
  return JSON.stringify(value, (_, part) =>
    part && typeof part === "object" && !Array.isArray(part)
      ? Object.fromEntries(Object.entries(part).sort(([a], [b]) => (a < b ? -1 : 1)))
      : part,
  );
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** One listener's mistake is reported like any uncaught error, and does not stop the others. */
function call(fn, ...args) {
  try {
    fn(...args);
  } catch (error) {
    if (globalThis.reportError) reportError(error);
    else setTimeout(() => Promise.reject(error));
  }
}
