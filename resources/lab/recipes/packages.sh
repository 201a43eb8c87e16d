#!/usr/bin/env bash
# Installs the Debian packages that the lab uses and this machine lacks.
. "$(dirname "$0")/../common.sh"

packages=(
    qemu-system-x86                        # the nested host's CPU, in software
    mmdebstrap e2fsprogs                   # root file systems, made without mounting anything
    gcc libc6-dev                          # the guest's own program
    g++                                    # libFuzzer
    busybox-static cpio zstd xz-utils lz4 kmod  # initramfs archives, compressed modules and kernels
    iproute2 procps util-linux             # namespaces, links, taps, netem; flock, setpriv, nsenter
    skopeo                                 # stock tool for images
    curl ca-certificates python3           # clients of the API and of the guests' web pages
)

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} = 0 ] && exit

[ "$(id -u)" = 0 ] || die "run as root, or install yourself: apt-get install ${missing[*]}"
command -v apt-get >/dev/null || die "the lab is made of Debian's packages, and this machine has no apt-get"
install() {
    # Another apt may be at work (unattended-upgrades on a machine that just booted): wait for it.
    apt-get -o DPkg::Lock::Timeout=300 update
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}
exec {lock}>"$lab_dir/packages.lock"
flock "$lock"
step "Debian packages: ${missing[*]}" "$lab_dir/logs/packages.log" install
