"""Writes what of the chart comes from elsewhere: README.md and values.schema.json from the comments and the defaults of
values.yaml, and copies of the rules and the dashboard. `make generate` runs it.

`--check` only says whether what is checked in is what would be written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "denoised"
MONITORING = CHART.parents[1] / "monitoring"
HEAD = """# The Helm chart of denoised

Written by `deploy/helm/reference.py` from `values.yaml`: edit that. How to use it is in
[deploy/README.md](../../README.md#kubernetes).

```console
helm install painter deploy/helm/denoised --set image.repository=registry.example.org/denoised
```

Each pool of daemons is a StatefulSet: a daemon keeps its handles on a volume of its own, and has them again when it is
back. Pods are not root, their root file system is read-only, and they hold no token of Kubernetes: the namespace may
enforce the pod security standard "restricted".

## Values

| value | default | what it is |
|---|---|---|
"""

# What a default alone does not say.
POOL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "gpus"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?$"},
        "replicas": {"type": "integer", "minimum": 0},
        "gpus": {"type": "integer", "minimum": 0},
        "resources": {"type": "object"},
        "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}},
        "tolerations": {"type": "array", "items": {"type": "object"}},
        "affinity": {"type": "object"},
        "settings": {"$ref": "#/$defs/settings"},
        "preloads": {"$ref": "#/$defs/preloads"},
    },
}
OWN_SETTINGS = ("address", "metrics_address", "tls_cert", "tls_key", "tls_client_ca", "tokens_file", "state_dir",
                "drain_grace", "insecure", "preload", "readiness_probe")  # fmt: skip
# The daemon takes a preload as one text, with commas between its fields.
FIELD = {"type": "string", "pattern": "^[^,]*$"}
DEFINITIONS = {
    "settings": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z][a-z_]*$", "not": {"enum": list(OWN_SETTINGS)}},
        "additionalProperties": {"type": ["string", "number", "boolean", "array"]},
    },
    "preloads": {
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["repo", "id"],
            "properties": {
                "repo": {"type": "string", "pattern": "^[^,]+$"},
                "id": {"type": "string", "pattern": "^[a-z][-a-z0-9]{0,62}$"},
                "task": FIELD,
                "dtype": FIELD,
                "variant": FIELD,
                "revision": FIELD,
            },
        },
    },
}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT = {"type": "integer", "minimum": 1}
SIZE = {"type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi|Ti)$"}
SPECIAL: dict[str, Any] = {
    "pools": {"type": "array", "minItems": 1, "items": POOL},
    "settings": {"$ref": "#/$defs/settings"},
    "preloads": {"$ref": "#/$defs/preloads"},
    "readinessProbe": {"enum": ["load", "generate"]},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.pullSecrets": {"type": "array", "items": {"type": "string"}},
    "service.port": PORT,
    "metrics.port": PORT,
    "autoscaling.kind": {"enum": ["none", "hpa", "keda"]},
    "autoscaling.minReplicas": COUNT,
    "autoscaling.maxReplicas": COUNT,
    "autoscaling.targetQueueSeconds": {"type": "number", "exclusiveMinimum": 0},
    "drainGraceSeconds": {"type": "integer", "minimum": 0},
    "startupSeconds": {"type": "integer", "minimum": 5},
    "storage.state.size": SIZE,
    "storage.models.size": SIZE,
    "podDisruptionBudget.maxUnavailable": {"type": ["integer", "string"]},
    "tls.certManager.issuerRef": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "kind": {"enum": ["Issuer", "ClusterIssuer"]}},
    },
}
RULES = [
    {
        "if": {"properties": {"tls": {"properties": {"enabled": {"const": True}}}}},
        "then": {
            "properties": {
                "tls": {
                    "anyOf": [
                        {"properties": {"existingSecret": {"minLength": 1}}},
                        {
                            "properties": {
                                "certManager": {
                                    "properties": {
                                        "enabled": {"const": True},
                                        "issuerRef": {"properties": {"name": {"minLength": 1}}},
                                    }
                                }
                            }
                        },
                    ]
                }
            }
        },
    }
]


def comments(text: str) -> dict[str, str]:
    """The `# --` comment before each value, by the value's path."""
    found, path, said = dict[str, str](), list[tuple[int, str]](), list[str]()
    for line in text.splitlines():
        if said_now := re.match(r"\s*# (?:-- )?(.*)", line):
            said = [said_now[1]] if "# -- " in line else [*said, said_now[1]] if said else []
            continue
        if not (key := re.match(r"(\s*)([A-Za-z]\w*):", line)):
            said = []
            continue
        indent = len(key[1])
        path = [part for part in path if part[0] < indent] + [(indent, key[2])]
        if said:
            found[".".join(name for _, name in path)] = " ".join(said)
        said = []
    return found


def schema(value: Any, path: str = "") -> dict[str, Any]:
    if path in SPECIAL:
        return dict(SPECIAL[path])
    match value:
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case str():
            return {"type": "string"}
        case list():
            return {"type": "array"}
        case dict() if not value or path.endswith("labels"):
            return {"type": "object"}
    properties = {name: schema(child, f"{path}.{name}".lstrip(".")) for name, child in value.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def files() -> Iterator[tuple[Path, str]]:
    """What to write, and where."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    whole: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of denoised"}
    whole |= schema(values)
    whole |= {"$defs": DEFINITIONS, "allOf": RULES}
    # Helm hands these to every chart.
    whole["properties"] |= {"global": {"type": "object"}}
    yield CHART / "values.schema.json", json.dumps(whole, indent=2) + "\n"
    rows = []
    for path, said in comments(text).items():
        value = values
        for name in path.split("."):
            value = value[name]
        default = f"`{json.dumps(value)}`" if len(json.dumps(value)) < 60 else "see `values.yaml`"
        rows.append(f"| `{path}` | {default} | {said} |")
    yield CHART / "README.md", HEAD + "\n".join(rows) + "\n"
    for name in ("rules.yaml", "dashboard.json"):
        yield CHART / "files" / name, (MONITORING / name).read_text()


def main() -> None:
    stale = []
    for path, text in files():
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(CHART.parents[2])))
    if stale:
        sys.exit(f"out of date, run `make generate`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
