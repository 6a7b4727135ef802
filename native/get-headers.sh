#!/bin/sh
# ONNX Runtime's headers, from Debian's package in trixie, without touching the system's own sources.
set -eu
out=$1
apt=$(mktemp -d)
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" > "$apt/sources.list"
options="-o Dir::Etc::SourceList=$apt/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State=$apt -o Dir::State::Lists=$apt/lists -o Dir::Cache=$apt"
apt-get $options -qq update
(cd "$apt" && apt-get $options -qq download libonnxruntime-dev && dpkg-deb -x libonnxruntime-dev_*.deb files)
mkdir -p "$out"
cp "$apt"/files/usr/include/onnxruntime/*.h "$out"
rm -rf "$apt"
