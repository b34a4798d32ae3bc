# shellcheck shell=bash disable=SC2034,SC2154
# Part of gcp_tpu.sh, whose variables it shares: what it says, asks of gcloud, and does on the workers.

say() {
  echo "gcp_tpu: $*" >&2
}

die() {
  say "$1"
  exit "${2:-1}"
}

# The words as any POSIX shell reads them back.
quote() {
  local word line=''
  for word in "$@"; do
    if ! [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

show() {
  quote "$@"
  echo
}

pause() {
  sleep "${SALT_JAX_TPU_WAIT:-$1}"
}

# Runs gcloud, shows the command and what it says, and keeps the latter in $said.
act() {
  local code=0
  if [[ -n $dry ]]; then
    show gcloud "$@"
    return 0
  fi
  say "$(quote gcloud "$@")"
  gcloud "$@" < /dev/null 2>&1 | tee "$tmp/said" || code=${PIPESTATUS[0]}
  said=$(< "$tmp/said")
  return "$code"
}

# What gcloud says where the network to it is gone, here or there.
lost="Unable to find the server|[Cc]onnection (aborted|refused|reset|timed out)|Max retries exceeded|[Nn]etwork is unreachable\
|name resolution|gaierror|SSLError|EOF occurred|RemoteDisconnected|TransportError|problem refreshing your current auth tokens|UNAVAILABLE"

# Whether what a call said is for waiting: the network is gone, and a run with --keep-going is watched.
outlasted() {
  [[ -n $keep && -n $begun && $1 =~ $lost ]]
}

# Whether to try again behind try $1, one every $2 seconds, that said $3: --tries times, or for --minutes where it is outlasted.
again() {
  (($1 < tries)) || { outlasted "$3" && (($1 < tries + minutes * 60 / $2)); }
}

# Describes something into $facts, fields parted by |; empty if there is no such thing. No answer is not "none".
ask() {
  local try
  if [[ -n $dry ]]; then
    show gcloud "$@"
    return 0
  fi
  for ((try = 1; ; try++)); do
    if facts=$(gcloud "$@" < /dev/null 2> "$tmp/error"); then
      return 0
    fi
    if grep -qE 'NOT_FOUND: .*/(nodes|queuedResources)/' "$tmp/error"; then
      facts=''
      return 0
    fi
    again "$try" 10 "$(< "$tmp/error")" || break
    ((try != tries)) || say "gcloud does not say what there is of $name: $(tail -n 1 "$tmp/error")"
    pause 10
  done
  cat "$tmp/error" >&2
  die "gcloud could not say what there is of $name (above); nothing was changed."
}

describe_node() {
  ask compute tpus tpu-vm describe "$1" "${where[@]}" \
    "--format=value[separator='|'](state,acceleratorType,labels.created-by,labels.owner,networkEndpoints.len(),queuedResource)"
}

describe_queued() {
  local node='tpu.nodeSpec[0].node'
  ask compute tpus queued-resources describe "$name" "${where[@]}" "--format=value[separator='|'](state.state,\
$node.acceleratorType,$node.labels.created-by,$node.labels.owner,tpu.nodeSpec[0].multisliceParams.nodeCount)"
}

# Sets the facts of the slice: kind (queued, node, none), state, found_type, made_by, owned_by, nodes.
locate() {
  local count=1 request=''
  kind=none state=ABSENT found_type='' made_by='' owned_by='' nodes=("$name")
  if [[ -n $dry ]]; then
    imagine
    return 0
  fi
  describe_node "$name"
  if [[ -n $facts ]]; then
    kind=node
    IFS='|' read -r state found_type made_by owned_by count request <<< "$facts"
    [[ -n $request ]] || return 0
  fi
  describe_queued
  if [[ -n $facts ]]; then
    kind=queued
    IFS='|' read -r state found_type made_by owned_by count <<< "$facts"
    name_nodes "${count:-1}"
  fi
}

name_nodes() {
  local number
  nodes=("$name")
  if [[ $1 -gt 1 ]]; then
    nodes=()
    for ((number = 0; number < $1; number++)); do nodes+=("$name-$number"); done
  fi
}

# With --dry-run: what would be found if all went well.
imagine() {
  kind=node state=READY made_by=salt-jax owned_by=$owner
  if [[ -n $queued ]]; then
    kind=queued state=ACTIVE
    name_nodes "$slices"
    describe_queued
  else
    describe_node "$name"
  fi
}

# Sets health to ready, waiting or gone, and because to the state that says so.
examine() {
  local node rest
  locate
  because="$name is $state"
  judge "$state"
  if [[ $kind != queued || $health != ready || -n $dry ]]; then
    return 0
  fi
  for node in "${nodes[@]}"; do
    describe_node "$node"
    IFS='|' read -r because rest <<< "${facts:-ABSENT}"
    judge "$because"
    because="$node is $because"
    [[ $health == ready ]] || return 0
  done
}

judge() {
  case $1 in
    READY | ACTIVE) health=ready ;;
    PREEMPTED | TERMINATED | ABSENT | DELETING | SUSPENDED | SUSPENDING | FAILED) health=gone ;;
    *) health=waiting ;;
  esac
}

# A command on every worker of a node. What did not arrive is tried again, so each command can bear to run twice.
on_workers() {
  local node=$1 try code failed='^\[worker [^]]*\] failed|^##### Command execution on worker|terminal state'
  unreached=''
  for ((try = 1; try <= tries; try++)); do
    code=0
    act "${ssh[@]}" "$node" "${where[@]}" "${reach[@]}" "--worker=$workers" "--command=$2" || code=$?
    [[ $code -ne 0 ]] || return 0
    # ssh ends with 255 and gcloud with 1 where they fail themselves.
    if [[ $code -ne 1 && $code -ne 255 ]] || grep -qE "$failed" <<< "$said"; then
      break
    fi
    say "$node: a worker could not be reached (try $try of $tries)."
    [[ $try -lt $tries ]] || { unreached=yes && break; }
    pause 15
  done
  name_failed "$node"
  return 1
}

name_failed() {
  local line
  while IFS= read -r line; do
    say "$1, $line"
  done < <(sed -nE 's/^\[(worker [^]]*)\] (failed with exit code [0-9]+)$/\1 \2/p
    s/^##### Command execution on (worker [0-9]+) (failed with exit) status ([0-9]+).*/\1 \2 code \3/p' <<< "$said" | sort -u)
}

send() {
  local try
  for ((try = 1; try <= tries; try++)); do
    if act compute tpus tpu-vm scp "$1" "$2:" "${where[@]}" "${reach[@]}" --worker=all; then
      return 0
    fi
    [[ $try -eq $tries ]] || pause 15
  done
  unreached=yes
  return 1
}

# What the run is on each worker into $states, lines "NODE WORKER STATE"; empty if a node did not answer.
read_states() {
  local node answer question
  question=$(quote bash salt_jax_code/current/launch/tpu_worker.sh state "$run")
  states=''
  for node in "${nodes[@]}"; do
    if ! answer=$(gcloud "${ssh[@]}" "$node" "${where[@]}" "${reach[@]}" --worker=all "--command=$question" \
      < /dev/null 2> "$tmp/error"); then
      states=''
      return 0
    fi
    states+=$(sed -nE "s/^\[worker ([^]]*)\] (absent|running|lost|stopped|exit [0-9]+)$/$node \1 \2/p" <<< "$answer")$'\n'
  done
}

# Passes on the log behind its first $2 bytes, without what it passed on before: gcloud repeats a dropped command by itself,
# and each time the worker says, behind the mark $1, from which byte on the log comes, maybe in the midst of a line.
sift() {
  local LC_ALL=C mark=$'\036'"$1 " have=$2 skip=0 line end=$'\n'
  while IFS= read -r line || { end='' && [[ -n $line ]]; }; do
    line+=$end
    if [[ $line =~ "$mark"([0-9]+)$'\n'$ ]]; then
      skip=$((have - BASH_REMATCH[1]))
    elif ((skip >= ${#line})); then
      skip=$((skip - ${#line}))
    else
      printf %s "${line:skip}"
      have=$((have + ${#line} - skip)) skip=0
    fi
  done
}

# Follows one worker's log until the run ends there or the slice is gone; a dropped connection goes on where it was.
follow_log() {
  local node=${nodes[0]} drops=0 before=0 mark=$$-$RANDOM$RANDOM
  : > "$tmp/stream"
  while :; do
    if gcloud "${ssh[@]}" "$node" "${where[@]}" "${reach[@]}" "--worker=$worker" "--command=$(quote bash \
      salt_jax_code/current/launch/tpu_worker.sh follow "$run" "$before" "$mark")" < /dev/null 2> "$tmp/error" \
      | sift "$mark" "$before" | tee -a "$tmp/stream" "$record/log.$run"; then
      return 0
    fi
    examine
    [[ $health != gone ]] || return 0
    [[ $(wc -c < "$tmp/stream") -eq $before ]] || drops=0
    before=$(($(wc -c < "$tmp/stream")))
    if ((++drops > tries)); then
      cat "$tmp/error" >&2
      say "$node: the log cannot be followed (above); the run itself may go on."
      return 0
    fi
    say "$node: the connection dropped; going on behind byte $before."
    pause 10
  done
}
