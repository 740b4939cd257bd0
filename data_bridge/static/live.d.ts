/** A live query as a keyed collection: the documents that match now, and every change after. */

/** What identifies a document: the `id` as the server's model serialises it. */
export type Id = string | number | boolean | null | { readonly [field: string]: unknown };

/**
 * - `connecting`: there was no connection yet
 * - `loading`: a snapshot is arriving (`sent` of `total` documents)
 * - `live`: the documents are the server's, and changes arrive
 * - `reconnecting`: the connection was lost and is being renewed; the documents are the last known
 * - `closed`: ended by `close()`, or by the server with 204
 * - `failed`: refused for good (`error` says why, `error.status` the HTTP status)
 */
export type Status = "connecting" | "loading" | "live" | "reconnecting" | "closed" | "failed";

export type Operation = "insert" | "update" | "replace" | "delete" | "enter" | "leave";

export interface ConnectionOptions {
  /** Send cookies and HTTP authentication to another origin too. Default: false. */
  withCredentials?: boolean;
  /** The first delay, in milliseconds, when the browser has given up; it doubles up to 30 s. Default: 1000. */
  retry?: number;
  /** Another implementation of EventSource. */
  EventSource?: typeof EventSource;
}

export interface CollectionOptions<T> {
  /** The field of a document that holds its id. Default: "id". */
  key?: string;
  /** The order of iteration and of `documents`. Default: the order of arrival. */
  sort?: (a: T, b: T) => number;
}

export interface LiveOptions<T> extends ConnectionOptions, CollectionOptions<T> {}

export interface LiveError extends Error {
  /** The HTTP status, when the server answered. */
  readonly status?: number;
}

/** A change, as a listener gets it after it has been applied. */
export interface ChangeEvent<T> {
  readonly type: Operation;
  /** Where it happened; only of `liveAll`. */
  readonly collection?: string;
  readonly operation: string;
  readonly id: Id;
  /** null for `delete` and `leave`, and for a document that does not fit the server's model. */
  readonly document: T | null;
  /** The document before this change, if the collection had it. */
  readonly previous: T | null;
  readonly lastEventId: string;
}

export interface SnapshotEvent<T> {
  readonly type: "snapshot";
  /** Whose documents they are; only of `liveAll`. */
  readonly collection?: string;
  readonly documents: readonly T[];
  readonly sent: number;
  readonly total: number;
}

export interface ReadyEvent {
  readonly type: "ready";
  readonly total?: number;
  readonly lastEventId: string;
}

export interface ResetEvent {
  readonly type: "reset";
  readonly reason: string;
}

export interface StatusEvent {
  readonly type: "status";
  readonly status: Status;
  readonly error: LiveError | null;
}

/** An event of a type that this module does not know; `data` is parsed if it is JSON. */
export interface OtherEvent {
  readonly type: string;
  readonly data: unknown;
  readonly lastEventId: string;
}

/** One state of a collection; the same object until something changes. */
export interface Snapshot<T> {
  readonly documents: readonly T[];
  readonly status: Status;
  readonly error: LiveError | null;
  readonly sent: number;
  readonly total: number | null;
  readonly version: number;
}

export type Unsubscribe = () => void;

export interface LiveCollection<T> extends Iterable<[Id, T]> {
  readonly url: string;
  readonly size: number;
  readonly status: Status;
  /** Why the status is `failed`, or what the last attempt of a `reconnecting` one met. */
  readonly error: LiveError | null;
  /** Documents of the current snapshot received so far. */
  readonly sent: number;
  /** Documents of the current snapshot altogether; null before the first chunk. */
  readonly total: number | null;
  /** Grows with every change of documents or status. */
  readonly version: number;
  /** The position that the documents are at; empty before the first `ready`. */
  readonly lastEventId: string;
  /** The documents in order: the same frozen array until one of them changes. */
  readonly documents: readonly T[];

  get(id: Id): T | undefined;
  has(id: Id): boolean;
  keys(): IterableIterator<Id>;
  values(): IterableIterator<T>;
  entries(): IterableIterator<[Id, T]>;
  forEach(fn: (document: T, id: Id, collection: LiveCollection<T>) => void, thisArg?: unknown): void;
  snapshot(): Snapshot<T>;

  /**
   * Render: `fn` is called in the next frame with everything, then at most once per animation
   * frame (in a hidden tab: from a timer) when documents or status have changed. `changed` holds
   * the ids of documents that appeared, changed or went; it is empty for a change of status alone.
   */
  subscribe(fn: (collection: LiveCollection<T>, changed: Set<Id>) => void): Unsubscribe;

  /** Every single event, after it was applied; `change` is any of the six operations. */
  on(type: Operation | "change", fn: (event: ChangeEvent<T>) => void): Unsubscribe;
  on(type: "snapshot", fn: (event: SnapshotEvent<T>) => void): Unsubscribe;
  on(type: "ready", fn: (event: ReadyEvent) => void): Unsubscribe;
  on(type: "reset", fn: (event: ResetEvent) => void): Unsubscribe;
  on(type: "status", fn: (event: StatusEvent) => void): Unsubscribe;
  on(type: string, fn: (event: OtherEvent) => void): Unsubscribe;

  /** Open the connection anew, from the last position; also after `failed`, e.g. signed in again. */
  reconnect(): void;
  /** End the connection for good; the documents stay readable. Of `liveAll`: that of all. */
  close(): void;
}

/** Several collections on one connection; `C` has their documents by the collections' names. */
export interface LiveConnection<C> {
  readonly url: string;
  readonly status: Status;
  readonly error: LiveError | null;
  /** The position that all the documents are at. */
  readonly lastEventId: string;

  /** One of the collections: the same object each time. The first call gives the options. */
  collection<N extends keyof C & string>(name: N, options?: CollectionOptions<C[N]>): LiveCollection<C[N]>;

  /** Render: as of a collection, once per frame in which any of them, or the status, has changed. */
  subscribe(fn: (connection: LiveConnection<C>) => void): Unsubscribe;

  /** Every single event of any collection, after it was applied. */
  on(type: Operation | "change", fn: (event: ChangeEvent<C[keyof C]>) => void): Unsubscribe;
  on(type: "snapshot", fn: (event: SnapshotEvent<C[keyof C]>) => void): Unsubscribe;
  on(type: "ready", fn: (event: ReadyEvent) => void): Unsubscribe;
  on(type: "reset", fn: (event: ResetEvent) => void): Unsubscribe;
  on(type: "status", fn: (event: StatusEvent) => void): Unsubscribe;
  on(type: string, fn: (event: OtherEvent) => void): Unsubscribe;

  /** Open the connection anew, from the last position; also after `failed`. */
  reconnect(): void;
  /** End the connection for good; the documents stay readable. */
  close(): void;
}

/**
 * Open the live query at `url`.
 *
 *     const orders = live<Order>("/orders/live");
 */
export function live<T = Record<string, unknown>>(
  url: string | URL,
  options?: LiveOptions<T>,
): LiveCollection<T>;

/**
 * Open the live queries that `merge()` on the server puts on one connection at `url`.
 *
 *     const shop = liveAll<{ orders: Order; customers: Customer }>("/shop/live");
 *     const orders = shop.collection("orders");
 */
export function liveAll<C = Record<string, Record<string, unknown>>>(
  url: string | URL,
  options?: ConnectionOptions,
): LiveConnection<C>;
