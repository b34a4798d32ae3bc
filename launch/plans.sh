#!/usr/bin/env bash
# Finds for each shipped config of a real size the smallest slice of each generation, and prints the table of the README.
#
#   launch/plans.sh [FOLDER]    (launch/plans by default)
#
# A row takes minutes to an hour on two cores. Rows that are in the folder already are kept, and so is what a search that
# was cut off found, in FOLDER/kept.
set -euo pipefail

folder=${1:-launch/plans}
python=${PYTHON:-python3}
# shellcheck disable=SC2054  # a comma is part of a config's argument
configs=(
  selfforcing.py
  selfforcing.py:teacher=1.3b
  selfforcing.py:14b
  selfforcing.py:14b,i2v
  selfforcing.py:backbone=causal_forcing
  selfforcing.py:backbone=longlive
  dmd.py
  dmd.py:teacher=1.3b
  dmd.py:14b,i2v
  dmd.py:14b,flf2v
)

mkdir -p "$folder"
for config in "${configs[@]}"; do
  for generation in v5p v6e v5e tpu7x; do
    file="$folder/$(tr -c 'a-z0-9.\n' '-' <<< "${config/.py/}")-$generation.json"
    more=()
    if [[ $generation = v5e && $config = selfforcing.py:14b* ]]; then
      more=(--config.accumulate=2) # the largest slice has four chips a clip, and two parts give a clip eight
    fi
    if [[ ! -e $file ]]; then
      "$python" -m salt_jax.plan --config="configs/$config" "${more[@]}" --smallest="$generation" --kept="$folder/kept" \
        --json="$file" || echo "no row for $config on $generation" >&2
    fi
  done
done
"$python" -m salt_jax.plan --table="$folder"
