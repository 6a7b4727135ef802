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

namespace dnp::core {

// How graphs are run.
struct Engine {
    std::string library;   // path of libonnxruntime.so; empty: $DNP_ONNXRUNTIME, or where the system finds it
    int threads = 0;       // to compute with; 0: every physical core that this process may use
    std::string plans;     // folder of plans; empty: plans/ in the bundle
    std::shared_ptr<Names> warnings = std::make_shared<Names>();  // what users should know, noted by whoever sees it
};

// Loads ONNX Runtime unless it is there. Throws backend_error when it is not found, too old, or another one than the
// process has already. Returns its version.
std::string load_onnxruntime(const Engine& engine);

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

// A named tensor in ordinary memory, on a store that only ever grows. One that keeps its shape keeps its contents.
class Buffer {
public:
    Buffer() = default;
    Buffer(std::string name, std::string dtype);

    const std::string& name() const { return name_; }
    const std::string& dtype() const { return dtype_; }
    const Shape& shape() const { return shape_; }
    std::size_t count() const { return count_; }  // values
    std::size_t bytes() const { return count_ * item_; }
    void* data() { return data_; }
    const void* data() const { return data_; }
    std::uint64_t version() const { return version_; }  // changes whenever place or shape do

    // The values, at these leading indices of the shape: as<float>({2}) is entry 2. The caller knows dtype and bounds.
    template <class T>
    T* as(std::initializer_list<std::int64_t> index = {}) {
        return static_cast<T*>(data()) + offset(index);
    }
    std::size_t part(std::size_t leading) const;  // values in one entry of so many leading dimensions

    template <class T>
    void fill(const std::vector<T>& values);  // throws when the count differs

    void reserve(const Shape& shape);   // throws settings_error when there is no such memory
    void shape_to(const Shape& shape);  // that was reserved

private:
    std::size_t offset(std::initializer_list<std::int64_t> index) const;

    std::string name_, dtype_;
    std::size_t item_ = 0, count_ = 0, capacity_ = 0;
    Shape shape_;
    std::unique_ptr<std::byte[]> store_;
    std::byte* data_ = nullptr;
    std::uint64_t version_ = 0;
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

    const std::string& runs_on() const { return runs_on_; }  // what really runs it, as the library itself says

private:
    struct Bound;
    struct Settings;
    bool open_plan(const Bundle& bundle, const Engine& engine, const Settings& settings);
    void bind_all();

    const Graph graph_;
    std::map<std::string, Buffer> inputs_, outputs_;
    std::map<std::string, Buffer*> aliased_;
    std::map<std::string, std::string> fed_back_;
    Sizes sizes_;
    std::string runs_on_;
    std::unique_ptr<Bound> bound_;
};

template <class T>
void Buffer::fill(const std::vector<T>& values) {
    if (values.size() != count_ || sizeof(T) != item_) throw Error(Code::general, cat("'", name_, "' holds ", count_, " values, not ", values.size()));
    std::copy(values.begin(), values.end(), static_cast<T*>(data()));
}

}  // namespace dnp::core
