#include "gpu.hpp"

#include <dlfcn.h>

#include <cstdint>
#include <type_traits>

#include "error.hpp"
#include "generated/constants.hpp"

namespace dnp::core {

namespace {

constexpr unsigned independent_stream = 1;  // of the default one
constexpr int capability_major = 75, capability_minor = 76;  // numbers of attributes
constexpr int of_this_thread = 1;                            // what is captured
constexpr int out_of_memory = 2, no_device = 100, invalid_device = 101;

using Address = std::uintptr_t;  // on the device

// The calls, with the names that they have in the library. The newest is of CUDA 11.4.
struct Driver {
    int (*cuInit)(unsigned);
    int (*cuDeviceGet)(int*, int);
    int (*cuDeviceGetName)(char*, int, int);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuDevicePrimaryCtxRetain)(void**, int);
    int (*cuDevicePrimaryCtxRelease_v2)(int);
    int (*cuCtxSetCurrent)(void*);
    int (*cuStreamCreate)(void**, unsigned);
    int (*cuStreamSynchronize)(void*);
    int (*cuStreamDestroy_v2)(void*);
    int (*cuMemAlloc_v2)(Address*, std::size_t);
    int (*cuMemFree_v2)(Address);
    int (*cuMemsetD8Async)(Address, unsigned char, std::size_t, void*);
    int (*cuMemcpyHtoDAsync_v2)(Address, const void*, std::size_t, void*);
    int (*cuMemcpyDtoHAsync_v2)(void*, Address, std::size_t, void*);
    int (*cuMemcpyDtoDAsync_v2)(Address, Address, std::size_t, void*);
    int (*cuStreamBeginCapture_v2)(void*, int);
    int (*cuStreamEndCapture)(void*, void**);
    int (*cuGraphInstantiateWithFlags)(void**, void*, unsigned long long);
    int (*cuGraphDestroy)(void*);
    int (*cuGraphExecDestroy)(void*);
    int (*cuGraphLaunch)(void*, void*);
    int (*cuGetErrorString)(int, const char**);

    Driver();
};

Driver::Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw backend_error("there is no NVIDIA driver here: install one for CUDA 13.0 or newer, or use the backend 'cpu'");
    auto find = [&](const char* name) {
        if (void* found = dlsym(library, name)) return found;
        throw backend_error("the NVIDIA driver here has no ", name, ", and is too old: install one for CUDA 13.0 or newer");
    };
    auto load = [&](auto& call, const char* name) { call = reinterpret_cast<std::decay_t<decltype(call)>>(find(name)); };
#define DNP_LOAD(call) load(call, #call)
    DNP_LOAD(cuInit), DNP_LOAD(cuDeviceGet), DNP_LOAD(cuDeviceGetName), DNP_LOAD(cuDeviceGetAttribute), DNP_LOAD(cuDevicePrimaryCtxRetain);
    DNP_LOAD(cuDevicePrimaryCtxRelease_v2), DNP_LOAD(cuCtxSetCurrent), DNP_LOAD(cuStreamCreate), DNP_LOAD(cuStreamSynchronize);
    DNP_LOAD(cuStreamDestroy_v2), DNP_LOAD(cuMemAlloc_v2), DNP_LOAD(cuMemFree_v2), DNP_LOAD(cuMemsetD8Async), DNP_LOAD(cuMemcpyHtoDAsync_v2);
    DNP_LOAD(cuMemcpyDtoHAsync_v2), DNP_LOAD(cuMemcpyDtoDAsync_v2), DNP_LOAD(cuGetErrorString);
    DNP_LOAD(cuStreamBeginCapture_v2), DNP_LOAD(cuStreamEndCapture), DNP_LOAD(cuGraphInstantiateWithFlags), DNP_LOAD(cuGraphDestroy);
    DNP_LOAD(cuGraphExecDestroy), DNP_LOAD(cuGraphLaunch);
#undef DNP_LOAD
}

const Driver& driver() {
    static const Driver loaded;
    return loaded;
}

void check(int status, const char* call, int number) {
    if (status == 0) return;
    if (status == no_device) throw backend_error("there is no NVIDIA GPU here; use the backend 'cpu'");
    if (status == invalid_device) throw backend_error("there is no GPU number ", number, " here; `nvidia-smi` lists them");
    const char* text = nullptr;
    driver().cuGetErrorString(status, &text);
    throw backend_error(call, " failed: ", text ? text : "an unknown error", " (", status, ")");
}

#define DNP_CHECKED(call, ...) check(driver().call(__VA_ARGS__), #call, number_)

Address address_of(const void* pointer) { return reinterpret_cast<Address>(pointer); }

}  // namespace

Gpu::Gpu(int number) : number_(number) {
    DNP_CHECKED(cuInit, 0);
    DNP_CHECKED(cuDeviceGet, &device_, number);
    char name[256] = "";
    int major = 0, minor = 0;
    DNP_CHECKED(cuDeviceGetName, name, sizeof name, device_);
    DNP_CHECKED(cuDeviceGetAttribute, &major, capability_major, device_);
    DNP_CHECKED(cuDeviceGetAttribute, &minor, capability_minor, device_);
    name_ = name, sm_ = major * 10 + minor;
    if (sm_ < oldest_gpu)
        throw backend_error(name_, " (SM ", sm_, ") is too old: CUDA 13 and TensorRT need SM ", oldest_gpu, " or newer; use the backend 'cpu'");
    DNP_CHECKED(cuDevicePrimaryCtxRetain, &context_, device_);
    try {
        activate();
        DNP_CHECKED(cuStreamCreate, &stream_, independent_stream);
    } catch (...) {
        driver().cuDevicePrimaryCtxRelease_v2(device_);
        throw;
    }
}

Gpu::~Gpu() {
    driver().cuCtxSetCurrent(context_);
    for (void* piece : scratch_) free(piece);
    driver().cuStreamDestroy_v2(stream_);
    driver().cuDevicePrimaryCtxRelease_v2(device_);
}

std::string Gpu::description() const { return cat(name_, ", SM ", sm_, ", cuda:", number_); }

std::string Gpu::architecture() const { return cat("sm", sm_, " ", name_); }

void Gpu::activate() { DNP_CHECKED(cuCtxSetCurrent, context_); }

void Gpu::synchronize() { DNP_CHECKED(cuStreamSynchronize, stream_); }

void* Gpu::allocate(std::size_t bytes, const std::string& what) {
    Address address = 0;
    int status = driver().cuMemAlloc_v2(&address, bytes);
    if (status == out_of_memory)
        throw backend_error("no memory on cuda:", number_, " for ", what, ": ", bytes / 1'000'000, " MB are wanted; ask for fewer images at once, or smaller ones");
    check(status, "cuMemAlloc", number_);
    DNP_CHECKED(cuMemsetD8Async, address, 0, bytes, stream_);
    return reinterpret_cast<void*>(address);
}

void Gpu::free(void* address) noexcept {
    driver().cuCtxSetCurrent(context_);
    driver().cuMemFree_v2(address_of(address));
}

// From ordinary memory, which the driver copies before it returns.
void Gpu::to_device(void* to, const void* from, std::size_t bytes) { DNP_CHECKED(cuMemcpyHtoDAsync_v2, address_of(to), from, bytes, stream_); }

void Gpu::to_host(void* to, const void* from, std::size_t bytes) {
    DNP_CHECKED(cuMemcpyDtoHAsync_v2, to, address_of(from), bytes, stream_);
    synchronize();
}

void Gpu::on_device(void* to, const void* from, std::size_t bytes) { DNP_CHECKED(cuMemcpyDtoDAsync_v2, address_of(to), address_of(from), bytes, stream_); }

void* Gpu::scratch() {
    if (scratch_wanted_ > scratch_bytes_) {
        scratch_.push_back(allocate(scratch_wanted_, "the activations"));
        scratch_bytes_ = scratch_wanted_;
    }
    return scratch_.empty() ? nullptr : scratch_.back();
}

Gpu::Captured Gpu::capture(const std::function<void()>& work) {
    void *graph = nullptr, *ready = nullptr;
    DNP_CHECKED(cuStreamBeginCapture_v2, stream_, of_this_thread);
    try {
        work();
    } catch (...) {  // a stream must not go on capturing instead of computing
        driver().cuStreamEndCapture(stream_, &graph);
        if (graph) driver().cuGraphDestroy(graph);
        throw;
    }
    DNP_CHECKED(cuStreamEndCapture, stream_, &graph);
    int status = driver().cuGraphInstantiateWithFlags(&ready, graph, 0);
    driver().cuGraphDestroy(graph);
    check(status, "cuGraphInstantiate", number_);
    return {ready, [](void* captured) { driver().cuGraphExecDestroy(captured); }};
}

void Gpu::launch(const Captured& graph) { DNP_CHECKED(cuGraphLaunch, graph.get(), stream_); }

}  // namespace dnp::core
