#!/usr/bin/env bash
# Runs the training entry on what this machine has: one or more GPUs, or the CPU.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: [DEVICES=N] [PYTHON=python3] launch/local.sh --config=FILE[:ARGS] --workdir=DIR [flag ...]

Runs `python -m salt_jax.main` with these flags in the project's folder.
  DEVICES=N   use N forced CPU devices instead of what is here, to try a mesh
  PYTHON=...  the interpreter; by default .venv/bin/python where it exists, else python3

example: launch/local.sh --config=configs/selfforcing.py:nano --workdir=runs/nano
         DEVICES=8 launch/local.sh --config=configs/selfforcing.py:nano --workdir=runs/eight
HELP
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  usage
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
if [[ -n ${DEVICES:-} ]]; then
  if ! [[ $DEVICES =~ ^[1-9][0-9]*$ ]]; then
    echo "DEVICES=$DEVICES is not a positive number; give the count of CPU devices." >&2
    exit 2
  fi
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
exec "$python" -m salt_jax.main "$@"
