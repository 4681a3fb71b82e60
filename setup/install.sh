#!/usr/bin/env bash
# Installs what is missing, and is done in a blink when nothing is:
#   1. Debian packages, through apt;
#   2. nbdkit 1.42 or newer: the distribution's, else built into a cache outside the clone (build-nbdkit.sh);
#   3. .venv, made from the system's Python (nbdkit embeds that one) with the pinned requirements;
#   4. in it, a compiled copy of what a request passes (compile.py).
# Usage: setup/install.sh [--test]     --test adds what the tests, the bench and the linters need.
set -euo pipefail
cd "$(dirname "$0")/.."

nbdkit_minimum=1.42
cache=${XDG_CACHE_HOME:-~/.cache}/nbdmirror
log=$cache/setup.log

say() { echo "setup: $*"; }

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Runs a command quietly; shows what it said when it fails.
quietly() {
    "$@" >"$log" 2>&1 </dev/null && return
    cat "$log" >&2
    return 1
}

names() { sed 's/#.*//' "$@" | xargs; }

# ---- Debian packages

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing() {
    local have name
    # dpkg-query exits with 1 when it does not know one of them.
    have=$({ dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true; } | sed -n 's/^installed //p')
    for name in "$@"; do
        grep -qx -- "$name" <<<"$have" || echo "$name"
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n -- "$@"; fi
}

may_be_root() {
    [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

apt_is_fresh=
refresh_apt() {
    [ -z "$apt_is_fresh" ] || return 0
    quietly as_root apt-get update -q || fail "'apt-get update' failed, see above. Check the network and /etc/apt, then try again."
    apt_is_fresh=yes
}

install_packages() {
    local install="apt-get install -y --no-install-recommends $*"
    may_be_root || fail "these Debian packages are missing, and only root may install them. Run this, then try again:
    sudo apt-get update && sudo $install"
    say "installing $# Debian packages (up to two minutes): $*"
    refresh_apt
    # shellcheck disable=SC2086 # a command line made of words
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 ${install#apt-get } ||
        fail "apt could not install them, see above. By hand: sudo $install"
}

# ---- nbdkit

# The rule by which nbd_server finds it, too: $NBDMIRROR_NBDKIT, else the newest in the cache, else the distribution's.
find_nbdkit() {
    if [ -n "${NBDMIRROR_NBDKIT:-}" ]; then
        echo "$NBDMIRROR_NBDKIT"
    elif compgen -G "$cache/nbdkit-*/sbin/nbdkit" >/dev/null; then
        printf '%s\n' "$cache"/nbdkit-*/sbin/nbdkit | sort -V | tail -n 1
    else
        PATH=$PATH:/usr/sbin:/usr/local/sbin command -v nbdkit
    fi
}

# New enough, starts, and embeds the same Python as .venv.
nbdkit_works() {
    local version python
    version=$("$1" --version 2>/dev/null) || return 1
    dpkg --compare-versions "${version#nbdkit }" ge "$nbdkit_minimum" 2>/dev/null || return 1
    python=$("$1" --dump-plugin python 2>/dev/null | sed -n 's/^python_version=\([0-9]*\.[0-9]*\).*/\1/p')
    [ -n "$python" ] && [ "$(readlink -f /usr/bin/python3)" = "/usr/bin/python$python" ]
}

distribution_nbdkit() {
    apt-cache policy nbdkit 2>/dev/null | sed -n 's/^ *Candidate: *//p'
}

# ---- the virtual environment

# What the environment was made from: a change in any of it makes a new one.
venv_key() {
    { pwd -P && readlink -f /usr/bin/python3 && cat requirements.txt setup.cfg "$@"; } | sha256sum
}

pip_install() {
    # No build isolation: setuptools is pinned and installed first, nothing else is needed to build with.
    quietly .venv/bin/python -m pip install --disable-pip-version-check --no-input --no-build-isolation --use-pep517 "$@" ||
        fail "pip could not install into .venv, see above. Check the network and pip's configuration, then try again."
}

make_venv() {
    say "making .venv with the pinned Python packages (about 15 s)"
    rm -rf .venv
    quietly /usr/bin/python3 -m venv .venv || fail "'/usr/bin/python3 -m venv .venv' failed, see above."
    pip_install "$(grep '^setuptools==' requirements.txt)"
    pip_install -r requirements.txt
    # "compat" writes a plain .pth, which type checkers can follow too and which costs nothing at import.
    pip_install --no-deps --config-settings editable_mode=compat -e .
    link_libnbd
    venv_key >.venv/made-from
}

# libnbd's Python module is a Debian package only. Links to just its files, because --system-site-packages would let in
# whatever else the machine has, pytest plugins among it.
link_libnbd() {
    local file
    for file in $(dpkg -L python3-libnbd | grep '/dist-packages/[^/]*$'); do
        ln -sf "$file" "$(echo .venv/lib/python3*/site-packages)/"
    done
}

# ---- all together

[ -z "${1:-}" ] || [ "$1" = --test ] || fail "usage: setup/install.sh [--test]"
command -v apt-get dpkg-query >/dev/null || fail "this needs Debian 12 or newer (there is no apt here)."
mkdir -p "$cache"
if [ "${NBDMIRROR_SETUP_LOCKED:-}" != yes ]; then
    # One set-up at a time. --close: no service that a package starts may inherit the lock.
    flock --nonblock "$cache/lock" true || say "another set-up is running, waiting for it"
    NBDMIRROR_SETUP_LOCKED=yes exec flock --close "$cache/lock" "$0" "$@"
fi
unset PYTHONHOME PYTHONPATH

build=
read -ra packages <<<"$(names setup/debian-run.txt)"
[ -z "${1:-}" ] || read -ra packages <<<"${packages[*]} $(names setup/debian-test.txt)"
if ! nbdkit=$(find_nbdkit) || ! nbdkit_works "$nbdkit"; then
    [ -z "${NBDMIRROR_NBDKIT:-}" ] ||
        fail "NBDMIRROR_NBDKIT=$NBDMIRROR_NBDKIT is not an nbdkit $nbdkit_minimum or newer with a plugin for the system's Python. Unset it or mend it."
    # Built for another Python, as after an upgrade of the system: it would be found before a good one.
    rm -rf "$cache"/nbdkit-*
    if may_be_root; then refresh_apt; fi
    if dpkg --compare-versions "$(distribution_nbdkit)" ge "$nbdkit_minimum"; then
        packages+=(nbdkit nbdkit-plugin-python)
    else
        build=yes
        read -ra packages <<<"${packages[*]} $(names setup/debian-build-nbdkit.txt)"
    fi
fi
mapfile -t wanted < <(missing "${packages[@]}")
if [ "$build" ] && installed debian-archive-keyring && [ ! -e /usr/share/keyrings/debian-archive-trixie-stable.gpg ]; then
    wanted+=(debian-archive-keyring) # too old for Debian 13's signatures: naming it upgrades it
fi
[ ${#wanted[@]} = 0 ] || install_packages "${wanted[@]}"

if [ "$build" ]; then
    say "building nbdkit from Debian 13's source package, because apt has $(distribution_nbdkit) here and" \
        "$nbdkit_minimum is needed (about a minute, once for all clones)"
    setup/build-nbdkit.sh
fi
if ! nbdkit=$(find_nbdkit) || ! nbdkit_works "$nbdkit"; then
    fail "there is still no working nbdkit $nbdkit_minimum or newer (found: '$nbdkit')."
fi

if [ ! -x .venv/bin/python ] || [ "$(venv_key)" != "$(cat .venv/made-from 2>/dev/null)" ]; then
    make_venv
fi
if [ "${1:-}" ] && [ "$(venv_key requirements-dev.txt)" != "$(cat .venv/made-from-dev 2>/dev/null)" ]; then
    say "adding the tools for tests and linting to .venv (about 15 s)"
    pip_install -r requirements-dev.txt
    venv_key requirements-dev.txt >.venv/made-from-dev
fi
.venv/bin/python setup/compile.py || fail "what a request passes could not be compiled, see above."
