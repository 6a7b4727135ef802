#include "session.hpp"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>
#include <utility>

namespace dnp::core {

namespace {

constexpr std::size_t alignment = 64;  // bytes: a cache line, and the widest vector
constexpr std::int64_t most_values = std::int64_t{1} << 40;

std::size_t item_size(const std::string& dtype) { return dtype == "float32" ? 4 : dtype == "float16" ? 2 : dtype == "int64" ? 8 : 1; }

Error no_memory(const std::string& name, const Shape& shape) { return settings_error("no memory for '", name, "' of ", Json(shape).dump(), "; ask for less"); }

void check_side(const std::string& path, const Sizes& fixed, const Tensors& declared, const Tensors& found, const char* side) {
    std::set<std::string> names;
    for (const auto& [name, spec] : declared) names.insert(name);
    for (const auto& [name, spec] : found) names.insert(name);
    for (const auto& name : names) {
        bool fits = declared.count(name) && found.count(name);
        if (fits) {
            const TensorSpec spec = declared.at(name).at(fixed), &there = found.at(name);
            fits = there.dtype == spec.dtype && there.shape.size() == spec.shape.size();
            for (std::size_t i = 0; fits && i < there.shape.size(); ++i) fits = there.shape[i] < 0 || spec.shape[i] == there.shape[i];
        }
        if (!fits) throw bundle_error(path, ": ", side, ".", name, " is another in the file than in the manifest; export the model again");
    }
}

}  // namespace

void check_signature(const std::string& path, const Signature& declared, const Sizes& fixed, const Signature& found) {
    check_side(path, fixed, declared.inputs, found.inputs, "inputs");
    check_side(path, fixed, declared.outputs, found.outputs, "outputs");
}

std::string described(const Sizes& sizes) {
    std::string text;
    for (const auto& [name, size] : sizes) text += cat(text.empty() ? "" : ", ", name, " ", size);
    return text;
}

bool mentions(std::string said, std::initializer_list<const char*> words) {
    std::transform(said.begin(), said.end(), said.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return std::any_of(words.begin(), words.end(), [&](const char* word) { return said.find(word) != std::string::npos; });
}

void Engine::warn(const std::string& topic, const std::string& message) const {
    if (std::none_of(warnings->begin(), warnings->end(), [&](const auto& told) { return told.first == topic; })) warnings->emplace_back(topic, message);
}

std::filesystem::path Engine::plan_folder(const Bundle& bundle) const { return plans.empty() ? bundle.path / "plans" : std::filesystem::absolute(plans); }

Names Engine::build_command(const Bundle& bundle) const {
    Names words{"dnp", "build", bundle.path.string(), "--backend", backend};
    if (!plans.empty()) words.insert(words.end(), {"--plans", plan_folder(bundle).string()});
    if (backend == "tensorrt" && device) words.insert(words.end(), {"--device", std::to_string(device)});
    return words;
}

void start(Engine& engine) { engine.backend == "tensorrt" ? start_tensorrt(engine) : start_onnxruntime(engine); }

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

Session::Session(const Bundle& bundle, const std::string& graph, const Engine& engine) : graph_(bundle.graphs.at(graph)), engine_(engine) {
    for (const auto& [name, spec] : graph_.inputs) inputs_.emplace(name, Buffer(name, spec.dtype, engine.gpu));
    for (const auto& [name, spec] : graph_.outputs) outputs_.emplace(name, Buffer(name, spec.dtype, engine.gpu));
    if (engine.gpu) engine.gpu->activate();
    runner_ = engine.backend == "tensorrt" ? open_tensorrt(bundle, graph_, engine_) : open_onnxruntime(bundle, graph_, engine_);
}

Session::~Session() {
    if (!engine_.gpu) return;
    try {
        engine_.gpu->activate();
        engine_.gpu->synchronize();
    } catch (const Error&) {  // after an error that lasts, every call fails; what can be freed is
    }
}

std::int64_t Session::at_most(const std::string& symbol, std::int64_t size) const {
    std::int64_t largest = runner_->largest(symbol);
    return largest ? std::min(size, largest) : size;
}

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
    runner_->check(sizes);
    runner_->choose(sizes);
    Sizes room = sizes;
    for (auto& [symbol, size] : room)
        if (std::int64_t largest = runner_->largest(symbol)) size = largest;
    std::vector<std::pair<Buffer*, const TensorSpec*>> own;
    for (auto& [name, buffer] : inputs_)
        if (!aliased_.count(name)) own.emplace_back(&buffer, &graph_.inputs.at(name));
    for (auto& [name, buffer] : outputs_) own.emplace_back(&buffer, &graph_.outputs.at(name));
    sizes_.clear();
    for (auto& [buffer, spec] : own) buffer->reserve(spec->resolve(room));
    for (auto& [buffer, spec] : own) buffer->shape_to(spec->resolve(sizes));
    sizes_ = sizes;
}

void Session::run(Stop& stop) {
    if (stop.requested()) throw Error(Code::cancelled, "cancelled");
    if (engine_.gpu) engine_.gpu->activate();
    for (const auto& [name, spec] : graph_.inputs) input(name).send();
    for (const auto& [name, buffer] : aliased_)
        if (const Shape wanted = graph_.inputs.at(name).resolve(sizes_); buffer->shape() != wanted)
            throw Error(Code::general, cat("graph '", graph_.name, "': '", name, "' is ", Json(buffer->shape()).dump(), " for ", described(sizes_)));
    runner_->run(*this, stop);
    for (auto& [name, buffer] : outputs_) buffer.was_written();
    for (const auto& [into, from] : fed_back_) inputs_.at(into).copy(outputs_.at(from));
}

}  // namespace dnp::core
