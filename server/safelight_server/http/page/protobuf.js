// Protobuf's wire format, for the messages of messages.js.
// A message is a plain object with the contract's names. 64-bit integers are BigInt. What is absent is undefined where
// the contract tells absent from zero, else the zero of its type.
import { MESSAGES } from "./messages.js";

const VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5;
const WIRE_TYPES = { string: BYTES, bytes: BYTES, float: FIXED32, bool: VARINT, int32: VARINT, int64: VARINT, uint64: VARINT };
const ZEROS = { string: "", bytes: new Uint8Array(0), float: 0, bool: false, int32: 0, int64: 0n, uint64: 0n };
const utf8 = new TextEncoder();
const text = new TextDecoder("utf-8", { fatal: true });

/** The bytes of a message. Throws on a name that the message does not have. */
export function encode(name, message) {
  const fields = MESSAGES[name];
  const out = [];
  for (const [key, value] of Object.entries(message)) {
    if (value === undefined) continue;
    if (!fields[key]) throw new TypeError(`${name} has no field ${key}`);
    const [number, type, label] = fields[key];
    for (const one of label === "repeated" ? value : [value]) writeField(out, number, type, one);
  }
  return Uint8Array.from(out);
}

/** The message in some bytes. Fields that it does not know are passed over. Throws where the bytes are no message. */
export function decode(name, bytes) {
  const fields = MESSAGES[name];
  const message = {};
  const byNumber = new Map();
  for (const [key, [number, type, label]] of Object.entries(fields)) {
    byNumber.set(number, key);
    message[key] = label === "repeated" ? [] : label === "optional" ? undefined : ZEROS[type];
  }
  const reader = new Reader(bytes);
  while (!reader.done) {
    const tag = Number(reader.varint());
    const key = byNumber.get(tag >>> 3);
    const wireType = tag & 7;
    if (key === undefined) {
      reader.skip(wireType);
      continue;
    }
    const [, type, label] = fields[key];
    const expected = WIRE_TYPES[type] ?? BYTES;
    if (wireType === expected) {
      const value = reader.value(type);
      if (label === "repeated") message[key].push(value);
      else message[key] = value;
    } else if (label === "repeated" && wireType === BYTES) {  // packed
      const packed = new Reader(reader.bytes());
      while (!packed.done) message[key].push(packed.value(type));
    } else {
      throw new RangeError(`${name}.${key} has wire type ${wireType}`);
    }
  }
  return message;
}

function writeField(out, number, type, value) {
  writeVarint(out, BigInt(number << 3 | (WIRE_TYPES[type] ?? BYTES)));
  if (type === "float") {
    const bytes = new Uint8Array(4);
    new DataView(bytes.buffer).setFloat32(0, value, true);
    out.push(...bytes);
  } else if (WIRE_TYPES[type] === VARINT) {
    writeVarint(out, BigInt.asUintN(64, BigInt(value)));  // negative numbers take ten bytes
  } else {
    const bytes = type === "string" ? utf8.encode(value) : type === "bytes" ? value : encode(type, value);
    writeVarint(out, BigInt(bytes.length));
    for (const byte of bytes) out.push(byte);
  }
}

function writeVarint(out, value) {
  for (; value > 0x7fn; value >>= 7n) out.push(Number(value & 0x7fn) | 0x80);
  out.push(Number(value));
}

class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  get done() {
    return this.at === this.data.length;
  }

  varint() {
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      const byte = this.take(1)[0];
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return BigInt.asUintN(64, value);
    }
    throw new RangeError("a varint has more than ten bytes");
  }

  bytes() {
    return this.take(Number(this.varint()));
  }

  take(length) {
    if (length > this.data.length - this.at) throw new RangeError("a message ends early");
    this.at += length;
    return this.data.subarray(this.at - length, this.at);
  }

  skip(wireType) {
    if (wireType === VARINT) this.varint();
    else if (wireType === FIXED64) this.take(8);
    else if (wireType === BYTES) this.bytes();
    else if (wireType === FIXED32) this.take(4);
    else throw new RangeError(`wire type ${wireType}`);
  }

  value(type) {
    switch (type) {
      case "string": return text.decode(this.bytes());
      case "bytes": return this.bytes();
      case "bool": return this.varint() !== 0n;
      case "int32": return Number(BigInt.asIntN(32, this.varint()));
      case "int64": return BigInt.asIntN(64, this.varint());
      case "uint64": return this.varint();
      case "float": {
        const four = this.take(4);
        return new DataView(four.buffer, four.byteOffset, 4).getFloat32(0, true);
      }
      default: return decode(type, this.bytes());
    }
  }
}
