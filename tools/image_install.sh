#!/bin/sh
# For the Dockerfile: fills /opt/venv with what an extra requires ("" is what every service requires), or with a wheel.
#   image_install.sh [EXTRA]          image_install.sh --wheel
# TORCH_INDEX_URL adds an index for torch's builds, where it answers.
set -eu
# The base image's own Python, not the one of the venv that is filled.
PATH=${PATH#/opt/venv/bin:}
cd "$(dirname "$0")"
pip="python3 -m pip --disable-pip-version-check --python /opt/venv/bin/python install --quiet --no-cache-dir"
if [ "${1:-}" = --wheel ]; then
  exec $pip --no-deps /wheel/*.whl
fi
python3 requirements.py "$@" >/tmp/requirements.txt
exec $pip -c constraints.txt -r /tmp/requirements.txt $(python3 torch_index.py "${TORCH_INDEX_URL:-}")
