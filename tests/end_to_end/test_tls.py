"""A daemon that speaks TLS, asks clients for certificates and tokens, and takes up new ones while it runs."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from denoised import Client, errors

from tests.certificates import Authority
from tests.daemon import Daemon


def served_serial(target: str, authority: Path, client: tuple[Path, Path]) -> int:
    """Serial number of the certificate that new connections get to see."""
    context = ssl.create_default_context(cafile=str(authority))
    context.load_cert_chain(*client)
    context.set_alpn_protocols(["h2"])
    host, _, port = target.partition(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
        certificate = tls.getpeercert(binary_form=True)
    assert certificate
    return x509.load_der_x509_certificate(certificate).serial_number


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def denoised(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "denoised", *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_mutual_tls_with_tokens_survives_the_rotation_of_everything(
    tmp_path: Path, sd_checkpoint: Path, checkpoint_dir: Path
) -> None:
    authority = Authority(tmp_path / "ca.pem")
    server, client = authority.issue(tmp_path, "server"), authority.issue(tmp_path, "alice")
    tokens = tmp_path / "tokens.json"
    secret = denoised("token", "create", "alice", "--file", str(tokens))
    assert secret not in tokens.read_text()
    assert tokens.stat().st_mode & 0o077 == 0
    options = (
        "--tls-cert",
        server[0],
        "--tls-key",
        server[1],
        "--tls-client-ca",
        authority.path,
        "--tokens-file",
        tokens,
    )
    with Daemon(tmp_path / "state", *map(str, options), allow=[checkpoint_dir]) as running:
        shown = {"ca": authority.path, "client_cert": client[0], "client_key": client[1]}
        with running.client(**shown, token=secret) as held:
            pipe = held.load(sd_checkpoint, task="text-to-image")
            before = pipe("a cat", num_inference_steps=1, height=64, width=64, seed=1, batching="forbid").images[0]

            # Nobody gets in without a certificate of the authority, or without TLS.
            stranger = Authority(tmp_path / "other.pem").issue(tmp_path, "mallory")
            for wrong in (
                {"ca": authority.path},
                {"ca": authority.path, "client_cert": stranger[0], "client_key": stranger[1]},
                {"ca": tmp_path / "other.pem", "client_cert": client[0], "client_key": client[1]},
                {},
            ):
                with running.client(**wrong, token=secret) as outside, pytest.raises(errors.DaemonUnreachableError):
                    outside.server_info()
            for token in (None, "guess", "denoised_" + "x" * 43):
                with running.client(**shown, token=token) as unknown, pytest.raises(errors.UnauthenticatedError):
                    unknown.server_info()

            # A new certificate is what new connections see; the old connection goes on.
            serial = served_serial(running.target, authority.path, client)
            authority.issue(tmp_path, "server")
            until(lambda: served_serial(running.target, authority.path, client) != serial)
            again = pipe("a cat", num_inference_steps=1, height=64, width=64, seed=1, batching="forbid").images[0]
            assert again.tobytes() == before.tobytes()

            # Half a rotation, or a broken one, leaves what there was in use.
            serial = served_serial(running.target, authority.path, client)
            server[1].write_text("no key")
            assert served_serial(running.target, authority.path, client) == serial

            # A new authority for clients takes the old clients' place.
            successor = Authority(authority.path)
            successor_server = successor.issue(tmp_path, "server")
            assert successor_server == server
            renewed = successor.issue(tmp_path, "alice")
            shown = {"ca": successor.path, "client_cert": renewed[0], "client_key": renewed[1]}
            with running.client(**shown, token=secret) as fresh:
                assert fresh.server_info().version

                # A token that comes and one that goes need no restart either.
                second = denoised("token", "create", "bob", "--scope", "read", "--file", str(tokens))
                with running.client(**shown, token=second) as reader:
                    assert reader.server_info().version
                    with pytest.raises(errors.ScopeMissingError) as refused:
                        reader.load(sd_checkpoint)
                    assert refused.value.metadata["scope"] == "load"
                denoised("token", "revoke", "alice", "--file", str(tokens))
                with pytest.raises(errors.UnauthenticatedError):
                    fresh.server_info()
    log = "".join(running.log)
    assert secret not in log
    assert second not in log


def test_a_certificate_may_stand_for_a_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca.pem")
    server, alice = authority.issue(tmp_path, "server"), authority.issue(tmp_path, "alice")
    mallory = authority.issue(tmp_path, "mallory")
    tokens = tmp_path / "tokens.json"
    assert denoised("token", "create", "alice", "--certificate", "alice", "--file", str(tokens)) == ""
    options = (
        "--tls-cert",
        server[0],
        "--tls-key",
        server[1],
        "--tls-client-ca",
        authority.path,
        "--tokens-file",
        tokens,
    )
    with Daemon(tmp_path / "state", *map(str, options)) as running:
        with running.client(ca=authority.path, client_cert=alice[0], client_key=alice[1]) as known:
            assert known.server_info().version
        with (
            running.client(ca=authority.path, client_cert=mallory[0], client_key=mallory[1]) as unknown,
            pytest.raises(errors.UnauthenticatedError),
        ):
            unknown.server_info()
        # The command line is a client like any other.
        certificates = ("--ca", authority.path, "--client-cert", alice[0], "--client-key", alice[1])
        assert denoised("ps", "--json", "--target", running.target, *map(str, certificates)) == "[]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--address", "0.0.0.0:0"), "there is no TLS"),
        (("--tls-cert", "nowhere.pem"), "tls_cert and tls_key belong together"),
        (("--tls-cert", "nowhere.pem", "--tls-key", "nowhere.key"), "cannot be read"),
        (("--tokens-file", "nowhere.json"), "tokens_file"),
    ],
)
def test_a_daemon_that_would_be_open_or_shut_to_everybody_does_not_start(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        Daemon(tmp_path / "state", *options)


def test_an_insecure_daemon_has_been_told_so(tmp_path: Path) -> None:
    with (
        Daemon(tmp_path / "state", "--address", "0.0.0.0:0", "--insecure") as running,
        Client("127.0.0.1:" + running.target.rpartition(":")[2]) as client,
    ):
        assert client.server_info().version
    assert any("whoever reaches" in line for line in running.log)
