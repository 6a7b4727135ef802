// A bundle: the folder that is a deployment. Opening one trusts nothing in it.
#pragma once

#include <filesystem>
#include <string>

#include "manifest.hpp"

namespace dnp::core {

struct Bundle : Manifest {
    std::filesystem::path path;  // absolute
    std::string fingerprint;     // 16 hexadecimal digits that change when anything in the bundle does

    std::string graph_sha256(const std::string& graph) const;  // one hash for a graph's file and the weights beside it
};

// Opens the bundle in a folder and verifies all of it, as Bundle.open does in Python. Throws bundle_error, naming the
// file, the reason and the remedy, when it is missing, truncated, edited, of a newer schema, or names a file outside.
Bundle open_bundle(const std::filesystem::path& folder);

// A whole file. Throws bundle_error when it cannot be read, or is larger than `most` bytes.
std::string read_file(const std::filesystem::path& file, std::uintmax_t most);

}  // namespace dnp::core
