#include "bundle.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "parallel.hpp"
#include "sha256.hpp"

namespace dnp::core {

namespace fs = std::filesystem;

namespace {

constexpr const char* manifest_name = "bundle.json";
constexpr const char* seal_name = "bundle.sha256";
constexpr std::uintmax_t most_manifest_bytes = 16u << 20;  // of a manifest; a real one has some kilobytes
constexpr std::size_t chunk = 1u << 20;
constexpr const char* recopy = "; copy the bundle again, or export it again";
constexpr const char* lfs_pointer = "version https://git-lfs.github.com/spec/";

// The path of a listed file, whose name lies inside `root`. What a link leads to may lie elsewhere: its hash tells.
fs::path place(const fs::path& root, const std::string& name) {
    fs::path parts(name);
    bool outside = parts.is_absolute() || name.find_first_of("\\:") != std::string::npos;
    for (const auto& part : parts) outside = outside || part == "..";
    if (outside) throw bundle_error((root / manifest_name).string(), ": lists ", shown(name), ", which is outside the bundle; do not use this bundle");
    fs::path path = root / parts;
    std::error_code error;
    if (name.find('\0') != std::string::npos || !fs::is_regular_file(path, error)) throw bundle_error(path.string(), ": missing", recopy);
    return path;
}

std::string hash_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> buffer(chunk);
    Sha256 hash;
    while (file) {
        file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
        hash.update(buffer.data(), static_cast<std::size_t>(file.gcount()));
    }
    if (!file.eof()) throw bundle_error(path.string(), ": cannot be read", recopy);
    return hash.hex();
}

bool is_pointer(const fs::path& path) {
    std::string start(std::strlen(lfs_pointer), '\0');
    std::ifstream(path, std::ios::binary).read(start.data(), static_cast<std::streamsize>(start.size()));
    return start == lfs_pointer;
}

// Places and sizes first, which costs nothing, then the hashes.
void verify(const fs::path& root, const std::map<std::string, FileRecord>& files) {
    std::vector<std::pair<fs::path, const FileRecord*>> listed;
    for (const auto& [name, record] : files) listed.emplace_back(place(root, name), &record);
    for (const auto& [path, record] : listed) {
        std::uintmax_t size = fs::file_size(path);
        if (size != record->size && is_pointer(path))
            throw bundle_error(path.string(), " is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone that it is from");
        if (size != record->size)
            throw bundle_error(path.string(), ": ", size < record->size ? "truncated" : "longer than it was", ", ", size, " bytes where ",
                               record->size, " are expected", recopy);
    }
    in_parallel(listed.size(), [&](std::size_t i) {
        if (hash_of(listed[i].first) != listed[i].second->sha256)
            throw bundle_error(listed[i].first.string(), ": edited or damaged, its SHA-256 differs", recopy);
    });
}

Bundle open_folder(const fs::path& root) {
    if (!fs::is_directory(root))
        throw bundle_error("bundle '", root.string(), "' ", fs::exists(root) ? "is no folder" : "does not exist",
                           "; name the folder that `dnp export` wrote");
    fs::path file = root / manifest_name;
    if (!fs::is_regular_file(file))
        throw bundle_error(root.string(), ": no bundle, it has no ", manifest_name, "; name the folder that `dnp export` wrote");
    std::string raw = read_file(file, most_manifest_bytes), digest = sha256(raw);
    Bundle bundle;
    static_cast<Manifest&>(bundle) = parse_manifest(parse_json(raw, file.string(), Code::bundle), file.string());
    if (read_file(root / seal_name, most_manifest_bytes).substr(0, 64) != digest)
        throw bundle_error(file.string(), ": edited since it was written, ", seal_name, " has another SHA-256", recopy);
    verify(root, bundle.files);
    bundle.path = root, bundle.fingerprint = digest.substr(0, 16);
    return bundle;
}

}  // namespace

std::string Bundle::graph_sha256(const std::string& graph) const {
    const std::string& file = graphs.at(graph).file;
    std::string listed;
    for (const std::string& name : {file, file + ".data"})
        if (auto found = files.find(name); found != files.end()) listed += found->second.sha256 + "  " + name + "\n";
    return sha256(listed);
}

std::string read_file(const fs::path& file, std::uintmax_t most) {
    std::ifstream stream(file, std::ios::binary | std::ios::ate);
    if (!stream) throw bundle_error(file.string(), ": cannot be read (", std::strerror(errno), ")", recopy);
    auto size = static_cast<std::uintmax_t>(stream.tellg());
    if (size > most) throw bundle_error(file.string(), ": too large, ", size, " bytes", recopy);
    std::string contents(size, '\0');
    stream.seekg(0).read(contents.data(), static_cast<std::streamsize>(size));
    if (!stream) throw bundle_error(file.string(), ": cannot be read", recopy);
    return contents;
}

Bundle open_bundle(const fs::path& folder) {
    try {
        return open_folder(fs::absolute(folder));
    } catch (const fs::filesystem_error& error) {
        throw bundle_error("bundle '", folder.string(), "' cannot be read: ", error.code().message());
    }
}

}  // namespace dnp::core
