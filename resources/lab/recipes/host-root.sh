#!/usr/bin/env bash
# host-root.sh OUT: the nested host's root file system, ext4: a minimal Debian with the programs that a host of microVMs
# has. RUNNEL_DEBIAN_MIRROR names another mirror.
. "$(dirname "$0")/../common.sh"
out=$1

packages=(
    iproute2 iputils-ping kmod procps util-linux  # a host's own
    curl python3 zstd e2fsprogs                   # what checks use
    skopeo docker-registry                        # stock tools that read and hold images
)
root=$out.work
rm -rf "$root"
mkdir "$root"
trap 'rm -rf "$root"' EXIT
mmdebstrap --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    bookworm "$root/root" ${RUNNEL_DEBIAN_MIRROR:+"$RUNNEL_DEBIAN_MIRROR"}
mkdir -p "$root/root/lab/in" "$root/root/lab/scratch"
install -m 755 "$lab/host/init" "$root/root/lab/init"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$root/root" "$out" 1536M
