#!/usr/bin/env bash
# Makes a TPU slice on Google Cloud, runs the training entry on all its workers, follows it, resumes it, deletes the slice.
# shellcheck disable=SC1091,SC2034 source-path=SCRIPTDIR
set -euo pipefail

usage() {
  cat <<'HELP'
usage: launch/gcp_tpu.sh COMMAND NAME [option ...] [-- FLAG ...]

  create NAME --type=TYPE   make the slice; one that is there already is left as it is
      --spot                cheap, may be taken away     --reserved   out of a reservation
      --queued              wait in Google's queue       --slices=N   N slices joined over the network (queued)
      --minutes=1440        how long to wait in the queue; 0: do not wait
      --tries=5             how often to ask while the zone has no capacity, or a worker does not answer
      --runtime=VERSION     the image; by default Google's for the type
      --network=N --subnetwork=N --service-account=MAIL --internal-ips   as gcloud has them
  install NAME              the code of this folder's commit, with an environment, on all workers
      --commit=HASH --repo=URL   another commit, another place; by default origin's, by https
      --ship                send `git archive` of the commit instead, for what is not pushed
      --extras=tpu,gcs,wan  extras of setup.py, parted by commas
      --setup='COMMAND'     for bash in the code's folder on every worker, behind the environment, such as
                            'gcloud storage rsync --recursive gs://BUCKET/inputs .'; noted, and run again whenever
                            the code is installed, also in a slice made again: it must bear to run twice
  run NAME -- FLAG ...      python -m salt_jax.main FLAG ... on all workers, detached; follows the log of worker 0
      --run=main            name of the run, for resume, logs, status, stop, fetch
      --keep-going[=20]     when the slice is taken away: make it again, install, go on; at most so often, and asking for
                            capacity, or while the network is gone, for --minutes=1440 (instead of --tries times)
      --no-follow           come back at once            --env=NAME=VALUE   set for the program, such as LIBTPU_INIT_ARGS
  resume NAME [--run=R]     go on after a preemption: slice, code and command as they were (also --keep-going)
  logs NAME [--run=R]       follow it (--worker=K); --no-follow: the last lines of all workers (--lines=20)
  status NAME               the state of the slice, and of the runs on each worker
  stop NAME [--run=R]       tell the run to save and leave; --now: if it cannot save, tell it again, and it leaves at once
  fetch NAME --to=DIR       the logs of all workers, the first one's workdir, and the run's bucket
  delete NAME [--yes]       delete the slice, if this script and this owner made it
  list                      what this script made in the zone, and still costs or holds quota

Always: --zone=Z --project=P (or CLOUDSDK_COMPUTE_ZONE, CLOUDSDK_CORE_PROJECT), --owner=YOU, --internal-ip (reach workers by it),
--dry-run (print the commands and do nothing; with --queued or --slices=N of such a slice).
TYPE: v4-8, v5litepod-16, v5p-64, v6e-16 and so on. tpu7x is not served by this API: see launch/GKE.md.
What was made is noted in ~/.salt_jax_tpu (SALT_JAX_TPU_HOME), so that resume knows it.

Exit code of run, resume and logs: 0 finished; 75 taken away or told to leave, resume goes on; else that of the first failed worker.
HELP
}

if ((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] < 44)); then
  echo 'gcp_tpu: bash 4.4 or later is needed; on macOS: brew install bash.' >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=gcp_tpu/calls.sh
. "$root/launch/gcp_tpu/calls.sh"
# shellcheck source=gcp_tpu/slice.sh
. "$root/launch/gcp_tpu/slice.sh"
# shellcheck source=gcp_tpu/program.sh
. "$root/launch/gcp_tpu/program.sh"

command=${1:-} name='' zone=${CLOUDSDK_COMPUTE_ZONE:-} project=${CLOUDSDK_CORE_PROJECT:-} owner=${USER:-$(id -un)} dry=''
type='' tier='' queued='' slices=1 minutes=1440 tries=5 looks=10 runtime='' network=() where=() reach=()
commit='' repo='' ship='' extras=tpu,gcs,wan setup='' run=main keep='' follow=yes environment=() worker=0 workers=all lines=20 to='' now='' yes='' flags=()
said='' facts='' kind=none state='' found_type='' made_by='' owned_by='' nodes=() health='' because='' states='' outcome='' begun='' unreached=''
# Without these ssh waits for minutes to connect, and for ever on a worker that is gone.
ssh=(compute tpus tpu-vm ssh '--ssh-flag=-o ConnectTimeout=20' '--ssh-flag=-o ServerAliveInterval=15')
address='^https://[A-Za-z0-9.-]+/[A-Za-z0-9._/~+-]+$'

# The options of each command besides those of all.
declare -A options=(
  [create]='type spot reserved queued slices minutes tries runtime network subnetwork service-account internal-ips'
  [install]='commit repo ship extras setup tries queued slices'
  [run]='run keep-going no-follow env tries minutes queued slices'
  [resume]='run keep-going no-follow tries minutes'
  [logs]='run worker lines no-follow tries queued slices'
  [status]='tries queued slices'
  [stop]='run now tries queued slices'
  [fetch]='run to tries queued slices'
  [delete]='yes tries queued slices'
  [list]=''
)

read_option() {
  local key=${1#--} value=''
  [[ $key != *=* ]] || value=${key#*=}
  key=${key%%=*}
  case " zone project owner internal-ip dry-run ${options[$command]} " in
    *" $key "*) ;;
    *) die "$command has no option --$key; see launch/gcp_tpu.sh --help." 2 ;;
  esac
  case $key in
    spot | reserved | queued | ship | no-follow | now | yes | dry-run | internal-ip | internal-ips)
      [[ $1 == "--$key" ]] || die "--$key takes no value." 2
      ;;
  esac
  case $key in
    spot | reserved)
      [[ -z $tier || $tier == "--$key" ]] || die '--spot and --reserved are two ways to pay: give one.' 2
      tier=--$key
      ;;
    queued) queued=yes ;;
    ship) ship=yes ;;
    no-follow) follow='' ;;
    now) now=now ;;
    yes) yes=yes ;;
    dry-run) dry=yes ;;
    keep-going) keep=${value:-20} ;;
    internal-ip) reach=(--internal-ip) ;;
    internal-ips) network+=(--internal-ips) ;;
    network | subnetwork | service-account) network+=("--$key=$value") ;;
    env) environment+=("$value") ;;
    *)
      [[ $1 == *=* ]] || die "--$key needs a value: --$key=…" 2
      printf -v "$key" %s "$value"
      ;;
  esac
}

demand() {
  [[ $2 =~ $3 ]] || die "$1 $(quote "$2") is not $4." 2
}

check_arguments() {
  [[ $command == list ]] || demand 'the name' "$name" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' \
    'a name of small letters, digits and hyphens that starts with a letter and has at most 40'
  [[ -n $zone ]] || die 'say where: --zone=us-central2-b, or export CLOUDSDK_COMPUTE_ZONE.' 2
  demand --zone "$zone" '^[a-z]+-[a-z]+[0-9]+-[a-z]$' 'a zone such as us-central2-b'
  [[ -z $project ]] || demand --project "$project" '^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$' 'the id of a project'
  demand --run "$run" '^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$' 'a name of letters, digits, dots, hyphens and underscores'
  demand --slices "$slices" '^[1-9][0-9]{0,2}$' 'a number of slices'
  demand --tries "$tries" '^[1-9][0-9]{0,2}$' 'a number of tries from 1 to 999'
  demand --minutes "$minutes" '^[0-9]{1,5}$' 'a number of minutes'
  demand --lines "$lines" '^[1-9][0-9]{0,5}$' 'a number of lines'
  demand --worker "$worker" '^[0-9]{1,4}$' 'the number of a worker'
  demand --extras "$extras" '^[a-z]+(,[a-z]+)*$' 'extras of setup.py parted by commas, such as tpu,wan'
  [[ -z $keep ]] || demand --keep-going "$keep" '^[1-9][0-9]{0,3}$' 'a number of times'
  [[ -z $commit ]] || demand --commit "$commit" '^[0-9a-f]{40}$' 'a whole commit hash of 40 digits'
  [[ -z $repo ]] || [[ $repo =~ $address ]] || die '--repo is not a public https:// address without user or token.' 2
  [[ -z $runtime ]] || demand --runtime "$runtime" '^[a-z0-9][a-z0-9._-]+$' 'the name of an image'
  check_words
  [[ $slices -eq 1 ]] || queued=yes
  owner=$(printf '%s' "$owner" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9_-' - | cut -c 1-63)
}

check_words() {
  local word where_to='put it into a file on the workers: arguments are seen by others and kept in logs.'
  local names='(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)'
  local set="${names}[A-Z0-9_]*=[\"']?[^\"'\$ ]"
  for word in "${network[@]}"; do
    demand 'the option' "$word" '^--(internal-ips|[a-z-]+=[A-Za-z0-9@._/-]+)$' 'a network or an account'
  done
  for word in "${environment[@]}"; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die '--env is not of the form --env=NAME=VALUE.' 2
    [[ ! ${word%%=*} =~ $names ]] \
      || die "--env=${word%%=*}=… looks like a secret; $where_to" 2
  done
  [[ ! $setup =~ $set ]] || die "--setup sets what looks like a secret; $where_to" 2
  for word in "${flags[@]}" "${environment[@]}" "$setup"; do
    [[ ! $word =~ (gh[opsu]_[A-Za-z0-9]{20}|github_pat_|hf_[A-Za-z0-9]{20}|AIza[A-Za-z0-9_-]{30}|ya29\.|-----BEGIN|://[^/@ ]+:[^/@ ]+@) ]] \
      || die "an argument of the program, or --setup, holds what looks like a secret; $where_to" 2
  done
}

# Values that belong together, so that another call can go on with them.
note() {
  local file=$record/$1
  [[ -z $dry ]] || return 0
  shift
  printf '%s\0' "$@" > "$file.part"
  mv "$file.part" "$file"
}

recall() {
  local values
  [[ -e $record/$1 ]] || return 1
  mapfile -d '' values < "$record/$1"
  case $1 in
    create)
      type=${values[0]} tier=${values[1]} queued=${values[2]} slices=${values[3]} runtime=${values[4]} network=("${values[@]:5}")
      ;;
    install) commit=${values[0]} repo=${values[1]} ship=${values[2]} extras=${values[3]} setup=${values[4]:-} ;;
    *) flags=("${values[@]}") ;;
  esac
}

ready() {
  examine
  [[ $health == ready ]] || die "$because; it cannot be used now. \`create\` makes it, \`resume\` makes it again."
}

run() {
  compose
  if ! recall install; then
    [[ -n $dry ]] || die "the code is not there yet: $(quote launch/gcp_tpu.sh install "$name" "${where[@]}")"
    commit=$(git -C "$root" rev-parse HEAD)
  fi
  ready
  note "run.$run" "${flags[@]}"
  cycle ''
}

resume() {
  recall "run.$run" || die "it is not known what run $run of $name was; start it with \`run\`."
  recall install || die "it is not known which code $name had: install it, then run."
  recall create || true
  if [[ -z $dry ]]; then
    examine
    [[ $health != ready ]] || read_states
    if grep -q ' running$' <<< "$states"; then
      say "run $run is still running."
      follow_log
      finish
    fi
  fi
  cycle yes
}

logs() {
  local node
  ready
  if [[ -n $follow && -z $dry ]]; then
    follow_log
    finish
    exit 75
  fi
  for node in "${nodes[@]}"; do
    on_workers "$node" "$(quote bash salt_jax_code/current/launch/tpu_worker.sh tail "$run" "$lines")" || exit 1
  done
}

status() {
  local node
  examine
  say "$because (${found_type:-none}${owned_by:+, of $owned_by})"
  [[ $health == ready ]] || return 0
  for node in "${nodes[@]}"; do
    on_workers "$node" "$(quote bash salt_jax_code/current/launch/tpu_worker.sh state)" \
      || say "$node: no code is installed there, or it does not answer."
  done
}

stop() {
  local node
  ready
  for node in "${nodes[@]}"; do
    on_workers "$node" "$(quote bash salt_jax_code/current/launch/tpu_worker.sh stop "$run" ${now:+"$now"})" \
      || die "run $run may not have stopped on $node (above)."
  done
}

fetch() {
  local node word workdir='' bucket=''
  [[ -n $to ]] || die 'say where to: --to=DIR.' 2
  recall "run.$run" || die "it is not known what run $run of $name was."
  for word in "${flags[@]}"; do
    case $word in
      --workdir=*) workdir=${word#*=} ;;
      --config.checkpoint.folder=*) bucket=${word#*=} ;;
    esac
  done
  [[ -n $dry ]] || mkdir -p "$to"
  if [[ -n $bucket ]]; then
    act storage rsync "$bucket" "$to/bucket" --recursive || die 'the checkpoints could not be copied (above).'
  fi
  examine
  [[ $health == ready ]] || die "$because: its workers cannot be read; what was followed of the log is in $record/log.$run."
  for node in "${nodes[@]}"; do fetch_logs "$node"; done
  act compute tpus tpu-vm scp "${nodes[0]}:$workdir" "$to/workdir" "${where[@]}" "${reach[@]}" --recurse --worker=0 \
    || die 'the workdir could not be copied (above).'
}

fetch_logs() {
  local number count=1
  describe_node "$1"
  [[ -n $dry ]] || count=$(cut -d '|' -f 5 <<< "$facts")
  for ((number = 0; number < count; number++)); do
    act compute tpus tpu-vm scp "$1:salt_jax_runs/$run/log" "$to/$1.$number.log" "${where[@]}" "${reach[@]}" "--worker=$number" \
      || say "$1: the log of worker $number could not be copied (above)."
  done
}

list() {
  act compute tpus queued-resources list "${where[@]}" --filter=tpu.nodeSpec.node.labels.created-by=salt-jax
  act compute tpus tpu-vm list "${where[@]}" --filter=labels.created-by=salt-jax
}

case $command in
  '' | -h | --help)
    usage
    exit 0
    ;;
  create | install | run | resume | logs | status | stop | fetch | delete | list) shift ;;
  *) die "there is no command $(quote "$command"); see launch/gcp_tpu.sh --help." 2 ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --*) read_option "$1" ;;
    -*) die "$1: options begin with two hyphens." 2 ;;
    *)
      [[ -z $name ]] || die "$(quote "$1") is one name too many; flags of the program follow --." 2
      name=$1
      ;;
  esac
  shift
done
[[ $# -eq 0 || $command == run ]] || die "only \`run\` takes flags behind --." 2
flags=("${@:2}")
check_arguments
where=("--zone=$zone" ${project:+"--project=$project"})
if [[ -z $dry ]] && ! command -v gcloud > /dev/null; then
  die "gcloud is not on the PATH: install the Google Cloud CLI and run gcloud auth login." 2
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
record=${SALT_JAX_TPU_HOME:-$HOME/.salt_jax_tpu}/${project:-default}/$zone/$name
[[ -n $dry ]] || mkdir -p "$record"
case $command in
  install)
    choose_code
    ready
    install || exit 1
    ;;
  *) "$command" ;;
esac
