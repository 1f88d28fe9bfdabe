// Streams a chat, cancels another one half-way, and shows the trace ids.
//
//     node clients/node/examples/stream-a-chat.mjs [HOST:PORT]

import { Client } from "headrace-client";

const client = new Client(process.argv[2] ?? "127.0.0.1:9000", { timeoutMs: 60_000 });

const answer = client.streamChat([{ role: "user", content: "What is the capital of Japan?" }], {
  sampling: { temperature: 0 },
  stopping: { maxTokens: 32 },
});
for await (const piece of answer) process.stdout.write(piece.text);
console.log(`\n[trace ${answer.traceId}, request ${answer.requestId}]`);

const story = client.streamChat([{ role: "user", content: "Tell a very long story." }], {
  stopping: { maxTokens: 1000, ignoreEos: true },
});
let numPieces = 0;
for await (const piece of story) {
  process.stdout.write(piece.text);
  numPieces += 1;
  if (numPieces === 10) break; // leaving the loop cancels
}
console.log(`\n[cancelled after ${numPieces} pieces, trace ${story.traceId}]`);
client.close();
