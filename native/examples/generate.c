/* A prompt to an image, in C: example_c BUNDLE PROMPT IMAGE.ppm */
#include <dnp.h>
#include <stdio.h>

static int show(void* user_data, const dnp_step* step) {
    (void)user_data;
    fprintf(stderr, "%s %u/%u\n", step->phase, (unsigned)step->index, (unsigned)step->total);
    return 0; /* anything else stops the work */
}

static int failed(dnp_error* error) {
    if (!error) return 0;
    fprintf(stderr, "%s\n", dnp_error_message(error));
    dnp_error_free(error);
    return 1;
}

static int write_image(const dnp_image* image, const char* path) {
    size_t bytes = (size_t)3 * image->height * image->width;
    FILE* file = fopen(path, "wb");
    if (!file) return 1;
    fprintf(file, "P6\n%u %u\n255\n", (unsigned)image->width, (unsigned)image->height);
    bytes -= fwrite(image->pixels, 1, bytes, file);
    return fclose(file) != 0 || bytes != 0;
}

int main(int count, char** arguments) {
    dnp_pipeline* pipeline = NULL;
    dnp_result* result = NULL;
    dnp_image image = {sizeof(dnp_image), 0, 0, NULL};
    dnp_callbacks callbacks = {sizeof(dnp_callbacks), NULL, show};
    char settings[1024];
    int wrong;
    if (count != 4) {
        fprintf(stderr, "%s BUNDLE PROMPT IMAGE.ppm\n", arguments[0]);
        return 2;
    }
    /* A program that takes prompts from others escapes them as JSON asks for. */
    snprintf(settings, sizeof settings, "{\"prompt\": \"%s\", \"seed\": 7, \"steps\": 10}", arguments[2]);
    wrong = failed(dnp_open(arguments[1], NULL, &pipeline)) ||
            failed(dnp_generate(pipeline, settings, &callbacks, &result)) ||
            failed(dnp_result_image(result, DNP_FINAL, 0, &image)) || write_image(&image, arguments[3]);
    if (!wrong) printf("%s\n", dnp_result_json(result));
    dnp_result_free(result);
    return failed(dnp_close(pipeline)) || wrong;
}
