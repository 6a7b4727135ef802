// Cancelling and closing from other threads, while requests run: dnp-threads BUNDLE [BACKEND]
#include <dnp.hpp>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

#define REQUIRE(what) \
    do { \
        if (!(what)) std::fprintf(stderr, "line %d: %s\n", __LINE__, #what), std::exit(1); \
    } while (false)

const std::string request = R"({"prompt": "a red circle", "steps": 6, "dns_steps": 6, "seed": 3})";

dnp_code code_of(dnp_error* error) {
    REQUIRE(error);
    dnp_code code = dnp_error_code(error);
    dnp_error_free(error);
    return code;
}

std::string options = R"({"threads": 1, "backend": "cpu"})";

dnp_pipeline* open(const char* bundle) {
    dnp_pipeline* pipeline = nullptr;
    dnp_error* error = dnp_open(bundle, options.c_str(), &pipeline);
    if (error) std::fprintf(stderr, "%s\n", dnp_error_message(error)), std::exit(1);
    return pipeline;
}

struct Watch {
    std::atomic<int> steps{0};
    dnp_pipeline* pipeline = nullptr;
};

int count_step(void* user_data, const dnp_step*) {
    ++static_cast<Watch*>(user_data)->steps;
    return 0;
}

// In its own callback a pipeline is busy, and cannot be closed.
int try_everything(void* user_data, const dnp_step*) {
    auto watch = static_cast<Watch*>(user_data);
    dnp_result* result = nullptr;
    REQUIRE(code_of(dnp_generate(watch->pipeline, request.c_str(), nullptr, &result)) == DNP_ERROR);
    REQUIRE(code_of(dnp_close(watch->pipeline)) == DNP_ERROR);
    dnp_cancel(watch->pipeline);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) return 2;
    const char* bundle = arguments[1];
    if (count > 2) options.replace(options.find("cpu"), 3, arguments[2]);
    for (int round = 0; round < 4; ++round) {
        Watch watch;
        watch.pipeline = open(bundle);
        dnp_callbacks callbacks{sizeof(dnp_callbacks), &watch, count_step};
        std::thread worker([&] {
            dnp_result* result = nullptr;
            REQUIRE(code_of(dnp_generate(watch.pipeline, R"({"prompt": "a red circle", "steps": 900})", &callbacks, &result)) == DNP_CANCELLED);
            REQUIRE(!result);
        });
        while (!watch.steps) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        dnp_result* second = nullptr;
        REQUIRE(code_of(dnp_generate(watch.pipeline, request.c_str(), nullptr, &second)) == DNP_ERROR);
        if (round % 2) {
            REQUIRE(!dnp_close(watch.pipeline));  // cancels, and waits
            worker.join();
        } else {
            dnp_cancel(watch.pipeline);
            worker.join();
            REQUIRE(!dnp_generate(watch.pipeline, request.c_str(), nullptr, &second));  // it goes on after a cancel
            REQUIRE(dnp_result_count(second, DNP_FINAL) == 1);
            dnp_callbacks all{sizeof(dnp_callbacks), &watch, try_everything};
            dnp_result* none = nullptr;
            REQUIRE(code_of(dnp_generate(watch.pipeline, request.c_str(), &all, &none)) == DNP_CANCELLED);
            REQUIRE(!dnp_close(watch.pipeline));
            dnp_image image{sizeof(dnp_image), 0, 0, nullptr};
            REQUIRE(!dnp_result_image(second, DNP_FINAL, 0, &image) && image.pixels);  // results outlive their pipeline
            dnp_result_free(second);
        }
    }
    std::thread others[3];
    for (std::thread& other : others)
        other = std::thread([&] {
            dnp::Pipeline pipeline(bundle, options);
            REQUIRE(pipeline.generate(request).count() == 1);
        });
    for (std::thread& other : others) other.join();
}
