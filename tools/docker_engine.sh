#!/usr/bin/env bash
# Ends with status 0 once a Docker engine answers: the one that runs, or one that ../shared/tools/docker-engine starts.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v docker >/dev/null && docker info >/dev/null 2>&1; then exit 0; fi
if [[ -x ../shared/tools/docker-engine ]]; then exec ../shared/tools/docker-engine; fi
echo "no Docker engine answers: start one, then run this again" >&2
exit 1
