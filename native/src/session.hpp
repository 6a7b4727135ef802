// Sessions: one graph opened in ONNX Runtime, with named buffers of our own that it reads and writes in place.
//
// The library is loaded when the first pipeline is opened, and never linked: programs that embed libdnp bring the
// version they want, from 1.21 on. Nothing else here knows ONNX Runtime.
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
#include "plans.hpp"

namespace dnp::core {

using Warnings = std::vector<std::pair<std::string, std::string>>;  // a sentence for each topic

// How graphs are run.
struct Engine {
    std::string backend = "cpu";  // or cuda
    std::string library;          // path of libonnxruntime.so; empty: $DNP_ONNXRUNTIME, or where the system finds it
    std::string plans;            // folder of plans; empty: plans/ in the bundle
    int threads = 0;              // to compute with; 0: every physical core that this process may use
    int device = 0;               // number of the GPU
    std::shared_ptr<Gpu> gpu;     // of the backend cuda, from `start` on

    std::shared_ptr<Warnings> warnings = std::make_shared<Warnings>();  // what users should know, noted by whoever sees it
    void warn(const std::string& topic, const std::string& message) const;

    std::shared_ptr<double> inside = std::make_shared<double>(0);  // seconds in ONNX Runtime's runs so far

    std::filesystem::path plan_folder(const Bundle& bundle) const;
    Names build_command(const Bundle& bundle) const;  // `dnp build`, of plans for it
};

// Loads ONNX Runtime unless it is there, and finds the GPU where the backend has one. Throws backend_error when the
// library is not found, too old, without the backend, or another one than the process has already.
void start(Engine& engine);

// Stops runs from other threads. After `create`, all members may be called at any time, `reset` only while nothing runs.
class Stop {
public:
    Stop();
    ~Stop();
    void create();  // once ONNX Runtime is loaded
    void request();
    void reset();
    bool requested() const { return requested_; }

private:
    friend class Session;
    struct Options;
    std::unique_ptr<Options> options_;
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

// Not for several threads at once.
class Session {
public:
    // Throws bundle_error when the file is no graph of the manifest's, backend_error when it cannot run here.
    Session(const Bundle& bundle, const std::string& graph, const Engine& engine);
    ~Session();

    Buffer& input(const std::string& name);
    Buffer& output(const std::string& name);

    void feed_back(const std::string& into, const std::string& output);  // each run ends with the input taking it over
    void alias(const std::string& name, Buffer& buffer);                 // reads another session's buffer in place
    void reshape(const Sizes& sizes);                                    // of every symbol of the graph
    void run(Stop& stop);  // throws Code::cancelled when stopped, backend_error when the graph cannot be run

    // The size to run `size` at, of what may be filled up: on a GPU one of few, each of which is captured.
    std::int64_t fit(std::int64_t size) const;

    const std::string& runs_on() const { return runs_on_; }  // what really runs it, as the library itself says

private:
    struct File;
    using State = std::vector<std::int64_t>;
    File& opened(const Sizes& fixed);
    std::unique_ptr<File> open_plan(const Sizes& fixed, const PlanSpec& spec);
    std::unique_ptr<File> open_graph(const std::filesystem::path& path, const Sizes& fixed, bool planned);
    void check(const File& file, const std::filesystem::path& path, const Sizes& fixed) const;
    void choose(const Sizes& sizes);
    State state();
    void bind_all(File& file);

    const Bundle& bundle_;
    const Graph graph_;
    const Engine engine_;
    std::map<std::string, Buffer> inputs_, outputs_;
    std::map<std::string, Buffer*> aliased_;
    std::map<std::string, std::string> fed_back_;
    Sizes sizes_;
    std::string runs_on_;
    std::vector<std::pair<Sizes, PlanSpec>> plans_;  // by the sizes that they have fixed, the newest first
    std::map<Sizes, std::unique_ptr<File>> files_;   // that are open, by the same; none for the graph itself
    File* file_ = nullptr;                           // for the present sizes
};

template <class T>
void Buffer::fill(const std::vector<T>& values) {
    if (values.size() != count_ || sizeof(T) != item_) throw Error(Code::general, cat("'", name_, "' holds ", count_, " values, not ", values.size()));
    std::copy(values.begin(), values.end(), static_cast<T*>(host(false)));
}

}  // namespace dnp::core
