from __future__ import annotations

import io
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from denoised import Client
from denoised.cli import app
from denoised.cli.console import segments
from denoised.cli.top import View, Watched, picture
from denoised.v1 import generation_service_pb2, pipeline_service_pb2, worker_service_pb2
from denoised.values import from_proto
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.unit.fake_daemon import DEFAULT_SEED, FakeDaemon, colour

COMMANDS = ("serve", "load", "plan", "derive", "generate", "ps", "workers", "top", "health", "drain", "unload")


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    # Help and errors are drawn in boxes as wide as the terminal.
    monkeypatch.setenv("COLUMNS", "200")
    with FakeDaemon() as daemon:
        monkeypatch.setenv("DENOISED_TARGET", daemon.target)
        yield daemon


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == code, result.output
    return result


def sent(daemon: FakeDaemon) -> generation_service_pb2.GenerateRequest:
    request: generation_service_pb2.GenerateRequest = daemon.last(generation_service_pb2.GenerateRequest)
    return request


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_teaches_with_an_example(command: str, daemon: FakeDaemon) -> None:
    text = run(command, "--help").output
    assert f"denoised {command}" in text.split("Example")[1]
    assert "Exit codes" in text


def test_the_help_names_every_command(daemon: FakeDaemon) -> None:
    text = run("--help").output
    assert all(command in text for command in COMMANDS)
    assert "DENOISED_TARGET" in text


def test_the_version_is_printed() -> None:
    assert run("--version").stdout.startswith("denoised ")


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("load",),
        ("load", "demo", "--ttl", "soon"),
        ("load", "demo", "--task", "painting"),
        ("load", "demo", "--override", "vae"),
        ("generate", "p0", "-o", "picture.xyz"),
        ("generate", "p0", "-o", "picture.psd"),
        ("generate", "p0", "-o", "-", "--json"),
        ("generate", "p0", "-o", "no/such/place.png"),
        ("generate", "p0", "--image", "absent.png"),
        ("generate", "p0", "--priority", "1000"),
        ("unload",),
    ],
)
def test_wrong_usage_ends_with_two(args: tuple[str, ...], daemon: FakeDaemon) -> None:
    run(*args, code=2)
    assert daemon.requests == []


# Pipelines


def test_load_prints_the_handle_and_nothing_else_on_stdout(daemon: FakeDaemon) -> None:
    result = run(
        *("load", "demo", "--task", "image-to-image", "--dtype", "float16", "--id", "apples", "--ttl", "1h"),
        *("--keep-alive", "90s", "--pinned"),
        *("--override", "safety_checker=null", "--override", "requires_safety_checker=false"),
    )
    assert result.stdout == "pipelines/apples\n"
    request = daemon.last(pipeline_service_pb2.LoadPipelineRequest)
    assert (request.spec.task, request.spec.dtype, request.ttl.seconds) == (2, 2, 3600)
    assert (request.keep_alive.seconds, request.pinned) == (90, True)
    assert request.spec.overrides["safety_checker"].value.HasField("null_value")
    assert request.spec.overrides["requires_safety_checker"].value.bool_value is False


def test_components_and_the_hub_on_the_command_line(daemon: FakeDaemon) -> None:
    options = ("--dtype", "auto", "--subfolder", "inside", "--hub-token", "hf_x", "--local-files-only")
    nets = ("--component", "controlnet=owner/canny", "--component", "controlnet=owner/depth:net")
    run("load", "demo", *options, *nets, "--component", "vae=pipelines/a:vae", "--id", "source")
    request = daemon.last(pipeline_service_pb2.LoadPipelineRequest)
    assert (request.hub_token, request.local_files_only, request.force_download) == ("hf_x", True, False)
    assert (request.spec.auto_dtype, request.spec.subfolder) == (True, "inside")
    several = request.spec.overrides["controlnet"].components.components
    assert [(each.repo_id, each.subfolder) for each in several] == [("owner/canny", ""), ("owner/depth", "net")]
    part = request.spec.overrides["vae"].component
    assert (part.pipeline, part.role, part.repo_id) == ("pipelines/a", "vae", "")
    run("derive", "source", "--task", "inpainting", "--component", "controlnet=owner/canny", "--hub-token", "hf_x")
    derived = daemon.last(pipeline_service_pb2.DerivePipelineRequest)
    assert derived.derivation.overrides["controlnet"].component.repo_id == "owner/canny"
    assert derived.hub_token == "hf_x"
    run("load", "demo", "--component", "vae", code=2)


def test_quantisation_on_the_command_line(daemon: FakeDaemon) -> None:
    run(
        *(
            "load",
            "demo",
            "--quantize",
            "unet=bitsandbytes_4bit:bnb_4bit_quant_type=nf4,bnb_4bit_use_double_quant=true",
        ),
        *("--quantize", "text_encoder=quanto"),
    )
    config = from_proto(daemon.last(pipeline_service_pb2.LoadPipelineRequest).spec.quantization_config["quant_mapping"])
    assert config == {
        "unet": {
            "quant_method": "bitsandbytes_4bit",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "text_encoder": {"quant_method": "quanto"},
    }
    run("load", "demo", "--quantize", "unet", code=2)
    run("load", "demo", "--quantize", "unet=quanto:int8", code=2)


def test_derive_and_unload_take_ids_alone(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples")
    assert run("derive", "apples", "--task", "inpainting", "--id", "more").stdout == "pipelines/more\n"
    assert run("unload", "apples", "pipelines/more").stdout == "apples: 0 B freed\npipelines/more: 9.77 KiB freed\n"


def test_ps_shows_what_is_shared(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples")
    run("derive", "apples", "--task", "inpainting", "--id", "more")
    header, *rows = run("ps").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "CLASS", "TASK", "STATE"]
    assert [row.split()[:10] for row in rows] == [
        [
            "pipelines/apples",
            "StableDiffusionPipeline",
            "text-to-image",
            "active",
            "███░░",
            "host",
            "0",
            "B",
            "9.77",
            "KiB",
        ],
        [
            "pipelines/more",
            "StableDiffusionInpaintPipeline",
            "inpainting",
            "active",
            "███░░",
            "host",
            "0",
            "B",
            "9.77",
            "KiB",
        ],
    ]


def test_json_has_the_names_of_the_protos_and_sizes_as_numbers(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples", "--ttl", "90s")
    (pipeline,) = json.loads(run("ps", "--json").stdout)
    assert (pipeline["name"], pipeline["exclusive_bytes"], pipeline["task"]) == (
        "pipelines/apples",
        10_000,
        "TASK_TEXT_TO_IMAGE",
    )
    assert pipeline["components"][1]["weight_bytes"] == 9000
    assert json.loads(run("load", "demo", "--json").stdout)["spec"]["repo_id"] == "demo"
    assert json.loads(run("unload", "apples", "--json").stdout) == [{"name": "apples", "freed_bytes": 0}]


def test_workers_shows_memory_and_joining(daemon: FakeDaemon) -> None:
    row = run("workers").stdout.splitlines()[1]
    assert "█████░░░░░ 9.77 KiB of 19.5 KiB" in row
    assert "75%" in row
    assert "█████▓▓▓▓▓▒▒░·······" in row
    assert json.loads(run("workers", "--json").stdout)[0]["memory"]["budget_bytes"] == 20_000


def test_a_worker_is_drained_and_takes_work_again(daemon: FakeDaemon) -> None:
    assert run("drain", "0").stdout == "workers/0 is drained\n"
    assert run("drain", "workers/0", "--undo").stdout == "workers/0 takes work\n"


def test_workers_tells_what_memory_is_used_for(daemon: FakeDaemon) -> None:
    head, row = (line.split("  ") for line in run("workers", "--memory").stdout.splitlines())
    cells = dict(zip((cell.strip() for cell in head if cell), (cell.strip() for cell in row if cell), strict=True))
    assert (cells["WORKING SET"], cells["UNACCOUNTED"], cells["TOTAL"]) == ("9.77 KiB", "1.95 KiB", "39.1 KiB")


def test_a_bar_is_never_wider_than_what_it_shows() -> None:
    assert segments([("a", 50), ("b", 100)], 100, 4) == "aabb"
    assert segments([("a", 1), ("b", -5), ("c", 1)], 8, 8) == "ac······"
    assert segments([("a", 1)], 0, 3) == "···"


def test_a_plan_shows_what_is_new_what_is_shared_and_what_leaves(daemon: FakeDaemon) -> None:
    text = run("plan", "demo", "--dtype", "float16").stdout
    unet, encoder = (next(line for line in text.splitlines() if line.startswith(role)) for role in ("unet", "text_e"))
    assert unet.split() == ["unet", "UNet2DConditionModel", "float16", "8.79", "KiB", "F32", "17.6", "KiB"]
    assert encoder.split()[-1] == "yes"
    assert "8.79 KiB new and 0.977 KiB shared on workers/0." in text
    assert "FluxTransformer2DModel of pipelines/a would leave: 5.86 KiB" in text
    assert "17.6 KiB would be downloaded." in text
    assert "Reading takes about 2 s." in text
    request = daemon.last(pipeline_service_pb2.PlanPipelineRequest)
    assert request.spec.repo_id == "demo"
    assert daemon.names == []


def test_a_plan_without_room_ends_with_one(daemon: FakeDaemon) -> None:
    assert "There is no room now" in run("plan", "demo", "--dtype", "float64", code=1).stdout
    plan = json.loads(run("plan", "demo", "--json").stdout)
    assert (plan["outcome"], plan["new_bytes"], plan["components"][0]["held"]) == ("evicts", 9000, True)


def test_workers_tells_what_became_of_calls(daemon: FakeDaemon) -> None:
    row = run("workers", "--engine").stdout.splitlines()[1]
    assert row.split()[1:6] == ["UNet.forward", "4", "75%", "unmatched", "1"]


# Generations


def test_top_shows_workers_and_what_is_busy_first(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples")
    lines = run("top", "--once", "--interval", "0.2").stdout.splitlines()
    assert daemon.target in lines[0]
    worker, memory = [line for line in lines if line.startswith("workers/0")]
    assert "active" in worker
    assert "····" in memory
    assert any(line.startswith("apples ") for line in lines)


def test_top_shows_what_memory_is_used_for_and_where_weights_are() -> None:
    memory = worker_service_pb2.DeviceMemory(
        total_bytes=40 << 30,
        budget_bytes=36 << 30,
        weight_bytes=16 << 30,
        reserved_bytes=4 << 30,
        working_set_bytes=4 << 30,
        cached_bytes=2 << 30,
        unaccounted_bytes=1 << 30,
        free_bytes=13 << 30,
    )
    pipeline = pipeline_service_pb2.Pipeline(
        name="pipelines/apples", device_bytes=3 << 30, disk_bytes=2 << 30, residency=pipeline_service_pb2.RESIDENCY_DISK
    )
    view = View("here", "1", 1.0, [worker_service_pb2.Worker(name="workers/0", memory=memory)], [pipeline])
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(picture(view, view))
    lines = console.export_text().splitlines()
    (row,) = [line for line in lines if "█▓" in line]
    assert row.split()[1] == "█" * 20 + "▓" * 4 + "▒" * 2 + "░" + "·" * 13
    assert " ".join(row.split()[2:]) == "20 GiB 4 GiB 2 GiB 1 GiB 13 GiB"
    assert any(line.startswith("apples") and "███░░ disk" in line for line in lines)


def test_top_follows_the_stream_of_workers(daemon: FakeDaemon) -> None:
    with Client(daemon.target) as client:
        watched = Watched(client, 0.2)
        assert [worker.running_count for worker in watched.latest] == [0]
        end = time.monotonic() + 20
        while watched.latest[0].running_count != 1:
            assert time.monotonic() < end, "the second message changes nothing"
            time.sleep(0.01)


def test_top_counts_what_happened_between_two_views() -> None:
    def view(time: float, calls: int, joined: int) -> View:
        engine = worker_service_pb2.EngineStats(call_count=calls, batch_count=calls // 2, joined_call_count=joined)
        memory = worker_service_pb2.DeviceMemory(weight_bytes=2**20, budget_bytes=2**22)
        worker = worker_service_pb2.Worker(name="workers/0", engine=engine, memory=memory, waiting_count=3)
        idle = pipeline_service_pb2.Pipeline(name="pipelines/idle")
        busy = pipeline_service_pb2.Pipeline(name="pipelines/busy", generation_count=2)
        return View("here", "1.2.3", time, [worker], [idle, busy])

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(picture(view(12.0, 1300, 150), view(10.0, 1000, 0)))
    text = console.export_text()
    assert "150/s" in text
    assert "75/s" in text
    assert "50%" in text
    assert "1 MiB of 4 MiB" in text
    assert "3 waiting" in text
    assert text.index("busy") < text.index("idle")
    # A worker that was started anew counts from zero.
    console.print(picture(view(14.0, 10, 0), view(12.0, 1300, 150)))
    assert "0/s" in console.export_text()


def test_top_shows_how_far_generations_are() -> None:
    def generation(number: int, done: int) -> generation_service_pb2.Generation:
        is_running = bool(done)
        state = "STATE_RUNNING" if is_running else "STATE_WAITING"
        info = generation_service_pb2.Generation(
            name=f"generations/g{number}",
            pipeline="pipelines/apples",
            state=generation_service_pb2.Generation.State.Value(state),
        )
        if is_running:
            info.progress.completed_steps, info.progress.total_steps = done, 30
        return info

    view = View("here", "1", 1.0, [], [], [generation(0, 0), *(generation(number, number) for number in range(1, 25))])
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(picture(view, view))
    lines = console.export_text().splitlines()
    rows = [line.split() for line in lines if line.startswith("g")]
    assert rows[0] == ["g24", "apples", "running", "█" * 16 + "░" * 4, "24", "of", "30"]
    assert len(rows) == 20
    assert any(line.strip() == "and 5 more" for line in lines)
    short = View("here", "1", 1.0, [], [], [generation(0, 0)])
    console.print(picture(short, short))
    text = console.export_text()
    assert "waiting" in text
    assert "more" not in text


def test_generate_writes_a_picture_and_says_its_seed(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("load", "demo", "--id", "apples")
    path = tmp_path / "apple.png"
    result = run(
        *("generate", "apples", "--prompt", "an apple", "-o", str(path), "--steps", "3", "--width", "24"),
        *("--height", "16", "--guidance-scale", "7.5", "--negative-prompt", "pears", "--batching", "forbid"),
        *("--priority", "-5", "--arg", "eta=0.5", "--arg", "sigmas=[1, 2]", "--arg", "clip_skip=null"),
    )
    assert f"{path}  (seed {DEFAULT_SEED};" in result.stdout
    with Image.open(path) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((24, 16), colour(DEFAULT_SEED))
    request = sent(daemon)
    assert (request.prompt, request.negative_prompt, request.sampling.num_inference_steps) == ("an apple", "pears", 3)
    assert (request.batching, request.priority) == (generation_service_pb2.BATCHING_FORBID, -5)
    assert request.arguments["eta"].double_value == 0.5
    assert request.arguments["clip_skip"].HasField("null_value")
    assert not request.HasField("image")


def test_generate_sends_pictures_and_numbers_several(daemon: FakeDaemon, tmp_path: Path) -> None:
    run("load", "demo", "--task", "inpainting", "--id", "apples")
    source, mask, out = tmp_path / "in.png", tmp_path / "mask.png", tmp_path / "out.jpg"
    Image.new("RGB", (8, 8)).save(source)
    Image.new("L", (8, 8)).save(mask)
    result = run(
        *("generate", "apples", "-p", "a leaf", "--image", str(source), "--mask", str(mask), "--strength", "0.5"),
        *("--num-images", "2", "--seed", "5", "--seed", "6", "-o", str(out), "--json"),
    )
    report = json.loads(result.stdout)
    assert report["images"] == [str(tmp_path / "out-0.jpg"), str(tmp_path / "out-1.jpg")]
    assert report["seeds"] == [5, 6]
    assert report["timings"]["run_seconds"] == 1.5
    assert all(Path(path).stat().st_size for path in report["images"])
    assert (sent(daemon).image.media_type, sent(daemon).mask_image.media_type) == ("image/png", "image/png")


def test_generate_writes_to_stdout(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples")
    result = run("generate", "apples", "-p", "an apple", "-o", "-")
    with Image.open(io.BytesIO(result.stdout_bytes)) as picture:
        assert picture.size == (8, 8)


# Failures


def test_a_failure_is_a_sentence_and_a_hint_on_stderr(daemon: FakeDaemon) -> None:
    result = run("load", "nowhere", code=1)
    assert result.stdout == ""
    assert result.stderr == "error: There is no 'nowhere'.\nhint:  Try demo.\n"


def test_a_picture_that_is_none_is_named(daemon: FakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    path.write_text("no picture")
    result = run("generate", "apples", "--image", str(path), code=1)
    assert f"{path} is not an image" in result.stderr


def test_tensors_are_not_written_as_pictures(daemon: FakeDaemon) -> None:
    run("load", "demo", "--id", "apples")
    assert "output_type" in run("generate", "apples", "--arg", "output_type=np", code=1).stderr


def test_nobody_at_the_target_is_one_error(daemon: FakeDaemon) -> None:
    result = run("ps", "--target", "127.0.0.1:1", code=1)
    assert "No daemon answers at 127.0.0.1:1" in result.stderr
    assert "denoised serve" in result.stderr


def test_the_token_is_sent(daemon: FakeDaemon) -> None:
    run("ps", "--token", "secret")
    assert daemon.metadata["authorization"] == "Bearer secret"


# The daemon


def test_serve_passes_on_what_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[dict[str, object], dict[str, object]]] = []

    def main(overrides: dict[str, object], **rest: object) -> int:
        calls.append((overrides, rest))
        return 3

    server = types.ModuleType("denoised_server.server")
    server.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "denoised_server.server", server)
    run("serve", code=3)
    run(
        *("serve", "--address", "0.0.0.0:0", "--metrics-address", "127.0.0.1:0", "--device", "cpu", "--workers", "2"),
        *("--threads", "1", "--allow-dir", str(tmp_path), "--allow-dir", "/models", "--state-dir", str(tmp_path)),
        *("--print-config", "-v"),
        code=3,
    )
    assert calls[0] == ({}, {"config_file": None, "print_config": False, "verbose": False})
    assert calls[1] == (
        {
            "address": "0.0.0.0:0",
            "metrics_address": "127.0.0.1:0",
            "device": "cpu",
            "workers": 2,
            "threads": 1,
            "allow_dirs": [tmp_path, Path("/models")],
            "state_dir": tmp_path,
        },
        {"config_file": None, "print_config": True, "verbose": True},
    )


def test_serve_without_the_daemons_packages_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "denoised_server.server", None)
    assert "pip install 'denoised[server]'" in run("serve", code=1).stderr
