// Stands in for NVIDIA's driver (libcuda.so.1) where there is none: one GPU, whose memory is ordinary memory and whose
// stream does everything at once, or captures it. DNP_STAND_IN_SM is its compute capability, 90 unless it is set; a line
// for each launch of what was captured goes into the file that DNP_STAND_IN_LOG names.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr int while_capturing = 900, of_this_thread = 1;

using Graph = std::vector<std::function<void()>>;

std::mutex mutex;
std::map<void*, Graph> captured;  // by the stream that captures

bool captures(void* stream) {
    std::lock_guard lock(mutex);
    return captured.count(stream);
}

void start(void* stream, std::function<void()> work) {
    std::unique_lock lock(mutex);
    if (auto found = captured.find(stream); found != captured.end()) {
        found->second.push_back(std::move(work));
    } else {
        lock.unlock();
        work();
    }
}

int capability() {
    const char* told = std::getenv("DNP_STAND_IN_SM");
    return told ? std::atoi(told) : 90;
}

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

extern "C" {

// For other libraries that work on its streams.
bool dnp_stand_in_captures(void* stream) { return captures(stream); }
void dnp_stand_in_start(void* stream, std::function<void()> work) { start(stream, std::move(work)); }

int cuInit(unsigned) { return 0; }

int cuDeviceGet(int* device, int number) {
    *device = number;
    return number == 0 ? 0 : 101;
}

int cuDeviceGetName(char* name, int size, int) {
    std::strncpy(name, "Stand-in", static_cast<std::size_t>(size));
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? capability() / 10 : capability() % 10;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = context;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) { return 0; }

int cuCtxSetCurrent(void*) { return 0; }

int cuStreamCreate(void** stream, unsigned) {
    *stream = std::malloc(1);
    return 0;
}

int cuStreamSynchronize(void* stream) { return captures(stream) ? while_capturing : 0; }

int cuStreamDestroy_v2(void* stream) {
    std::free(stream);
    return 0;
}

int cuMemAlloc_v2(std::uintptr_t* address, std::size_t bytes) {
    void* found = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    *address = reinterpret_cast<std::uintptr_t>(found);
    if (found) std::memset(found, 0xA5, bytes);  // no zeros unless they are asked for
    return found ? 0 : 2;
}

int cuMemFree_v2(std::uintptr_t address) {
    std::free(pointer(address));
    return 0;
}

int cuMemsetD8Async(std::uintptr_t to, unsigned char value, std::size_t bytes, void* stream) {
    start(stream, [=] { std::memset(pointer(to), value, bytes); });
    return 0;
}

int cuMemcpyHtoDAsync_v2(std::uintptr_t to, const void* from, std::size_t bytes, void* stream) {
    start(stream, [=] { std::memcpy(pointer(to), from, bytes); });
    return 0;
}

int cuMemcpyDtoHAsync_v2(void* to, std::uintptr_t from, std::size_t bytes, void* stream) {
    start(stream, [=] { std::memcpy(to, pointer(from), bytes); });
    return 0;
}

int cuMemcpyDtoDAsync_v2(std::uintptr_t to, std::uintptr_t from, std::size_t bytes, void* stream) {
    start(stream, [=] { std::memcpy(pointer(to), pointer(from), bytes); });
    return 0;
}

int cuStreamBeginCapture_v2(void* stream, int mode) {
    std::lock_guard lock(mutex);
    captured[stream];
    return mode == of_this_thread ? 0 : 1;
}

int cuStreamEndCapture(void* stream, void** graph) {
    std::lock_guard lock(mutex);
    *graph = new Graph(std::move(captured.at(stream)));
    captured.erase(stream);
    return 0;
}

int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) {
    *ready = new Graph(*static_cast<Graph*>(graph));
    return 0;
}

int cuGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return 0;
}

int cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }

int cuGraphLaunch(void* graph, void*) {
    if (const char* file = std::getenv("DNP_STAND_IN_LOG")) std::ofstream(file, std::ios::app) << "launch\n";
    for (const auto& work : *static_cast<Graph*>(graph)) work();
    return 0;
}

int cuGetErrorString(int, const char** text) {
    *text = "an error of the stand-in";
    return 0;
}
}
