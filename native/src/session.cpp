#include "session.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "plans.hpp"
#include "processor.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace dnp::core {

namespace {

constexpr std::size_t alignment = 64;  // bytes: a cache line, and the widest vector
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

std::string described(const Sizes& sizes) {
    std::string text;
    for (const auto& [name, size] : sizes) text += cat(text.empty() ? "" : ", ", name, " ", size);
    return text;
}

// Holds the names, dtypes, ranks and fixed sizes that the library found in the file against the manifest's.
void check_side(const Graph& graph, const Tensors& declared, const std::map<std::string, Ort::TypeInfo>& found, const char* side) {
    std::set<std::string> names;
    for (const auto& [name, spec] : declared) names.insert(name);
    for (const auto& [name, type] : found) names.insert(name);
    for (const auto& name : names) {
        bool fits = declared.count(name) && found.count(name);
        if (fits) {
            const TensorSpec& spec = declared.at(name);
            auto tensor = found.at(name).GetTensorTypeAndShapeInfo();
            Shape shape = tensor.GetShape();
            fits = tensor.GetElementType() == element_type(spec.dtype) && shape.size() == spec.shape.size();
            for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || spec.shape[i] == shape[i];
        }
        if (!fits) throw bundle_error(graph.file, ": ", side, ".", name, " is another in the file than in the manifest; export the model again");
    }
}

}  // namespace

std::string load_onnxruntime(const Engine& engine) {
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    const char* named = std::getenv("DNP_ONNXRUNTIME");
    std::string asked = !engine.library.empty() ? engine.library : named ? named : "";
    Library*& library = loaded();
    if (!library) library = load(asked);
    if (!asked.empty() && asked != library->path)
        throw backend_error("this process has loaded ONNX Runtime from '", library->path, "' already, and cannot have ", asked, " besides");
    return library->version;
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

Buffer::Buffer(std::string name, std::string dtype) : name_(std::move(name)), dtype_(std::move(dtype)), item_(item_size(dtype_)) {}

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

void Buffer::reserve(const Shape& shape) {
    std::int64_t values = 1;
    for (std::int64_t size : shape)
        if (__builtin_mul_overflow(values, size, &values) || values > most_values)
            throw settings_error("no memory for '", name_, "' of ", Json(shape).dump(), "; ask for less");
    std::size_t bytes = static_cast<std::size_t>(values) * item_;
    if (bytes <= capacity_ && data_) return;
    try {
        auto store = std::make_unique<std::byte[]>(bytes + alignment);
        auto address = reinterpret_cast<std::uintptr_t>(store.get());
        data_ = store.get() + (alignment - address % alignment) % alignment;
        store_ = std::move(store), capacity_ = bytes;
    } catch (const std::bad_alloc&) {
        throw settings_error("no memory for '", name_, "' of ", Json(shape).dump(), "; ask for less");
    }
    shape_.clear(), count_ = 0, ++version_;
}

void Buffer::shape_to(const Shape& shape) {
    if (shape == shape_) return;
    shape_ = shape, count_ = 1, ++version_;
    for (std::int64_t size : shape) count_ *= static_cast<std::size_t>(size);
}

struct Session::Settings {
    Ort::SessionOptions& options;
};

struct Session::Bound {
    Ort::Session session{nullptr};
    Ort::IoBinding binding{nullptr};
    std::map<const Buffer*, std::uint64_t> versions;  // of the buffers, as they are bound
};

Session::Session(const Bundle& bundle, const std::string& graph, const Engine& engine) : graph_(bundle.graphs.at(graph)), bound_(std::make_unique<Bound>()) {
    for (const auto& [name, spec] : graph_.inputs) inputs_.emplace(name, Buffer(name, spec.dtype));
    for (const auto& [name, spec] : graph_.outputs) outputs_.emplace(name, Buffer(name, spec.dtype));
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(engine.threads ? engine.threads : core_count());
    options.SetInterOpNumThreads(1);
    options.SetExecutionMode(ORT_SEQUENTIAL);
    options.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    options.DisableMemPattern();  // takes as much memory again, and no less time
    // Threads that wait by spinning take the cores from the next graph, and from everyone else.
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    bool planned = open_plan(bundle, engine, {options});
    if (!planned) {
        std::string path = (bundle.path / graph_.file).string();
        try {
            bound_->session = Ort::Session(*loaded()->env, path.c_str(), options);
        } catch (const Ort::Exception& error) {
            if (error.GetOrtErrorCode() == ORT_NOT_IMPLEMENTED)
                throw backend_error(path, ": ONNX Runtime ", loaded()->version, " lacks an operator: ", first_line(error.what()));
            throw bundle_error(path, ": no graph that ONNX Runtime can load: ", first_line(error.what()), "; export the model again");
        }
    }
    bound_->binding = Ort::IoBinding(bound_->session);
    runs_on_ = cat("cpu (ONNX Runtime ", loaded()->version, ", CPUExecutionProvider, f32, threads: ", engine.threads, planned ? ", plan)" : ")");
    Ort::AllocatorWithDefaultOptions allocator;
    std::map<std::string, Ort::TypeInfo> found;
    for (std::size_t i = 0; i < bound_->session.GetInputCount(); ++i)
        found.emplace(bound_->session.GetInputNameAllocated(i, allocator).get(), bound_->session.GetInputTypeInfo(i));
    check_side(graph_, graph_.inputs, found, "inputs");
    found.clear();
    for (std::size_t i = 0; i < bound_->session.GetOutputCount(); ++i)
        found.emplace(bound_->session.GetOutputNameAllocated(i, allocator).get(), bound_->session.GetOutputTypeInfo(i));
    check_side(graph_, graph_.outputs, found, "outputs");
}

// Opens what ONNX Runtime made of the graph before, as it is. What cannot be used is named in a warning.
bool Session::open_plan(const Bundle& bundle, const Engine& engine, const Settings& settings) {
    std::filesystem::path folder = engine.plans.empty() ? bundle.path / "plans" : std::filesystem::absolute(engine.plans);
    Names command{"dnp", "build", bundle.path.string(), "--backend", "cpu"};
    if (!engine.plans.empty()) command.insert(command.end(), {"--plans", folder.string()});
    auto [plan, reason] = PlanStore(folder).find(cpu_plan(bundle, graph_.name, loaded()->version));
    if (plan) {
        try {
            Ort::SessionOptions as_it_is = settings.options.Clone();
            as_it_is.SetGraphOptimizationLevel(ORT_DISABLE_ALL);
            bound_->session = Ort::Session(*loaded()->env, plan->path.c_str(), as_it_is);
            return true;
        } catch (const Ort::Exception& error) {  // the graph may do well: it needs no file that is mapped
            reason = cat(plan->path.filename().string(), " does not open: ", first_line(error.what()));
            command.insert(command.end(), {"--force", "--graph", graph_.name});
        }
    }
    if (!reason.empty()) engine.warnings->push_back(cat(graph_.name, ": opened without its plan: ", reason, "; build it again: ", command_line(command)));
    return false;
}

Session::~Session() = default;

Buffer& Session::input(const std::string& name) {
    auto aliased = aliased_.find(name);
    return aliased != aliased_.end() ? *aliased->second : inputs_.at(name);
}

Buffer& Session::output(const std::string& name) { return outputs_.at(name); }

void Session::feed_back(const std::string& into, const std::string& output) { fed_back_[into] = output; }

void Session::alias(const std::string& name, Buffer& buffer) { aliased_[name] = &buffer; }

void Session::reshape(const Sizes& sizes) {
    if (sizes == sizes_) return;
    std::vector<std::pair<Buffer*, Shape>> shapes;
    for (auto& [name, buffer] : inputs_)
        if (!aliased_.count(name)) shapes.emplace_back(&buffer, graph_.inputs.at(name).resolve(sizes));
    for (auto& [name, buffer] : outputs_) shapes.emplace_back(&buffer, graph_.outputs.at(name).resolve(sizes));
    sizes_.clear();
    for (auto& [buffer, shape] : shapes) buffer->reserve(shape);
    for (auto& [buffer, shape] : shapes) buffer->shape_to(shape);
    sizes_ = sizes;
}

void Session::bind_all() {
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    auto bind = [&](Buffer& buffer, const std::string& name, const TensorSpec& spec, bool is_input) {
        auto known = bound_->versions.find(&buffer);
        if (known != bound_->versions.end() && known->second == buffer.version()) return;
        if (buffer.shape() != spec.resolve(sizes_))
            throw Error(Code::general, cat("graph '", graph_.name, "': '", name, "' is ", Json(buffer.shape()).dump(), " for ", described(sizes_)));
        auto value = Ort::Value::CreateTensor(memory, buffer.data(), buffer.bytes(), buffer.shape().data(), buffer.shape().size(), element_type(spec.dtype));
        if (is_input) {
            bound_->binding.BindInput(name.c_str(), value);
        } else {
            bound_->binding.BindOutput(name.c_str(), value);
        }
        bound_->versions[&buffer] = buffer.version();
    };
    for (const auto& [name, spec] : graph_.inputs) bind(input(name), name, spec, true);
    for (const auto& [name, spec] : graph_.outputs) bind(output(name), name, spec, false);
}

void Session::run(Stop& stop) {
    try {
        bind_all();
        bound_->session.Run(stop.options_->run, bound_->binding);
    } catch (const Ort::Exception& error) {
        if (stop.requested()) throw Error(Code::cancelled, "cancelled");
        throw backend_error("graph '", graph_.name, "' failed with ", described(sizes_), ": ", first_line(error.what()));
    }
    for (const auto& [into, from] : fed_back_) std::memcpy(inputs_.at(into).data(), outputs_.at(from).data(), outputs_.at(from).bytes());
}

}  // namespace dnp::core
