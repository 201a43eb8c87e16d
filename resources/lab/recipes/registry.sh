#!/usr/bin/env bash
# registry.sh OUT: Debian's docker-registry, the program alone: installing the package would start a service.
. "$(dirname "$0")/../common.sh"
out=$1

work=$out.work
rm -rf "$work"
mkdir "$work"
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -o DPkg::Lock::Timeout=300 update
apt-get -o APT::Sandbox::User=root download docker-registry
dpkg-deb -x ./*.deb .
mv usr/bin/docker-registry "$out"
