# For scripts that unpack Debian: `debian [MIRROR SUITE]` sets mirror and suite; without them, to those of this machine's apt.
debian() {
    case $# in
    0)
        suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
        mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' "Codename: $suite" |
            head -n 1)
        [ "$mirror" ] || { echo "this machine's apt has no Debian: name a MIRROR and a SUITE of it" >&2; exit 1; }
        ;;
    2) mirror=$1 suite=$2 ;;
    *) sed -n 's/^#  *sh /usage: sh /p' "$0" >&2; exit 2 ;;
    esac
}
