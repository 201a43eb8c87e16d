#!/usr/bin/env bash
# initramfs.sh KERNEL FOLDER OUT: an initramfs of busybox, FOLDER/initramfs-init as /init, FOLDER/*.c as programs, and
# the modules named in FOLDER/modules with all that they depend on, uncompressed, numbered in the order in which they
# must be loaded.
. "$(dirname "$0")/../common.sh"
kernel=$lab_dir/kernel/$1 folder=$2 out=$3

root=$out.work
rm -rf "$root"
mkdir "$root"
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,dev,proc,sys,run,root,modules}
cp /bin/busybox "$root/bin/busybox"
for applet in $(busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
ln -s bin "$root/sbin"
install -m 755 "$folder/initramfs-init" "$root/init"
for source in "$folder"/*.c; do
    [ -e "$source" ] || continue
    "${CC:-gcc}" -std=gnu11 -O2 -Wall -Wextra -Werror -static -s -o "$root/bin/$(basename "$source" .c)" "$source"
done

# modules.dep lists what a module needs, what is needed first standing last. A name that the kernel does not have as a
# module is built into it, or it has not got it: /init finds out.
load_order() {
    local name line
    while read -r name _; do
        line=$(grep -E "(^|/)${name//[-_]/[-_]}\.ko[^ ]*:" "$kernel/modules/modules.dep") || { echo "built in, or absent: $name" >&2; continue; }
        tr ' ' '\n' <<<"${line//:/}" | grep . | tac
    done < <(grep -v '^#' "$folder/modules") | awk '!seen[$0]++'
}
number=100
while read -r module; do
    target=$root/modules/$number-$(basename "${module%%.ko*}").ko
    case $module in
        *.ko.xz) xz -dc "$kernel/modules/$module" >"$target" ;;
        *.ko) cp "$kernel/modules/$module" "$target" ;;
        *) die "a module that is neither .ko nor .ko.xz: $module" ;;
    esac
    number=$((number + 1))
done < <(load_order)
ls "$root/modules"

# zstd: both kernels read it, and under a software CPU it unpacks several times faster than gzip.
(cd "$root" && find . -print0 | sort -z | cpio --null --create --format=newc --owner=0:0 --reproducible) | zstd -q -10 >"$out"
