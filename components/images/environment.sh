#!/bin/sh
# Make a Python environment without pip in /opt/NAME; the arguments after NAME are pip's. NO_DEPS names a list of packages
# whose own requirements are not wanted.
#     environment.sh NAME PIP_ARGUMENT...
# `opensora` has the environment `torch` behind it, so that PyTorch stays a layer of its own, and gets the command and
# an SBOM of both.
set -eu
name=$1
shift
env=/opt/$name
packages=$env/lib/python3.11/site-packages
pip() { /build/tools/bin/pip --python "$env/bin/python" install --no-cache-dir --quiet "$@"; }

python3 -m venv --without-pip "$env"
if [ "$name" = opensora ]; then
    echo "import site; site.addsitedir('/opt/torch/lib/python3.11/site-packages')" >"$packages/torch.pth"
    sed "s#/usr/bin/env python#$env/bin/python#" /build/opensora >"$env/bin/opensora"
    chmod +x "$env/bin/opensora"
fi
pip --constraint /build/constraints.txt "$@"
[ -z "${NO_DEPS:-}" ] || pip --no-deps --requirement "$NO_DEPS"
if [ "$name" = opensora ]; then
    /build/tools/bin/cyclonedx-py environment --output-format JSON --output-file /build/python.cdx.json "$env/bin/python"
    python3 /build/sbom.py /build/python.cdx.json /usr/share/opensora/debian.txt >"$env/sbom.cdx.json"
fi

# Tests, headers and static libraries are of no use to those who only run this.
find "$packages" -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
rm -rf "$packages"/torch/include "$packages"/torch/bin/protoc* "$packages"/pyarrow/include
find "$packages" -name '*.a' -delete
# The root of a container is read-only: what Python would compile at each start is compiled now.
python3 -m compileall -q "$packages" || true
