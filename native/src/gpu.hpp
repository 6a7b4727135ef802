// One GPU, by its driver's own calls: a stream on which everything happens in order, and memory.
//
// The driver (libcuda.so.1) is loaded when a GPU is first asked for. Whatever CUDA runtime ONNX Runtime brings works
// with the same context, so that its streams and addresses mean the same to both.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace dnp::core {

class Gpu {
public:
    // Throws backend_error when there is no driver, no GPU of this number, or one that is too old.
    explicit Gpu(int number);
    ~Gpu();
    Gpu(const Gpu&) = delete;

    int number() const { return number_; }
    void* stream() const { return stream_; }
    std::string description() const;   // "NVIDIA L4, SM 89, cuda:0"
    std::string architecture() const;  // "sm89 NVIDIA L4", as plans of TensorRT are called

    void activate();     // makes it this thread's own, as each thread has to that works with it
    void synchronize();  // waits for all that was started; errors of that work are thrown here

    // Memory that will hold zeros. Throws backend_error, with what it is for, when there is not enough.
    void* allocate(std::size_t bytes, const std::string& what);
    void free(void* address) noexcept;
    void to_device(void* to, const void* from, std::size_t bytes);  // starts it; `from` may change at once
    void to_host(void* to, const void* from, std::size_t bytes);    // and waits
    void on_device(void* to, const void* from, std::size_t bytes);  // starts it

    // Memory for what a graph computes on its way, shared by all that run on the stream: as much as was wanted so far. It
    // stays where it is; when more is wanted later, a larger piece is added for those who ask from then on.
    void want_scratch(std::size_t bytes) { scratch_wanted_ = std::max(scratch_wanted_, bytes); }
    void* scratch();

    // What `work` starts on the stream, and does not do, as a CUDA graph. Throws what `work` throws, and backend_error when
    // something in it cannot be captured.
    using Captured = std::shared_ptr<void>;
    Captured capture(const std::function<void()>& work);
    void launch(const Captured& graph);  // starts all of it

private:
    int number_;
    int device_ = 0, sm_ = 0;
    void *context_ = nullptr, *stream_ = nullptr;
    std::string name_;
    std::size_t scratch_wanted_ = 0, scratch_bytes_ = 0;
    std::vector<void*> scratch_;
};

}  // namespace dnp::core
