# Sourced by every script of the lab: where things are, how work is announced, logged, locked and kept.
# shellcheck shell=bash

set -euo pipefail
umask 022
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$lab/../.." && pwd)
# Kernels, root file systems and logs. Worktrees of one clone may share them by setting RUNNEL_LAB_DIR.
lab_dir=${RUNNEL_LAB_DIR:-${CARGO_TARGET_DIR:-$repository/target}/lab}
mkdir -p "$lab_dir/logs"
lab_dir=$(cd "$lab_dir" && pwd)

say() { printf 'lab: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# step TEXT LOG COMMAND…: runs COMMAND with its output in LOG. Announces it, counts the seconds on a terminal, and
# shows the end of the log if it fails. COMMAND runs as a child that is waited for, so `set -e` holds inside it.
step() {
    local text=$1 log=$2 started=$SECONDS pid status=0
    shift 2
    say "$text …"
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    # shellcheck disable=SC2064 # the pid of now is meant
    trap "kill $pid 2>/dev/null" INT TERM
    if [ -t 2 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\rlab: %s … %s s ' "$text" $((SECONDS - started)) >&2
            sleep 1
        done
        printf '\r\033[K' >&2
    fi
    wait "$pid" || status=$?
    trap - INT TERM
    if [ "$status" != 0 ]; then
        tail -n 30 "$log" >&2
        die "failed: $text (exit code $status); the whole log is in $log"
    fi
    say "$text: done in $((SECONDS - started)) s"
}

# digest_of FILE…: one hash over their content; a thing is made anew when its recipe changed.
digest_of() { cat "$@" | sha256sum | cut -c1-16; }

# keep THING KEY TEXT RECIPE…: makes $lab_dir/THING by running RECIPE with a temporary path as its last argument,
# unless it is there already and was made under the same KEY. The lock makes a second run wait for the first; the
# rename makes an interrupted run leave nothing that is taken for the thing.
keep() {
    local thing=$lab_dir/$1 key=$2 text=$3 temporary
    shift 3
    [ -e "$thing" ] && [ "$(cat "$thing.key" 2>/dev/null)" = "$key" ] && return
    mkdir -p "$(dirname "$thing")"
    exec {lock}>"$thing.lock"
    flock "$lock"
    if [ ! -e "$thing" ] || [ "$(cat "$thing.key" 2>/dev/null)" != "$key" ]; then
        temporary=$thing.temporary
        rm -rf "$temporary" "$temporary.work" "$thing.key"
        step "$text" "$lab_dir/logs/$(basename "$thing").log" "$@" "$temporary"
        rm -rf "$thing"
        mv -T "$temporary" "$thing"
        echo "$key" >"$thing.key"
    fi
    exec {lock}>&-
}
