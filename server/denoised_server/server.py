"""The daemon: starts everything, says where it listens, and stops everything in reverse."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from denoised import traces
from denoised.channel import is_loopback
from denoised.errors import DenoisedError
from denoised.version import __version__
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha import reflection

from . import config, devices, health, logs, preloads, probes
from .access import Access
from .audit import Audit
from .config import Settings, SettingsError
from .executor.local import WORKER, LocalExecutor
from .exposition import MetricsServer
from .interceptors import ErrorInterceptor
from .journal import Journal, JournalError
from .messages import WorkerSettings
from .metrics import Metrics
from .pool import Pool
from .services import METHODS, SERVICES, add_services
from .tls import CertificateError, CertificateFiles
from .tokens import TokenFile, TokenFileError

logger = logging.getLogger(__name__)

# How long calls that have ended get to send what they have.
FLUSH_SECONDS = 2.0
# How long the event loop may take to answer a probe.
PROBE_SECONDS = 5.0
# Clients ping to keep connections open; gRPC would by default end those that ping more often than every five minutes.
MIN_PING_MS = 5_000


class StartError(Exception):
    """The daemon cannot start; the text is for whoever started it."""


def main(
    overrides: Mapping[str, object],
    *,
    config_file: Path | None,
    print_config: bool,
    verbose: bool,
    worker: str = WORKER,
) -> int:
    """Runs the daemon until it is told to stop; returns the exit code of the process."""
    logs.set_up(verbose=verbose)
    try:
        settings = config.read(overrides, config_file)
        if print_config:
            sys.stdout.write(settings.to_toml())
            return 0
        logs.set_up(verbose=verbose, log_format=settings.log_format)
        send_traces = traces.set_up("denoised")
        try:
            asyncio.run(_serve(settings, worker=worker, verbose=verbose))
        finally:
            send_traces()
    except SettingsError as error:
        sys.stderr.write(f"denoised: {error}\n")
        return 2
    except (StartError, JournalError, DenoisedError) as error:
        sys.stderr.write(f"denoised: {error}\n")
        return 1
    return 0


async def _serve(settings: Settings, *, worker: str, verbose: bool) -> None:
    stopped = _catch_signals()
    async with AsyncExitStack() as stack:
        workers = _worker_settings(settings, verbose=verbose)
        metrics = Metrics(
            version=__version__, methods=METHODS, workers=[f"workers/{index}" for index in range(len(workers))]
        )
        # Both ports before the workers: a second daemon on the same machine learns at once that there is a first.
        server = _make_server(settings, metrics)
        port = _bind(server, settings)
        metrics_server = _serve_metrics(metrics, settings.metrics_address)
        stack.callback(metrics_server.stop)
        state_dir = settings.state_dir.expanduser().absolute()
        journal = Journal(state_dir if settings.journal == "disk" else None, observer=metrics)
        pool = Pool(
            LocalExecutor(workers, start_timeout=settings.start_timeout, worker=worker),
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_pixels=settings.max_pixels,
            callback_timeout=settings.callback_timeout,
            default_ttl=min(settings.default_ttl, settings.max_ttl),
            max_ttl=settings.max_ttl,
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
            step_timeout=settings.step_timeout,
            leak_limit=settings.leak_limit,
            journal=journal,
            results_ttl=settings.results_ttl,
            results_bytes=settings.results_bytes,
            keep_requests=settings.keep_requests,
            preload=[preloads.parse(text) for text in settings.preload],
            trials=settings.readiness_probe == "generate",
            observer=metrics,
        )
        metrics_server.probe(partial(_probe, asyncio.get_running_loop(), pool))
        stack.push_async_callback(pool.stop)
        await pool.restore()
        add_services(
            server,
            pool,
            max_message_bytes=settings.max_message_bytes,
            max_pixels=settings.max_pixels,
            max_waiting=settings.max_waiting,
        )
        await stack.enter_async_context(health.serve(server, pool, SERVICES))
        reflection.enable_server_reflection((*SERVICES, HEALTH, reflection.SERVICE_NAME), server)
        await server.start()
        stack.push_async_callback(server.stop, FLUSH_SECONDS)
        # Served before, so that probes get an answer and clients may wait with us.
        if await _unless(stopped, pool.start()) and await _unless(stopped, pool.get_ready()):
            _announce(settings, port, metrics_server.port)
        await stopped.wait()
        logger.info("stopping: what runs has %g s to finish; another signal ends it at once", settings.drain_grace)
        await pool.drain(settings.drain_grace)


def _announce(settings: Settings, port: int, metrics_port: int) -> None:
    host, metrics_host = (address.rpartition(":")[0] for address in (settings.address, settings.metrics_address))
    sys.stdout.write(f"denoised ready on {host}:{port}, metrics on http://{metrics_host}:{metrics_port}/metrics\n")
    sys.stdout.flush()


def _worker_settings(settings: Settings, *, verbose: bool) -> list[WorkerSettings]:
    names = devices.resolve(settings.device, None if settings.workers == "auto" else settings.workers)
    threads = devices.threads_each(names, None if settings.threads == "auto" else settings.threads)
    budget = settings.memory_budget
    state_dir = settings.state_dir.expanduser().absolute()
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"state_dir {state_dir} cannot be made: {error.strerror}.") from error
    return [
        WorkerSettings(
            device=name,
            threads=threads,
            budget=None if isinstance(budget, str) else devices.budget_each(budget, names),
            working_set=devices.budget_each(settings.working_set, names),
            headroom=devices.budget_each(settings.headroom, names),
            part=devices.part_each(names),
            host_memory=devices.host_each(settings.host_memory, names),
            allow_dirs=tuple(str(path.expanduser().resolve()) for path in settings.allow_dirs),
            state_dir=str(state_dir) if settings.journal == "disk" else "",
            max_joined=settings.max_joined,
            verbose=verbose,
            log_format=settings.log_format,
            max_pixels=settings.max_pixels,
            allow_repos=tuple(settings.allow_repos),
            pinned_revisions=settings.pinned_revisions,
            allow_pickle=settings.allow_pickle,
            embeddings_bytes=settings.embeddings_bytes,
            embeddings_ttl=settings.embeddings_ttl,
            load_timeout=settings.load_timeout,
            load_bytes_per_second=settings.load_bytes_per_second,
        )
        for name in names
    ]


def _make_server(settings: Settings, metrics: Metrics) -> grpc.aio.Server:
    log = _audit(settings)
    interceptor = ErrorInterceptor(
        access=_access(settings, log), max_message_bytes=settings.max_message_bytes, observer=metrics, log=log
    )
    return grpc.aio.server(
        interceptors=(interceptor,),
        options=(
            # Otherwise a second daemon gets the same port, and half of the calls.
            ("grpc.so_reuseport", 0),
            # Above our own limit: gRPC refuses without saying why or where the limit is set.
            ("grpc.max_receive_message_length", 2 * settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client that vanished without a word is noticed, and its generations end.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.ping_timeout_ms", 20_000),
        ),
    )


def _audit(settings: Settings) -> Audit:
    file = settings.audit_file.expanduser() if settings.audit_file else None
    try:
        return Audit(file, prompts=settings.audit_prompts)
    except OSError as error:
        raise StartError(f"audit_file {file} cannot be written: {error.strerror}.") from None


def _access(settings: Settings, log: Audit) -> Access:
    if settings.tokens_file is None:
        if not is_loopback(settings.address):
            logger.warning("whoever reaches %s may use the daemon: there is no tokens_file", settings.address)
        return Access()
    try:
        file = TokenFile(
            settings.tokens_file.expanduser(),
            changed=lambda came, went: log.record("tokens", {"came": sorted(came), "went": sorted(went)}),
        )
        return Access(file.tokens)
    except TokenFileError as error:
        raise StartError(f"tokens_file: {error}") from None


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    authorities = settings.tls_client_ca.expanduser() if settings.tls_client_ca else None
    files = CertificateFiles(settings.tls_cert.expanduser(), settings.tls_key.expanduser(), authorities)
    try:
        return files.credentials()
    except CertificateError as error:
        raise StartError(str(error)) from None


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    address, credentials = settings.address, _credentials(settings)
    try:
        # gRPC keeps the reason of a failure to itself, so we try first.
        host, port = _split(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except OSError as error:
        raise StartError(f"address {address} cannot be listened on: {_why(error)}.") from None
    except RuntimeError:
        raise StartError(f"address {address} cannot be listened on.") from None


def _serve_metrics(metrics: Metrics, address: str) -> MetricsServer:
    host, port = _split(address)
    try:
        return MetricsServer(metrics.registry, host=host, port=port)
    except OSError as error:
        raise StartError(f"metrics_address {address} cannot be listened on: {_why(error)}.") from None


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "it is in use; another daemon may be running"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _probe(loop: asyncio.AbstractEventLoop, pool: Pool, path: str) -> tuple[int, str] | None:
    """Asks the event loop itself, on whose life everything else depends."""

    async def ask() -> tuple[int, str] | None:
        return probes.answer(path, pool.health(), has_started=pool.has_started)

    if path not in probes.PATHS:
        return None
    asked = ask()
    try:
        return asyncio.run_coroutine_threadsafe(asked, loop).result(PROBE_SECONDS)
    except (TimeoutError, RuntimeError):
        asked.close()
        return 503, "failing\nThe daemon does not answer.\n"


def _catch_signals() -> asyncio.Event:
    """An event for the first signal to stop; the second one ends the process there and then."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if stopped.is_set():
            # Workers end by themselves when their pipes do.
            os._exit(128 + number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return stopped


async def _unless(stopped: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, or gives up on it when told to stop; returns whether it is done."""
    task, wait = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((task, wait), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        await task
        return True
    finally:
        for one in (task, wait):
            one.cancel()
        await asyncio.wait((task, wait))
