#!/usr/bin/env bash
# Check a GPU in at most 8 minutes: scripts/gpu_check.sh --out FOLDER (--help has the options).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m scripts.gpu "$@"
