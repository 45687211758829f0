// A complete client of denoised: loads or reuses a pipeline, derives a second one, makes pictures with both while it
// shows the progress, cancels a generation, and reads the reason of an error.
//
//     npm start -- [HOST:PORT [FOLDER]]

import { writeFile } from "node:fs/promises";
import { join } from "node:path";

import * as grpc from "@grpc/grpc-js";

import type { Artifact__Output } from "../build/api/denoised/v1/Artifact.js";
import type { DerivePipelineRequest } from "../build/api/denoised/v1/DerivePipelineRequest.js";
import type { DerivePipelineResponse__Output } from "../build/api/denoised/v1/DerivePipelineResponse.js";
import type { GenerateRequest } from "../build/api/denoised/v1/GenerateRequest.js";
import type { GenerateResponse__Output } from "../build/api/denoised/v1/GenerateResponse.js";
import type { LoadPipelineResponse__Output } from "../build/api/denoised/v1/LoadPipelineResponse.js";
import type { Pipeline__Output } from "../build/api/denoised/v1/Pipeline.js";
import { Daemon, isServiceError, metadata, reason } from "./denoised.js";

const PATIENCE_MS = 120_000;
const CANCEL_AFTER_STEPS = 3;

const deadline = () => ({ deadline: Date.now() + PATIENCE_MS });

/** The pipeline of that id, which is loaded only where it is not live yet. */
async function load(daemon: Daemon, repo: string, id: string): Promise<Pipeline__Output> {
  const call = daemon.pipelines.LoadPipeline(
    { spec: { repoId: repo, task: "TASK_TEXT_TO_IMAGE" }, pipelineId: id },
    metadata(),
    deadline(),
  );
  for await (const event of call as AsyncIterable<LoadPipelineResponse__Output>) {
    if (event.pipeline) {
      console.log(`loaded ${event.pipeline.name}: ${event.pipeline.pipelineClass}`);
      return event.pipeline;
    }
    const { phase, role, completedBytes, totalBytes } = event.progress!;
    console.log(`${phase} ${role}: ${completedBytes} of ${totalBytes} bytes`);
  }
  throw new Error("the daemon ended the load without a pipeline");
}

/** A unary call as a promise. */
function promised<Response>(begin: (callback: grpc.requestCallback<Response>) => unknown): Promise<Response> {
  return new Promise((resolve, reject) => begin((error, response) => (error ? reject(error) : resolve(response!))));
}

async function derive(daemon: Daemon, request: DerivePipelineRequest): Promise<Pipeline__Output> {
  const response = await promised<DerivePipelineResponse__Output>((callback) =>
    daemon.pipelines.DerivePipeline(request, metadata(), deadline(), callback),
  );
  const pipeline = response.pipeline!;
  console.log(`derived ${pipeline.name}: ${pipeline.exclusiveBytes} bytes of its own, ${pipeline.sharedBytes} shared`);
  return pipeline;
}

/** Shows the progress and returns the first image. Cancels the call, which stops the denoising, after so many steps. */
async function generate(daemon: Daemon, request: GenerateRequest, cancelAfter = Infinity): Promise<Artifact__Output> {
  const call = daemon.generations.Generate(request, metadata(), deadline());
  let image: Artifact__Output | undefined;
  for await (const event of call as AsyncIterable<GenerateResponse__Output>) {
    if (event.queued) console.log(`${event.queued.position} before this one`);
    if (event.phaseBegan) console.log(event.phaseBegan.phase);
    if (event.progress) {
      const { completedSteps, totalSteps } = event.progress;
      console.log(`step ${completedSteps} of ${totalSteps}`);
      if (completedSteps >= cancelAfter) call.cancel();
    }
    if (event.output?.field === "images" && event.output.index === 0) image = event.output.artifact ?? undefined;
  }
  if (!image) throw new Error("the pipeline made no image");
  return image;
}

/** Ends a generation after a few steps. */
async function leave(daemon: Daemon, pipeline: string): Promise<void> {
  try {
    await generate(daemon, { pipeline, prompt: "castle", sampling: { numInferenceSteps: 900 } }, CANCEL_AFTER_STEPS);
  } catch (error) {
    if (!isServiceError(error) || error.code !== grpc.status.CANCELLED) throw error;
    console.log("cancelled");
  }
}

/** Asks for something that does not exist, to show what an error says. */
async function misspell(daemon: Daemon, pipeline: string): Promise<void> {
  try {
    await generate(daemon, { pipeline, arguments: { promt: { stringValue: "red apple" } } });
  } catch (error) {
    if (reason(error)?.reason !== "UNKNOWN_ARGUMENT") throw error;
    console.log(`refused: ${explain(error)}`);
    return;
  }
  throw new Error("a misspelled argument was not refused");
}

function explain(error: unknown): string {
  const info = reason(error);
  if (!info || !isServiceError(error)) return String(error);
  return `${info.reason}: ${error.details} (did you mean "${info.metadata.suggestion}"?)`;
}

async function paint(target: string, folder: string): Promise<void> {
  const daemon = new Daemon(target);
  try {
    const source = (await load(daemon, "demo", "painter-ts")).name;
    const derivation = { task: "TASK_IMAGE_TO_IMAGE" } as const;
    const editor = (await derive(daemon, { source, derivation, pipelineId: "editor-ts" })).name;
    const apple = await generate(daemon, {
      pipeline: source,
      prompt: "red apple",
      sampling: { numInferenceSteps: 12, seeds: [1] },
    });
    const tangerine = await generate(daemon, {
      pipeline: editor,
      prompt: "tangerine",
      image: apple,
      sampling: { numInferenceSteps: 12, strength: 0.7, seeds: [2] },
    });
    await writeFile(join(folder, "apple.png"), apple.data!);
    await writeFile(join(folder, "tangerine.png"), tangerine.data!);
    await leave(daemon, source);
    await misspell(daemon, source);
    for (const name of [editor, source]) {
      await promised((callback) => daemon.pipelines.UnloadPipeline({ name }, metadata(), deadline(), callback));
    }
  } finally {
    daemon.close();
  }
}

const [target = "127.0.0.1:50051", folder = "."] = process.argv.slice(2);
paint(target, folder).catch((error: unknown) => {
  console.error(explain(error));
  process.exitCode = 1;
});
