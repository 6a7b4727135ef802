#include "plans.hpp"

#include <chrono>
#include <fstream>

#include "generated/constants.hpp"
#include "parallel.hpp"
#include "processor.hpp"
#include "schema.hpp"
#include "sha256.hpp"

namespace dnp::core {

namespace fs = std::filesystem;

namespace {

constexpr std::int64_t hashed_apart = 64 << 20;         // bytes of a file of weights that are hashed on their own
constexpr std::uintmax_t most_sidecar_bytes = 1 << 20;  // a real one has some hundreds
constexpr int exchanges[] = {0, 50, 200};               // milliseconds to wait before a plan that cannot be used is looked at again
constexpr std::int64_t most_file_bytes = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t most_size = 1 << 24;
constexpr std::size_t most_named = 3;  // plans that do not fit, in an error

// The fields, in order.
std::vector<std::pair<const char*, Json>> fields_of(const PlanSpec& spec) {
    return {{"graph", spec.graph},     {"graph_sha256", spec.graph_sha256}, {"backend", spec.backend}, {"version", spec.version},
            {"architecture", spec.architecture}, {"precision", spec.precision}, {"profile", spec.profile}, {"flags", spec.flags}};
}

// A value as Python writes it.
std::string written(const Json& value) {
    if (value.is_null()) return "None";
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_string()) return value.get<std::string>();
    if (!value.is_array()) return shown(value);
    std::string text;
    for (const Json& entry : value) text += (text.empty() ? "" : ", ") + written(entry);
    return "[" + text + "]";
}

std::string brief(const Json& value) {
    std::string text = written(value);
    for (char& c : text)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';  // sidecars can be edited
    return text.size() <= 40 ? text : text.substr(0, 12) + "...";
}

struct WeightsFile : FileRecord {
    std::string file;
};

struct Sidecar : FileRecord {
    PlanSpec spec;
    std::string built;  // when, as text that sorts by time
    std::optional<WeightsFile> weights;
};

FileRecord record_of(Fields& fields) {
    return {static_cast<std::uint64_t>(fields.integer("size", 0, most_file_bytes)), fields.text("sha256")};
}

PlanSpec spec_of(const Json& value, const std::string& where) {
    Fields fields(value, where);
    PlanSpec spec{fields.text("graph"), fields.text("graph_sha256"), fields.text("backend"), fields.text("version"), fields.text("architecture"),
                  fields.text("precision"), fields.at("profile"), fields.at("flags")};
    fields.finish();
    for (const char* name : {"profile", "flags"})
        if (!value[name].is_object()) refuse(fields.where(name), "an object", value[name]);
    for (const auto& [name, entry] : spec.profile.items())
        if (!entry.is_array() || !std::all_of(entry.begin(), entry.end(), [](const Json& size) { return size.is_number_integer(); }))
            refuse(fields.where("profile") + "." + name, "a list of integers", entry);
    return spec;
}

// The sidecar of a plan. Throws bundle_error when it is not as it was written.
Sidecar read_sidecar(fs::path path) {
    path.replace_extension(".json");
    std::string where = path.filename().string();
    Json value = parse_json(read_file(path, most_sidecar_bytes), where, Code::bundle);
    Fields fields(value, where);
    Sidecar sidecar;
    static_cast<FileRecord&>(sidecar) = record_of(fields);
    sidecar.spec = spec_of(fields.at("spec"), fields.where("spec"));
    const Json& statistics = fields.at("statistics");
    if (!statistics.is_object()) refuse(fields.where("statistics"), "an object", statistics);
    const std::string ending = "_bytes";
    for (const auto& [name, number] : statistics.items())
        if (name.size() >= ending.size() && name.substr(name.size() - ending.size()) == ending && !is_integer(number, 0))
            refuse(fields.where("statistics") + ": " + name, "a number of bytes", number);
    sidecar.built = statistics.contains("built") && statistics["built"].is_string() ? statistics["built"].get<std::string>() : "None";
    if (const Json* weights = fields.find("weights")) {
        Fields of(*weights, fields.where("weights"));
        sidecar.weights = WeightsFile{record_of(of), of.text("file")};
        of.finish();
        const std::string& file = sidecar.weights->file;
        if (file.empty() || file == ".." || file == "." || fs::path(file).filename() != file) refuse(of.where("file"), "a file's name", Json(file));
    }
    fields.finish();
    return sidecar;
}

// The SHA-256 of a file, from `start` on and of so many bytes at most. Throws bundle_error.
Sha256 hashed(const fs::path& path, std::int64_t start, std::int64_t most) {
    std::ifstream file(path, std::ios::binary);
    file.seekg(start);
    std::vector<char> chunk(1 << 20);
    Sha256 hash;
    while (most > 0 && file) {
        file.read(chunk.data(), std::min<std::streamsize>(most, static_cast<std::streamsize>(chunk.size())));
        hash.update(chunk.data(), static_cast<std::size_t>(file.gcount()));
        most -= file.gcount();
    }
    if (most > 0 && !file.eof()) throw bundle_error(path.filename().string(), " cannot be read");
    return hash;
}

std::string whole_hash(const fs::path& path) { return hashed(path, 0, most_file_bytes).hex(); }

// Of the hashes of its blocks.
std::string block_hash(const fs::path& path) {
    auto blocks = static_cast<std::size_t>((static_cast<std::int64_t>(fs::file_size(path)) + hashed_apart - 1) / hashed_apart);
    std::vector<std::string> digests(blocks);
    in_parallel(blocks, [&](std::size_t i) { digests[i] = hashed(path, static_cast<std::int64_t>(i) * hashed_apart, hashed_apart).digest(); });
    Sha256 hash;
    for (const auto& digest : digests) hash.update(digest.data(), digest.size());
    return hash.hex();
}

// How a file differs from what was written; empty when it does not.
std::string damage(const fs::path& path, const FileRecord& wanted, std::string (*hash)(const fs::path&)) {
    std::string name = path.filename().string();
    std::error_code error;
    std::uintmax_t size = fs::file_size(path, error);
    if (error) return cat(name, " cannot be read (", error.message(), ")");
    if (size != wanted.size) return cat(name, " is damaged: ", size, " bytes, wanted are ", wanted.size);
    return hash(path) == wanted.sha256 ? "" : name + " is damaged: its SHA-256 differs";
}

std::string without_remedy(std::string message) {
    std::size_t at = message.rfind(remedy);
    return at == std::string::npos ? message : message.substr(0, at);
}

}  // namespace

std::string PlanSpec::key() const {
    Json all = Json::object();
    for (const auto& [name, value] : fields_of(*this)) all[name] = value;
    return sha256(all.dump(-1, ' ', true)).substr(0, 16);
}

std::string PlanSpec::difference(const PlanSpec& other) const {
    auto mine = fields_of(*this), its = fields_of(other);
    for (std::size_t i = 0; i < mine.size(); ++i) {
        const auto& [name, wanted] = mine[i];
        const Json& found = its[i].second;
        if (wanted == found) continue;
        if (!wanted.is_object()) return cat(name, " is ", brief(found), ", wanted is ", brief(wanted));
        Json both = wanted;
        both.update(found);
        for (const auto& [key, value] : both.items()) {
            Json one = wanted.value(key, Json()), another = found.value(key, Json());
            if (one != another) return cat(name, ".", brief(key), " is ", brief(another), ", wanted is ", brief(one));
        }
    }
    return "";
}

PlanStore::Found PlanStore::find(const PlanSpec& spec) const {
    Found found = look(spec);
    for (int pause : exchanges) {  // another process may be giving the files of a new build their names
        if (found.plan || found.reason.empty()) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(pause));
        found = look(spec);
    }
    return found;
}

PlanStore::Found PlanStore::look(const PlanSpec& spec) const {
    fs::path path = place(spec);
    try {
        if (!fs::exists(path)) return {{}, nearest_to(spec)};
        Sidecar sidecar;
        try {
            sidecar = read_sidecar(path);
        } catch (const Error& error) {
            return {{}, cat(path.filename().string(), " has no sidecar that can be read (", without_remedy(error.what()), ")")};
        }
        std::string reason = spec.difference(sidecar.spec);
        if (!reason.empty()) return {{}, path.filename().string() + ": " + reason};
        reason = damage(path, sidecar, whole_hash);
        if (reason.empty() && sidecar.weights) reason = damage(folder_ / sidecar.weights->file, *sidecar.weights, block_hash);
        if (!reason.empty()) return {{}, reason};
        return {Plan{path, sidecar.spec}, ""};
    } catch (const fs::filesystem_error& error) {
        return {{}, cat(path.string(), " cannot be read (", error.code().message(), ")")};
    }
}

std::vector<Plan> PlanStore::newest(const std::string& graph, const std::string& backend) const {
    std::vector<std::tuple<std::string, std::string, Plan>> found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(folder_, error)) {
        if (entry.path().extension() != ".plan") continue;
        try {
            Sidecar sidecar = read_sidecar(entry.path());
            if (sidecar.spec.graph == graph && sidecar.spec.backend == backend && entry.path() == place(sidecar.spec))
                found.emplace_back(sidecar.built, entry.path().filename().string(), Plan{entry.path(), sidecar.spec});
        } catch (const Error&) {
        }
    }
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return std::tie(std::get<0>(a), std::get<1>(a)) > std::tie(std::get<0>(b), std::get<1>(b)); });
    std::vector<Plan> plans;
    for (auto& [built, name, plan] : found) plans.push_back(std::move(plan));
    return plans;
}

// What is different about the plan that has most in common with `spec`.
std::string PlanStore::nearest_to(const PlanSpec& spec) const {
    auto wanted = fields_of(spec);
    std::string told;
    std::ptrdiff_t most = -1;
    for (const Plan& plan : newest(spec.graph, spec.backend)) {
        auto its = fields_of(plan.spec);
        std::ptrdiff_t shared = 0;
        for (std::size_t i = 0; i < its.size(); ++i) shared += its[i].second == wanted[i].second;
        if (shared > most) most = shared, told = plan.path.filename().string() + ": " + spec.difference(plan.spec);
    }
    return told;
}

PlanSpec cpu_plan(const Bundle& bundle, const std::string& graph, const std::string& version) {
    return {graph, bundle.graph_sha256(graph), "cpu", version, processor_architecture(), bundle.precision};
}

Sizes with_beams(const Sizes& sizes) {
    Sizes all = sizes;
    if (sizes.count("sequences") && sizes.count("images")) all[beams] = sizes.at("sequences") / sizes.at("images");
    return all;
}

std::vector<std::pair<Sizes, PlanSpec>> cuda_plans(const Bundle& bundle, const std::string& graph, const PlanStore& store) {
    std::vector<std::pair<Sizes, PlanSpec>> found;
    PlanSpec wanted{graph, bundle.graph_sha256(graph), "cuda", cat("revision ", cuda_revision), "every GPU", bundle.precision};
    for (const Plan& plan : store.newest(graph, "cuda")) {
        Sizes sizes;
        wanted.profile = Json::object();
        for (const auto& [symbol, range] : plan.spec.profile.items())
            if (!range.empty() && is_integer(range[0])) {
                auto size = sizes[symbol] = range[0].get<std::int64_t>();
                wanted.profile[symbol] = {size, size, size};
            }
        bool known = std::any_of(found.begin(), found.end(), [&](const auto& other) { return other.first == sizes; });
        if (!known && wanted.difference(plan.spec).empty()) found.emplace_back(sizes, plan.spec);
    }
    return found;
}

Profile profile_of(const PlanSpec& spec) {
    Profile profile;
    for (const auto& [symbol, sizes] : spec.profile.items()) {
        auto range = sizes.get<std::vector<std::int64_t>>();
        if (range.size() != 3 || range[0] < 1 || range[0] > range[1] || range[1] > range[2] || range[2] > most_size)
            throw bundle_error("the sidecar of a plan of '", spec.graph, "' was edited: ", symbol, " ", sizes.dump(), " is no range; build it again");
        profile[symbol] = {range[0], range[1], range[2]};
    }
    return profile;
}

namespace {

// How users speak of a size, and what theirs is multiplied with: dnp/engine/bundle/contract.py.
struct Symbol {
    const char *name, *option;
    std::int64_t least = 1, usual = 1, most = 1, divisor = 1;
};

std::vector<Symbol> symbols(const Bundle& bundle) {
    std::int64_t scale = bundle.latents.vae_scale_factor, length = bundle.text.length;
    return {{"batch", "--batch"},
            {"places", "--batch"},
            {"rows", "--batch", 1, 2, bundle.guidance.roles},
            {"steps", "--steps"},
            {"noise_steps", "--steps"},
            {"height", "--height", 1, 1, 1, scale},
            {"width", "--width", 1, 1, 1, scale},
            {"tokens", "--windows", length, length, length},
            {"image_height", "--image-height"},
            {"image_width", "--image-width"},
            {"images", "--batch"},
            {"sequences", "--batch", 1, 1, beams_at_most}};
}

// The options that ask for at least these sizes.
Names range_options(const Bundle& bundle, const Profile& profile) {
    std::vector<std::pair<std::string, Range>> options;
    for (const Symbol& symbol : symbols(bundle)) {
        auto found = profile.find(symbol.name);
        if (found == profile.end()) continue;
        const Range& sizes = found->second;
        std::int64_t low = std::max<std::int64_t>(1, sizes.low * symbol.divisor / symbol.least);
        std::int64_t high = std::max(low, (sizes.high * symbol.divisor + symbol.most - 1) / symbol.most);
        Range asked{low, std::min(std::max(low, sizes.best * symbol.divisor / symbol.usual), high), high};
        auto known = std::find_if(options.begin(), options.end(), [&](const auto& option) { return option.first == symbol.option; });
        if (known == options.end()) {
            options.emplace_back(symbol.option, asked);
        } else {
            known->second.low = std::min(known->second.low, asked.low), known->second.high = std::max(known->second.high, asked.high);
        }
    }
    Names words;
    for (const auto& [option, sizes] : options) words.insert(words.end(), {option, cat(sizes.low, ":", sizes.best, ":", sizes.high)});
    return words;
}

// The options that ask for what a plan was built with, but for its sizes.
Names setting_options(const PlanSpec& spec) {
    Names words;
    Json level = spec.flags.value("optimization_level", Json()), workspace = spec.flags.value("workspace", Json());
    if (is_integer(level)) words.insert(words.end(), {"--optimization-level", level.dump()});
    if (is_integer(workspace)) words.insert(words.end(), {"--workspace", std::to_string((workspace.get<std::int64_t>() + 999'999) / 1'000'000)});
    if (truthy(spec.flags.value("weight_streaming", Json()))) words.push_back("--weight-streaming");
    if (truthy(spec.flags.value("refit", Json()))) words.push_back("--refit");
    return words;
}

void append(Names& words, const Names& more) { words.insert(words.end(), more.begin(), more.end()); }

}  // namespace

Plan tensorrt_plan(const Bundle& bundle, const std::string& graph, const std::string& version, const std::string& architecture,
                   const PlanStore& store, Names command) {
    std::vector<Plan> plans = store.newest(graph, "tensorrt");
    std::string told;
    std::size_t number = 0;
    for (const Plan& plan : plans) {
        PlanSpec wanted = plan.spec;
        wanted.graph_sha256 = bundle.graph_sha256(graph), wanted.version = version, wanted.architecture = architecture;
        wanted.flags["revision"] = tensorrt_revision;
        std::string difference = wanted.difference(plan.spec);
        if (difference.empty()) {
            auto [found, reason] = store.find(plan.spec);
            if (found) return *found;
            append(command, setting_options(plan.spec)), append(command, range_options(bundle, profile_of(plan.spec)));
            throw backend_error("the plan of '", graph, "' cannot be used: ", reason.empty() ? plan.path.filename().string() + " is gone" : reason,
                                "; build it again: ", command_line(command));
        }
        if (number++ < most_named) told += cat(told.empty() ? "" : "; ", plan.path.filename().string(), ": ", difference);
    }
    if (number > most_named) told += cat("; and ", number - most_named, " more");
    if (number) append(command, setting_options(plans[0].spec)), append(command, range_options(bundle, profile_of(plans[0].spec)));
    throw backend_error("tensorrt needs a plan of '", graph, "', and ",
                        number ? cat("those there do not fit (", told, ")") : cat("there is none in ", store.folder().string()),
                        "; build it: ", command_line(command));
}

std::string beyond(const Bundle& bundle, const PlanSpec& spec, const Sizes& sizes, Names command) {
    Profile profile = profile_of(spec), wider = profile;
    std::string told;
    for (const auto& [symbol, size] : sizes) {
        const Range& range = profile.at(symbol);
        if (size >= range.low && size <= range.high) continue;
        std::string known = range.low == range.high ? std::to_string(range.low) : cat(range.low, ":", range.best, ":", range.high);
        told += cat(told.empty() ? "" : " and ", symbol, " ", known, ", not for ", size);
        wider[symbol] = {std::min(range.low, size), range.best, std::max(range.high, size)};
    }
    if (told.empty()) return told;
    append(command, setting_options(spec)), append(command, range_options(bundle, wider));
    return cat("graph '", spec.graph, "': the plan was compiled for ", told, "; build a wider one: ", command_line(command));
}

Names size_options(const Bundle& bundle, const Sizes& sizes) {
    const auto& latents = bundle.latents;
    std::int64_t scale = latents.vae_scale_factor;
    const Sizes usual{{"height", latents.height}, {"width", latents.width}, {"tokens", bundle.text.length},
                      {"image_height", latents.height * scale}, {"image_width", latents.width * scale}};
    Names options;
    for (const Symbol& symbol : symbols(bundle))
        if (auto size = sizes.find(symbol.name); size != sizes.end() && usual.count(symbol.name) && size->second != usual.at(symbol.name))
            append(options, {symbol.option, std::to_string(size->second * symbol.divisor / symbol.usual)});
    return options;
}

std::string command_line(const Names& words) {
    static constexpr const char* safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
    std::string line;
    for (const auto& word : words) {
        if (!line.empty()) line += ' ';
        if (!word.empty() && word.find_first_not_of(safe) == std::string::npos) {
            line += word;
            continue;
        }
        line += '\'';
        for (char c : word) line += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
        line += '\'';
    }
    return line;
}

}  // namespace dnp::core
