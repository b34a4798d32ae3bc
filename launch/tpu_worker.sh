#!/usr/bin/env bash
# What launch/gcp_tpu.sh asks of each worker of a slice. It runs there, out of the code that was installed.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: launch/tpu_worker.sh install EXTRAS [SETUP]   an environment with these extras, in .venv beside this code; then
                                                    SETUP, a command of bash, whether or not that was there already
       launch/tpu_worker.sh start RUN TOKEN [NAME=VALUE ...] -- FLAG ...
                                                    python -m salt_jax.main FLAG ..., detached from the terminal
       launch/tpu_worker.sh state [RUN]              absent, running, exit N, stopped, or lost (the machine restarted)
       launch/tpu_worker.sh follow RUN BYTES [MARK]  the log behind its first BYTES, until the run ends; before it, with
                                                    MARK, a line of the character 036, MARK and BYTES
       launch/tpu_worker.sh tail RUN LINES           its last lines
       launch/tpu_worker.sh stop RUN [now]           SIGTERM, once: the run saves and leaves; with now once more: it leaves at once

A run keeps log, exit_code and the command in ~/salt_jax_runs/RUN, and the logs before it as log.TOKEN.
HELP
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=$HOME/salt_jax_runs
boot=$(cat /proc/sys/kernel/random/boot_id)

# TPU VMs are called …-w-NUMBER.
worker=$(hostname)
worker=${worker##*-w-}

say() {
  echo "[worker $worker] $*"
}

report() {
  local code=$?
  [[ $code -eq 0 ]] || say "failed with exit code $code"
}

# A machine's image has Python 3.10 or 3.12; the former gets 3.12 from uv, without root.
make_environment() {
  local python
  for python in python3.14 python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      "$python" -m venv .venv
      return
    fi
  done
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 .venv
}

install() {
  cd "$here"
  if [[ -e .venv/ready && $(< .venv/ready) == "$1" ]]; then
    say "installed already: ${here##*/}"
  else
    rm -rf .venv
    make_environment
    .venv/bin/python -m pip install --quiet -e ".[$1]"
    printf '%s\n' "$1" > .venv/ready
    say "installed: ${here##*/}"
  fi
  if [[ -n ${2:-} ]]; then
    say "setup: $2"
    bash -c "$2"
  fi
  ln -sfn "${here##*/}" "${here%/*}/current"
}

# A dead process that nobody has collected takes signals still, so kill -0 alone would not do.
alive() {
  local stat
  { stat=$(< "/proc/$1/stat"); } 2> /dev/null && [[ ${stat##*) } != [ZX]* ]]
}

state() {
  local place=$runs/$1
  if [[ -e $place/stopped && -s $place/exit_code && $(< "$place/exit_code") != 0 ]]; then
    echo stopped
  elif [[ -s $place/exit_code ]]; then
    echo "exit $(< "$place/exit_code")"
  elif [[ ! -s $place/pid ]]; then
    echo absent
  elif [[ $(< "$place/boot") == "$boot" ]] && alive "$(< "$place/pid")"; then
    echo running
  else
    echo lost
  fi
}

start() {
  local run=$1 token=$2 place=$runs/$1 other
  shift 2
  # A dropped connection must not stop half of this, and the second try must not start a second run.
  trap '' HUP
  mkdir -p "$place"
  if [[ -e $place/token && $(< "$place/token") == "$token" ]]; then
    say "run $run: started already"
    return
  fi
  for other in "$runs"/*/; do
    if [[ $(state "$(basename "$other")") == running ]]; then
      say "run $(basename "$other") is still running here, and a TPU serves one: follow it with logs, or stop it first"
      return 3
    fi
  done
  if [[ -e $place/log ]]; then
    mv "$place/log" "$place/log.$(cat "$place/token")"
  fi
  rm -f "$place/exit_code" "$place/pid" "$place/python_pid" "$place/stopped"
  printf '%s\n' "$token" > "$place/token"
  printf '%s\n' "$boot" > "$place/boot"
  printf '%q ' "$@" > "$place/command"
  : > "$place/log"
  # A session of its own: it outlives the connection, and needs no tool that an image might lack.
  setsid nohup bash "${BASH_SOURCE[0]}" body "$run" "$@" < /dev/null >> "$place/log" 2>&1 &
  printf '%s\n' "$!" > "$place/pid"
  say "run $run: started"
}

body() {
  local place=$runs/$1 code=0 environment=()
  shift
  while [[ $1 != -- ]]; do
    environment+=("$1")
    shift
  done
  shift
  cd "$here"
  # A machine that goes down signals everybody: this shell waits for what the program has to say.
  trap : TERM
  # shellcheck disable=SC2016
  bash -c 'echo $$ > "$0"; exec env "$@"' "$place/python_pid" ${environment[@]+"${environment[@]}"} \
    .venv/bin/python -u -m salt_jax.main "$@" || code=$?
  printf '%s\n' "$code" > "$place/exit_code.part"
  mv "$place/exit_code.part" "$place/exit_code"
}

follow() {
  local place=$runs/$1 from=$(($2 + 1))
  if [[ ! -e $place/log ]]; then
    say "there is no run $1 here" >&2
    return 4
  fi
  if [[ -n ${3:-} ]]; then
    printf '\036%s %s\n' "$3" "$2"
  fi
  local wait=${SALT_JAX_TPU_WAIT:-1}
  if [[ $(state "$1") == running ]]; then
    while alive "$$" && [[ $(state "$1") == running ]]; do sleep "$wait"; done &
    tail -c "+$from" --pid="$!" -s "$wait" -f "$place/log"
  else
    tail -c "+$from" "$place/log"
  fi
}

last() {
  local place=$runs/$1
  if [[ ! -e $place/log ]]; then
    say "there is no run $1 here"
    return 4
  fi
  tail -n "$2" "$place/log" | sed "s/^/[worker $worker] /"
}

states() {
  local run
  for run in "$runs"/*/; do
    [[ ! -d $run ]] || say "run $(basename "$run"): $(state "$(basename "$run")")"
  done
}

# The program takes a second SIGTERM for "at once, without saving", and this may be repeated where a connection fails.
stop() {
  local place=$runs/$1
  if [[ $(state "$1") != running ]]; then
    say "run $1: not running ($(state "$1"))"
  elif [[ -e $place/stopped && ${2:-} != now ]]; then
    say "run $1: told already; it saves and leaves"
  else
    touch "$place/stopped"
    if ! kill -TERM "$(< "$place/python_pid")"; then
      rm "$place/stopped"
      return 1
    fi
    say "run $1: told to ${2:+leave }${2:-save and leave}"
  fi
}

[[ ${1:-} == body || ${1:-} == follow ]] || trap report EXIT
case ${1:-} in
  install | start | body | follow | stop) "$@" ;;
  tail) last "$2" "$3" ;;
  state) if [[ $# -gt 1 ]]; then say "$(state "$2")"; else states; fi ;;
  *)
    usage
    [[ ${1:-} == -h || ${1:-} == --help ]] || exit 2
    ;;
esac
