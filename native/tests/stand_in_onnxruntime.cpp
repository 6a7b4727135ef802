// Stands in for ONNX Runtime with a CUDA provider: the library that DNP_STAND_IN_FOR names, which runs on the processor,
// taken for one that runs on a GPU. It keeps a log of what it was told in the file that DNP_STAND_IN_LOG names, a line
// each, and cannot load its provider where DNP_STAND_IN_BROKEN is set. It does as ONNX Runtime does about capturing:
// only plans can be captured, a run under a new number is captured, and one under a known number replayed, with the
// addresses that it was captured with.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include <onnxruntime_c_api.h>

struct OrtCUDAProviderOptionsV2 {
    std::map<std::string, std::string> settings;
};

namespace {

using Addresses = std::map<std::string, void*>;

const OrtApi* real = nullptr;
OrtApi api;
std::mutex mutex;
std::set<const OrtSessionOptions*> capturing;                        // options of sessions that capture
std::map<const OrtRunOptions*, std::map<std::string, std::string>> entries;
std::map<const OrtIoBinding*, Addresses> bound;
std::map<std::pair<const OrtSession*, std::string>, Addresses> captured;  // by number

void log(const std::string& line) {
    if (const char* file = std::getenv("DNP_STAND_IN_LOG")) std::ofstream(file, std::ios::app) << line << "\n";
}

OrtStatus* providers(char*** names, int* count) noexcept {
    static char cuda[] = "CUDAExecutionProvider", cpu[] = "CPUExecutionProvider";
    static char* all[] = {cuda, cpu};
    *names = all, *count = 2;
    return nullptr;
}

OrtStatus* release_providers(char**, int) noexcept { return nullptr; }

OrtStatus* create_cuda(OrtCUDAProviderOptionsV2** options) noexcept {
    *options = new OrtCUDAProviderOptionsV2;
    return nullptr;
}

OrtStatus* update_cuda(OrtCUDAProviderOptionsV2* options, const char* const* keys, const char* const* values, size_t count) noexcept {
    for (size_t i = 0; i < count; ++i) options->settings[keys[i]] = values[i];
    return nullptr;
}

OrtStatus* update_cuda_pointer(OrtCUDAProviderOptionsV2* options, const char* key, void* value) noexcept {
    options->settings[key] = value ? "set" : "";
    return nullptr;
}

void release_cuda(OrtCUDAProviderOptionsV2* options) noexcept { delete options; }

OrtStatus* append_cuda(OrtSessionOptions* options, const OrtCUDAProviderOptionsV2* cuda) noexcept {
    if (std::getenv("DNP_STAND_IN_BROKEN"))
        return real->CreateStatus(ORT_FAIL, "OrtSessionOptionsAppendExecutionProvider_Cuda: Failed to load shared library");
    std::lock_guard lock(mutex);
    std::string line = "session";
    for (const auto& [key, value] : cuda->settings) line += " " + key + "=" + value;
    log(line);
    cuda->settings.at("enable_cuda_graph") == "1" ? (void)capturing.insert(options) : (void)capturing.erase(options);
    return nullptr;
}

OrtStatus* create_session(const OrtEnv* env, const ORTCHAR_T* path, const OrtSessionOptions* options, OrtSession** session) noexcept {
    std::lock_guard lock(mutex);
    bool plan = std::strstr(path, ".plan") != nullptr;
    if (capturing.count(options) && !plan)
        return real->CreateStatus(ORT_FAIL, "This session cannot use the graph capture feature as requested by the user");
    log(std::string("open ") + path);
    return real->CreateSession(env, path, options, session);
}

void release_session(OrtSession* session) noexcept {  // what was captured of it goes too: another may get its address
    {
        std::lock_guard lock(mutex);
        for (auto entry = captured.begin(); entry != captured.end();) entry = entry->first.first == session ? captured.erase(entry) : std::next(entry);
    }
    real->ReleaseSession(session);
}

OrtStatus* create_memory(const char* name, OrtAllocatorType type, int id, OrtMemType kind, OrtMemoryInfo** info) noexcept {
    return std::strcmp(name, "Cuda") == 0 ? real->CreateCpuMemoryInfo(type, kind, info) : real->CreateMemoryInfo(name, type, id, kind, info);
}

OrtStatus* add_entry(OrtRunOptions* options, const char* key, const char* value) noexcept {
    std::lock_guard lock(mutex);
    entries[options][key] = value;
    return real->AddRunConfigEntry(options, key, value);
}

void note(const OrtIoBinding* binding, const char* name, const OrtValue* value) {
    std::lock_guard lock(mutex);
    if (OrtStatus* failed = real->GetTensorMutableData(const_cast<OrtValue*>(value), &bound[binding][name])) real->ReleaseStatus(failed);
}

OrtStatus* bind_input(OrtIoBinding* binding, const char* name, const OrtValue* value) noexcept {
    note(binding, name, value);
    return real->BindInput(binding, name, value);
}

OrtStatus* bind_output(OrtIoBinding* binding, const char* name, const OrtValue* value) noexcept {
    note(binding, name, value);
    return real->BindOutput(binding, name, value);
}

OrtStatus* run(OrtSession* session, const OrtRunOptions* options, const OrtIoBinding* binding) noexcept {
    std::unique_lock lock(mutex);
    std::string number = entries[options]["gpu_graph_id"], waits = entries[options]["disable_synchronize_execution_providers"] == "1" ? "" : " waits";
    if (number == "-1") {
        log("run" + waits);
    } else if (auto [known, is_new] = captured.try_emplace({session, number}, bound[binding]); is_new) {
        log("capture " + number + waits);
    } else if (known->second != bound[binding]) {
        return real->CreateStatus(ORT_FAIL, "replayed with other addresses than it was captured with");
    } else {
        log("replay " + number + waits);
    }
    lock.unlock();
    return real->RunWithBinding(session, options, binding);
}

const OrtApi* get_api(uint32_t version) noexcept {
    auto library = dlopen(std::getenv("DNP_STAND_IN_FOR"), RTLD_NOW | RTLD_LOCAL);
    auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    real = base()->GetApi(version);
    std::memcpy(&api, real, sizeof api);
    api.GetAvailableProviders = providers, api.ReleaseAvailableProviders = release_providers;
    api.CreateCUDAProviderOptions = create_cuda, api.UpdateCUDAProviderOptions = update_cuda;
    api.UpdateCUDAProviderOptionsWithValue = update_cuda_pointer, api.ReleaseCUDAProviderOptions = release_cuda;
    api.SessionOptionsAppendExecutionProvider_CUDA_V2 = append_cuda, api.CreateSession = create_session;
    api.ReleaseSession = release_session;
    api.CreateMemoryInfo = create_memory, api.AddRunConfigEntry = add_entry;
    api.BindInput = bind_input, api.BindOutput = bind_output, api.RunWithBinding = run;
    return &api;
}

const char* get_version() noexcept { return "stand-in"; }

}  // namespace

extern "C" const OrtApiBase* OrtGetApiBase() noexcept {
    static const OrtApiBase base{get_api, get_version};
    return &base;
}
