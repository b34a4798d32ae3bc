#!/usr/bin/env bash
# Scores exported videos with VBench, in an environment of its own, and prints the table.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: [GPUS=1] [STATIC=1] [VBENCH_ENV=.venv-vbench] [VBENCH_PYTHON=python3.10] [PYTHON=python3] launch/vbench.sh DIR [DIMENSION ...]

DIR is what `python -m salt_jax.evaluate --vbench=PROMPTS --output=DIR` has written. An incomplete one is refused.
  DIMENSION ...      those of VBench to score; by default all 16. What is scored already is kept
  GPUS=1             processes, one a GPU
  STATIC=1           for temporal_flickering, keep only still videos first, as VBench's leaderboard does
  VBENCH_ENV=...     where vbench 0.1.5 is installed at first use: it wants numpy below 2, salt_jax wants 2
  VBENCH_PYTHON=...  the Python of that environment, 3.8 to 3.11
  PYTHON=...         the Python of salt_jax; by default .venv/bin/python where it exists, else python3

VBench downloads the weights of its judges to VBENCH_CACHE_DIR (default ~/.cache/vbench). object_class, multiple_objects,
color and spatial_relationship need detectron2 besides, which is not on PyPI: install it into VBENCH_ENV by hand.

example: launch/vbench.sh runs/vbench
         launch/vbench.sh runs/vbench dynamic_degree motion_smoothness
HELP
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  usage
  exit 0
fi

folder=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
dimensions=("$@")
if [[ ${#dimensions[@]} -eq 0 ]]; then
  mapfile -t dimensions < <("$python" -c 'from salt_jax import vbench; print("\n".join(vbench.DIMENSIONS))')
fi
"$python" -m salt_jax.vbench --check --results="$folder"

home=$(realpath -m "${VBENCH_ENV:-.venv-vbench}")
if [[ ! -e $home/ready ]]; then
  "${VBENCH_PYTHON:-python3.10}" -m venv "$home"
  "$home/bin/pip" install -q 'setuptools<70' wheel 'numpy<2' 'torch==2.3.1' 'torchvision==0.18.1'
  "$home/bin/pip" install -q --no-build-isolation 'vbench==0.1.5'
  touch "$home/ready"
fi
package=$("$home/bin/python" -c 'import importlib.util as u; print(u.find_spec("vbench").submodule_search_locations[0])')

for dimension in "${dimensions[@]}"; do
  place=$folder/scores/$dimension
  if compgen -G "$place/*_eval_results.json" > /dev/null; then
    echo "$dimension: scored already"
    continue
  fi
  videos=$folder/videos
  if [[ $dimension == temporal_flickering && ${STATIC:-0} == 1 ]]; then
    "$home/bin/vbench" static_filter --videos_path "$videos" --result_path "$folder/static"
    videos=$folder/static/filtered_videos
  fi
  unfinished=$folder/unfinished/$dimension
  rm -rf "$unfinished"
  "$home/bin/python" -m torch.distributed.run --standalone --nproc_per_node "${GPUS:-1}" "$package/launch/evaluate.py" \
    --videos_path "$videos" --dimension "$dimension" --output_path "$unfinished"
  mkdir -p "$folder/scores"
  mv "$unfinished" "$place"
done
"$python" -m salt_jax.vbench --results="$folder"
