#!/usr/bin/env bash
# Installs the Debian packages that the lab uses and this machine lacks.
. "$(dirname "$0")/../common.sh"

packages=(
    qemu-system-x86                        # the nested host's CPU, in software
    mmdebstrap e2fsprogs                   # root file systems, made without mounting anything
    gcc libc6-dev                          # the guest's own program
    busybox-static cpio zstd xz-utils lz4 kmod  # initramfs archives, compressed modules and kernels
    iproute2 procps util-linux             # namespaces, links, taps, netem; flock, setpriv, nsenter
    skopeo                                 # stock tool for images
    xfsprogs                               # a file system with reflinks
    curl ca-certificates python3           # clients of the API and of the guests' web pages
)

# QEMU before 8.1 may translate code that another CPU is changing at that moment, and then run for ever what it was in
# between: now and then a nested host, whose kernel changes its own code, dies of it (an oops of int3). Debian 12 has
# 7.2; its backports have one that locks the page first.
qemu_is_old() { dpkg --compare-versions "$(version_of qemu-system-x86)" lt 1:8.1; }
version_of() { dpkg-query -W -f '${db:Status-Status}:${Version}' "$1" 2>/dev/null | sed -n 's/^installed://p'; }

missing=()
for package in "${packages[@]}"; do
    [ -n "$(version_of "$package")" ] || missing+=("$package")
done
[ ${#missing[@]} != 0 ] || qemu_is_old || exit 0

[ "$(id -u)" = 0 ] || die "run as root, or install yourself: apt-get install ${missing[*]:-qemu-system-x86/bookworm-backports}"
command -v apt-get >/dev/null || die "the lab is made of Debian's packages, and this machine has no apt-get"
# Another apt may be at work (unattended-upgrades on a machine that just booted): wait for it.
apt() { apt-get -o DPkg::Lock::Timeout=300 "$@"; }
install() {
    apt update
    apt install -y --no-install-recommends "${missing[@]}"
}
# With lists of their own: what this machine has as sources of packages stays as it is.
install_backport() {
    local folder=$lab_dir/backports mirror own
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 'Codename: bookworm' \
        'Component: main' | head -n 1)
    mkdir -p "$folder/lists/partial"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$mirror" bookworm "$mirror" bookworm-backports >"$folder/sources.list"
    own=(-o "Dir::Etc::sourcelist=$folder/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$folder/lists")
    apt "${own[@]}" update
    apt "${own[@]}" install -y --no-install-recommends -t bookworm-backports "$@"
}
exec {lock}>"$lab_dir/packages.lock"
flock "$lock"
if [ ${#missing[@]} != 0 ]; then
    step "Debian packages: ${missing[*]}" "$lab_dir/logs/packages.log" install
fi
if qemu_is_old; then
    step "QEMU of Debian's backports" "$lab_dir/logs/qemu.log" install_backport qemu-system-x86
fi
