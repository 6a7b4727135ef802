// One GPU, by its driver's own calls: a stream on which everything happens in order, and memory.
//
// The driver (libcuda.so.1) is loaded when a GPU is first asked for. Whatever CUDA runtime ONNX Runtime brings works
// with the same context, so that its streams and addresses mean the same to both.
#pragma once

#include <cstddef>
#include <string>

namespace dnp::core {

class Gpu {
public:
    // Throws backend_error when there is no driver, no GPU of this number, or one that is too old.
    explicit Gpu(int number);
    ~Gpu();
    Gpu(const Gpu&) = delete;

    int number() const { return number_; }
    void* stream() const { return stream_; }
    const std::string& description() const { return description_; }  // "NVIDIA L4, SM 89, cuda:0"

    void activate();     // makes it this thread's own, as each thread has to that works with it
    void synchronize();  // waits for all that was started; errors of that work are thrown here

    // Memory that will hold zeros. Throws backend_error, with what it is for, when there is not enough.
    void* allocate(std::size_t bytes, const std::string& what);
    void free(void* address) noexcept;
    void to_device(void* to, const void* from, std::size_t bytes);  // starts it; `from` may change at once
    void to_host(void* to, const void* from, std::size_t bytes);    // and waits
    void on_device(void* to, const void* from, std::size_t bytes);  // starts it

private:
    int number_;
    int device_ = 0;
    void *context_ = nullptr, *stream_ = nullptr;
    std::string description_;
};

}  // namespace dnp::core
