// Stands in for TensorRT (libnvinfer.so): a plan is "stand-in plan" and the path of an ONNX file, in two lines, which ONNX
// Runtime, of the library that DNP_STAND_IN_FOR names, runs on the processor. What a context is told is held against what
// TensorRT asks for, and a line for each call goes into the file that DNP_STAND_IN_LOG names.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace {

using namespace nvinfer1;

constexpr std::int64_t scratch_bytes = 1000;
const std::string opening = "stand-in plan\n";

ILogger* logger = nullptr;

void log(const std::string& line) {
    if (const char* file = std::getenv("DNP_STAND_IN_LOG")) std::ofstream(file, std::ios::app) << line << "\n";
}

bool refused(const std::string& why) {
    logger->log(ILogger::Severity::kERROR, why.c_str());
    return false;
}

// The stand-in driver, which does what is started on a stream or captures it.
template <class Function>
Function driver(const char* name) {
    return reinterpret_cast<Function>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), name));
}

Ort::Env* environment = nullptr;

void load_onnxruntime() {
    auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(dlopen(std::getenv("DNP_STAND_IN_FOR"), RTLD_NOW), "OrtGetApiBase"));
    Ort::InitApi(base()->GetApi(ORT_API_VERSION));
    environment = new Ort::Env(ORT_LOGGING_LEVEL_FATAL, "stand-in");
}

void unexpected() {
    log("a call that the stand-in has not");
    std::abort();
}

// What an object of TensorRT calls: a table of virtual functions, of which those that are set may be called.
template <class Interface, class Owner>
class Table {
public:
    explicit Table(Owner* owner) : owner(owner) {
        for (void*& slot : slots_) slot = reinterpret_cast<void*>(&unexpected);
    }
    Interface* get() { return reinterpret_cast<Interface*>(this); }
    template <class Result, class... Arguments>
    void set(Result (Interface::*member)(Arguments...) noexcept, Result (*function)(Table*, Arguments...)) {
        place(&member, reinterpret_cast<void*>(function));
    }
    template <class Result, class... Arguments>
    void set(Result (Interface::*member)(Arguments...) const noexcept, Result (*function)(Table*, Arguments...)) {
        place(&member, reinterpret_cast<void*>(function));
    }

private:
    void place(const void* member, void* function) {  // a pointer to a virtual member is 1 and where it is in the table
        std::uintptr_t at;
        std::memcpy(&at, member, sizeof at);
        slots_[(at - 1) / sizeof(void*)] = function;
    }

    void** table_ = slots_;  // first, as in any object with virtual functions
    void* slots_[256];

public:
    Owner* owner;
};

struct Engine;

struct Context : IExecutionContext {
    explicit Context(Engine& engine);
    bool enqueue(void* stream);

    Table<apiv::VExecutionContext, Context> table{this};
    Engine& engine;
    std::map<std::string, std::vector<std::int64_t>> shapes;
    std::map<std::string, void*> addresses;
    void* scratch = nullptr;
    bool met = false;  // these shapes
};

struct Engine : ICudaEngine {
    explicit Engine(const std::string& file);

    Table<apiv::VCudaEngine, Engine> table{this};
    Ort::Session session{nullptr};
    std::vector<std::string> names;  // inputs first
    std::size_t inputs;

    std::size_t index(const std::string& name) const { return static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin()); }
    Ort::TypeInfo type(const std::string& name) const {
        std::size_t at = index(name);
        return at < inputs ? session.GetInputTypeInfo(at) : session.GetOutputTypeInfo(at - inputs);
    }
};

DataType data_type(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return DataType::kFLOAT;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return DataType::kINT64;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return DataType::kUINT8;
        default: unexpected(); return DataType::kHALF;
    }
}

Engine::Engine(const std::string& file) : session(*environment, file.c_str(), Ort::SessionOptions()) {
    mImpl = table.get();
    Ort::AllocatorWithDefaultOptions allocator;
    inputs = session.GetInputCount();
    for (std::size_t i = 0; i < inputs; ++i) names.push_back(session.GetInputNameAllocated(i, allocator).get());
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) names.push_back(session.GetOutputNameAllocated(i, allocator).get());
    using Self = Table<apiv::VCudaEngine, Engine>*;
    using Virtual = apiv::VCudaEngine;
    table.set(&Virtual::getNbIOTensors, +[](Self self) { return static_cast<std::int32_t>(self->owner->names.size()); });
    table.set(&Virtual::getIOTensorName, +[](Self self, std::int32_t index) { return self->owner->names[static_cast<std::size_t>(index)].c_str(); });
    table.set(&Virtual::getTensorIOMode, +[](Self self, const char* name) { return self->owner->index(name) < self->owner->inputs ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT; });
    table.set(&Virtual::getTensorDataType, +[](Self self, const char* name) { return data_type(self->owner->type(name).GetTensorTypeAndShapeInfo().GetElementType()); });
    table.set(&Virtual::getTensorShape, +[](Self self, const char* name) {
        auto shape = self->owner->type(name).GetTensorTypeAndShapeInfo().GetShape();
        Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        return dims;
    });
    table.set(&Virtual::getStreamableWeightsSize, +[](Self) { return std::int64_t{0}; });
    table.set(&Virtual::getDeviceMemorySizeForProfileV2, +[](Self, std::int32_t) { return scratch_bytes; });
    table.set(&Virtual::createExecutionContext, +[](Self self, ExecutionContextAllocationStrategy strategy) -> IExecutionContext* {
        if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) unexpected();
        log("context");
        return new Context(*self->owner);
    });
}

Context::Context(Engine& engine) : engine(engine) {
    mImpl = table.get();
    using Self = Table<apiv::VExecutionContext, Context>*;
    using Virtual = apiv::VExecutionContext;
    table.set(&Virtual::setInputShape, +[](Self self, const char* name, const Dims& dims) {
        self->owner->shapes[name] = {dims.d, dims.d + dims.nbDims};
        self->owner->met = false;
        return self->owner->engine.index(name) < self->owner->engine.inputs || refused("no such input");
    });
    table.set(&Virtual::setTensorAddress, +[](Self self, const char* name, void* address) {
        self->owner->addresses[name] = address;
        return self->owner->engine.index(name) < self->owner->engine.names.size() || refused("no such tensor");
    });
    table.set(&Virtual::setDeviceMemoryV2, +[](Self self, void* memory, std::int64_t bytes) {
        if (bytes < scratch_bytes) unexpected();
        self->owner->scratch = memory;
    });
    table.set(&Virtual::enqueueV3, +[](Self self, cudaStream_t stream) { return self->owner->enqueue(stream); });
}

std::size_t item_size(ONNXTensorElementDataType type) { return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 1; }

bool Context::enqueue(void* stream) {
    bool captured = driver<bool (*)(void*)>("dnp_stand_in_captures")(stream);
    log(captured ? "enqueue captured" : "enqueue");
    if (!scratch) return refused("there is no memory for the activations");
    if (shapes.size() != engine.inputs) return refused("an input has no shape");
    for (const auto& name : engine.names)
        if (!addresses[name]) return refused(name + " has no address");
    if (captured && !met) return refused("the first run at these shapes cannot be captured");
    met = true;
    auto work = [&engine = engine, shapes = shapes, addresses = addresses, scratch = scratch] {
        std::memset(scratch, 7, scratch_bytes);
        auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
        std::vector<Ort::Value> values;
        std::vector<const char*> names;
        for (const auto& name : engine.names) names.push_back(name.c_str());
        for (std::size_t i = 0; i < engine.inputs; ++i) {
            const auto& shape = shapes.at(engine.names[i]);
            auto type = engine.type(engine.names[i]).GetTensorTypeAndShapeInfo().GetElementType();
            std::size_t bytes = item_size(type);
            for (std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
            values.push_back(Ort::Value::CreateTensor(memory, addresses.at(engine.names[i]), bytes, shape.data(), shape.size(), type));
        }
        auto outputs = engine.session.Run(Ort::RunOptions(), names.data(), values.data(), values.size(), names.data() + engine.inputs, names.size() - engine.inputs);
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            auto about = outputs[i].GetTensorTypeAndShapeInfo();
            std::memcpy(addresses.at(engine.names[engine.inputs + i]), outputs[i].GetTensorRawData(), about.GetElementCount() * item_size(about.GetElementType()));
        }
    };
    driver<void (*)(void*, std::function<void()>)>("dnp_stand_in_start")(stream, work);
    return true;
}

struct Runtime : IRuntime {
    Table<apiv::VRuntime, Runtime> table{this};

    Runtime() {
        mImpl = table.get();
        using Self = Table<apiv::VRuntime, Runtime>*;
        using Virtual = apiv::VRuntime;
        table.set(static_cast<ICudaEngine* (Virtual::*)(const void*, std::size_t) noexcept>(&Virtual::deserializeCudaEngine),
                  +[](Self, const void* data, std::size_t size) -> ICudaEngine* {
                      std::string plan(static_cast<const char*>(data), size);
                      if (plan.rfind(opening, 0) != 0) {
                          refused("this is no plan of the stand-in");
                          return nullptr;
                      }
                      log("plan " + plan.substr(opening.size()));
                      return new Engine(plan.substr(opening.size()));
                  });
    }
};

}  // namespace

extern "C" {

std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
std::int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
std::int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

void* createInferRuntime_INTERNAL(void* asked, std::int32_t version) noexcept {
    logger = static_cast<ILogger*>(asked);
    load_onnxruntime();
    if (version == NV_TENSORRT_VERSION) return static_cast<IRuntime*>(new Runtime);
    refused("another version");
    return nullptr;
}
}
