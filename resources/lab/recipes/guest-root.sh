#!/usr/bin/env bash
# guest-root.sh OUT: the demo's guest: a Debian as its installer leaves it (systemd, udev, Debian's kernel and the
# initrd that initramfs-tools made for it) and one service. OUT is a folder: disk.ext4 of 2 GiB, vmlinuz, initrd.
. "$(dirname "$0")/../common.sh"
out=$1 guest=$repository/resources/demo/guest

packages=(
    linux-image-cloud-amd64 initramfs-tools zstd  # its kernel and initrd
    systemd-sysv udev iproute2                    # what starts, finds devices, configures the network
    python3                                       # the service
)
work=$out.work
rm -rf "$work"
mkdir "$work"
trap 'rm -rf "$work"' EXIT
root=$work/root
mmdebstrap --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
    bookworm "$root" ${RUNNEL_DEBIAN_MIRROR:+"$RUNNEL_DEBIAN_MIRROR"}
install -D -m 755 -t "$root/opt/demo" "$guest/service.py"
install -D -m 644 -t "$root/etc/systemd/system" "$guest/demo.service"
install -D -m 644 -t "$root/etc/systemd/network" "$guest/ethernet.network"
echo demo >"$root/etc/hostname"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
chroot "$root" passwd --quiet --delete root # for `runnel console`: log in as root, without a password
chroot "$root" systemctl --quiet enable demo systemd-networkd
# Nothing that wakes up by itself in the middle of a measurement.
chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
# A microVM has a serial line and no screen.
chroot "$root" systemctl --quiet mask getty-static.service getty@tty1.service

mkdir "$out"
cp -L "$root/vmlinuz" "$out/vmlinuz"
cp -L "$root/initrd.img" "$out/initrd"
mke2fs -q -t ext4 -L demo -d "$root" "$out/disk.ext4" 2G
