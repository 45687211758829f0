"""The Helm chart: valid for several versions of Kubernetes, and as restricted as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from denoised_server.config import Settings
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests import tools
from tests.certificates import Authority
from tests.daemon import Daemon
from tests.tools import ROOT

CHART = ROOT / "deploy" / "helm" / "denoised"
VALUES = [None, *sorted((CHART / "ci").glob("*.yaml"))]
VERSIONS = ("1.29.0", "1.33.0", "1.37.0")
# Where their types are, for kinds that Kubernetes itself does not know.
CUSTOM = {
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
    "Certificate": "@kubernetes-models/cert-manager/cert-manager.io/v1",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1",
}
TOOLS = ROOT / ".tools"

pytestmark = [pytest.mark.tools, tools.needs("helm", "npm", target="kubernetes")]
each_values = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem if path else "defaults")


@cache
def render(values: Path | None) -> list[dict[str, Any]]:
    given: list[str | Path] = ["--values", values] if values else []
    text = tools.run("helm", "template", "painter", CHART, "--namespace", "pictures", *given)
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(values: Path | None, kind: str) -> list[dict[str, Any]]:
    return [document for document in render(values) if document["kind"] == kind]


def containers(values: Path | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pod's spec with each of its containers."""
    for document in of_kind(values, "StatefulSet"):
        pod = document["spec"]["template"]["spec"]
        for container in pod["containers"] + pod.get("initContainers", []):
            yield pod, container


def validate(file: Path, version: str) -> subprocess.CompletedProcess[str]:
    program = TOOLS / "venv" / "bin" / "kubernetes-validate"
    options = ["--strict", "--kubernetes-version", version]
    return subprocess.run([program, *options, file], capture_output=True, text=True)


@each_values
def test_it_lints(values: Path | None) -> None:
    given: list[str | Path] = ["--values", values] if values else []
    tools.run("helm", "lint", "--strict", CHART, *given)


@each_values
@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_fits_the_strict_schema_of_kubernetes(values: Path | None, version: str, tmp_path: Path) -> None:
    known = [document for document in render(values) if document["kind"] not in CUSTOM]
    file = tmp_path / "documents.yaml"
    file.write_text(yaml.safe_dump_all(known))
    done = validate(file, version)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    # A kind that it does not know is only a warning of its.
    assert "WARN" not in printed.upper(), printed
    assert printed.count("passed") == len(known), printed


def test_the_strict_schemas_find_mistakes(tmp_path: Path) -> None:
    (wrong,) = of_kind(None, "StatefulSet")
    wrong = json.loads(json.dumps(wrong))
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(wrong))
    assert validate(file, VERSIONS[0]).returncode != 0


def check_custom(documents: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    """By their types, which know no field that the resource's schema does not, then by the schema."""
    lines = []
    for number, document in enumerate(documents):
        kind = document["kind"]
        lines += [
            f'import {{ I{kind} as I{number}, {kind} as K{number} }} from "{CUSTOM[kind]}";',
            f"const d{number}: I{number} = {json.dumps(document)};",
            f"(new K{number}(d{number}) as unknown as {{ validate(): void }}).validate();",
        ]
    (folder / "check.mts").write_text("\n".join(lines))
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(TOOLS / "npm" / "node_modules")
    types = ["--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", "check.mts"]
    done = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", *types], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        return done
    return subprocess.run(["node", "check.mjs"], cwd=folder, capture_output=True, text=True)


def test_custom_resources_fit_their_schemas(tmp_path: Path) -> None:
    documents = [document for values in VALUES for document in render(values) if document["kind"] in CUSTOM]
    assert {document["kind"] for document in documents} == set(CUSTOM)
    done = check_custom(documents, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = json.loads(json.dumps(documents[0]))
    broken["spec"]["no_such_field"] = 1
    assert check_custom([broken], tmp_path).returncode != 0


@each_values
def test_pods_are_restricted(values: Path | None) -> None:
    pods = list(containers(values))
    assert pods
    for pod, container in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10_000
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert not container["image"].endswith((":latest", ":"))
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/var/lib/denoised", "/var/cache/huggingface", "/tmp", "/dev/shm"}


@each_values
def test_nothing_has_rights_and_every_selector_finds_its_pods(values: Path | None) -> None:
    kinds = {document["kind"] for document in render(values)}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret"}
    labels = [document["spec"]["template"]["metadata"]["labels"] for document in of_kind(values, "StatefulSet")]
    for kind in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
        for document in of_kind(values, kind):
            selector = document["spec"].get("selector") or document["spec"]["podSelector"]
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found.items() for found in labels), document["metadata"]["name"]
    names = [(document["kind"], document["metadata"]["name"]) for document in render(values)]
    assert len(set(names)) == len(names)
    for document in of_kind(values, "StatefulSet"):
        assert document["spec"]["serviceName"] in {each["metadata"]["name"] for each in of_kind(values, "Service")}


@each_values
def test_a_pod_outlives_its_drain(values: Path | None) -> None:
    configs = {document["metadata"]["name"]: document["data"] for document in of_kind(values, "ConfigMap")}
    for document in of_kind(values, "StatefulSet"):
        settings = tomllib.loads(configs[document["metadata"]["name"]]["denoised.toml"])
        grace = document["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= settings["drain_grace"] + 15


@each_values
def test_the_settings_are_those_of_the_daemon(values: Path | None) -> None:
    for document in of_kind(values, "ConfigMap"):
        if "denoised.toml" in document["data"]:
            Settings(**tomllib.loads(document["data"]["denoised.toml"]))


def test_secrets_are_only_referred_to() -> None:
    (values,) = [path for path in VALUES if path and path.stem == "pools"]
    for pod, container in containers(values):
        (token,) = [each for each in container["env"] if each["name"] == "HF_TOKEN"]
        assert "value" not in token
        secrets = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        assert secrets == {"painter-denoised-tls", "tokens"}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("settings.address=0.0.0.0:1", "invalid propertyName 'address'"),
        ("tls.enabled=true", "existingSecret"),
        ("pools[0].name=UPPER", "pattern"),
        ("autoscaling.kind=magic", "value must be one of"),
        ("no.such.value=1", "additional properties 'no' not allowed"),
        ("service.port=99999", "maximum"),
        ("readinessProbe=magic", "value must be one of"),
        ("preloads[0].repo=a\\,b,preloads[0].id=a", "pattern"),
    ],
)
def test_values_that_cannot_work_are_refused(setting: str, reason: str) -> None:
    done = subprocess.run(
        ["helm", "template", "painter", CHART, "--set", setting, "--set", "pools[0].gpus=1"],
        env=os.environ | {"PATH": tools.PATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert reason in done.stderr


@tools.needs("promtool", target="monitoring")
def test_the_rendered_rules_are_valid(tmp_path: Path) -> None:
    (values,) = [path for path in VALUES if path and path.stem == "pools"]
    (rule,) = of_kind(values, "PrometheusRule")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    count = sum(len(group["rules"]) for group in rule["spec"]["groups"])
    assert count > 20
    assert f"{count} rules found" in tools.run("promtool", "check", "rules", file)
    assert "https://example.org/runbook.md#denoiseddown" in file.read_text()


def here(text: str, folder: Path) -> str:
    """With files and folders of this machine for those of the image."""
    return text.replace("/etc/denoised", str(folder)).replace("/models", str(folder))


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A folder with what a pod has in /etc/denoised: certificates and tokens."""
    folder = tmp_path / "etc"
    for part in ("tls", "tokens"):
        (folder / part).mkdir(parents=True)
    authority = Authority(folder / "tls" / "ca.crt")
    authority.issue(folder / "tls", "tls")
    secret = tools.run(
        sys.executable, "-m", "denoised", "token", "create", "painter", "--file", folder / "tokens" / "tokens"
    )
    (folder / "token").write_text(secret.strip())
    return folder


@each_values
def test_the_commands_of_the_chart_run_here(values: Path | None, etc: Path, tmp_path: Path) -> None:
    """The container's own command, settings and environment, and what the kubelet asks by its probes."""
    document = of_kind(values, "StatefulSet")[-1]
    (container,) = document["spec"]["template"]["spec"]["containers"]
    (config,) = [
        each["data"]["denoised.toml"]
        for each in of_kind(values, "ConfigMap")
        if each["metadata"]["name"] == document["metadata"]["name"]
    ]
    file = etc / "denoised.toml"
    config = re.sub(r"^(address|metrics_address|state_dir|device) = .*$", "", config, flags=re.MULTILINE)
    file.write_text(here(config, etc))
    assert container["command"][:2] == ["denoised", "serve"]
    variables = {
        each["name"]: here(each["value"], etc)
        for each in container["env"]
        if "value" in each and each["name"].startswith("DENOISED_")
    }
    with Daemon(tmp_path / "state", *(here(part, etc) for part in container["command"][2:])) as daemon:
        port = daemon.target.rpartition(":")[2]
        # What `kubectl exec` asks and a gRPC probe does; a probe over TLS asks the metrics' port.
        asked: dict[str, Any] = {
            **variables,
            "DENOISED_TARGET": daemon.target,
            "DENOISED_TOKEN": (etc / "token").read_text(),
        }
        assert variables["DENOISED_TARGET"] == "localhost:50051"
        assert tools.run(Path(sys.executable).parent / "denoised", "health", **asked).strip() == "serving"
        probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
        for probe in probes:
            if "grpc" in probe:
                assert probe["grpc"] == {"port": 50051}
                with grpc.insecure_channel(f"localhost:{port}") as channel:
                    answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
                assert answer.status == HealthCheckResponse.SERVING
            else:
                url = daemon.metrics_url.replace("/metrics", probe["httpGet"]["path"])
                with urllib.request.urlopen(url, timeout=10) as page:
                    assert page.status == 200
        assert ("grpc" in container["readinessProbe"]) == ("DENOISED_CA" not in variables)
        listed = json.loads(tools.run(Path(sys.executable).parent / "denoised", "ps", "--json", **asked))
        assert [(each["name"], each["pinned"]) for each in listed] == (
            [("pipelines/smoke", True)] if "preload" in config else []
        )
        generates = 'readiness_probe = "generate"' in config
        assert (daemon.metric("denoised_images_total") >= 1) == generates
