import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import type { ProtoGrpcType } from "./generated/inference.js";

/** A field of a message, as the protos describe it. */
export interface Field {
  name: string;
  label: string;
  type: string;
  typeName: string;
}

const PROTOS = join(dirname(dirname(fileURLToPath(import.meta.url))), "proto");
const LOADED = loadPackageDefinition(
  loadSync("headrace/v1/inference.proto", { includeDirs: [PROTOS], longs: Number, enums: String, oneofs: true, defaults: true }),
) as unknown as ProtoGrpcType;
const TYPES = LOADED.headrace.v1 as unknown as Record<string, { type: { field?: Field[]; value?: { name: string }[] } }>;

/** The service's own client. */
export const Inference = LOADED.headrace.v1.Inference;

/** The fields of a message, in camelCase. */
export function fieldsOf(typeName: string): Field[] {
  return TYPES[typeName]?.type.field ?? [];
}

/** The values of an enum by their short names, "json_schema" for CONSTRAINT_KIND_JSON_SCHEMA; without the unspecified one. */
export function valuesOf(typeName: string): Map<string, string> {
  const names = (TYPES[typeName]?.type.value ?? []).map((value) => value.name);
  const prefix = names[0]?.replace(/UNSPECIFIED$/, "") ?? "";
  return new Map(names.slice(1).map((name) => [name.slice(prefix.length).toLowerCase(), name]));
}
