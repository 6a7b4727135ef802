// The C interface over Pipeline: handles, errors as objects, and nothing else. What may throw runs inside `guarded`.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include "dnp.h"
#include "pipeline.hpp"
#include "version.hpp"

namespace core = dnp::core;

struct dnp_error {
    dnp_code code;
    std::string message;
};

struct dnp_pipeline {
    dnp_pipeline(const char* bundle, const core::Json& options) : pipeline(bundle, options), info(pipeline.info().dump()) {}

    core::Pipeline pipeline;
    std::string info;
};

struct dnp_result {
    core::Result result;
    std::string json;
};

namespace {

// An error for which there is no memory.
dnp_error no_memory{DNP_ERROR, "out of memory"};

dnp_error* failure(core::Code code, const char* message) noexcept {
    try {
        return new dnp_error{static_cast<dnp_code>(code), core::encode_utf8(core::decode_utf8(message))};  // a path may be none
    } catch (...) {
        return &no_memory;
    }
}

// Runs `work`; what it throws becomes the error that is returned.
template <class Work>
dnp_error* guarded(Work work) noexcept {
    try {
        work();
        return nullptr;
    } catch (const core::Error& error) {
        return failure(error.code, error.what());
    } catch (const std::bad_alloc&) {
        return &no_memory;
    } catch (const std::exception& error) {
        return failure(core::Code::general, error.what());
    } catch (...) {
        return failure(core::Code::general, "an unknown error");
    }
}

template <class Pointer>
void require(const Pointer* argument, const char* name) {
    if (!argument) throw core::settings_error(name, " is NULL");
}

// A struct of the caller's must have room for what this version of it has; a later one may be larger.
template <class Struct>
void require_size(const Struct* given, const char* name) {
    require(given, name);
    if (given->size < sizeof(Struct))
        throw core::settings_error("the size of ", name, " is ", given->size, "; set it to sizeof(", name, "), ", sizeof(Struct), " or more");
}

core::Json json_of(const char* text, const char* name) {
    return text ? core::parse_json(text, std::string("the ") + name, core::Code::settings) : core::Json::object();
}

void lend(const core::Pixels& images, std::size_t index, dnp_image* image) {
    if (index >= static_cast<std::size_t>(images.count)) throw core::settings_error("there is no image ", index, ", of ", images.count, " counted from 0");
    image->height = static_cast<std::uint32_t>(images.height), image->width = static_cast<std::uint32_t>(images.width);
    image->pixels = images.image(static_cast<std::int64_t>(index));
}

// What a step lends to its callback: the images of a preview, once one is asked for.
struct StepContext {
    const core::Step& step;
    core::Pixels preview;
};

core::Progress progress_of(const dnp_callbacks* callbacks) {
    if (!callbacks) return {};
    require_size(callbacks, "dnp_callbacks");
    if (!callbacks->progress) return {};
    return [told = *callbacks](const core::Step& step) {
        StepContext context{step, {}};
        dnp_step told_step{sizeof(dnp_step),
                           step.phase,
                           static_cast<std::uint32_t>(step.index),
                           static_cast<std::uint32_t>(step.total),
                           static_cast<std::uint32_t>(step.images),
                           &context};
        return told.progress(told.user_data, &told_step) == 0;
    };
}

using Method = core::Result (core::Pipeline::*)(const core::Json&, const core::Progress&);

dnp_error* request(Method method, dnp_pipeline* pipeline, const char* settings, const dnp_callbacks* callbacks, dnp_result** result) noexcept {
    if (result) *result = nullptr;
    return guarded([&] {
        require(pipeline, "pipeline"), require(settings, "settings"), require(result, "result");
        auto made = std::make_unique<dnp_result>();
        made->result = (pipeline->pipeline.*method)(json_of(settings, "settings"), progress_of(callbacks));
        core::OrderedJson json{{"negatives", made->result.negatives}, {"request", made->result.request}, {"seconds", made->result.seconds}, {"inside", made->result.inside}};
        json.update(made->result.made_with);  // the pipeline may be closed by now
        json["warnings"] = made->result.warnings;
        made->json = json.dump();
        *result = made.release();
    });
}

}  // namespace

uint32_t dnp_abi_version(void) { return DNP_ABI_VERSION; }

const char* dnp_version(void) { return core::version; }

dnp_code dnp_error_code(const dnp_error* error) { return error ? error->code : DNP_ERROR; }

const char* dnp_error_message(const dnp_error* error) { return error ? error->message.c_str() : "no error"; }

void dnp_error_free(dnp_error* error) {
    if (error != &no_memory) delete error;
}

dnp_error* dnp_open(const char* bundle, const char* options, dnp_pipeline** pipeline) {
    if (pipeline) *pipeline = nullptr;
    return guarded([&] {
        require(bundle, "bundle"), require(pipeline, "pipeline");
        *pipeline = new dnp_pipeline(bundle, json_of(options, "options"));
    });
}

dnp_error* dnp_warm_up(dnp_pipeline* pipeline, int captioner) {
    return guarded([&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.warm_up(captioner != 0);
    });
}

const char* dnp_info(const dnp_pipeline* pipeline) { return pipeline ? pipeline->info.c_str() : "{}"; }

void dnp_cancel(dnp_pipeline* pipeline) {
    if (pipeline) dnp_error_free(guarded([&] { pipeline->pipeline.cancel(); }));
}

dnp_error* dnp_close(dnp_pipeline* pipeline) {
    return guarded([&] {
        if (!pipeline) return;
        pipeline->pipeline.end();
        delete pipeline;
    });
}

dnp_error* dnp_step_preview(const dnp_step* step, uint32_t index, dnp_image* image) {
    return guarded([&] {
        require(step, "step"), require_size(image, "dnp_image");
        auto context = static_cast<StepContext*>(step->context);
        if (!context->preview.count) context->preview = context->step.preview();
        lend(context->preview, index, image);
    });
}

dnp_error* dnp_generate(dnp_pipeline* pipeline, const char* settings, const dnp_callbacks* callbacks, dnp_result** result) {
    return request(&core::Pipeline::generate, pipeline, settings, callbacks, result);
}

dnp_error* dnp_find_negatives(dnp_pipeline* pipeline, const char* settings, const dnp_callbacks* callbacks, dnp_result** result) {
    return request(&core::Pipeline::find_negatives, pipeline, settings, callbacks, result);
}

dnp_error* dnp_caption(dnp_pipeline* pipeline, const dnp_image* image, const char* settings, char** caption) {
    if (caption) *caption = nullptr;
    return guarded([&] {
        require(pipeline, "pipeline"), require_size(image, "dnp_image"), require(image->pixels, "pixels"), require(caption, "caption");
        if (!image->height || !image->width || image->height > core::max_side || image->width > core::max_side)
            throw core::settings_error("an image of ", image->height, "x", image->width, " cannot be read; its sides must be 1 to ", core::max_side, " pixels");
        core::Pixels pixels{1, image->height, image->width, {}};
        pixels.values.assign(image->pixels, image->pixels + std::size_t{3} * image->height * image->width);
        std::string text = pipeline->pipeline.caption(pixels, json_of(settings, "settings"));
        auto copy = static_cast<char*>(std::malloc(text.size() + 1));
        if (!copy) throw std::bad_alloc();
        std::memcpy(copy, text.c_str(), text.size() + 1);
        *caption = copy;
    });
}

void dnp_text_free(char* text) { std::free(text); }

size_t dnp_result_count(const dnp_result* result, dnp_kind kind) {
    if (!result) return 0;
    const core::Result& found = result->result;
    const core::Pixels& images = kind == DNP_DNS ? found.dns : kind == DNP_PLAIN ? found.plain : found.final;
    return static_cast<std::size_t>(images.count);
}

dnp_error* dnp_result_image(const dnp_result* result, dnp_kind kind, size_t index, dnp_image* image) {
    return guarded([&] {
        require(result, "result"), require_size(image, "dnp_image");
        if (kind != DNP_FINAL && kind != DNP_DNS && kind != DNP_PLAIN) throw core::settings_error("there is no kind ", static_cast<int>(kind), " of images");
        const core::Result& found = result->result;
        lend(kind == DNP_DNS ? found.dns : kind == DNP_PLAIN ? found.plain : found.final, index, image);
    });
}

const char* dnp_result_json(const dnp_result* result) { return result ? result->json.c_str() : "{}"; }

void dnp_result_free(dnp_result* result) { delete result; }
