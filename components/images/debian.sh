#!/bin/sh
# Install Debian packages, leave nothing of the installation behind, and write down what the image now holds.
#     debian.sh PACKAGE...
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /var/log/* /usr/share/doc/* /usr/share/man/* /usr/share/locale/*
mkdir -p /usr/share/opensora
dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\n' >/usr/share/opensora/debian.txt
