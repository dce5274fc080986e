#!/usr/bin/env bash
# Check and measure this machine's GPU in under 8 minutes, without a network: see tests/gpu/check.py --help.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-$python}" tests/gpu/check.py "$@"
