#!/bin/sh
# Makes a base image for tests/test_image.py out of Debian's packages, where no registry of images can be reached.
#
#     sh tests/image_base.sh NAME FOLDER [MIRROR SUITE]
#
# It stands in for the official image of Python that the Dockerfile names: Debian's Python, called as it is there, and
# numpy for the board's image. FOLDER is a work folder; it is left empty. Without a mirror, packages come from where
# this machine's apt has Debian from. Needs root, debootstrap and buildah; BUILDAH=... names it with its options.
set -eu
PATH=$PATH:/usr/sbin
. "$(dirname "$0")/debian.sh"
[ $# -gt 1 ] || debian usage
name=$1 folder=$2
shift 2
debian "$@"
rm -rf "$folder"
debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,python3-numpy,ca-certificates \
    "$suite" "$folder" "$mirror"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
ln -s /usr/bin/python3 "$folder/usr/local/bin/python"
box=$(${BUILDAH:-buildah} from scratch)
${BUILDAH:-buildah} add --quiet "$box" "$folder" /
${BUILDAH:-buildah} commit --quiet --rm "$box" "$name"
rm -rf "$folder"
