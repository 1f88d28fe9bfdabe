import { inspect } from "node:util";
import { type Field, fieldsOf, valuesOf } from "./protos.js";

/** A message under way: what is put there is checked. */
export type Target = Record<string, unknown>;
/** A message by its type's name. */
export type Place = readonly [typeName: string, target: Target];

/** Fields that calls have arguments for. */
const ARGUMENTS = new Set(["prompt", "text", "chat", "messages", "tokenIds", "inputs"]);
/** Text fields that hold JSON: an object or an array is written as such. */
const JSON_FIELDS = new Set(["ChatPrompt.tools", "ChatPrompt.templateKwargs", "ChatMessage.toolCalls", "Constraint.source"]);
const INTEGERS: Record<string, [low: bigint, high: bigint]> = {
  TYPE_INT32: [-(2n ** 31n), 2n ** 31n - 1n],
  TYPE_SINT32: [-(2n ** 31n), 2n ** 31n - 1n],
  TYPE_UINT32: [0n, 2n ** 32n - 1n],
  TYPE_FIXED64: [0n, 2n ** 64n - 1n],
};
const OTHERS: Record<string, [type: string, words: string]> = {
  TYPE_FLOAT: ["number", "a number"],
  TYPE_BOOL: ["boolean", "a boolean"],
  TYPE_STRING: ["string", "a string"],
};

/**
 * Put fields where they belong, in one of several messages. protobufjs would pass over a name that there is not, and bend a value
 * of another type until it fits.
 *
 * @throws TypeError: there is no such field, or its value is of another type
 * @throws RangeError: a value is out of its field's range
 */
export function fill(given: object, places: readonly Place[], path = ""): void {
  const setters = new Map<string, (value: unknown, where: string) => void>();
  for (const [typeName, target] of places) {
    for (const field of fieldsOf(typeName)) {
      if (!path && ARGUMENTS.has(field.name)) continue;
      setters.set(field.name, (value, where) => {
        if (field.name in target) throw new TypeError(`${where} is given twice`);
        target[field.name] = valueOf(typeName, field, value, where);
      });
    }
  }
  for (const [name, value] of Object.entries(given)) {
    const set = setters.get(camelCase(name));
    if (!set) {
      const names = [...setters.keys()].sort().join(", ");
      throw new TypeError(`there is no field ${name}${path && ` in ${path}`}; there are ${names}`);
    }
    if (value !== undefined && value !== null) set(value, path ? `${path}.${name}` : name);
  }
}

/** Put one field, by its own name. */
export function put(typeName: string, target: Target, name: string, value: unknown, path: string): void {
  const field = fieldsOf(typeName).find((one) => one.name === name);
  if (!field) throw new TypeError(`there is no field ${name} in ${typeName}`);
  target[name] = valueOf(typeName, field, value, path);
}

/** A text or token ids, as the messages with `text` and `tokenIds` have them. */
export function inputOf(value: unknown, path: string): Target {
  const target: Target = {};
  if (typeof value === "string") return { text: value };
  put("TokenIds", target, "ids", value, path);
  return { tokenIds: target };
}

function valueOf(typeName: string, field: Field, value: unknown, path: string): unknown {
  const full = `${typeName}.${field.name}`;
  if (field.label === "LABEL_REPEATED") {
    if (!Array.isArray(value)) throw new TypeError(`${path} must be an array; got ${shown(value)}`);
    return value.map((one, index) => single(field, one, `${path}.${index}`));
  }
  if (JSON_FIELDS.has(full) && typeof value === "object") {
    return asJson(full === "ChatMessage.toolCalls" ? callsOf(value, path) : value, path);
  }
  return single(field, value, path);
}

function single(field: Field, value: unknown, path: string): unknown {
  if (field.type === "TYPE_MESSAGE") return messageOf(field.typeName, value, path);
  if (field.type === "TYPE_ENUM") return enumOf(field.typeName, value, path);
  const range = INTEGERS[field.type];
  if (range) return integerOf(range, value, path);
  const [type, words] = OTHERS[field.type] ?? [];
  if (typeof value !== type) throw new TypeError(`${path} must be ${words}; got ${shown(value)}`);
  return value;
}

function messageOf(typeName: string, value: unknown, path: string): Target {
  const name = typeName.split(".").at(-1) ?? "";
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    const names = fieldsOf(name).map((field) => field.name);
    throw new TypeError(`${path} must be an object of ${names.sort().join(", ")}; got ${shown(value)}`);
  }
  const target: Target = {};
  fill(value, [[name, target]], path);
  return target;
}

function enumOf(typeName: string, value: unknown, path: string): string {
  const values = valuesOf(typeName.split(".").at(-1) ?? "");
  const found = [...values].find(([short, name]) => value === short || value === name)?.[1];
  if (!found) throw new RangeError(`${path} must be one of ${[...values.keys()].join(", ")}; got ${shown(value)}`);
  return found;
}

/** An integer; one that a number cannot hold may be a bigint or decimal digits, and is handed on as digits. */
function integerOf([low, high]: [bigint, bigint], value: unknown, path: string): number | string {
  const refusal = `${path} must be an integer from ${low} to ${high}; got ${shown(value)}`;
  const isLong = high > BigInt(Number.MAX_SAFE_INTEGER);
  const isWide = isLong && (typeof value === "bigint" || (typeof value === "string" && /^\d+$/.test(value)));
  if (!isWide && !(typeof value === "number" && Number.isInteger(value))) throw new TypeError(refusal);
  const exact = BigInt(value as number | bigint | string);
  if (exact < low || exact > high) throw new RangeError(refusal);
  if (typeof value === "number" && !Number.isSafeInteger(value)) {
    throw new RangeError(`${path} is a number that is not exact: give a bigint`);
  }
  return isWide ? String(exact) : Number(exact);
}

function callsOf(value: unknown, path: string): object[] {
  if (!Array.isArray(value)) throw new TypeError(`${path} must be an array of tool calls; got ${shown(value)}`);
  return value.map((call: unknown, index) => {
    const { id, name, arguments: text, ...rest } = (call ?? {}) as Record<string, unknown>;
    if ([id, name, text].some((part) => typeof part !== "string") || Object.keys(rest).length > 0) {
      throw new TypeError(`${path}.${index} must be an object of id, name and arguments, which are strings; got ${shown(call)}`);
    }
    return { id, type: "function", function: { name, arguments: text } };
  });
}

function asJson(value: unknown, path: string): string {
  try {
    return JSON.stringify(value);
  } catch (error) {
    throw new TypeError(`${path} must be what JSON can say: ${(error as Error).message}`);
  }
}

/** The protos' own spelling names a field too: max_tokens is maxTokens. */
function camelCase(name: string): string {
  return name.replace(/(?!^)_([a-z])/g, (_, letter: string) => letter.toUpperCase());
}

/** A value in an error, cut where it is long. */
function shown(value: unknown): string {
  return inspect(value, { depth: 1, breakLength: Infinity, maxArrayLength: 5, maxStringLength: 60 });
}
