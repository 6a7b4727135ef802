// Plans: what `dnp build` made of graphs ahead. They are found by what lies beside them, and verified before use, as
// dnp/engine/plans/store.py does. Nothing here writes.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace dnp::core {

// Everything that changes a plan.
struct PlanSpec {
    std::string graph, graph_sha256, backend, version, architecture, precision;
    Json profile = Json::object(), flags = Json::object();

    std::string key() const;                                 // 16 hexadecimal digits over all fields, Python's
    std::string difference(const PlanSpec& other) const;     // the first field that is another there; empty when none is
};

struct Plan {
    std::filesystem::path path;
    PlanSpec spec;
};

class PlanStore {
public:
    explicit PlanStore(std::filesystem::path folder) : folder_(std::move(folder)) {}

    struct Found {
        std::optional<Plan> plan;
        std::string reason;  // why there is none that can be used; empty when there never was one
    };
    Found find(const PlanSpec& spec) const;

    // The plans of a graph for a backend, the newest first; not verified. Those whose sidecar cannot be read are left out.
    std::vector<Plan> newest(const std::string& graph, const std::string& backend) const;

    const std::filesystem::path& folder() const { return folder_; }

private:
    Found look(const PlanSpec& spec) const;
    std::string nearest_to(const PlanSpec& spec) const;
    std::filesystem::path place(const PlanSpec& spec) const { return folder_ / (spec.graph + "-" + spec.key() + ".plan"); }

    std::filesystem::path folder_;
};

// What the plan of a graph is for this processor and this version of ONNX Runtime; it takes every size.
PlanSpec cpu_plan(const Bundle& bundle, const std::string& graph, const std::string& version);

// Plans of the backend `cuda`, each for one image size and for one sequence an image, greedy search.
constexpr const char* beams = "beams";  // how many sequences each image has: a size that no input has by itself
Sizes with_beams(const Sizes& sizes);   // `beams` too, where there are any

// What plans of a graph there are, by the sizes that they have fixed, the newest first; not verified.
std::vector<std::pair<Sizes, PlanSpec>> cuda_plans(const Bundle& bundle, const std::string& graph, const PlanStore& store);

// The sizes that a plan of TensorRT was compiled for: of each symbol the smallest, the best and the largest.
struct Range {
    std::int64_t low, best, high;
};
using Profile = std::map<std::string, Range>;
Profile profile_of(const PlanSpec& spec);  // throws bundle_error when it was edited

// The newest plan of the backend `tensorrt` of this very graph, by this version, for this GPU; its sizes and settings are
// those that it was built with. Verified. `command` is the `dnp build` of plans for the bundle. Throws backend_error where
// none fits, with what is there, what differs and what builds one; and for a plan that is damaged.
Plan tensorrt_plan(const Bundle& bundle, const std::string& graph, const std::string& version, const std::string& architecture,
                   const PlanStore& store, Names command);

// What is said of sizes that a plan of TensorRT does not take, with the command that builds one which takes them besides;
// empty when there are none.
std::string beyond(const Bundle& bundle, const PlanSpec& spec, const Sizes& sizes, Names command);

// The options of `dnp build` that ask for a plan for these sizes of a graph, where they are not the bundle's own.
Names size_options(const Bundle& bundle, const Sizes& sizes);

// A command as a shell reads it.
std::string command_line(const Names& words);

}  // namespace dnp::core
