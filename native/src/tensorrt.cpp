// TensorRT, by NVIDIA's public headers: nothing else here knows it. Without them there is the last function alone.
#include "session.hpp"

#ifdef DNP_TENSORRT

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

#include <NvInferRuntime.h>

#include "plans.hpp"

namespace dnp::core {

namespace {

namespace trt = nvinfer1;

// The one logger of the process, for TensorRT keeps the first that it is given: whoever listens gets the errors of its
// own thread, and of threads of TensorRT's own, which do not say for whom they work.
class Logger : public trt::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        std::lock_guard lock(mutex_);
        std::string line(message);
        line = line.substr(0, line.find('\n'));
        auto mine = errors_.find(std::this_thread::get_id());
        for (auto& [thread, said] : errors_)
            if (mine == errors_.end() || thread == mine->first) said += (said.empty() ? "" : "; ") + line;
    }

    void listen() {
        std::lock_guard lock(mutex_);
        errors_[std::this_thread::get_id()].clear();
    }

    std::string heard() {  // and no longer
        std::lock_guard lock(mutex_);
        std::string said = std::move(errors_[std::this_thread::get_id()]);
        errors_.erase(std::this_thread::get_id());
        return said.empty() ? "it gave no reason" : said;
    }

private:
    std::mutex mutex_;
    std::map<std::thread::id, std::string> errors_;
};

// The one copy of the library in this process, never unloaded.
struct Library {
    std::string version;
    Logger logger;
    std::unique_ptr<trt::IRuntime> runtime;

    Library();
};

Library::Library() {
    std::string name = cat("libnvinfer.so.", NV_TENSORRT_MAJOR);
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        throw backend_error("TensorRT ", NV_TENSORRT_MAJOR, " is not found (", dlerror(), "); ", name, " of the version that built the plans has to be where the "
                            "system finds libraries (LD_LIBRARY_PATH): NVIDIA's packages bring it, the package tensorrt for Python in tensorrt_libs/");
    auto find = [&](const char* symbol) {
        if (void* found = dlsym(handle, symbol)) return found;
        throw backend_error(name, " is no TensorRT that libdnp can use: it has no ", symbol);
    };
    auto number = [&](const char* symbol) { return reinterpret_cast<std::int32_t (*)()>(find(symbol))(); };
    version = cat(number("getInferLibMajorVersion"), ".", number("getInferLibMinorVersion"), ".", number("getInferLibPatchVersion"), ".",
                  number("getInferLibBuildVersion"));
    logger.listen();
    auto create = reinterpret_cast<void* (*)(void*, std::int32_t)>(find("createInferRuntime_INTERNAL"));
    runtime.reset(static_cast<trt::IRuntime*>(create(&logger, NV_TENSORRT_VERSION)));
    if (std::string said = logger.heard(); !runtime) throw backend_error("TensorRT ", version, " made no runtime: ", said);
}

Library& library() {
    static Library* loaded = new Library;  // its end would come after that of the driver
    return *loaded;
}

std::string dtype_name(trt::DataType type) {
    switch (type) {
        case trt::DataType::kFLOAT: return "float32";
        case trt::DataType::kHALF: return "float16";
        case trt::DataType::kINT64: return "int64";
        case trt::DataType::kUINT8: return "uint8";
        default: return "another";
    }
}

trt::Dims dims_of(const Shape& shape) {
    trt::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy_n(shape.begin(), std::min<std::size_t>(shape.size(), trt::Dims::MAX_DIMS), dims.d);
    return dims;
}

bool is_about_memory(const std::string& said) { return mentions(said, {"outofmemory", "out of memory", "memory allocation"}); }

// A file's bytes, for as long as it lives.
struct Mapped {
    void* data = MAP_FAILED;
    std::size_t bytes = 0;

    explicit Mapped(const std::filesystem::path& path) {
        int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        off_t end = file < 0 ? -1 : lseek(file, 0, SEEK_END);
        if (end > 0) bytes = static_cast<std::size_t>(end), data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
        if (file >= 0) ::close(file);
        if (data == MAP_FAILED) throw backend_error(path.string(), " cannot be read any more; open it again");
    }
    ~Mapped() { munmap(data, bytes); }
    Mapped(const Mapped&) = delete;
};

}  // namespace

// A plan. Sizes that are met again have an execution context each, whose run is one launch of a captured CUDA graph; all
// others share one. Buffers have the profile's largest sizes and never move, so that what was captured stays valid.
class TensorRt : public Runner {
public:
    TensorRt(const Bundle& bundle, const Graph& graph, const Engine& engine)
        : bundle_(bundle), graph_(graph), engine_(engine),
          plan_(tensorrt_plan(bundle, graph.name, library().version, engine.gpu->architecture(), PlanStore(engine.plan_folder(bundle)), engine.build_command(bundle))),
          profile_(profile_of(plan_.spec)) {
        library().logger.listen();
        {
            Mapped file(plan_.path);
            deserialized_.reset(library().runtime->deserializeCudaEngine(file.data, file.bytes));
        }
        if (std::string said = library().logger.heard(); !deserialized_)
            throw backend_error("graph '", graph.name, "': TensorRT cannot load the plan on ", engine.gpu->description(), ": ", said, "; ",
                                is_about_memory(said) ? "free what else is there, or build plans with --weight-streaming"
                                                      : "build it again: " + command_line(engine.build_command(bundle)) + " --force");
        check_signature(plan_.path.string(), graph, {}, signature());
        if (deserialized_->getStreamableWeightsSize() > 0) deserialized_->setWeightStreamingBudgetV2(deserialized_->getWeightStreamingAutomaticBudget());
        scratch_ = deserialized_->getDeviceMemorySizeForProfileV2(0);
        engine.gpu->want_scratch(static_cast<std::size_t>(scratch_));
    }

    std::string runs_on() const override { return cat("tensorrt (TensorRT ", library().version, ", ", engine_.gpu->description(), ")"); }

    std::int64_t fit(const std::string& symbol, std::int64_t size) const override {
        const Range& range = profile_.at(symbol);
        return size <= range.high && (size > 1 || range.low > 1) ? range.high : size;
    }

    std::int64_t largest(const std::string& symbol) const override { return profile_.at(symbol).high; }

    void check(const Sizes& sizes) const override {
        std::string said = beyond(bundle_, plan_.spec, sizes, engine_.build_command(bundle_));
        if (!said.empty()) throw Error(Code::settings, said);
    }

    void choose(const Sizes&) override {}

    void run(Session& session, Stop&) override {
        auto before = std::chrono::steady_clock::now();
        start(session);
        *engine_.inside += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    }

private:
    struct Run {
        std::unique_ptr<trt::IExecutionContext> context;
        Sizes sizes;  // that the context has
        Gpu::Captured captured;
    };

    void start(Session& session) {
        auto [met, is_new] = met_.try_emplace(session.sizes());
        Run& own = met->second;
        if (own.captured) return engine_.gpu->launch(own.captured);
        if (is_new || !captures_) return enqueue(shared_, session);
        enqueue(own, session);  // what TensorRT does only once must not be captured
        engine_.gpu->synchronize();
        try {
            own.captured = engine_.gpu->capture([&] { enqueue(own, session); });
        } catch (const Error& error) {
            captures_ = false;
            engine_.warn("capture", cat("graph '", graph_.name, "': runs without CUDA graphs from now on: ", error.what()));
        }
    }

    void enqueue(Run& run, Session& session) {
        if (!run.context) run.context = context(session);
        library().logger.listen();
        bool fits = true, started = false;
        if (run.sizes != session.sizes()) {
            run.sizes.clear();  // until all of them are set
            for (const auto& [name, spec] : graph_.inputs) fits = fits && run.context->setInputShape(name.c_str(), dims_of(spec.resolve(session.sizes())));
            if (fits) run.sizes = session.sizes();
        }
        if (fits) started = run.context->enqueueV3(static_cast<cudaStream_t>(engine_.gpu->stream()));
        std::string said = library().logger.heard();
        if (!started) throw backend_error("graph '", graph_.name, "' failed on ", runs_on(), " with ", described(session.sizes()), ": ", said);
    }

    std::unique_ptr<trt::IExecutionContext> context(Session& session) {
        library().logger.listen();
        std::unique_ptr<trt::IExecutionContext> made(deserialized_->createExecutionContext(trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        bool placed = made != nullptr;
        if (made && scratch_) made->setDeviceMemoryV2(engine_.gpu->scratch(), scratch_);
        auto place = [&](const std::string& name, const Buffer& buffer) { placed = placed && made->setTensorAddress(name.c_str(), buffer.place()); };
        for (const auto& [name, spec] : graph_.inputs) place(name, session.input(name));
        for (const auto& [name, spec] : graph_.outputs) place(name, session.output(name));
        std::string said = library().logger.heard();
        if (!placed) throw backend_error("graph '", graph_.name, "': TensorRT made no execution context: ", said, is_about_memory(said) ? "; free what else is on the GPU" : "");
        return made;
    }

    Signature signature() const {
        Signature found;
        for (std::int32_t i = 0; i < deserialized_->getNbIOTensors(); ++i) {
            const char* name = deserialized_->getIOTensorName(i);
            trt::Dims dims = deserialized_->getTensorShape(name);
            TensorSpec spec{{dims.d, dims.d + std::max(dims.nbDims, 0)}, dtype_name(deserialized_->getTensorDataType(name))};
            (deserialized_->getTensorIOMode(name) == trt::TensorIOMode::kINPUT ? found.inputs : found.outputs)[name] = spec;
        }
        return found;
    }

    const Bundle& bundle_;
    const Graph& graph_;
    const Engine& engine_;
    Plan plan_;
    Profile profile_;
    std::unique_ptr<trt::ICudaEngine> deserialized_;
    std::int64_t scratch_ = 0;  // bytes
    bool captures_ = true;
    Run shared_;
    std::map<Sizes, Run> met_;
};

void start_tensorrt(Engine& engine) {
    library();
    engine.gpu = std::make_shared<Gpu>(engine.device);
}

std::unique_ptr<Runner> open_tensorrt(const Bundle& bundle, const Graph& graph, const Engine& engine) { return std::make_unique<TensorRt>(bundle, graph, engine); }

}  // namespace dnp::core

#else

namespace dnp::core {

void start_tensorrt(Engine&) {
    throw backend_error("this libdnp was built without TensorRT: build it with -DDNP_TENSORRT_INCLUDE=FOLDER of NVIDIA's headers (docs/embedding.md), or use the "
                        "backend 'cuda'");
}

std::unique_ptr<Runner> open_tensorrt(const Bundle&, const Graph&, const Engine&) { return nullptr; }

}  // namespace dnp::core

#endif
