"""Eight requests of three tasks at once, against the same eight one after another, on the same daemon.

The demo model, 20 steps, one compute thread.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import denoised
from PIL import Image

from tests.benchmarks import setting

ROUNDS, COUNT = 5, 8


def main() -> None:
    picture, mask = Image.new("RGB", (64, 64), (200, 80, 20)), Image.new("L", (64, 64), 255)
    with setting.daemon() as daemon, daemon.client() as client:
        text_to_image = denoised.AutoPipelineForText2Image.from_pretrained("demo", client=client)
        image_to_image = denoised.AutoPipelineForImage2Image.from_pipe(text_to_image)
        inpainting = denoised.AutoPipelineForInpainting.from_pipe(text_to_image)

        def request(index: int) -> Any:
            asked: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 20, "seed": index}
            match index % 3:
                case 0:
                    return text_to_image(**asked)
                case 1:
                    return image_to_image(**asked, image=picture, strength=0.9)
            return inpainting(**asked, image=picture, mask_image=mask, strength=1.0)

        def together() -> None:
            with ThreadPoolExecutor(COUNT) as threads:
                joined.extend(result.timings.max_joined for result in threads.map(request, range(COUNT)))

        joined: list[int] = []
        together()
        times: dict[str, list[float]] = {"one by one": [], "at once": []}
        for _ in range(ROUNDS):
            times["one by one"].append(setting.seconds(lambda: [request(index) for index in range(COUNT)]))
            times["at once"].append(setting.seconds(together))
    for name, values in times.items():
        print(f"{name:12} {setting.spread(values)}")
    alone, at_once = (statistics.median(values) for values in times.values())
    print(f"speed-up     {alone / at_once:.2f}x, up to {max(joined)} requests in one call")


if __name__ == "__main__":
    main()
