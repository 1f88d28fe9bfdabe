#!/usr/bin/env bash
# Lints the protos and compares them with what others may already speak: the last release, or main's former commit.
# PROTO_BASE=<commit> names another base. Generated Python is compiled by the build, not here.
set -euo pipefail
cd "$(dirname "$0")/.."
buf=.venv/bin/buf

"$buf" lint proto
echo "buf lint: clean"

base=${PROTO_BASE:-$(git describe --tags --abbrev=0 2>/dev/null || git rev-parse --quiet --verify HEAD~1 || true)}
if [[ -z $base ]] || ! git cat-file -e "$base:proto/buf.yaml" 2>/dev/null; then
  echo "buf breaking: NOT RUN: no earlier commit here holds protos (base: ${base:-none})" >&2
  exit 0
fi
"$buf" breaking proto --against "$(git rev-parse --git-common-dir)#ref=$base,subdir=proto"
echo "buf breaking: nothing broken since $base"
