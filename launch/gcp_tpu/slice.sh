# shellcheck shell=bash disable=SC2034,SC2154
# Part of gcp_tpu.sh, whose variables it shares: the slice, made, waited for and deleted.

check_type() {
  case $type in
    v4-* | v5p-* | v6e-* | v5litepod-*) demand --type "$type" '^[a-z0-9]+-[1-9][0-9]{0,4}$' 'a slice such as v5p-64' ;;
    v5e-*) die "--type=$type is called v5litepod-${type#v5e-} by Google." 2 ;;
    tpu7x* | v7x*) die "--type=$type is not served by the Cloud TPU API; launch/GKE.md says how to run on it." 2 ;;
    *) die "--type=$type is not a TPU slice; give one such as v4-8, v5litepod-16, v5p-64 or v6e-16." 2 ;;
  esac
  case $type in
    v4-*) runtime=${runtime:-tpu-ubuntu2204-base} ;;
    v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
    v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
    v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
  esac
}

create() {
  check_type
  examine
  if [[ $kind != none && -z $dry ]]; then
    may_delete 'already there, and '
    [[ $found_type == "$type" ]] || die "$name is there already as $found_type; delete it or choose another name."
    [[ $health != gone ]] || die "$because: \`resume\` makes it again, \`delete\` removes it."
    note create "$type" "$tier" "$queued" "$slices" "$runtime" "${network[@]}"
    say "$because already; nothing was created."
  else
    note create "$type" "$tier" "$queued" "$slices" "$runtime" "${network[@]}"
    make
  fi
  [[ -n $dry ]] || await
  say "$name costs money or holds quota until you delete it: $(quote launch/gcp_tpu.sh delete "$name" "${where[@]}")"
}

make() {
  local try refused most=$tries words=("$name" "${where[@]}" "--accelerator-type=$type" "--labels=created-by=salt-jax,owner=$owner" "${network[@]}")
  [[ -z $tier ]] || words+=("$tier")
  if [[ -z $queued ]]; then
    words=(tpu-vm create "${words[@]}" "--version=$runtime")
  elif [[ $slices -gt 1 ]]; then
    words=(queued-resources create "${words[@]}" "--runtime-version=$runtime" "--node-count=$slices" "--node-prefix=$name")
  else
    words=(queued-resources create "${words[@]}" "--runtime-version=$runtime" "--node-id=$name")
  fi
  [[ -z $keep ]] || most=$((minutes + 1))
  for ((try = 1; try <= most; try++)); do
    if act compute tpus "${words[@]}"; then
      return 0
    fi
    explain_refusal
    say "no $refused for $type in $zone (try $try of $most${keep:+, one a minute})."
    [[ $try -eq $most ]] || pause 60
    # What was asked for may be there although the answer was lost.
    if [[ $refused != capacity ]]; then
      examine
      [[ $kind == none ]] || return 0
    fi
  done
  [[ -z $keep ]] || die "$zone has had no $refused for $type for $minutes minutes; to go on later: $(resumption)" 8
  die "$zone has no capacity for $type now; try --queued, --spot or another zone. Nothing was created." 8
}

# Returns only for what waiting can mend: what there is none of, into $refused.
explain_refusal() {
  refused=capacity
  if outlasted "$said"; then
    refused='network to ask'
    return 0
  fi
  case $said in
    *'no more capacity'* | *nsufficient*capacity*) ;;
    *[Qq]uota*) die "the project's quota does not allow $type in $zone (above). Queued resources that are suspended or failed count too: see \`list\`." 8 ;;
    *ALREADY_EXISTS* | *'already exists'*) die "$name exists already, made by somebody else meanwhile; choose another name." ;;
    *RESOURCE_EXHAUSTED*) ;;
    *) die "gcloud did not create $name (above)." ;;
  esac
}

# Until the slice can be used; leaves where it still queues after --minutes, and with --keep-going returns 1 where it is gone.
await() {
  local polls=$((minutes * 2)) before=''
  while :; do
    examine
    case $health in
      ready) return 0 ;;
      gone)
        [[ -z $keep ]] || return 1
        die "$because, it did not come to be. Nothing was deleted; \`delete\` removes what is left."
        ;;
    esac
    [[ $before == "$because" ]] || say "$because."
    before=$because
    if ((polls-- <= 0)); then
      say "$because still; \`status\` says when it is ready. It stays in the queue until you delete it."
      [[ -z $keep ]] || say "to go on then: $(resumption)"
      [[ $command == create ]] || exit 75
      exit 0
    fi
    pause 30
  done
}

may_delete() {
  [[ $made_by == salt-jax ]] \
    || die "$name is ${1:-}not made by this script (it lacks the label created-by=salt-jax), so it is left alone."
  [[ $owned_by == "$owner" ]] \
    || die "$name is ${1:-}the slice of ${owned_by:-nobody}, not of $owner, so it is left alone; --owner=${owned_by:-NAME} if that is you."
}

remove() {
  local try words=(tpu-vm delete "$name" "${where[@]}" --quiet)
  may_delete
  [[ $kind != queued ]] || words=(queued-resources delete "$name" "${where[@]}" --force --quiet)
  for ((try = 1; ; try++)); do
    if act compute tpus "${words[@]}"; then
      return 0
    fi
    again "$try" 30 "$said" || break
    pause 30
  done
  die "$name was not deleted (above); it may still cost money."
}

delete() {
  local answer
  locate
  [[ $kind != none ]] || die "there is no slice $name in $zone."
  may_delete
  if [[ -z $yes && -z $dry ]]; then
    say "about to delete $name ($kind, $found_type, $state) with everything on its disks."
    read -r -p 'type its name to delete it: ' answer || die 'nothing was deleted; --yes deletes without asking.' 2
    [[ $answer == "$name" ]] || die 'nothing was deleted.' 2
  fi
  remove
  [[ -n $dry ]] || say "$name is deleted. What lies in a bucket stays there."
}
