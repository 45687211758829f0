"""Whether the demo model draws what it is asked for: 40 captions × 3 seeds, 20 steps, guidance 4.

A picture is right when the nearest training picture, at 16×16 pixels, is the one that was asked for.
"""

from __future__ import annotations

import random
import statistics
from concurrent.futures import ThreadPoolExecutor

import denoised

from tests import demo_pictures
from tests.benchmarks import setting

CAPTIONS, SEEDS, STEPS, GUIDANCE = 40, 3, 20, 4.0


def main() -> None:
    known = demo_pictures.pictures()
    asked = random.Random(2).sample(demo_pictures.CAPTIONS, CAPTIONS)
    wrong = []
    with setting.daemon() as daemon, daemon.client() as client:
        pipe = denoised.AutoPipelineForText2Image.from_pretrained("demo", client=client)

        def draw(request: tuple[str, int]) -> tuple[str, str]:
            prompt, seed = request
            image = pipe(prompt, seed=seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE).images[0]
            return prompt, demo_pictures.nearest(image, known)

        with ThreadPoolExecutor(16) as threads:
            drawn = list(threads.map(draw, [(prompt, seed) for seed in range(SEEDS) for prompt in asked]))
        wrong = [f"{prompt} looks like {found}" for prompt, found in drawn if prompt != found]
        times = [setting.seconds(lambda: pipe("red apple", num_inference_steps=STEPS)) for _ in range(5)]
    print(f"right        {len(drawn) - len(wrong)} of {len(drawn)} ({1 - len(wrong) / len(drawn):.1%})")
    print(f"one picture  {statistics.median(times):.2f} s for {STEPS} steps on one core")
    for line in wrong:
        print(f"             {line}")


if __name__ == "__main__":
    main()
