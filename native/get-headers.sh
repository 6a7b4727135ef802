#!/bin/sh
# ONNX Runtime's headers into a folder: get-headers.sh FOLDER. They come from Debian 13's package, 85 kB, by apt with a
# state of its own, so that the system's packages and sources stay as they are.
set -eu
out=$1
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
chmod 755 "$apt"
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/here"
chmod 777 "$apt/lists/partial" "$apt/archives/partial" "$apt/here"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" > "$apt/sources.list"
options="-qq -o Dir::Etc::SourceList=$apt/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State=$apt -o Dir::State::Lists=$apt/lists -o Dir::Cache=$apt"
# shellcheck disable=SC2086
apt-get $options update
# shellcheck disable=SC2086
(cd "$apt/here" && apt-get $options download libonnxruntime-dev && dpkg-deb -x libonnxruntime-dev_*.deb files)
mkdir -p "$out"
cp "$apt"/here/files/usr/include/onnxruntime/*.h "$out"
