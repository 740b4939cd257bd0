// better-sse on Node's own HTTP server: one shared change stream, or one for every client.
//     node server.mjs shared|per-client PORT URI
import { createServer } from "node:http"
import { createChannel, createSession } from "better-sse"
import { MongoClient } from "mongodb"

const [mode, port, uri] = process.argv.slice(2)
// Its pool has 100 connections; a stream for each of 100 clients would leave nothing for the rest.
const client = new MongoClient(uri, { maxPoolSize: 1000 })
await client.connect()
const orders = client.db("shop").collection("orders")

const eventOf = (change) => {
  const { _id, ...rest } = change.fullDocument
  return {
    operation: change.operationType,
    id: change.documentKey._id,
    document: { id: _id, ...rest },
  }
}

// Resolves when the cursor is open on the server.
const watch = async (each) => {
  const stream = orders.watch()
  const opened = new Promise((resolve) => stream.once("init", resolve))
  stream.on("change", each)
  stream.on("error", () => {})
  await Promise.race([opened, new Promise((resolve) => setTimeout(resolve, 1000))])
  return stream
}

const channel = createChannel()
if (mode === "shared") {
  await watch((change) =>
    channel.broadcast(eventOf(change), change.operationType, { eventId: change._id._data }),
  )
}

createServer(async (request, response) => {
  const session = await createSession(request, response)
  if (mode === "shared") {
    channel.register(session)
    return
  }
  const stream = await watch((change) =>
    session.push(eventOf(change), change.operationType, change._id._data),
  )
  session.on("disconnected", () => stream.close().catch(() => {}))
}).listen(Number(port), "127.0.0.1", 2048)

process.on("SIGTERM", () => process.exit(0))
process.stdin.resume().on("end", () => process.exit(1)) // with the parent, however it ends
