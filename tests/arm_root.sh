#!/bin/sh
# Makes the folder that tests/test_arm.py needs: Debian's Python for 64-bit Arm, with numpy and ONNX Runtime.
#
#     sh tests/arm_root.sh FOLDER [MIRROR SUITE]
#
# Without a mirror, packages come from where this machine's apt has Debian from. Needs debootstrap, fakeroot and a
# python3 with pip (PYTHON=... names another). Packages are unpacked, never set up: nothing is run in the folder, so
# root and a registered qemu are not needed.
set -eu
PATH=$PATH:/usr/sbin
python=${PYTHON:-python3}
tests=$(cd "$(dirname "$0")" && pwd)
. "$tests/debian.sh"
[ $# -gt 0 ] || debian usage
folder=${1%/}
shift
debian "$@"
[ ! -e "$folder" ] || { echo "$folder is already there: remove it, or name another" >&2; exit 1; }

rm -rf "$folder.partial"
mkdir -p "$folder.partial"
partial=$(cd "$folder.partial" && pwd)
fakeroot debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 "$suite" "$partial" "$mirror"
for package in "$partial"/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --directory "$partial" --keep-directory-symlink --no-same-owner
done
# the devices are plain files, proc is a link to this machine's
rm -rf "$partial/var/cache/apt/archives" "$partial/debootstrap" "$partial/dev" "$partial/proc"

# ONNX Runtime crashes on an Arm whose /proc/cpuinfo speaks of x86; qemu shows files of the folder before the machine's
mkdir "$partial/proc"
cat > "$partial/proc/cpuinfo" <<'END'
processor	: 0
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3
END

version=$(readlink "$partial/usr/bin/python3")  # python3.11
"$python" -m pip install --quiet --target "$partial/usr/lib/python3/dist-packages" \
    --constraint "$tests/../constraints.txt" --python-version "${version#python}" --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    --only-binary=:all: numpy onnxruntime
mv "$folder.partial" "$folder"
echo "export EDGEKD_ARM_ROOT=$(cd "$folder" && pwd)"
