/* dnp.h: diffusion-negative prompting in any program, from a bundle that `dnp export` wrote.
 *
 *     dnp_pipeline* pipeline = NULL;
 *     dnp_result* result = NULL;
 *     dnp_error* error = dnp_open("path/to/bundle", NULL, &pipeline);
 *     if (!error) error = dnp_generate(pipeline, "{\"prompt\": \"a red circle\", \"seed\": 7}", NULL, &result);
 *     if (error) fprintf(stderr, "%s\n", dnp_error_message(error));
 *
 * Errors. A call that may fail gives NULL when it did not, and otherwise an error object: a code for programs and a
 * sentence for people that names the value and the remedy. It is the caller's, to be freed by dnp_error_free. What a
 * failed call would have written to its out parameter is NULL then.
 *
 * Ownership. What a dnp_..._free function exists for is the caller's; free it by that function, never by free().
 * Anything else that is handed out is lent, for as long as its declaration says. Arguments are read during the call
 * only. All texts are UTF-8 and end with a NUL.
 *
 * Threads. Different handles are independent of each other. One pipeline runs one request at a time: a call that
 * would have to wait is refused with DNP_ERROR. Any thread may make it. dnp_cancel may be called by any thread at any
 * time. No other thread's state is touched: no signal handlers, no locale, no global callback. A process that forks
 * may use in the child only pipelines that were opened there.
 *
 * No C++ exception leaves the library. Every symbol begins with dnp_, and every struct with its size, so that a later
 * library still knows what an earlier caller has room for.
 */
#ifndef DNP_H
#define DNP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(DNP_BUILDING)
#define DNP_API __attribute__((visibility("default")))
#else
#define DNP_API
#endif

/* The version of this interface. It grows with every addition; what is there never changes its meaning. */
#define DNP_ABI_VERSION 1

/* The version that the library itself has: at least the DNP_ABI_VERSION that a caller was compiled with, or the
 * caller is newer than its library. */
DNP_API uint32_t dnp_abi_version(void);

/* The version of libdnp, such as "0.1.0". Lent, for ever. */
DNP_API const char* dnp_version(void);

/* ---------------------------------------------------------------- errors */

/* What went wrong. The numbers are the exit codes of the `dnp` command. A later library may have more of them. */
typedef enum dnp_code {
    DNP_ERROR = 1,          /* anything that fits nowhere below */
    DNP_ERROR_SETTINGS = 2, /* a setting, prompt or image that cannot be honoured */
    DNP_ERROR_BUNDLE = 3,   /* a bundle that is missing, damaged, edited or too new */
    DNP_ERROR_BACKEND = 4,  /* ONNX Runtime, a driver or a GPU is missing or too old, or a graph cannot be run */
    DNP_CANCELLED = 130     /* stopped by dnp_cancel, a callback, or dnp_close */
} dnp_code;

typedef struct dnp_error dnp_error;

DNP_API dnp_code dnp_error_code(const dnp_error* error);

/* One sentence. Lent, until the error is freed. */
DNP_API const char* dnp_error_message(const dnp_error* error);

/* NULL is allowed. */
DNP_API void dnp_error_free(dnp_error* error);

/* ---------------------------------------------------------------- images */

/* An RGB image, 3 bytes a pixel, rows from the top, without padding. Set `size` to sizeof(dnp_image), whichever
 * direction it goes. */
typedef struct dnp_image {
    size_t size;
    uint32_t height, width;
    const uint8_t* pixels; /* height * width * 3 bytes */
} dnp_image;

/* ---------------------------------------------------------------- pipelines */

/* An opened bundle with its graphs, which are loaded when they are first needed. */
typedef struct dnp_pipeline dnp_pipeline;

/* Opens the bundle in a folder, and verifies every byte of it.
 *
 * `options`: a JSON object, or NULL for {}. It may hold
 *   "backend"      "cpu", "cuda" for ONNX Runtime's CUDA provider, or "tensorrt"; "cpu" when it is left out.
 *   "device"       number of the GPU, 0 when it is left out.
 *   "onnxruntime"  path of ONNX Runtime's library, 1.21 or later. Otherwise the environment variable DNP_ONNXRUNTIME
 *                  names it, or the system finds libonnxruntime.so.1. A process has one: the first that is loaded.
 *   "plans"        folder of the plans that `dnp build` made; plans/ in the bundle when it is left out.
 *   "threads"      to compute with; every physical core that the process may use when it is left out.
 *
 * On success *pipeline is the caller's, to be freed by dnp_close. */
DNP_API dnp_error* dnp_open(const char* bundle, const char* options, dnp_pipeline** pipeline);

/* Loads the graphs now, and not with the first request: those of sampling, and of captioning too unless `captioner`
 * is 0, which plain guidance does without. */
DNP_API dnp_error* dnp_warm_up(dnp_pipeline* pipeline, int captioner);

/* What was opened, as a JSON object: "bundle" (its fingerprint), "name", "family", "precision", "backend", "runs_on"
 * (what really runs, as the library itself says), "defaults", "height", "width", "multiple" and "max_height", "max_width"
 * in pixels, "samplers". Lent, until the pipeline is closed. */
DNP_API const char* dnp_info(const dnp_pipeline* pipeline);

/* Stops what the pipeline is doing, within the network call that is under way (on a GPU, when it is done); the call that asked for it gives
 * DNP_CANCELLED. Does nothing when nothing runs. From any thread, and from callbacks. */
DNP_API void dnp_cancel(dnp_pipeline* pipeline);

/* Frees the pipeline, and memory that can be hundreds of megabytes. What it is doing is cancelled and waited for. No
 * call on it may begin once this has, and none may follow. Results outlive it. Refused, with DNP_ERROR, only in a
 * callback of the pipeline itself. NULL is allowed. */
DNP_API dnp_error* dnp_close(dnp_pipeline* pipeline);

/* ---------------------------------------------------------------- requests */

/* What a progress callback is told. The library sets `size` to that of the struct that it knows. */
typedef struct dnp_step {
    size_t size;
    const char* phase; /* "dns", "caption", "plain" or "final"; lent, for ever */
    uint32_t index;    /* how many steps of the phase are done, from 1 */
    uint32_t total;    /* how many there are; for "caption" the most there can be */
    uint32_t images;   /* how many images a preview has */
    void* context;     /* the library's own */
} dnp_step;

/* Decodes the present state of image `index` of a step, which costs one run of the decoder for all of them.
 * Only in the callback that got the step, and by its thread. The pixels are lent until the callback returns. */
DNP_API dnp_error* dnp_step_preview(const dnp_step* step, uint32_t index, dnp_image* image);

/* How a request is watched. Set `size` to sizeof(dnp_callbacks); members may be NULL. */
typedef struct dnp_callbacks {
    size_t size;
    void* user_data; /* handed to each callback as it is */
    /* After each step, on the thread of the call. Anything but 0 stops the work there, with DNP_CANCELLED. It must not
     * throw or jump out, and must not call the pipeline but by dnp_cancel, dnp_info and dnp_step_preview. */
    int (*progress)(void* user_data, const dnp_step* step);
} dnp_callbacks;

/* What a request gave. It is not changed by reading, and may be read by several threads at once. */
typedef struct dnp_result dnp_result;

/* Generates images. `settings` is a JSON object with the settings of `Request` (docs/requests.md), of which "prompt"
 * is required; what it leaves out is the bundle's default. `callbacks` may be NULL.
 *
 * Unless "negative" or "dnp": false says otherwise, the whole of diffusion-negative prompting runs: the diffusion-
 * negative image, its caption n*, and the image of the prompt against n*. A seed gives the image that it gives in
 * Python. On success *result is the caller's, to be freed by dnp_result_free. */
DNP_API dnp_error* dnp_generate(dnp_pipeline* pipeline, const char* settings, const dnp_callbacks* callbacks, dnp_result** result);

/* Only the first half: the diffusion-negative images, which are the DNP_DNS images of the result, and their captions
 * n*. Otherwise as dnp_generate. */
DNP_API dnp_error* dnp_find_negatives(dnp_pipeline* pipeline, const char* settings, const dnp_callbacks* callbacks, dnp_result** result);

/* Puts an image of any size into words. `settings`: a JSON object with "beams", "prefix", "min_length" and "max_length",
 * or NULL for {}. On success *caption is the caller's, to be freed by dnp_text_free. */
DNP_API dnp_error* dnp_caption(dnp_pipeline* pipeline, const dnp_image* image, const char* settings, char** caption);

DNP_API void dnp_text_free(char* text); /* NULL is allowed */

/* The kinds of images in a result. */
typedef enum dnp_kind {
    DNP_FINAL = 0, /* what was asked for */
    DNP_DNS = 1,   /* the diffusion-negative images, where n* was sought */
    DNP_PLAIN = 2  /* the same with plain guidance, where "compare" is true */
} dnp_kind;

/* How many images of a kind there are; 0 for those that were not asked for. */
DNP_API size_t dnp_result_count(const dnp_result* result, dnp_kind kind);

/* Image `index` of a kind. Its pixels are lent, until the result is freed. */
DNP_API dnp_error* dnp_result_image(const dnp_result* result, dnp_kind kind, size_t index, dnp_image* image);

/* Everything else, as a JSON object: "negatives" (n* of each image, "" for plain guidance), "request" (the settings,
 * all explicit), "seconds" (by phase), "inside" (how many of them within the library's runs), "bundle", "backend",
 * "precision", "runs_on", "warnings" (sentences about what the pipeline does without since it was opened, such as a plan
 * that cannot be used). Lent, until the result is freed. */
DNP_API const char* dnp_result_json(const dnp_result* result);

DNP_API void dnp_result_free(dnp_result* result); /* NULL is allowed */

#ifdef __cplusplus
}
#endif
#endif
