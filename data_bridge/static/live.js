/**
 * A live query as a keyed collection: the documents that match now, and every change after.
 *
 *     import { live, liveAll } from "/data-bridge/live.js";
 *     const orders = live("/orders/live", { sort: (a, b) => b.created.localeCompare(a.created) });
 *     orders.subscribe(() => render(orders.documents));
 *
 *     const shop = liveAll("/shop/live"); // several collections, one connection
 *     const customers = shop.collection("customers");
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
const OURS = new Set(["status", "change", "open", "error"]); // never handed on from a stream
const HEED = Symbol("heed"); // between the classes of this module
const TICK = 20_000; // how often the clock is looked at, in milliseconds
const SLEPT = 60_000; // a clock this far ahead of its timer was asleep; throttled tabs tick once a minute
const LONGEST_DELAY = 30_000;
const SETTLED = 200; // an open connection that lasts this long is one: a server that is up but has
// no database answers with an empty stream, again and again

/** Open the live query at `url`; see live.d.ts for the options. */
export function live(url, options) {
  return new LiveConnection(url, options, false).collection("", options);
}

/** Open several live queries on one connection, as `merge()` on the server makes it. */
export function liveAll(url, options) {
  return new LiveConnection(url, options, true);
}

// -- what a page sees -----------------------------------------------------------------------------

class LiveCollection {
  #rows;
  #connection;

  constructor(rows, connection) {
    this.#rows = rows;
    this.#connection = connection;
    rows.frames = new Frames(() => {
      const changed = new Set(rows.changed.values());
      rows.changed.clear();
      return (isNew) => [this, isNew ? new Set([...this.keys(), ...changed]) : changed];
    });
  }

  get url() {
    return this.#connection.url;
  }

  get size() {
    return this.#rows.now.size;
  }

  get(id) {
    return this.#rows.now.get(keyOf(id))?.document;
  }

  has(id) {
    return this.#rows.now.has(keyOf(id));
  }

  *keys() {
    for (const row of this.#rows.inOrder()) yield row.id;
  }

  *values() {
    for (const row of this.#rows.inOrder()) yield row.document;
  }

  *entries() {
    for (const row of this.#rows.inOrder()) yield [row.id, row.document];
  }

  [Symbol.iterator]() {
    return this.entries();
  }

  forEach(fn, thisArg) {
    for (const [id, document] of this) fn.call(thisArg, document, id, this);
  }

  get documents() {
    const ordered = this.#rows.inOrder();
    return (ordered.documents ??= Object.freeze(ordered.map((row) => row.document)));
  }

  get status() {
    return this.#connection.status;
  }

  get error() {
    return this.#connection.error;
  }

  get lastEventId() {
    return this.#connection.lastEventId;
  }

  get sent() {
    return this.#rows.sent;
  }

  get total() {
    return this.#rows.total;
  }

  get version() {
    return this.#rows.version;
  }

  /** All of it as one frozen object, the same one until something changes. */
  snapshot() {
    return (this.#rows.view ??= Object.freeze({
      documents: this.documents,
      status: this.status,
      error: this.error,
      sent: this.sent,
      total: this.total,
      version: this.version,
    }));
  }

  /** Call `fn(collection, changed)` in the next frame, then once for each frame with changes. */
  subscribe(fn) {
    return this.#rows.frames.subscribe(fn);
  }

  /** Call `fn(event)` for each single event of a type, after it has been applied. */
  on(type, fn) {
    this.#connection[HEED](type);
    return this.#rows.listeners.add(type, fn);
  }

  /** Open the connection anew, from the last position: also after it failed. */
  reconnect() {
    this.#connection.reconnect();
  }

  /** End the connection for good; the documents stay readable. */
  close() {
    this.#connection.close();
  }

  [Symbol.dispose ?? Symbol("dispose")]() {
    this.close();
  }
}

// -- what it has ----------------------------------------------------------------------------------

/** The documents of one collection, and those of a snapshot of it that is not complete yet. */
class Rows {
  now = new Map(); // key -> { id, document }: what the page sees
  next = null; // the same, of a snapshot on its way
  changed = new Map(); // key -> id, since the last frame
  listeners = new Listeners();
  frames; // made by the collection, which its subscribers get
  options = { key: "id" };
  sent = 0;
  total = null;
  version = 0;
  view = null;
  #ordered = null; // the rows in order, until one of them changes

  inOrder() {
    if (!this.#ordered) {
      this.#ordered = [...this.now.values()];
      const { sort } = this.options;
      if (sort) this.#ordered.sort((a, b) => sort(a.document, b.document));
    }
    return this.#ordered;
  }

  /** Something is different: the version, and what is shown with the next frame. */
  touch() {
    this.version += 1;
    this.view = null;
    this.frames.schedule();
  }

  reorder() {
    this.#ordered = null;
  }

  begin() {
    this.next = new Map();
    this.sent = 0;
    this.total = null;
  }

  collect({ documents, sent, total }) {
    for (const document of documents) {
      const id = document[this.options.key];
      this.next.set(keyOf(id), { id, document });
    }
    this.sent = sent;
    this.total = total;
  }

  /** Put the collected snapshot in the place of what the page sees. */
  swap() {
    const [before, after] = [this.now, this.next];
    this.next = null;
    if (!after) return;
    for (const [key, row] of before) if (!after.has(key)) this.changed.set(key, row.id);
    for (const [key, row] of after) {
      const known = before.get(key);
      // An unchanged document stays the same object, so that nothing needs to be rendered for it.
      if (known && JSON.stringify(known) === JSON.stringify(row)) after.set(key, known);
      else this.changed.set(key, row.id);
    }
    this.now = after;
    this.reorder();
  }

  /** Apply one change, and return the document that was there before. */
  change(type, { id, document }) {
    const rows = this.next ?? this.now;
    const key = keyOf(id);
    const previous = rows.get(key)?.document ?? null;
    if (type === "delete" || type === "leave") rows.delete(key);
    // Without a document it does not fit the model or is gone already: its last known state stays.
    else if (document != null) rows.set(key, { id, document });
    if (rows === this.now) {
      this.changed.set(key, id);
      this.reorder();
    }
    return previous;
  }
}

// -- where it comes from --------------------------------------------------------------------------

class LiveConnection {
  #several; // collections, each event naming its own
  #collections = new Map(); // name -> { rows, collection }
  #listeners = new Listeners();
  #frames = new Frames(() => () => [this]);
  #heeded = new Set(); // event types that this module does not know
  #source = null;
  #opened = false; // there was a connection before
  #ended = false; // close() was called
  #loading = false; // a snapshot is on its way, or about to be
  #chunks = 0; // of it
  #attempt = 0;
  #retryTimer;
  #settleTimer;
  #probe;
  #awake = Date.now();
  #clock;
  #leaving = new AbortController();
  #options;
  #status = "connecting";
  #error = null;
  #lastEventId = "";

  constructor(url, options = {}, several) {
    this.url = String(url);
    this.#several = several;
    this.#options = { retry: 1000, withCredentials: false, ...options };
    this.#open();
    this.#watchThePage();
  }

  get status() {
    return this.#status;
  }

  get error() {
    return this.#error;
  }

  get lastEventId() {
    return this.#lastEventId;
  }

  /** The documents of one of the collections; `options` are `sort` and `key`. */
  collection(name, options) {
    const { rows, collection } = this.#collections.get(name) ?? this.#made(name);
    if (options) {
      rows.options = { ...rows.options, ...options };
      rows.reorder();
    }
    return collection;
  }

  #made(name) {
    const rows = new Rows();
    const made = { rows, collection: new LiveCollection(rows, this) };
    if (this.#loading) rows.begin();
    this.#collections.set(name, made);
    return made;
  }

  #rowsOf(data) {
    if (this.#several !== (data.collection !== undefined)) {
      throw new Error(`this stream is one for ${this.#several ? "live()" : "liveAll()"}`);
    }
    const name = data.collection ?? "";
    return (this.#collections.get(name) ?? this.#made(name)).rows;
  }

  get #all() {
    return [...this.#collections.values()].map(({ rows }) => rows);
  }

  // -- listening --------------------------------------------------------------------------------

  /** Call `fn(connection)` in the next frame, then once for each frame in which anything changed. */
  subscribe(fn) {
    return this.#frames.subscribe(fn);
  }

  /** Call `fn(event)` for each single event of a type, of whatever collection. */
  on(type, fn) {
    this[HEED](type);
    return this.#listeners.add(type, fn);
  }

  #emit(type, event, rows = this.#all) {
    for (const { listeners } of rows) listeners.emit(type, event);
    this.#listeners.emit(type, event);
  }

  #touch(rows = this.#all) {
    for (const each of rows) each.touch();
    this.#frames.schedule();
  }

  #become(status, error = null) {
    const before = this.#status;
    this.#status = status;
    this.#error = error;
    this.#touch();
    if (status !== before) this.#emit("status", { type: "status", status, error });
  }

  // -- the stream -------------------------------------------------------------------------------

  #receive({ type, data: text, lastEventId }) {
    clearTimeout(this.#settleTimer);
    let rows;
    let applied;
    try {
      const data = JSON.parse(text);
      if (type === "snapshot" || CHANGES.includes(type)) rows = [this.#rowsOf(data)];
      applied = { type, ...data, ...this.#apply(type, data, lastEventId, rows) };
    } catch (cause) {
      // A change that cannot be read is a change lost: better no rows follow than wrong ones.
      const reason = `${this.url} sent a "${type}" that cannot be read: ${cause.message}`;
      this.#stop();
      this.#become("failed", new Error(reason, { cause }));
      return;
    }
    this.#emit(type, applied, rows);
    if (CHANGES.includes(type)) this.#emit("change", applied, rows);
  }

  #apply(type, data, lastEventId, [rows] = []) {
    if (type === "snapshot") {
      if (!this.#loading) this.#begin();
      this.#chunks += 1;
      rows.collect(data);
      this.#become("loading");
      return {};
    }
    if (type === "reset") {
      this.#begin(); // the rows stay those of the last id, which is asked for again after a cut
      this.#become("loading");
      return {};
    }
    if (type === "ready") {
      this.#lastEventId = lastEventId;
      this.#swap();
      this.#become("live");
      return { lastEventId };
    }
    if (this.#loading && !this.#chunks) this.#swap(); // a stream of changes alone: no snapshot
    const previous = rows.change(type, data);
    if (!this.#loading) {
      this.#lastEventId = lastEventId;
      if (this.#status === "live") this.#touch([rows]);
      else this.#become("live");
    }
    return { previous, lastEventId };
  }

  #begin() {
    this.#loading = true;
    this.#chunks = 0;
    for (const rows of this.#all) rows.begin();
  }

  #swap() {
    this.#loading = false;
    for (const rows of this.#all) rows.swap();
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
    // `event: open` and `event: error` in the stream have data; the browser's own events have none.
    source.addEventListener("open", (event) => {
      if (source !== this.#source || event.data !== undefined) return;
      this.#opened = true;
      this.#attempt = 0;
      this.#loading = false;
      for (const rows of this.#all) rows.next = null; // half a snapshot of the connection before
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
    for (const type of this.#heeded) this.#hear(source, type);
  }

  // Event types that this module does not know are handed on as they are.
  [HEED](type) {
    if (KNOWN.has(type) || OURS.has(type) || this.#heeded.has(type)) return;
    this.#heeded.add(type);
    if (this.#source) this.#hear(this.#source, type);
  }

  #hear(source, type) {
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

// -- small things ---------------------------------------------------------------------------------

/** Calls its subscribers once for each animation frame in which something was scheduled. */
class Frames {
  #subscribers = new Set();
  #prepare; // at the start of a frame; gives what gives the arguments of a subscriber
  #frame;
  #timer;

  constructor(prepare) {
    this.#prepare = prepare;
  }

  subscribe(fn) {
    const subscriber = { fn, isNew: true };
    this.#subscribers.add(subscriber);
    this.schedule();
    return () => this.#subscribers.delete(subscriber);
  }

  // A hidden tab runs no animation frames, and a tab may be hidden after it asked for one.
  schedule() {
    if (this.#timer !== undefined) return;
    const visible = globalThis.document?.visibilityState === "visible";
    if (visible) this.#frame = requestAnimationFrame(() => this.#flush());
    this.#timer = setTimeout(() => this.#flush(), visible ? 1000 : 100);
  }

  #flush() {
    if (this.#frame !== undefined) cancelAnimationFrame(this.#frame);
    clearTimeout(this.#timer);
    this.#frame = this.#timer = undefined;
    const argumentsOf = this.#prepare();
    for (const subscriber of [...this.#subscribers]) {
      if (!this.#subscribers.has(subscriber)) continue; // another one unsubscribed it just now
      const { fn, isNew } = subscriber;
      subscriber.isNew = false;
      call(fn, ...argumentsOf(isNew));
    }
  }
}

class Listeners {
  #of = new Map(); // type -> functions

  add(type, fn) {
    const listeners = this.#of.get(type) ?? new Set();
    this.#of.set(type, listeners.add(fn));
    return () => listeners.delete(fn);
  }

  emit(type, event) {
    for (const fn of [...(this.#of.get(type) ?? [])]) call(fn, event);
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
