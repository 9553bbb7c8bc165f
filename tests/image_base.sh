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
case $# in
2)
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' "Codename: $suite" |
        head -n 1)
    [ "$mirror" ] || { echo "this machine's apt has no Debian: name a MIRROR and a SUITE of it" >&2; exit 1; }
    ;;
4) mirror=$3 suite=$4 ;;
*) echo "usage: sh tests/image_base.sh NAME FOLDER [MIRROR SUITE]" >&2; exit 2 ;;
esac
rm -rf "$2"
debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,python3-numpy,ca-certificates \
    "$suite" "$2" "$mirror"
rm -rf "$2"/var/cache/apt/archives/*.deb "$2"/var/lib/apt/lists/*
ln -s /usr/bin/python3 "$2/usr/local/bin/python"
box=$(${BUILDAH:-buildah} from scratch)
${BUILDAH:-buildah} add --quiet "$box" "$2" /
${BUILDAH:-buildah} commit --quiet --rm "$box" "$1"
rm -rf "$2"
