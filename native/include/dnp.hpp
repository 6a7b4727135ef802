// dnp.hpp: dnp.h for C++17, without a library of its own: handles that free themselves, errors as exceptions.
//
//     dnp::Pipeline pipeline("path/to/bundle");
//     dnp::Result result = pipeline.generate(R"({"prompt": "a red circle", "seed": 7})");
//     use(result.image(0).pixels);
//
// What dnp.h says of threads and lifetimes holds here too.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "dnp.h"

namespace dnp {

// A call that failed: what went wrong, and with `code` which kind of thing.
class Failure : public std::runtime_error {
public:
    Failure(dnp_code code, const std::string& message) : std::runtime_error(message), code(code) {}
    dnp_code code;
};

namespace detail {

inline void check(dnp_error* error) {
    if (!error) return;
    Failure failure(dnp_error_code(error), dnp_error_message(error));
    dnp_error_free(error);
    throw failure;
}

}  // namespace detail

// One step of the work, for as long as the callback runs that got it.
class StepView {
public:
    explicit StepView(const dnp_step* step) : step_(step) {}

    const char* phase() const { return step_->phase; }
    std::uint32_t index() const { return step_->index; }
    std::uint32_t total() const { return step_->total; }
    std::uint32_t images() const { return step_->images; }

    dnp_image preview(std::uint32_t index = 0) const {
        dnp_image image{sizeof(dnp_image), 0, 0, nullptr};
        detail::check(dnp_step_preview(step_, index, &image));
        return image;
    }

private:
    const dnp_step* step_;
};

// Hears every step; false stops the work. What it throws comes out of the call that runs the request.
using OnStep = std::function<bool(const StepView&)>;

class Result {
public:
    explicit Result(dnp_result* result) : result_(result, dnp_result_free) {}

    std::size_t count(dnp_kind kind = DNP_FINAL) const { return dnp_result_count(result_.get(), kind); }

    dnp_image image(std::size_t index, dnp_kind kind = DNP_FINAL) const {  // lent by this object
        dnp_image image{sizeof(dnp_image), 0, 0, nullptr};
        detail::check(dnp_result_image(result_.get(), kind, index, &image));
        return image;
    }

    std::string json() const { return dnp_result_json(result_.get()); }

private:
    std::unique_ptr<dnp_result, void (*)(dnp_result*)> result_;
};

class Pipeline {
public:
    explicit Pipeline(const std::string& bundle, const std::string& options = "{}") {
        detail::check(dnp_open(bundle.c_str(), options.c_str(), &pipeline_));
    }
    ~Pipeline() { dnp_error_free(dnp_close(pipeline_)); }
    Pipeline(Pipeline&& other) noexcept : pipeline_(std::exchange(other.pipeline_, nullptr)) {}
    Pipeline& operator=(Pipeline&& other) noexcept {
        std::swap(pipeline_, other.pipeline_);
        return *this;
    }

    std::string info() const { return dnp_info(pipeline_); }
    void warm_up(bool captioner = true) { detail::check(dnp_warm_up(pipeline_, captioner)); }
    void cancel() { dnp_cancel(pipeline_); }

    Result generate(const std::string& settings, const OnStep& on_step = {}) { return request(dnp_generate, settings, on_step); }
    Result find_negatives(const std::string& settings, const OnStep& on_step = {}) { return request(dnp_find_negatives, settings, on_step); }

    std::string caption(std::uint32_t height, std::uint32_t width, const std::uint8_t* pixels, const std::string& settings = "{}") {
        dnp_image image{sizeof(dnp_image), height, width, pixels};
        char* text = nullptr;
        detail::check(dnp_caption(pipeline_, &image, settings.c_str(), &text));
        std::unique_ptr<char, void (*)(char*)> owned(text, dnp_text_free);
        return owned.get();
    }

private:
    struct Watch {
        const OnStep& on_step;
        std::exception_ptr thrown;
    };

    // No exception may cross the C interface: it is kept, and thrown again on this side.
    static int heard(void* user_data, const dnp_step* step) {
        auto watch = static_cast<Watch*>(user_data);
        try {
            return watch->on_step(StepView(step)) ? 0 : 1;
        } catch (...) {
            watch->thrown = std::current_exception();
            return 1;
        }
    }

    template <class Call>
    Result request(Call call, const std::string& settings, const OnStep& on_step) {
        Watch watch{on_step, nullptr};
        dnp_callbacks callbacks{sizeof(dnp_callbacks), &watch, on_step ? heard : nullptr};
        dnp_result* result = nullptr;
        dnp_error* error = call(pipeline_, settings.c_str(), &callbacks, &result);
        if (watch.thrown) {
            dnp_error_free(error);
            std::rethrow_exception(watch.thrown);
        }
        detail::check(error);
        return Result(result);
    }

    dnp_pipeline* pipeline_ = nullptr;
};

}  // namespace dnp
