// Sessions: one graph, with named buffers of our own that a library reads and writes in place. Libraries are loaded when
// a pipeline is opened that needs them, and never linked: programs that embed libdnp bring the versions they want.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "gpu.hpp"

namespace dnp::core {

using Warnings = std::vector<std::pair<std::string, std::string>>;  // a sentence for each topic

// How graphs are run.
struct Engine {
    std::string backend = "cpu";  // or cuda, tensorrt
    std::string library;          // path of libonnxruntime.so; empty: $DNP_ONNXRUNTIME, or where the system finds it
    std::string plans;            // folder of plans; empty: plans/ in the bundle
    int threads = 0;              // to compute with; 0: every physical core that this process may use
    int device = 0;               // number of the GPU
    std::shared_ptr<Gpu> gpu;     // of a backend on one, from `start` on

    std::shared_ptr<Warnings> warnings = std::make_shared<Warnings>();  // what users should know, noted by whoever sees it
    void warn(const std::string& topic, const std::string& message) const;

    std::shared_ptr<double> inside = std::make_shared<double>(0);  // seconds in the library's runs so far

    std::filesystem::path plan_folder(const Bundle& bundle) const;
    Names build_command(const Bundle& bundle) const;  // `dnp build`, of plans for it
};

// Loads the library of the backend unless it is there, and finds the GPU where the backend has one. Throws backend_error
// when the library is not found, too old, without the backend, or another one than the process has already.
void start(Engine& engine);

// Stops runs from other threads. After `create`, all members may be called at any time, `reset` only while nothing runs.
class Stop {
public:
    Stop();
    ~Stop();
    void create();  // once the backend's library is loaded
    void request();
    void reset();
    bool requested() const { return requested_; }

private:
    friend class OnnxRuntime;
    struct Options;
    std::unique_ptr<Options> options_;  // where ONNX Runtime is
    std::atomic<bool> requested_{false};
};

// A named tensor on a store that only ever grows: in ordinary memory or, with a GPU, in the GPU's. One that keeps its
// shape keeps its contents.
class Buffer {
public:
    Buffer() = default;
    Buffer(std::string name, std::string dtype, std::shared_ptr<Gpu> gpu);
    Buffer(Buffer&&) = default;

    const std::string& name() const { return name_; }
    const std::string& dtype() const { return dtype_; }
    const Shape& shape() const { return shape_; }
    std::size_t count() const { return count_; }  // values
    std::size_t bytes() const { return count_ * item_; }

    // The values in ordinary memory, at these leading indices of the shape: as<float>({2}) is entry 2. They may be read
    // and written: from a GPU they are fetched when a run has written them, and the next run takes them from here. The
    // caller knows dtype and bounds.
    template <class T>
    T* as(std::initializer_list<std::int64_t> index = {}) {
        return static_cast<T*>(host(true)) + offset(index);
    }
    std::size_t part(std::size_t leading) const;  // values in one entry of so many leading dimensions

    void clear();  // zeros
    template <class T>
    void fill(const std::vector<T>& values);  // throws when the count differs
    void copy(Buffer& other);                 // of the same shape and dtype, where it lies

    // A session's own.
    void reserve(const Shape& shape);   // throws settings_error or backend_error when there is no such memory
    void shape_to(const Shape& shape);  // that was reserved
    void* place() const;                // where a graph reads and writes it
    void send();                        // there what was written in ordinary memory
    void was_written();                 // by a graph

private:
    void* host(bool with_contents);
    std::size_t offset(std::initializer_list<std::int64_t> index) const;

    std::string name_, dtype_;
    std::size_t item_ = 0, count_ = 0, capacity_ = 0, host_capacity_ = 0;
    Shape shape_;
    std::unique_ptr<std::byte[]> store_;
    std::byte* host_ = nullptr;  // in ordinary memory
    std::shared_ptr<Gpu> gpu_;
    struct Freed {
        Gpu* gpu;
        void operator()(void* address) const { gpu->free(address); }
    };
    std::unique_ptr<void, Freed> device_{nullptr, {nullptr}};  // where there is a GPU
    enum class Newer { neither, host, device } newer_ = Newer::neither;
};

class Session;

// A graph as one library has opened it, to run on the buffers of a session.
class Runner {
public:
    virtual ~Runner() = default;
    virtual std::string runs_on() const = 0;  // as the library itself says
    virtual std::int64_t fit(const std::string& symbol, std::int64_t size) const = 0;  // see Session

    // The largest size that it takes, which buffers have from the first on, so that they never move; 0 where it takes any.
    virtual std::int64_t largest(const std::string& symbol) const = 0;
    virtual void check(const Sizes& sizes) const = 0;  // throws settings_error, with what to build, for those that it does not take
    virtual void choose(const Sizes& sizes) = 0;       // gets ready for them, which are checked

    // Starts the work, and waits for it where that is not on a GPU. Throws as Session::run.
    virtual void run(Session& session, Stop& stop) = 0;
};

// Not for several threads at once.
class Session {
public:
    // Throws bundle_error when the file is no graph of the manifest's, backend_error when it cannot run here.
    Session(const Bundle& bundle, const std::string& graph, const Engine& engine);
    ~Session();

    const Graph& graph() const { return graph_; }
    const Sizes& sizes() const { return sizes_; }  // of every symbol of the graph
    Buffer& input(const std::string& name);
    Buffer& output(const std::string& name);

    void feed_back(const std::string& into, const std::string& output);  // each run ends with the input taking it over
    void alias(const std::string& name, Buffer& buffer);                 // reads another session's buffer in place
    void reshape(const Sizes& sizes);
    void run(Stop& stop);  // throws Code::cancelled when stopped, backend_error when the graph cannot be run

    // The size to run `size` at, of what may be filled up: on a GPU one of few, each of which is captured.
    std::int64_t fit(const std::string& symbol, std::int64_t size) const { return runner_->fit(symbol, size); }
    std::int64_t at_most(const std::string& symbol, std::int64_t size) const;  // or the largest that is taken
    void check(const Sizes& sizes) const { runner_->check(sizes); }  // of some symbols, before there is any work on them

    std::string runs_on() const { return runner_->runs_on(); }

private:
    const Graph graph_;
    const Engine engine_;
    std::map<std::string, Buffer> inputs_, outputs_;
    std::map<std::string, Buffer*> aliased_;
    std::map<std::string, std::string> fed_back_;
    Sizes sizes_;
    std::unique_ptr<Runner> runner_;  // goes first
};

// For the libraries.
void start_onnxruntime(Engine& engine);
void start_tensorrt(Engine& engine);
std::unique_ptr<Runner> open_onnxruntime(const Bundle& bundle, const Graph& graph, const Engine& engine);
std::unique_ptr<Runner> open_tensorrt(const Bundle& bundle, const Graph& graph, const Engine& engine);

// Holds the names, dtypes, ranks and sizes that a library found in a file (sizes below 0: any) against the manifest's.
void check_signature(const std::string& path, const Signature& declared, const Sizes& fixed, const Signature& found);
std::string described(const Sizes& sizes);
bool mentions(std::string said, std::initializer_list<const char*> words);  // any of them, given in small letters

template <class T>
void Buffer::fill(const std::vector<T>& values) {
    if (values.size() != count_ || sizeof(T) != item_) throw Error(Code::general, cat("'", name_, "' holds ", count_, " values, not ", values.size()));
    std::copy(values.begin(), values.end(), static_cast<T*>(host(false)));
}

}  // namespace dnp::core
