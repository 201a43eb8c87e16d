#!/usr/bin/env bash
# kernel.sh KERNEL OUT: downloads Debian's current kernel package of that line and unpacks it into the folder OUT.
#
# The metapackage names the current version: older ones leave the mirror. apt verifies what it downloads; version and
# SHA-256 are recorded in OUT/package.
. "$(dirname "$0")/../common.sh"
kernel=$1 out=$2

case $kernel in
    6.1-cloud) metapackage=linux-image-cloud-amd64 ;;
    6.1) metapackage=linux-image-amd64 ;;
    6.12-cloud) metapackage=linux-image-6.12-cloud-amd64 ;;
    *) die "no such kernel: $kernel" ;;
esac
current() { apt-cache depends --important "$metapackage" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p'; }
apt-get -o DPkg::Lock::Timeout=300 update
package=$(current)
case $package in
    linux-image-"${kernel%-cloud}".*) ;;
    *) die "$metapackage names \"$package\", not a ${kernel%-cloud} kernel: the lab needs Debian 12 (bookworm) with its security updates as a source of packages" ;;
esac

mkdir -p "$out"
cd "$out"
# apt's own user could not write into a folder of root's.
apt-get -o APT::Sandbox::User=root download "$package"
deb=$(echo ./*.deb)
{
    echo "package=$package"
    echo "version=$(dpkg-deb -f "$deb" Version)"
    echo "sha256=$(sha256sum <"$deb" | cut -d' ' -f1)"
} >package
cat package
dpkg-deb -x "$deb" unpacked
rm "$deb"
mv unpacked/boot/vmlinuz-* vmlinuz
mv unpacked/boot/config-* config
depmod -b unpacked "$(basename unpacked/lib/modules/*)"
mv unpacked/lib/modules/* modules
rm -r unpacked

# The same kernel as an ELF: the payload of the bzImage, found by its compression's magic number.
extract() {
    local magic=$1 offset
    shift
    for offset in $(LC_ALL=C grep -abo -P "$magic" vmlinuz | cut -d: -f1); do
        tail -c "+$((offset + 1))" vmlinuz | "$@" >vmlinux 2>/dev/null || true # bytes follow the payload
        [ "$(head -c 4 vmlinux | od -An -c | tr -d ' ')" = '177ELF' ] && return
    done
    rm -f vmlinux
    return 1
}
extract '\x02\x21\x4c\x18' lz4 -dc || extract '\x28\xb5\x2f\xfd' zstd -dc || extract '\xfd7zXZ\x00' xz -dc ||
    die "no compressed ELF found in the vmlinuz of $package"
