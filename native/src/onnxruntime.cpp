// ONNX Runtime, by its C++ header: nothing else here knows it.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <set>
#include <thread>

#include "generated/constants.hpp"
#include "plans.hpp"
#include "session.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace dnp::core {

namespace {

constexpr const char* cuda_provider = "CUDAExecutionProvider";
constexpr std::int64_t not_captured = -1;  // ONNX Runtime's number for "neither capture nor replay this run"

ONNXTensorElementDataType element_type(const std::string& dtype) {
    static const std::map<std::string, ONNXTensorElementDataType> types{{"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                                                        {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                                                        {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                                                        {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8}};
    return types.at(dtype);
}

// The first line of ONNX Runtime's error: what follows is where in its own source.
std::string first_line(const char* message) {
    std::string text(message);
    return text.substr(0, text.find('\n'));
}

// The one copy of ONNX Runtime of this process. It is never unloaded: its threads may outlive any pipeline.
struct Library {
    std::string path, version;
    std::unique_ptr<Ort::Env> env;
};

Library*& loaded() {
    static Library* library = nullptr;
    return library;
}

void* open_library(const Names& names) {
    std::string said;
    for (const auto& name : names) {
        if (void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        said = dlerror();
    }
    throw backend_error("ONNX Runtime is not found (", said,
                        "); name its library in the option 'onnxruntime' or in DNP_ONNXRUNTIME: the Python package has it as "
                        "onnxruntime/capi/libonnxruntime.so.1.*, releases as lib/libonnxruntime.so");
}

Library* load(const std::string& asked) {
    Names names{asked};
    if (asked.empty()) names = {"libonnxruntime.so.1", "libonnxruntime.so"};
    void* handle = open_library(names);
    auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (!base) throw backend_error(asked, " is no ONNX Runtime: it has no OrtGetApiBase");
    std::string version = base()->GetVersionString();
    const OrtApi* api = base()->GetApi(ORT_API_VERSION);
    if (!api) throw backend_error("ONNX Runtime ", version, " is too old, libdnp needs 1.", ORT_API_VERSION, " or later");
    Ort::InitApi(api);
    auto library = std::make_unique<Library>();
    library->path = asked, library->version = version;
    library->env = std::make_unique<Ort::Env>(ORT_LOGGING_LEVEL_FATAL, "dnp");
    library->env->DisableTelemetryEvents();
    return library.release();
}

// Whether ONNX Runtime, or CUDA below it, found too little memory.
bool is_about_memory(const Ort::Exception& error) {
    return mentions(error.what(), {"failed to allocate memory", "out of memory", "available memory"});
}

Ort::SessionOptions cpu_options(const Engine& engine, bool planned) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(engine.threads);
    options.SetInterOpNumThreads(1);
    options.SetExecutionMode(ORT_SEQUENTIAL);
    options.SetGraphOptimizationLevel(planned ? ORT_DISABLE_ALL : ORT_ENABLE_ALL);  // a plan is taken as it is
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    options.DisableMemPattern();  // takes as much memory again, and no less time
    // Threads that wait by spinning take the cores from the next graph, and from everyone else.
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    return options;
}

// The settings of dnp/engine/backends/onnxruntime/cuda.py, which says why.
Ort::SessionOptions cuda_options(const Engine& engine, bool planned, bool capture) {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    std::vector<std::pair<const char*, std::string>> settings{{"device_id", std::to_string(engine.device)},
                                                              {"do_copy_in_default_stream", "1"},
                                                              {"use_tf32", "0"},
                                                              {"enable_cuda_graph", capture ? "1" : "0"},
                                                              {"cudnn_conv_algo_search", "HEURISTIC"},
                                                              {"arena_extend_strategy", "kSameAsRequested"},
                                                              {"prefer_nhwc", planned ? "1" : "0"},
                                                              {"enable_skip_layer_norm_strict_mode", "1"}};
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : settings) keys.push_back(key), values.push_back(value.c_str());
    const OrtApi& api = Ort::GetApi();
    try {
        OrtCUDAProviderOptionsV2* cuda = nullptr;
        Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
        std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> freed(cuda, api.ReleaseCUDAProviderOptions);
        Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, keys.data(), values.data(), keys.size()));
        Ort::ThrowOnError(api.UpdateCUDAProviderOptionsWithValue(cuda, "user_compute_stream", engine.gpu->stream()));
        options.AppendExecutionProvider_CUDA_V2(*cuda);
    } catch (const Ort::Exception& error) {  // which names no library
        throw backend_error("ONNX Runtime cannot load its CUDA provider: ", first_line(error.what()),
                            "; it needs libonnxruntime_providers_cuda.so beside its library, and CUDA and cuDNN 9 of the versions that this one was made for "
                            "where the system finds libraries (LD_LIBRARY_PATH): `ldd` on that file names what is missing");
    }
    return options;
}

std::string dtype_name(ONNXTensorElementDataType type) {
    for (const char* dtype : {"float32", "float16", "int64", "uint8"})
        if (element_type(dtype) == type) return dtype;
    return "another";
}

// What the library found in a file.
Signature signature_of(const Ort::Session& session) {
    Ort::AllocatorWithDefaultOptions allocator;
    Signature found;
    auto add = [](Tensors& side, const char* name, const Ort::TypeInfo& type) {
        auto tensor = type.GetTensorTypeAndShapeInfo();
        Shape shape = tensor.GetShape();
        side[name] = {{shape.begin(), shape.end()}, dtype_name(tensor.GetElementType())};
    };
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) add(found.inputs, session.GetInputNameAllocated(i, allocator).get(), session.GetInputTypeInfo(i));
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) add(found.outputs, session.GetOutputNameAllocated(i, allocator).get(), session.GetOutputTypeInfo(i));
    return found;
}

}  // namespace

void start_onnxruntime(Engine& engine) {
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    const char* named = std::getenv("DNP_ONNXRUNTIME");
    std::string asked = !engine.library.empty() ? engine.library : named ? named : "";
    Library*& library = loaded();
    if (!library) library = load(asked);
    if (!asked.empty() && asked != library->path)
        throw backend_error("this process has loaded ONNX Runtime from '", library->path, "' already, and cannot have ", asked, " besides");
    if (engine.backend != "cuda") return;
    auto providers = Ort::GetAvailableProviders();
    if (std::find(providers.begin(), providers.end(), cuda_provider) == providers.end())
        throw backend_error("ONNX Runtime ", library->version, " from '", library->path,
                            "' has no CUDA provider; name the library of the package onnxruntime-gpu, or of a release for GPUs, in the option "
                            "'onnxruntime' or in DNP_ONNXRUNTIME");
    engine.gpu = std::make_shared<Gpu>(engine.device);
}

struct Stop::Options {
    Ort::RunOptions run;
};

Stop::Stop() = default;
Stop::~Stop() = default;

void Stop::create() {
    if (loaded()) options_ = std::make_unique<Options>();
}

void Stop::request() {
    requested_ = true;
    if (options_) options_->run.SetTerminate();
}

void Stop::reset() {
    requested_ = false;
    if (options_) options_->run.UnsetTerminate();
}

class OnnxRuntime : public Runner {
public:
    OnnxRuntime(const Bundle& bundle, const Graph& graph, const Engine& engine);

    std::string runs_on() const override { return runs_on_; }
    std::int64_t fit(const std::string& symbol, std::int64_t size) const override;
    std::int64_t largest(const std::string&) const override { return 0; }
    void check(const Sizes&) const override {}
    void choose(const Sizes& sizes) override;
    void run(Session& session, Stop& stop) override;

private:
    struct File;
    using State = std::vector<std::int64_t>;
    File& opened(const Sizes& fixed);
    std::unique_ptr<File> open_plan(const Sizes& fixed, const PlanSpec& spec);
    std::unique_ptr<File> open_graph(const std::filesystem::path& path, const Sizes& fixed, bool planned);
    State state(Session& session) const;
    void bind_all(File& file, Session& session) const;

    const Bundle& bundle_;
    const Graph& graph_;
    const Engine& engine_;
    std::string runs_on_;
    std::vector<std::pair<Sizes, PlanSpec>> plans_;  // by the sizes that they have fixed, the newest first
    std::map<Sizes, std::unique_ptr<File>> files_;   // that are open, by the same; none for the graph itself
    File* file_ = nullptr;                           // for the present sizes
};

// What ONNX Runtime holds of a file.
struct OnnxRuntime::File {
    Ort::Session session{nullptr};
    Ort::IoBinding binding{nullptr};  // goes first
    bool capturable = false;
    State bound;                                   // what the binding is of; to bind takes as long as to launch
    std::map<State, std::int64_t> numbers;         // that runs are captured under, of states that were met before
    std::int64_t captured = 0;                     // how many of them are
    std::map<std::int64_t, Ort::RunOptions> ways;  // options of a run, by that number

    const Ort::RunOptions& way(const State& present);
};

// A state that is met again is captured, under a number of its own, and replayed from then on, which ONNX Runtime does
// within that run. It is never cut short, for half of it would be captured.
const Ort::RunOptions& OnnxRuntime::File::way(const State& present) {
    std::int64_t number = not_captured;
    if (capturable) {
        auto [known, is_new] = numbers.emplace(present, not_captured);
        if (!is_new && known->second == not_captured) known->second = ++captured;
        number = known->second;
    }
    auto [found, is_new] = ways.try_emplace(number);
    if (is_new) {
        // Where nothing is captured, ONNX Runtime has to wait at the end of each run: what it took of the host's memory
        // is else given back by a callback that may come after the session's end, and end the process.
        found->second.AddConfigEntry("disable_synchronize_execution_providers", capturable ? "1" : "0");
        found->second.AddConfigEntry("gpu_graph_id", std::to_string(number).c_str());
    }
    return found->second;
}

OnnxRuntime::OnnxRuntime(const Bundle& bundle, const Graph& graph, const Engine& engine) : bundle_(bundle), graph_(graph), engine_(engine) {
    PlanStore store(engine.plan_folder(bundle));
    plans_ = engine.gpu ? cuda_plans(bundle, graph.name, store) : std::vector{std::pair{Sizes{}, cpu_plan(bundle, graph.name, loaded()->version)}};
    file_ = &opened(plans_.empty() ? Sizes{} : plans_.front().first);
}

// The plan that has these sizes fixed, or the graph itself where there is none that can be used, which a warning names.
OnnxRuntime::File& OnnxRuntime::opened(const Sizes& fixed) {
    auto& file = files_[fixed];
    if (file) return *file;
    auto known = std::find_if(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan.first == fixed; });
    if (known != plans_.end()) {
        if ((file = open_plan(fixed, known->second))) return *file;
        plans_.erase(known);
        if (!fixed.empty()) {
            files_.erase(fixed);
            return opened({});
        }
    }
    file = open_graph(bundle_.path / graph_.file, {}, false);
    return *file;
}

std::unique_ptr<OnnxRuntime::File> OnnxRuntime::open_plan(const Sizes& fixed, const PlanSpec& spec) {
    auto [plan, reason] = PlanStore(engine_.plan_folder(bundle_)).find(spec);
    Names command = engine_.build_command(bundle_);
    if (plan) {
        try {
            return open_graph(plan->path, fixed, true);
        } catch (const Error& error) {  // the graph may do well: it needs no file that is mapped
            if (error.code != Code::bundle) throw;
            reason = cat(plan->path.filename().string(), " does not open: ", error.cause);
            if (!engine_.gpu) command.insert(command.end(), {"--force", "--graph", graph_.name});
        }
    }
    if (engine_.gpu) {
        for (const auto& word : size_options(bundle_, fixed)) command.push_back(word);
        command.push_back("--force");
        if (reason.empty()) reason = "it is gone";
    }
    if (!reason.empty()) engine_.warn("plan of " + graph_.name, cat(graph_.name, ": opened without its plan: ", reason, "; build it again: ", command_line(command)));
    return nullptr;
}

std::unique_ptr<OnnxRuntime::File> OnnxRuntime::open_graph(const std::filesystem::path& path, const Sizes& fixed, bool planned) {
    auto file = std::make_unique<File>();
    // What runs beside a plan, such as a search with beams, is not tried: it would be refused.
    bool capture = engine_.gpu && (planned || plans_.empty());
    auto load = [&] {
        file->session = Ort::Session(*loaded()->env, path.c_str(), engine_.gpu ? cuda_options(engine_, planned, capture) : cpu_options(engine_, planned));
    };
    try {
        try {
            load();
        } catch (const Ort::Exception& refused) {
            if (!capture || is_about_memory(refused)) throw;
            capture = false;
            load();  // no session that captures opens when a node has to run on the processor
            engine_.warn("capture", cat("graph '", graph_.name, "': runs without CUDA graphs: ", first_line(refused.what())));
        }
    } catch (const Ort::Exception& error) {
        std::string said = first_line(error.what());
        if (engine_.gpu && is_about_memory(error))
            throw backend_error("no memory on the GPU for the weights of '", graph_.name, "': ", said, "; free what else is there");
        if (error.GetOrtErrorCode() == ORT_NOT_IMPLEMENTED && !engine_.gpu)
            throw backend_error(path.string(), ": ONNX Runtime ", loaded()->version, " lacks an operator: ", said);
        Error refused = bundle_error(path.string(), ": no graph that ONNX Runtime can load", engine_.gpu ? " on CUDA" : "", ": ", said, "; export the model again");
        refused.cause = said;
        throw refused;
    }
    check_signature(path.string(), graph_, fixed, signature_of(file->session));
    file->binding = Ort::IoBinding(file->session);
    file->capturable = capture;
    std::string version = loaded()->version;
    runs_on_ = engine_.gpu ? cat("cuda (ONNX Runtime ", version, ", ", cuda_provider, ", ", engine_.gpu->description(), ")")
                           : cat("cpu (ONNX Runtime ", version, ", CPUExecutionProvider, f32, threads: ", engine_.threads, planned ? ", plan)" : ")");
    return file;
}

// Opens a file the first time that there is a plan for these sizes, or none.
void OnnxRuntime::choose(const Sizes& sizes) {
    if (!engine_.gpu) return;
    Sizes dims = with_beams(sizes);
    auto fits = [&](const auto& plan) {
        return std::all_of(plan.first.begin(), plan.first.end(), [&](const auto& size) { return dims.at(size.first) == size.second; });
    };
    auto wanted = std::find_if(plans_.begin(), plans_.end(), fits);
    if (wanted == plans_.end() && (!dims.count(beams) || dims.at(beams) == 1)) {
        Names command = engine_.build_command(bundle_);
        for (const auto& word : size_options(bundle_, sizes)) command.push_back(word);
        Sizes asked;
        for (const auto& [name, size] : sizes)
            if (name.find("height") != std::string::npos || name.find("width") != std::string::npos) asked[name] = size;
        engine_.warn("plans", cat("graph '", graph_.name, "': there is no plan for ", asked.empty() ? "it" : described(asked),
                                  ", so it runs as it was exported; in a plan ONNX Runtime finds its fused kernels, takes less memory, and can capture: ",
                                  command_line(command)));
    }
    file_ = &opened(wanted == plans_.end() ? Sizes{} : Sizes(wanted->first));
}

std::int64_t OnnxRuntime::fit(const std::string&, std::int64_t size) const {
    return engine_.gpu && size > 1 && size <= usual_steps ? usual_steps : size;
}

// What a binding, and a captured run, depend on: the thread, which ONNX Runtime keeps a capture for, sizes, addresses.
OnnxRuntime::State OnnxRuntime::state(Session& session) const {
    State found{static_cast<std::int64_t>(std::hash<std::thread::id>()(std::this_thread::get_id()))};
    for (const auto& [name, size] : session.sizes()) found.push_back(size);
    auto add = [&](const Buffer& buffer) { found.push_back(reinterpret_cast<std::int64_t>(buffer.place())); };
    for (const auto& [name, spec] : graph_.inputs) add(session.input(name));
    for (const auto& [name, spec] : graph_.outputs) add(session.output(name));
    return found;
}

void OnnxRuntime::bind_all(File& file, Session& session) const {
    auto memory = engine_.gpu ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, engine_.device, OrtMemTypeDefault)
                              : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    auto value = [&](Buffer& buffer, const TensorSpec& spec) {
        return Ort::Value::CreateTensor(memory, buffer.place(), buffer.bytes(), buffer.shape().data(), buffer.shape().size(), element_type(spec.dtype));
    };
    for (const auto& [name, spec] : graph_.inputs) file.binding.BindInput(name.c_str(), value(session.input(name), spec));
    for (const auto& [name, spec] : graph_.outputs) file.binding.BindOutput(name.c_str(), value(session.output(name), spec));
}

void OnnxRuntime::run(Session& session, Stop& stop) {
    File& file = *file_;
    State present = state(session);
    try {
        if (present != file.bound) bind_all(file, session), file.bound = present;
        const Ort::RunOptions& how = engine_.gpu ? file.way(present) : stop.options_->run;
        auto before = std::chrono::steady_clock::now();
        file.session.Run(how, file.binding);
        *engine_.inside += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    } catch (const Ort::Exception& error) {
        if (stop.requested()) throw Error(Code::cancelled, "cancelled");
        throw backend_error("graph '", graph_.name, "' failed with ", described(session.sizes()), ": ", first_line(error.what()),
                            engine_.gpu && is_about_memory(error) ? "; ask for fewer images at once, or smaller ones" : "");
    }
}

std::unique_ptr<Runner> open_onnxruntime(const Bundle& bundle, const Graph& graph, const Engine& engine) {
    return std::make_unique<OnnxRuntime>(bundle, graph, engine);
}

}  // namespace dnp::core
