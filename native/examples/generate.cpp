// Two pipelines at once, and a preview of every step, in C++: example_cpp BUNDLE
#include <dnp.hpp>

#include <cstdio>
#include <thread>

int main(int count, char** arguments) {
    if (count != 2) return std::fprintf(stderr, "%s BUNDLE\n", arguments[0]), 2;
    auto draw = [&](int seed) {
        try {
            dnp::Pipeline pipeline(arguments[1], R"({"threads": 1})");
            auto on_step = [&](const dnp::StepView& step) {
                dnp_image preview = step.preview();
                std::printf("seed %d: %s %u/%u, %ux%u\n", seed, step.phase(), step.index(), step.total(), preview.width, preview.height);
                return true;
            };
            dnp::Result result = pipeline.generate(R"({"prompt": "a small blue square", "steps": 4, "dns_steps": 4, "seed": )" + std::to_string(seed) + "}", on_step);
            dnp_image image = result.image(0);
            std::printf("seed %d: %s; in words: %s\n", seed, result.json().c_str(), pipeline.caption(image.height, image.width, image.pixels).c_str());
        } catch (const dnp::Failure& failure) {
            std::fprintf(stderr, "seed %d: %s\n", seed, failure.what());
            std::exit(failure.code);
        }
    };
    std::thread first(draw, 1), second(draw, 2);
    first.join(), second.join();
}
