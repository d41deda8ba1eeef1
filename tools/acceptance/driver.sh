# The driver through which fault cases written for other tools run on nemesisfs. Sourced by a case, not run.
#
# A case is a script that runs a database on a mount, breaks the storage below it and checks what comes of it. It calls
# the functions below, and brings `bad MESSAGE`, which prints a failure, and FAILS, their number, from which it makes its
# exit status. Here nothing is used but the command line, so a case tests what a user has.
#
#   fault_can CAP           can it do this: enospc werr ferr slow drop
#   fault_mount BACKING MNT an empty filesystem at MNT; BACKING is a directory for the driver alone
#   fault_arm "SPEC"        space=0 | op=write|fsync path=GLOB err=E [skip=N] [count=N|inf] | op=fsync path=GLOB delay=MS
#                           | op=fsync path=GLOB drop=1; GLOB is relative to MNT, * means every file
#   fault_clear             disarm all
#   fault_umount            end, and fail the case unless it was a test of this filesystem at all
#   fault_pids, fault_run   of use to drivers that work on processes
#
# A case also passes for the wrong reasons: when the fault never fired, or when the mount has gone and the directory below
# it answers. So the end counts the events of each fault that was armed, and looks whether the mount is still the one of
# the start. A case may arm the same fault in several parts, and each of them has to fire: so each arming is counted by
# itself. The end is reached from the case's cleanup, whose output is thrown away: hence a descriptor of our own.

nfs_home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
nfs_mount= nfs_dir= nfs_device= nfs_pid= nfs_log= nfs_arms=0
nfs_fired=()  # "EVENTS SPEC" of each arming that is over, in the order in which they ended
nfs_active=() # armed now: "RULE CURSOR SPEC"
exec {nfs_out}>&1

# The program under test: as told, or the latest build of this checkout, or the installed one.
nfs_program() {
  local newest= candidate
  if [ -n "${NEMESISFS:-}" ]; then echo "$NEMESISFS"; return; fi
  for candidate in "$nfs_home"/target/{debug,release}/nemesisfs; do
    if [ -x "$candidate" ] && { [ -z "$newest" ] || [ "$candidate" -nt "$newest" ]; }; then newest=$candidate; fi
  done
  if [ -n "$newest" ]; then echo "$newest"; else command -v nemesisfs; fi
}
nfs_binary=$(nfs_program) || echo "driver: no nemesisfs: build it, or set NEMESISFS" >&2

# Each case has an instance and a run directory of its own, so that cases run side by side.
nfs() { env -u NEMESISFS_HOST NEMESISFS_RUNDIR="$nfs_dir/run" "$nfs_binary" "$@"; }

nfs_bad() { bad "$1" >&"$nfs_out"; }

fault_can() { case $1 in enospc | werr | ferr | slow | drop) return 0 ;; *) return 1 ;; esac; }

fault_pids() { :; }
fault_run() { "$@"; }

fault_mount() {
  local ready word
  nfs_dir=$1
  mkdir -p "$1/files" "$1/run" || return 1
  # The servers of the cases are users of their own.
  chmod 777 "$1/files"
  ready=$(nfs mount "$1/files" "$2" --instance "case-$$") || return 1
  for word in $ready; do
    case $word in pid=*) nfs_pid=${word#pid=} ;; log=*) nfs_log=${word#log=} ;; esac
  done
  nfs_mount=$2
  nfs_device=$(stat -c %d "$2")
}

fault_arm() {
  local spec=$1 word words reply rule
  local op= path= err= skip= count=1 delay= drop= space=
  # Not by word splitting, which would expand the globs.
  read -ra words <<<"$spec"
  for word in "${words[@]}"; do
    case $word in
      op=*) op=${word#*=} ;; path=*) path=${word#*=} ;; err=*) err=${word#*=} ;; skip=*) skip=${word#*=} ;;
      count=*) count=${word#*=} ;; delay=*) delay=${word#*=} ;; drop=*) drop=${word#*=} ;; space=*) space=${word#*=} ;;
      *) nfs_bad "the driver cannot do '$word' of '$spec'"; return 1 ;;
    esac
  done
  if [ -n "$space" ]; then
    rule=space
    reply=$(nfs --json space virtual --free "$space")
  else
    local options=(--path "/$path")
    # A star alone means every file at any depth; elsewhere it stays within its directory, as in a shell.
    [ "$path" = '*' ] || [ -z "$path" ] && options=(--path '/**')
    # The program cannot tell an fsync of a file from one of a directory; the filesystem can.
    case $op in fsync) options+=(--op fsync,fsyncdir) ;; *) options+=(--op "$op") ;; esac
    if [ -n "$delay" ]; then options+=(--kind latency --delay "${delay}ms")
    elif [ -n "$drop" ]; then options+=(--kind drop)
    else
      options+=(--kind error --errno "$err")
      [ "$count" = inf ] || options+=(--times "$count")
    fi
    [ -z "$skip" ] || options+=(--skip "$skip")
    nfs_arms=$((nfs_arms + 1))
    rule=fault-$nfs_arms
    reply=$(nfs --json rule add "$rule" "${options[@]}")
  fi || { nfs_bad "could not arm '$spec'"; return 1; }
  nfs_active+=("$rule $(sed -n 's/.*"cursor": *"\([^"]*\)".*/\1/p' <<<"$reply") $spec")
}

# Notes what the faults that are armed now have done, as they are about to go.
nfs_count() {
  local rule cursor spec seen entry
  for entry in "${nfs_active[@]}"; do
    read -r rule cursor spec <<<"$entry"
    seen=$(nfs --json events --rule "$rule" --since "$cursor" | grep -c '"event": *"injection"')
    nfs_fired+=("$seen $spec")
  done
  nfs_active=()
}

fault_clear() {
  [ -n "$nfs_mount" ] || return 0
  nfs_count
  nfs --quiet reset || nfs_bad "reset was refused"
}

fault_umount() {
  local entry said tries=0
  # Called twice, or by a case that was skipped before it mounted anything.
  [ -n "$nfs_mount" ] || return 0
  nfs_count
  for entry in "${nfs_fired[@]}"; do
    if [ "${entry%% *}" -gt 0 ]; then say "ok   - fired ${entry%% *} times: ${entry#* }" >&"$nfs_out"
    else nfs_bad "was armed and never fired: ${entry#* }"; fi
  done
  [ ${#nfs_fired[@]} -gt 0 ] || nfs_bad "nothing was armed"
  [ "$(stat -c %d "$nfs_mount" 2>&1)" = "$nfs_device" ] || nfs_bad "$nfs_mount is not the mount of the start any more"
  # One that has died may still be there as a zombie.
  grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$nfs_pid/status" || nfs_bad "the daemon has died: $(tail -3 "$nfs_log")"
  # Processes that were killed a moment ago may still be closing their files.
  until said=$(nfs umount --instance "case-$$" 2>&1); do
    tries=$((tries + 1))
    if [ $tries -ge 20 ]; then
      nfs_bad "umount: $said"
      nfs umount --instance "case-$$" --force
      break
    fi
    sleep 0.25
  done
  ! grep -q 'panic: ' "$nfs_log" || nfs_bad "panic in the daemon's log: $(grep -m1 'panic: ' "$nfs_log")"
  nfs_mount=
}
