#!/usr/bin/env bash
# Builds nbdkit from Debian 13's source package into the user's cache, where every clone finds it:
#   ${XDG_CACHE_HOME:-~/.cache}/nbdmirror/nbdkit-VERSION-pythonX.Y-ARCH/sbin/nbdkit
# For Debian 12, whose nbdkit 1.32 aborts when a client hangs up with requests in flight; 1.42 does not.
# It is built against the system's Python, because nbdkit embeds it. install.sh calls this, and holds its lock.
set -euo pipefail

minimum=1.42
release=trixie
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
cache=${XDG_CACHE_HOME:-~/.cache}/nbdmirror
log=$cache/build-nbdkit.log

# Nothing of a user's own Python, compiler flags or pkg-config paths may get into the build.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
unset PYTHONPATH PYTHONHOME CFLAGS CXXFLAGS CPPFLAGS LDFLAGS LIBS PKG_CONFIG_PATH MAKEFLAGS MAKELEVEL MFLAGS DESTDIR

fail() {
    echo "setup: nbdkit was not built: $1" >&2
    exit 1
}

fail_with_log() {
    echo "--- the end of $log" >&2
    tail -n 25 "$log" >&2
    echo "---" >&2
    fail "$1"
}

# The archives that this machine takes its Debian from. apt itself reads its sources, in whichever format they are.
debian_archives() {
    # shellcheck disable=SC2016 # apt fills these in
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Component: main' |
        awk '$2 !~ /[-\/]/ && !seen[$1]++ { print $1 }'
}

# apt with a source list and state of its own. The system's proxy, credentials and preferences for transport still apply.
private_apt() {
    apt-get -q -y -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Default-Release= \
        -o APT::Sandbox::User=root -o APT::Get::AllowUnauthenticated=false -o Acquire::AllowInsecureRepositories=false \
        -o APT::Update::Error-Mode=any "$@"
}

fetch_source() {
    local archive
    [ -r "$keyring" ] || fail "there is no $keyring to check signatures with: install debian-archive-keyring."
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    for archive in $(debian_archives); do
        echo "deb-src [signed-by=$keyring] $archive $release main" >"$work/sources.list"
        if private_apt update && (cd "$work" && private_apt source --download-only nbdkit); then
            return
        fi
    done >>"$log" 2>&1
    if grep -q NO_PUBKEY "$log"; then
        fail_with_log "$keyring lacks the keys of Debian's $release. Install debian-archive-keyring 2023.3+deb12u2 or newer."
    fi
    fail_with_log "apt could not fetch its source package of $release from the archives in this machine's apt sources
(see the lines above). Check these sources and the network, or install nbdkit $minimum or newer on PATH yourself."
}

configure() {
    # What is off needs a library or a language that nothing here uses; TLS and Python must be there.
    ./configure --prefix="$prefix" --sysconfdir=/etc PYTHON=/usr/bin/python3 CFLAGS=-O2 CXXFLAGS=-O2 \
        --disable-static --disable-dependency-tracking --disable-valgrind \
        --with-gnutls --enable-python --without-manpages --without-bash-completions --without-selinux \
        --disable-{golang,lua,ocaml,perl,rust,tcl,torrent,vddk,linuxdisk,libguestfs-tests} \
        --without-{bzip2,curl,ext2,iso,libblkio,libguestfs,liblzma,libnbd,libvirt,libzstd,ssh,zlib,zlib-ng}
    grep -q '^#define HAVE_GNUTLS 1' config.h
}

compile() {
    local part
    # All but nbdkit's own tests and documents.
    for part in include common/{include,protocol,replacements,utils} server common/{allocators,bitmap,gpt,regions} \
        plugins filters; do
        make -s -j"$(nproc)" -C "$part"
    done
    for part in server plugins filters; do
        make -s -C "$part" DESTDIR="$work/root" install
    done
    # Does it start, and does its Python?
    "$work/root$prefix/sbin/nbdkit" --version
    "$work/root$prefix/sbin/nbdkit" --dump-plugin "$work/root$prefix/lib/nbdkit/plugins/nbdkit-python-plugin.so" |
        grep '^python_version='
}

# A function, and a subshell's own `set -e`, because `if` and `||` switch -e off in what they call.
logged() {
    local status=0
    set +e
    (
        set -e
        "$@"
    ) >>"$log" 2>&1
    status=$?
    set -e
    return $status
}

mkdir -p "$cache"
: >"$log"
case $cache in
    *[[:space:]]*) fail "its build can't work under a path with a space: '$cache'. Set XDG_CACHE_HOME to another one." ;;
esac
rm -rf "$cache"/build.* # of builds that were killed; the lock says that none is running
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fetch_source
tarball=$(echo "$work"/nbdkit_*.orig.tar.gz)
version=${tarball##*/nbdkit_}
version=${version%.orig.tar.gz}
dpkg --compare-versions "$version" ge "$minimum" || fail "the archive has $version, $minimum or newer is needed."
python=$(/usr/bin/python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
prefix=$cache/nbdkit-$version-$python-$(dpkg --print-architecture)

# Upstream's tarball without Debian's patches: they concern 32-bit machines, tests and languages that are off here,
# and would need autotools.
tar -xzf "$tarball" -C "$work" --no-same-owner
cd "$work/nbdkit-$version"
logged configure || fail_with_log "configuring it failed. The whole log: $log"
logged compile || fail_with_log "compiling it failed. The whole log: $log"

# One rename, so that an interrupted build is never found.
rm -rf "$prefix"
mv -T "$work/root$prefix" "$prefix"
