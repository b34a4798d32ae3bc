# shellcheck shell=bash disable=SC2034,SC2154
# Part of gcp_tpu.sh, whose variables it shares: the code on the workers, and the run from start to end.

# Sets commit, and repo unless the code is shipped.
choose_code() {
  local git=(git -C "$root")
  if [[ -z $commit ]]; then
    commit=$("${git[@]}" rev-parse HEAD 2> /dev/null) || die 'this folder is not a git checkout; give --commit and --repo.' 2
    if [[ -n $("${git[@]}" status --porcelain) ]]; then
      [[ -n $ship ]] \
        || die 'the tree has uncommitted changes, which the workers would not get: commit and push them, or --ship the last commit.' 2
      say "uncommitted changes are not sent; the workers get commit ${commit:0:12}."
    fi
  fi
  if [[ -n $ship || -n $repo ]]; then
    return 0
  fi
  repo=$("${git[@]}" config --get remote.origin.url) || die 'there is no remote called origin; give --repo=https://…, or --ship.' 2
  if [[ $repo =~ ^(ssh://)?git@([^:/]+)[:/](.+)$ ]]; then
    repo=https://${BASH_REMATCH[2]}/${BASH_REMATCH[3]}
  fi
  [[ $repo =~ $address ]] \
    || die "the address of origin is not a public https:// one without user or token; give --repo=https://…, or --ship." 2
  [[ -n $("${git[@]}" branch --remotes --contains "$commit" 2> /dev/null) ]] \
    || die "commit ${commit:0:12} was not pushed to origin: push it, or --ship it." 2
}

# The code and its environment on all workers; can be done again at any time.
install() {
  local node bring place=salt_jax_code/$commit pack=salt_jax-$commit.tar.gz words=("$extras" ${setup:+"$setup"})
  bring="git clone --quiet $(quote "$repo") $place.part && git -C $place.part checkout --quiet --detach $commit"
  if [[ -n $ship ]]; then
    bring="mkdir $place.part && tar -xzf $pack -C $place.part"
    pack_code "$record/$pack"
  fi
  for node in "${nodes[@]}"; do
    if [[ -n $ship ]] && ! send "$record/$pack" "$node"; then
      say "the code could not be sent to all workers of $node (above)."
      return 1
    fi
    if ! on_workers "$node" "{ test -d $place || { mkdir -p salt_jax_code && rm -rf $place.part && $bring && mv $place.part $place; } && \
bash $place/launch/tpu_worker.sh install $(quote "${words[@]}"); } || { code=\$?; name=\$(hostname); \
echo \"[worker \${name##*-w-}] failed with exit code \$code\"; exit \$code; }"; then
      say "the code was not installed on all workers of $node (above)."
      return 1
    fi
  done
  rm -f "$record/$pack"
  note install "$commit" "$repo" "$ship" "$extras" "$setup"
}

pack_code() {
  local words=(git -C "$root" archive --format=tar.gz -o "$1" "$commit")
  if [[ -n $dry ]]; then
    show mkdir -p "$record"
    show "${words[@]}"
  else
    "${words[@]}"
  fi
}

# Flags, as a worker's `start` takes them: the environment, --, the program's flags.
compose() {
  local word config='' workdir='' bucket='' multihost=--multihost
  for word in "${flags[@]}"; do
    case $word in
      --config=*) config=yes ;;
      --workdir=*) workdir=${word#*=} ;;
      --config.checkpoint.folder=*) bucket=${word#*=} ;;
      --multihost | --multihost=* | --nomultihost) multihost='' ;;
    esac
  done
  [[ -n $config ]] || die 'say what to run: run NAME -- --config=configs/selfforcing.py:1.3b --workdir=/tmp/run --config.checkpoint.folder=gs://BUCKET/DIR' 2
  case $workdir in
    /?*) ;;
    *) die 'give --workdir=/DIR, an absolute path on the workers; checkpoints may go to a bucket (--config.checkpoint.folder).' 2 ;;
  esac
  case $bucket in
    gs://?*) ;;
    '') say "$workdir is taken for a disk that all workers share and that outlives the slice: else give --config.checkpoint.folder." ;;
    *) die "--config.checkpoint.folder=$bucket must be gs://BUCKET/DIR: what lies on a worker is lost with the slice." 2 ;;
  esac
  flags=("${environment[@]}" -- "${flags[@]}")
  [[ -z $multihost ]] || flags+=("$multihost")
}

begin() {
  local node token
  token=$(date -u +%Y%m%dT%H%M%S)-$$-$RANDOM
  for node in "${nodes[@]}"; do
    if ! on_workers "$node" "$(quote bash "salt_jax_code/$commit/launch/tpu_worker.sh" start "$run" "$token" "${flags[@]}")"; then
      say "run $run did not start on all workers of $node (above); where it started, \`stop\` ends it."
      [[ $said != *'tpu_worker.sh: No such file'* ]] || say "the code is not there: \`install\` brings it."
      return 1
    fi
  done
}

# The slice as it was noted, with its code: what is gone is removed and made again.
renew() {
  examine
  if [[ $health == gone || -n $dry ]]; then
    recall create || die "it is not known how $name was made: create it, install, then run."
    [[ $kind == none ]] || remove
    make
  fi
  [[ -n $dry ]] || await || return 1
  install
}

resumption() {
  quote launch/gcp_tpu.sh resume "$name" "${where[@]}" "--run=$run"
}

# Starts, follows and concludes: once, or again and again with --keep-going. `cycle yes` looks after slice and code first.
cycle() {
  local round fresh=$1
  for ((round = 0; round <= ${keep:-0}; round++)); do
    if { [[ -z $fresh ]] || renew; } && begin; then
      begun=yes
      [[ -z $dry && -n $follow ]] || return 0
      trap 'say "the run goes on; see logs, stop and delete."; exit 130' INT
      follow_log
      finish
    else
      examine
      if [[ $health == gone ]]; then
        say "$because: the slice was taken away."
      else
        [[ -n $begun && -n $unreached ]] || exit 1
      fi
    fi
    fresh=yes
  done
  say "to go on from the newest checkpoint: $(resumption)"
  exit 75
}

# How the run ended, into $outcome. An end that a dying slice may have caused is looked at again before it is believed.
conclude() {
  local look bad left
  for ((look = 1; look <= looks; look++)); do
    examine
    outcome=gone
    [[ $health != gone ]] || return 0
    [[ $health == waiting ]] || read_states
    bad=$(grep -vE ' (exit (0|69|75|134|143)|running|lost|stopped)$' <<< "$states" | grep . || true)
    left=$(grep -E ' (exit (69|75|134|143)|lost)$' <<< "$states" || true)
    if [[ $health == waiting ]]; then
      outcome=left
    elif [[ -z $states ]]; then
      outcome=unknown
    elif [[ -n $bad ]]; then
      outcome=failed
    elif grep -q ' running$' <<< "$states"; then
      outcome=running
    elif grep -q ' stopped$' <<< "$states"; then
      outcome=stopped
      return 0
    elif [[ -n $left ]]; then
      outcome=left
    else
      outcome=finished
      return 0
    fi
    [[ $look -lt 3 || $outcome == unknown || $outcome == running ]] || return 0
    [[ $look -eq $looks ]] || pause 20
  done
}

# Leaves with the run's end; returns when it can go on.
finish() {
  conclude
  case $outcome in
    finished)
      say "run $run finished on all workers. The slice is still there: \`delete\` it when you need it no more."
      exit 0
      ;;
    gone) say "$because: the slice was taken away." ;;
    left)
      if grep -qE ' exit (69|134)$' <<< "$states"; then
        say "run $run lost a host, and the others ended; $because."
      else
        say "run $run was told to leave, or its machine restarted; $because."
      fi
      ;;
    stopped) die "run $run was stopped; \`resume\` goes on. The slice is still there." 75 ;;
    failed) blame ;;
    running) die "run $run ended on one worker and still runs on others; see \`status\` and \`logs --worker=K\`." ;;
    *) die "the workers did not answer; the run may go on. See \`status\`." ;;
  esac
}

# Names each worker that ended badly, and leaves with the exit code of the first.
blame() {
  local node worker end code first=''
  while read -r node worker end code; do
    case $end$code in
      exit0) continue ;;
      running | exit69 | exit75 | exit134 | exit143) ;;
      *) first=${first:-${code:-1}} ;;
    esac
    say "$node, worker $worker: ${end/exit/exit code}${code:+ $code}"
  done < <(grep . <<< "$states")
  say "run $run failed; its log is in $record/log.$run, the others' in \`logs --no-follow\`. Nothing was deleted."
  exit "$first"
}
