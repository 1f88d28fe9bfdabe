// Copies the public protos into this package and generates TypeScript types from them. In the repository they stand two folders up; in a
// published package they are already here.

import { cpSync, existsSync, mkdirSync, rmSync } from "node:fs";
import { execFileSync } from "node:child_process";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const source = join(root, "..", "..", "proto", "headrace", "v1");
const protos = ["common", "control", "tokenizer", "inference"];
const target = join(root, "proto", "headrace", "v1");

if (existsSync(source)) {
  rmSync(join(root, "proto"), { recursive: true, force: true });
  mkdirSync(target, { recursive: true });
  for (const name of protos) cpSync(join(source, `${name}.proto`), join(target, `${name}.proto`));
}
const generator = join(root, "node_modules", "@grpc", "proto-loader", "build", "bin", "proto-loader-gen-types.js");
execFileSync(
  process.execPath,
  [
    generator, "--longs=Number", "--enums=String", "--defaults", "--arrays", "--oneofs", "--includeComments", "--grpcLib=@grpc/grpc-js",
    "--importFileExtension=.js", "--includeDirs=proto", "--outDir=src/generated", "headrace/v1/inference.proto",
  ],
  { cwd: root, stdio: ["ignore", "ignore", "inherit"] },
);
