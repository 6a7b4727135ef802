// Work on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace dnp::core {

// Runs `work(0)` to `work(count - 1)` on a few threads, and throws the first error that one of them gave.
template <class Work>
void in_parallel(std::size_t count, Work work) {
    std::atomic<std::size_t> next{0};
    std::vector<std::exception_ptr> errors(count);
    auto worker = [&] {
        for (std::size_t i; (i = next++) < count;) {
            try {
                work(i);
            } catch (...) {
                errors[i] = std::current_exception();
            }
        }
    };
    std::vector<std::thread> threads;
    std::size_t wanted = std::min<std::size_t>({count, std::max(1u, std::thread::hardware_concurrency()), 8});
    try {
        while (threads.size() + 1 < wanted) threads.emplace_back(worker);
    } catch (const std::system_error&) {  // no more threads to be had: those that there are do it all
    }
    worker();
    for (auto& thread : threads) thread.join();
    for (const auto& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace dnp::core
