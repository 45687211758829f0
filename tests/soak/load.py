"""The load: callers who do all that callers do, and note how each request ended."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from denoised import Client, DenoisedError
from denoised.v1.generation_service_pb2 import BATCHING_FORBID, GenerateRequest
from PIL import Image

WORDS = ("red apple", "rocket", "castle", "panda face", "guitar", "octopus")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
PATIENCE = 240.0
# A client in a process of its own, to be killed: it draws one picture after another.
VICTIM = """
import sys
from denoised import Client
client = Client(sys.argv[1], progress_bar=False)
painter = client.pipeline("painter")
print(painter.submit("red apple", num_inference_steps=6).name, flush=True)
while True:
    painter("red apple", num_inference_steps=30)
"""


class Load:
    """Each request ends as `whole`, as told (with a reason), or as what is wrong, which `wrong` collects.

    `told` are the reasons that faults may bring about; any other one is wrong.
    """

    def __init__(self, target: str, told: frozenset[str], seed: int = 1) -> None:
        self.ends = Counter[str]()
        self.wrong: list[str] = []
        self._target = target
        self._told = told
        self._seed = seed
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._expected: dict[tuple[str, int], str] = {}
        self._jobs: list[str] = []

    def warm_up(self, callers: int, seconds: float) -> None:
        """Does everything once, and then all at once for a while, and notes what pictures there are to be."""
        with self._client() as client:
            client.load("demo", task="text-to-image", pipeline_id="painter", pinned=True)
            client.derive("painter", "image-to-image", pipeline_id="editor")
            client.derive("painter", "inpainting", pipeline_id="mender")
            dice = random.Random(self._seed)
            for word in WORDS[:3]:
                self._expected[word, 1] = self._draw(client, word, 1)
            for act in (*ACTS, *ACTS):
                self._do(act, client, dice)
        # Pools of threads grow with what goes on at once.
        self.start(callers, 0.01)
        time.sleep(seconds)
        self.stop()

    def start(self, callers: int, pause: float) -> None:
        for number in range(callers):
            dice = random.Random(f"{self._seed} {number}")
            thread = threading.Thread(target=self._call, args=(dice, pause), name=f"caller {number}")
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Lets what is under way end, and looks at what was left to be fetched later."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(PATIENCE + 60)
            if thread.is_alive():
                self.wrong.append(f"{thread.name} waits for ever")
        self._threads.clear()
        self._stopped.clear()
        with self._client() as client:
            for name in self._jobs:
                self._note(partial(_fetch, client, name), "job of a killed client")
        self._jobs.clear()

    def start_victim(self) -> subprocess.Popen[str]:
        """A client with a job and a call under way; the job's result is asked for at the end."""
        command = [sys.executable, "-c", VICTIM, self._target]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout
        with process.stdout:
            if name := process.stdout.readline().strip():
                self._jobs.append(name)
        return process

    def _client(self) -> Client:
        return Client(self._target, progress_bar=False, timeout=PATIENCE)

    def _call(self, dice: random.Random, pause: float) -> None:
        with self._client() as client:
            while not self._stopped.is_set():
                self._do(dice.choice(ACTS), client, dice)
                self._stopped.wait(dice.expovariate(1 / pause))

    def _do(self, act: Callable[[Load, Client, random.Random], object], client: Client, dice: random.Random) -> None:
        self._note(lambda: act(self, client, dice), act.__name__.strip("_").replace("_", " "))

    def _note(self, act: Callable[[], object], name: str) -> None:
        try:
            act()
            end = "whole"
        except DenoisedError as error:
            end = error.reason or type(error).__name__
            if end not in self._told:
                self._complain(f"{name}: {error!r}")
        except Exception as error:
            end = "wrong"
            self._complain(f"{name}: {error!r}")
        with self._lock:
            self.ends[f"{name}: {end}"] += 1

    def _complain(self, text: str) -> None:
        with self._lock:
            self.wrong.append(f"{time.strftime('%H:%M:%S')} {text}")

    # What callers do

    def _draw(self, client: Client, word: str, seed: int) -> str:
        """The digest of a picture drawn alone, whose stream must be whole."""
        request = GenerateRequest(pipeline="pipelines/painter", prompt=word, batching=BATCHING_FORBID)
        request.sampling.num_inference_steps = 4
        request.sampling.seeds.append(seed)
        return self._read(client, request)

    def _read(self, client: Client, request: GenerateRequest) -> str:
        steps, pictures, summaries = [], [], 0
        for event in client.generate(request, timeout=PATIENCE):
            match event.WhichOneof("event"):
                case "progress":
                    steps.append(event.progress.completed_steps)
                case "output":
                    pictures.append(event.output.artifact.data)
                case "summary":
                    summaries += 1
        wanted = request.sampling.num_inference_steps
        assert steps == list(range(1, wanted + 1)), f"steps {steps} of {wanted}"
        assert (len(pictures), summaries) == (1, 1), f"{len(pictures)} pictures, {summaries} summaries"
        return hashlib.sha256(pictures[0]).hexdigest()

    def _picture_alone(self, client: Client, dice: random.Random) -> None:
        word = dice.choice(WORDS[:3])
        assert self._draw(client, word, 1) == self._expected[word, 1], "another picture than before"

    def _picture(self, client: Client, dice: random.Random) -> None:
        request = GenerateRequest(pipeline="pipelines/painter", prompt=dice.choice(WORDS))
        request.sampling.num_inference_steps = dice.randint(1, 10)
        self._read(client, request)

    def _image_to_image(self, client: Client, dice: random.Random) -> None:
        found = client.pipeline("editor")(dice.choice(WORDS), image=PICTURE, strength=0.6, num_inference_steps=6)
        assert len(found.images) == 1

    def _inpainting(self, client: Client, dice: random.Random) -> None:
        found = client.pipeline("mender")(dice.choice(WORDS), image=PICTURE, mask_image=MASK, num_inference_steps=4)
        assert len(found.images) == 1

    def _cancel(self, client: Client, dice: random.Random) -> None:
        request = GenerateRequest(pipeline="pipelines/painter", prompt="castle")
        request.sampling.num_inference_steps = 40
        last = dice.randint(1, 12)
        for number, _ in enumerate(client.generate(request, timeout=PATIENCE)):
            if number == last:
                return

    def _deadline(self, client: Client, dice: random.Random) -> None:
        request = GenerateRequest(pipeline="pipelines/painter", prompt="guitar")
        request.sampling.num_inference_steps = 900
        try:
            for _ in client.generate(request, timeout=dice.uniform(0.05, 1.0)):
                pass
        except TimeoutError:
            return
        raise AssertionError("900 steps in a second")

    def _job(self, client: Client, dice: random.Random) -> None:
        job = client.pipeline("painter").submit(dice.choice(WORDS), num_inference_steps=dice.randint(1, 6))
        assert len(job.result(timeout=PATIENCE).images) == 1

    def _job_cancelled(self, client: Client, dice: random.Random) -> None:
        job = client.pipeline("painter").submit(dice.choice(WORDS), num_inference_steps=400)
        time.sleep(dice.uniform(0, 0.5))
        job.cancel()

    def _pipeline_of_its_own(self, client: Client, dice: random.Random) -> None:
        pipe = client.load("demo", task="image-to-image")
        try:
            pipe.set_scheduler(dice.choice(SCHEDULERS))
            assert len(pipe("rocket", image=PICTURE, num_inference_steps=4).images) == 1
        finally:
            pipe.unload()

    def _nonsense(self, client: Client, dice: random.Random) -> None:
        request = GenerateRequest(pipeline="pipelines/painter", prompt="castle")
        request.sampling.num_inference_steps = dice.choice((-1, 10**6))
        try:
            for _ in client.generate(request):
                pass
        except ValueError:
            return
        raise AssertionError("nonsense was not refused")


def _fetch(client: Client, name: str) -> None:
    assert len(client.generation(name).result(timeout=PATIENCE).images) == 1


def settle(client: Client) -> None:
    """Uses every pipeline that is there from the start, so that a worker which was started again has them."""
    client.pipeline("painter")("castle", num_inference_steps=2)
    client.pipeline("editor")("castle", image=PICTURE, num_inference_steps=4)
    client.pipeline("mender")("castle", image=PICTURE, mask_image=MASK, num_inference_steps=4)


ACTS: tuple[Any, ...] = (
    Load._picture_alone,
    Load._picture,
    Load._picture,
    Load._image_to_image,
    Load._inpainting,
    Load._cancel,
    Load._deadline,
    Load._job,
    Load._job_cancelled,
    Load._pipeline_of_its_own,
    Load._nonsense,
)
PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.linear_gradient("L").resize((64, 64))
