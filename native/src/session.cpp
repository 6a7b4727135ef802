#include "session.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "generated/constants.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace dnp::core {

namespace {

constexpr std::size_t alignment = 64;  // bytes: a cache line, and the widest vector
constexpr const char* cuda_provider = "CUDAExecutionProvider";
constexpr std::int64_t not_captured = -1;  // ONNX Runtime's number for "neither capture nor replay this run"
constexpr std::int64_t most_values = std::int64_t{1} << 40;

ONNXTensorElementDataType element_type(const std::string& dtype) {
    static const std::map<std::string, ONNXTensorElementDataType> types{{"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                                                        {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                                                        {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                                                        {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8}};
    return types.at(dtype);
}

std::size_t item_size(const std::string& dtype) { return dtype == "float32" ? 4 : dtype == "float16" ? 2 : dtype == "int64" ? 8 : 1; }

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

Error no_memory(const std::string& name, const Shape& shape) { return settings_error("no memory for '", name, "' of ", Json(shape).dump(), "; ask for less"); }

// Whether ONNX Runtime, or CUDA below it, found too little memory.
bool is_about_memory(const Ort::Exception& error) {
    std::string said = error.what();
    std::transform(said.begin(), said.end(), said.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    for (const char* words : {"failed to allocate memory", "out of memory", "available memory"})
        if (said.find(words) != std::string::npos) return true;
    return false;
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

std::string described(const Sizes& sizes) {
    std::string text;
    for (const auto& [name, size] : sizes) text += cat(text.empty() ? "" : ", ", name, " ", size);
    return text;
}

// Holds the names, dtypes, ranks and fixed sizes that the library found in the file against the manifest's.
void check_side(const std::string& path, const Sizes& fixed, const Tensors& declared, const std::map<std::string, Ort::TypeInfo>& found, const char* side) {
    std::set<std::string> names;
    for (const auto& [name, spec] : declared) names.insert(name);
    for (const auto& [name, type] : found) names.insert(name);
    for (const auto& name : names) {
        bool fits = declared.count(name) && found.count(name);
        if (fits) {
            const TensorSpec spec = declared.at(name).at(fixed);
            auto tensor = found.at(name).GetTensorTypeAndShapeInfo();
            Shape shape = tensor.GetShape();
            fits = tensor.GetElementType() == element_type(spec.dtype) && shape.size() == spec.shape.size();
            for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || spec.shape[i] == shape[i];
        }
        if (!fits) throw bundle_error(path, ": ", side, ".", name, " is another in the file than in the manifest; export the model again");
    }
}

}  // namespace

void Engine::warn(const std::string& topic, const std::string& message) const {
    if (std::none_of(warnings->begin(), warnings->end(), [&](const auto& told) { return told.first == topic; })) warnings->emplace_back(topic, message);
}

std::filesystem::path Engine::plan_folder(const Bundle& bundle) const { return plans.empty() ? bundle.path / "plans" : std::filesystem::absolute(plans); }

Names Engine::build_command(const Bundle& bundle) const {
    Names words{"dnp", "build", bundle.path.string(), "--backend", backend};
    if (!plans.empty()) words.insert(words.end(), {"--plans", plan_folder(bundle).string()});
    return words;
}

void start(Engine& engine) {
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

void Stop::create() { options_ = std::make_unique<Options>(); }

void Stop::request() {
    requested_ = true;
    options_->run.SetTerminate();
}

void Stop::reset() {
    requested_ = false;
    options_->run.UnsetTerminate();
}

Buffer::Buffer(std::string name, std::string dtype, std::shared_ptr<Gpu> gpu)
    : name_(std::move(name)), dtype_(std::move(dtype)), item_(item_size(dtype_)), gpu_(std::move(gpu)) {}

std::size_t Buffer::part(std::size_t leading) const {
    std::size_t values = 1;
    for (std::size_t i = leading; i < shape_.size(); ++i) values *= static_cast<std::size_t>(shape_[i]);
    return values;
}

std::size_t Buffer::offset(std::initializer_list<std::int64_t> index) const {
    std::size_t offset = 0, depth = 0;
    for (std::int64_t i : index) offset += static_cast<std::size_t>(i) * part(++depth);
    return offset;
}

void* Buffer::host(bool with_contents) {
    if (std::size_t wanted = gpu_ ? bytes() : capacity_; wanted > host_capacity_ || !host_) {
        try {
            auto store = std::make_unique<std::byte[]>(wanted + alignment);
            auto address = reinterpret_cast<std::uintptr_t>(store.get());
            host_ = store.get() + (alignment - address % alignment) % alignment;
            store_ = std::move(store), host_capacity_ = wanted;
        } catch (const std::bad_alloc&) {
            throw no_memory(name_, shape_);
        }
    }
    if (with_contents && newer_ == Newer::device) gpu_->to_host(host_, device_.get(), bytes());
    newer_ = Newer::host;
    return host_;
}

void Buffer::clear() { std::memset(host(false), 0, bytes()); }

void Buffer::copy(Buffer& other) {
    if (gpu_) {
        other.send();
        gpu_->on_device(device_.get(), other.device_.get(), bytes());
        newer_ = Newer::device;
    } else {
        std::memcpy(host(false), other.host(true), bytes());
    }
}

void Buffer::reserve(const Shape& shape) {
    std::int64_t values = 1;
    for (std::int64_t size : shape)
        if (__builtin_mul_overflow(values, size, &values) || values > most_values) throw no_memory(name_, shape);
    std::size_t bytes = static_cast<std::size_t>(values) * item_;
    if (bytes <= capacity_ && capacity_) return;
    if (gpu_) device_ = {gpu_->allocate(std::max<std::size_t>(bytes, 1), cat("'", name_, "' of ", Json(shape).dump())), {gpu_.get()}};
    std::size_t before = std::exchange(capacity_, std::max<std::size_t>(bytes, 1));
    if (!gpu_) {
        try {
            host(false);
        } catch (...) {
            capacity_ = before;
            throw no_memory(name_, shape);
        }
    }
    shape_.clear(), count_ = 0;
}

void Buffer::shape_to(const Shape& shape) {
    if (shape == shape_) return;
    shape_ = shape, count_ = 1;
    for (std::int64_t size : shape) count_ *= static_cast<std::size_t>(size);
    newer_ = gpu_ ? Newer::device : Newer::host;
}

void* Buffer::place() const { return gpu_ ? device_.get() : host_; }

void Buffer::send() {
    if (!gpu_ || newer_ != Newer::host) return;
    gpu_->to_device(device_.get(), host_, bytes());
    newer_ = Newer::neither;
}

void Buffer::was_written() { newer_ = gpu_ ? Newer::device : Newer::host; }

// What ONNX Runtime holds of a file.
struct Session::File {
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
const Ort::RunOptions& Session::File::way(const State& present) {
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

Session::Session(const Bundle& bundle, const std::string& graph, const Engine& engine) : bundle_(bundle), graph_(bundle.graphs.at(graph)), engine_(engine) {
    for (const auto& [name, spec] : graph_.inputs) inputs_.emplace(name, Buffer(name, spec.dtype, engine.gpu));
    for (const auto& [name, spec] : graph_.outputs) outputs_.emplace(name, Buffer(name, spec.dtype, engine.gpu));
    if (engine.gpu) {
        engine.gpu->activate();
        plans_ = cuda_plans(bundle, graph, PlanStore(engine.plan_folder(bundle)));
    } else {
        plans_ = {{Sizes{}, cpu_plan(bundle, graph, loaded()->version)}};
    }
    file_ = &opened(plans_.empty() ? Sizes{} : plans_.front().first);
}

Session::~Session() {
    if (!engine_.gpu) return;
    try {
        engine_.gpu->activate();
        engine_.gpu->synchronize();
    } catch (const Error&) {  // after an error that lasts, every call fails; what can be freed is
    }
}

// The plan that has these sizes fixed, or the graph itself where there is none that can be used, which a warning names.
Session::File& Session::opened(const Sizes& fixed) {
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

std::unique_ptr<Session::File> Session::open_plan(const Sizes& fixed, const PlanSpec& spec) {
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

std::unique_ptr<Session::File> Session::open_graph(const std::filesystem::path& path, const Sizes& fixed, bool planned) {
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
    check(*file, path, fixed);
    file->binding = Ort::IoBinding(file->session);
    file->capturable = capture;
    std::string version = loaded()->version;
    runs_on_ = engine_.gpu ? cat("cuda (ONNX Runtime ", version, ", ", cuda_provider, ", ", engine_.gpu->description(), ")")
                           : cat("cpu (ONNX Runtime ", version, ", CPUExecutionProvider, f32, threads: ", engine_.threads, planned ? ", plan)" : ")");
    return file;
}

// Holds what the library found in a file against the manifest, where a plan has sizes fixed.
void Session::check(const File& file, const std::filesystem::path& path, const Sizes& fixed) const {
    Ort::AllocatorWithDefaultOptions allocator;
    std::map<std::string, Ort::TypeInfo> found;
    for (std::size_t i = 0; i < file.session.GetInputCount(); ++i)
        found.emplace(file.session.GetInputNameAllocated(i, allocator).get(), file.session.GetInputTypeInfo(i));
    check_side(path.string(), fixed, graph_.inputs, found, "inputs");
    found.clear();
    for (std::size_t i = 0; i < file.session.GetOutputCount(); ++i)
        found.emplace(file.session.GetOutputNameAllocated(i, allocator).get(), file.session.GetOutputTypeInfo(i));
    check_side(path.string(), fixed, graph_.outputs, found, "outputs");
}

// Opens a file the first time that there is a plan for these sizes, or none.
void Session::choose(const Sizes& sizes) {
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

std::int64_t Session::fit(std::int64_t size) const { return engine_.gpu && size > 1 && size <= usual_steps ? usual_steps : size; }

Buffer& Session::input(const std::string& name) {
    auto aliased = aliased_.find(name);
    return aliased != aliased_.end() ? *aliased->second : inputs_.at(name);
}

Buffer& Session::output(const std::string& name) { return outputs_.at(name); }

void Session::feed_back(const std::string& into, const std::string& output) { fed_back_[into] = output; }

void Session::alias(const std::string& name, Buffer& buffer) { aliased_[name] = &buffer; }

void Session::reshape(const Sizes& sizes) {
    if (sizes == sizes_) return;
    if (engine_.gpu) engine_.gpu->activate();
    std::vector<std::pair<Buffer*, Shape>> shapes;
    for (auto& [name, buffer] : inputs_)
        if (!aliased_.count(name)) shapes.emplace_back(&buffer, graph_.inputs.at(name).resolve(sizes));
    for (auto& [name, buffer] : outputs_) shapes.emplace_back(&buffer, graph_.outputs.at(name).resolve(sizes));
    choose(sizes);
    sizes_.clear();
    for (auto& [buffer, shape] : shapes) buffer->reserve(shape);
    for (auto& [buffer, shape] : shapes) buffer->shape_to(shape);
    sizes_ = sizes;
}

// What a binding, and a captured run, depend on: the thread, which ONNX Runtime keeps a capture for, sizes, addresses.
Session::State Session::state() {
    State found{static_cast<std::int64_t>(std::hash<std::thread::id>()(std::this_thread::get_id()))};
    for (const auto& [name, size] : sizes_) found.push_back(size);
    auto add = [&](const Buffer& buffer) { found.push_back(reinterpret_cast<std::int64_t>(buffer.place())); };
    for (const auto& [name, spec] : graph_.inputs) add(input(name));
    for (const auto& [name, spec] : graph_.outputs) add(output(name));
    return found;
}

void Session::bind_all(File& file) {
    auto memory = engine_.gpu ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, engine_.device, OrtMemTypeDefault)
                              : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    auto value = [&](Buffer& buffer, const TensorSpec& spec) {
        return Ort::Value::CreateTensor(memory, buffer.place(), buffer.bytes(), buffer.shape().data(), buffer.shape().size(), element_type(spec.dtype));
    };
    for (const auto& [name, spec] : graph_.inputs) file.binding.BindInput(name.c_str(), value(input(name), spec));
    for (const auto& [name, spec] : graph_.outputs) file.binding.BindOutput(name.c_str(), value(output(name), spec));
}

void Session::run(Stop& stop) {
    if (stop.requested()) throw Error(Code::cancelled, "cancelled");
    if (engine_.gpu) engine_.gpu->activate();
    for (const auto& [name, spec] : graph_.inputs) input(name).send();
    for (const auto& [name, buffer] : aliased_)
        if (const Shape wanted = graph_.inputs.at(name).resolve(sizes_); buffer->shape() != wanted)
            throw Error(Code::general, cat("graph '", graph_.name, "': '", name, "' is ", Json(buffer->shape()).dump(), " for ", described(sizes_)));
    File& file = *file_;
    State present = state();
    try {
        if (present != file.bound) bind_all(file), file.bound = present;
        const Ort::RunOptions& how = engine_.gpu ? file.way(present) : stop.options_->run;
        auto before = std::chrono::steady_clock::now();
        file.session.Run(how, file.binding);
        *engine_.inside += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    } catch (const Ort::Exception& error) {
        if (stop.requested()) throw Error(Code::cancelled, "cancelled");
        throw backend_error("graph '", graph_.name, "' failed with ", described(sizes_), ": ", first_line(error.what()),
                            engine_.gpu && is_about_memory(error) ? "; ask for fewer images at once, or smaller ones" : "");
    }
    for (auto& [name, buffer] : outputs_) buffer.was_written();
    for (const auto& [into, from] : fed_back_) inputs_.at(into).copy(outputs_.at(from));
}

}  // namespace dnp::core
