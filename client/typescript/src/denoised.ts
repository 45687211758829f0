// A connection to a daemon, and what its errors say.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

import type { ProtoGrpcType as Generations } from "../build/api/generation_service.js";
import type { ProtoGrpcType as Pipelines } from "../build/api/pipeline_service.js";
import type { GenerationServiceClient } from "../build/api/denoised/v1/GenerationService.js";
import type { PipelineServiceClient } from "../build/api/denoised/v1/PipelineService.js";
import type { ErrorInfo__Output } from "../build/api/google/rpc/ErrorInfo.js";
import type { Status__Output } from "../build/api/google/rpc/Status.js";

// gRPC itself stops at 4 MiB, which one large picture exceeds.
const MAX_MESSAGE_BYTES = 256 * 2 ** 20;
const DOMAIN = "denoised";
const DETAILS = "grpc-status-details-bin";

// From build/painter/src, where tsc puts this file.
const ROOT = fileURLToPath(new URL("../../../../..", import.meta.url));
const definitions = loader.loadSync(
  [
    "denoised/v1/pipeline_service.proto",
    "denoised/v1/generation_service.proto",
    "google/rpc/status.proto",
    "google/rpc/error_details.proto",
  ],
  {
    includeDirs: [`${ROOT}/protos`, `${ROOT}/client/googleapis`],
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  },
);

/** The services of one daemon. */
export class Daemon {
  readonly pipelines: PipelineServiceClient;
  readonly generations: GenerationServiceClient;

  constructor(target: string, credentials = transport()) {
    const options = {
      "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
      "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    };
    const api = grpc.loadPackageDefinition(definitions) as unknown as Pipelines & Generations;
    this.pipelines = new api.denoised.v1.PipelineService(target, credentials, options);
    this.generations = new api.denoised.v1.GenerationService(target, credentials, options);
  }

  close(): void {
    this.pipelines.close();
    this.generations.close();
  }
}

/**
 * Plain text, unless the environment names an authority to trust ("system" for the usual ones) or a certificate to show,
 * as PEM files.
 */
export function transport(): grpc.ChannelCredentials {
  const { DENOISED_CA: ca, DENOISED_CLIENT_CERT: certificate, DENOISED_CLIENT_KEY: key } = process.env;
  if (!ca && !certificate) return grpc.credentials.createInsecure();
  const read = (path: string | undefined) => (path ? readFileSync(path) : null);
  return grpc.credentials.createSsl(ca === "system" ? null : read(ca), read(key), read(certificate));
}

/** Metadata with the token that the environment names, if it does. */
export function metadata(): grpc.Metadata {
  const metadata = new grpc.Metadata();
  const token = process.env.DENOISED_TOKEN;
  if (token) metadata.set("authorization", `Bearer ${token}`);
  return metadata;
}

/** Why a call failed, or undefined where the daemon has not said so. */
export function reason(error: unknown): ErrorInfo__Output | undefined {
  if (!isServiceError(error)) return undefined;
  for (const bytes of error.metadata.get(DETAILS)) {
    const status = decode<Status__Output>("google.rpc.Status", bytes as Buffer);
    for (const detail of status.details) {
      const { type_url: type, value } = detail as unknown as { type_url: string; value: Buffer };
      if (!type.endsWith("/google.rpc.ErrorInfo")) continue;
      const info = decode<ErrorInfo__Output>("google.rpc.ErrorInfo", value);
      if (info.domain === DOMAIN) return info;
    }
  }
  return undefined;
}

export function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error;
}

function decode<T>(type: string, bytes: Buffer): T {
  const definition = definitions[type] as loader.MessageTypeDefinition<object, object>;
  return definition.deserialize(bytes) as T;
}
