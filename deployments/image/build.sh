#!/bin/sh
# Builds the image where no registry of images is reached: its base by debootstrap, then the Containerfile by buildah.
#   deployments/image/build.sh [TAG] [further arguments of `buildah build`, such as --build-arg LOCK=cuda]
# Needs root, and debootstrap, buildah and runc of Debian. SUITE (bookworm) and MIRROR name Debian's packages.
set -eu
cd "$(dirname "$0")/../.."
tag=${1:-nested-tune}
[ $# -eq 0 ] || shift
suite=${SUITE:-bookworm}
base=localhost/debian-$suite
export BUILDAH_ISOLATION=oci BUILDAH_RUNTIME=runc STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} # crun fails on hybrid cgroups
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! buildah inspect --type image "$base" >"$work/inspected" 2>&1; then
    debootstrap --variant=minbase "$suite" "$work/root" "${MIRROR:-http://deb.debian.org/debian}" >"$work/log" ||
        { tail -n 20 "$work/log" >&2; exit 1; }
    rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/root" /
    buildah commit --quiet --rm "$container" "$base"
fi
# An open registry is asked for nothing: both stages begin with the base that is here.
printf '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"
buildah build --signature-policy "$work/policy.json" --pull=never --network host --build-arg "BASE=$base" \
    --file deployments/image/Containerfile --tag "$tag" "$@" .
