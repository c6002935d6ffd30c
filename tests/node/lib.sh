# Shared by the scripts of tests/: messages, packages, mirrors, time-outs. Sourced, never run.
# shellcheck shell=bash disable=SC2034 # the variables are for those who source this

me=${me:-$(basename "$0")}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache_root=${BRIG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/brig}

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# need PKG... : installs the Debian packages that are missing. Package lists are refreshed only when that fails.
need() {
    local missing=() p
    for p; do
        dpkg-query -W -f='${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    # Another of these scripts may be installing something beside this one.
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 --no-install-recommends install "${missing[@]}")
    as_root "${install[@]}" >&2 2>/dev/null && return
    as_root apt-get -qq update >&2
    as_root "${install[@]}" >&2 || die "apt-get could not install ${missing[*]}: install them by hand, then run this again"
}

# writable DIR…: makes what is missing and tries it, so that no long work ends in a file that cannot be written.
writable() {
    local dir
    for dir; do
        mkdir -p "$dir" || die "the directory $dir cannot be made: choose another place, or make it writable"
        { : >"$dir/.trial-$$" && rm "$dir/.trial-$$"; } || die "nothing can be written to $dir: choose another place, or make it writable"
    done
}

# binaries: what a node runs, in BRIG_BIN_DIR: built now, unless that names some.
binaries() {
    if [ -z "${BRIG_BIN_DIR-}" ]; then
        BRIG_BIN_DIR=$("$repo/build" --tests | tail -n1)
        [ -n "$BRIG_BIN_DIR" ] || die "the binaries for a node cannot be built; the reason is above"
    fi
    export BRIG_BIN_DIR
}

# The Debian mirror that this machine's own apt uses: nothing here names one.
debian_mirror() {
    local uri
    # shellcheck disable=SC2016 # the $() are apt's
    uri=${BRIG_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F'|' '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }')}
    [ -n "$uri" ] || die "apt on this machine knows no Debian archive: run apt-get update, or set BRIG_DEBIAN_MIRROR to a mirror's URI"
    printf '%s\n' "${uri%/}"
}

# scaled SECONDS: a time-out, stretched by the one factor (default 1).
scaled() { awk -v s="$1" -v f="${BRIG_TIME_SCALE:-1}" 'BEGIN { printf "%d\n", s * f + 0.5 }'; }
