// dnp-native: the library as a command.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <vector>

#include <nlohmann/json.hpp>

#include "dnp.hpp"
#include "png_file.hpp"

namespace {

using Json = nlohmann::json;

constexpr const char* usage =
    "dnp-native generate BUNDLE PROMPT [--out FOLDER] [--SETTING VALUE ...]   images, as PNG files\n"
    "dnp-native caption BUNDLE IMAGE.png [--SETTING VALUE ...]                an image in words\n"
    "dnp-native info BUNDLE                                                   what a bundle is, and what it runs on\n"
    "\n"
    "A SETTING is one of Request: --seed 7, --steps 20, --sampler euler, --dns-guidance 1.5, --dnp false, and so on.\n"
    "--onnxruntime FILE names ONNX Runtime's library, --plans FOLDER where plans are, --threads N how many threads compute;\n"
    "--backend cuda or tensorrt runs on an NVIDIA GPU, --device N on another than the first.\n"
    "--json FILE keeps all that a result tells, and the most memory that the process had.\n";

constexpr const char* options[] = {"backend", "device", "onnxruntime", "plans", "threads"};  // of dnp_open

struct Arguments {
    std::vector<std::string> words;
    Json settings = Json::object(), options = Json::object();
    std::string out = ".", json;
};

// `--dns-steps 20` is the setting "dns_steps": 20. What is no JSON is text.
Arguments parse(int count, char** given) {
    Arguments arguments;
    for (int i = 1; i < count; ++i) {
        std::string word = given[i];
        if (word.rfind("--", 0) != 0) {
            arguments.words.push_back(word);
            continue;
        }
        if (i + 1 == count) throw std::runtime_error(word + " needs a value");
        std::string name = word.substr(2), value = given[++i];
        std::replace(name.begin(), name.end(), '-', '_');
        bool option = std::find(std::begin(options), std::end(options), name) != std::end(options);
        bool text = name == "out" || name == "json" || name == "onnxruntime" || name == "plans" || name == "negative" || name == "prefix";
        Json parsed = text ? Json(value) : Json::parse(value, nullptr, false);
        if (parsed.is_discarded()) parsed = value;
        if (name == "out") {
            arguments.out = value;
        } else if (name == "json") {
            arguments.json = value;
        } else {
            (option ? arguments.options : arguments.settings)[name] = parsed;
        }
    }
    return arguments;
}

// The largest resident size of this process so far, in bytes.
std::size_t peak_memory() {
    std::ifstream file("/proc/self/status");
    std::size_t kilobytes = 0;
    for (std::string line; std::getline(file, line);)
        if (line.rfind("VmHWM:", 0) == 0) kilobytes = std::stoul(line.substr(6));
    return kilobytes << 10;
}

std::atomic<bool> interrupted{false};

// The first signal stops the work at its next step, a second one the process.
void interrupt(int signal) {
    interrupted = true;
    std::signal(signal, SIG_DFL);
}

void generate(Arguments arguments) {
    dnp::Pipeline pipeline(arguments.words[1], arguments.options.dump());
    arguments.settings["prompt"] = arguments.words[2];
    dnp::Result result = pipeline.generate(arguments.settings.dump(), [&](const dnp::StepView& step) {
        if (isatty(STDERR_FILENO))
            std::fprintf(stderr, "\r%s %u/%u   %s", step.phase(), step.index(), step.total(), step.index() == step.total() ? "\n" : "");
        if (interrupted) pipeline.cancel();
        return true;
    });
    Json told = Json::parse(result.json());
    std::filesystem::create_directories(arguments.out);
    auto seed = told["request"]["seed"].get<std::int64_t>();
    bool dnp = told["request"]["dnp"].get<bool>();
    for (auto [kind, name] : {std::pair{DNP_FINAL, dnp ? "dnp" : "plain"}, {DNP_DNS, "dns"}, {DNP_PLAIN, "plain"}}) {
        if (kind == DNP_PLAIN && !dnp) continue;  // the final image is it
        for (std::size_t i = 0; i < result.count(kind); ++i) {
            Json settings{{"request", told["request"]}, {"kind", name}, {"index", i}, {"version", dnp_version()}};
            for (const char* key : {"bundle", "backend", "precision", "runs_on"}) settings[key] = told[key];
            dnp_image image = result.image(i, kind);
            auto file = std::filesystem::path(arguments.out) / (std::to_string(seed + static_cast<std::int64_t>(i)) + "-" + name + ".png");
            write_png(file.string(), image.height, image.width, image.pixels, settings.dump());
            std::cout << file.string() << "\n";
        }
    }
    for (const Json& warning : told["warnings"]) std::cerr << "warning: " << warning.get<std::string>() << "\n";
    for (const Json& negative : told["negatives"]) std::cout << "n*: " << negative.get<std::string>() << "\n";
    told["peak_memory_bytes"] = peak_memory();
    if (!arguments.json.empty() && !(std::ofstream(arguments.json) << told.dump(1) << std::endl)) throw std::runtime_error(arguments.json + ": cannot be written");
    std::printf("%.3f s on %s\n", told["seconds"]["total"].get<double>(), told["runs_on"].get<std::string>().c_str());
}

void caption(const Arguments& arguments) {
    Picture picture = read_png(arguments.words[2]);
    dnp::Pipeline pipeline(arguments.words[1], arguments.options.dump());
    std::cout << pipeline.caption(picture.height, picture.width, picture.pixels.data(), arguments.settings.dump()) << "\n";
}

}  // namespace

int main(int count, char** given) {
    std::signal(SIGINT, interrupt), std::signal(SIGTERM, interrupt);
    try {
        Arguments arguments = parse(count, given);
        std::string command = arguments.words.empty() ? "" : arguments.words[0];
        if (command == "generate" && arguments.words.size() == 3) {
            generate(arguments);
        } else if (command == "caption" && arguments.words.size() == 3) {
            caption(arguments);
        } else if (command == "info" && arguments.words.size() == 2) {
            std::cout << Json::parse(dnp::Pipeline(arguments.words[1], arguments.options.dump()).info()).dump(2) << "\n";
        } else {
            std::cerr << usage;
            return 2;
        }
        return 0;
    } catch (const dnp::Failure& failure) {
        std::cerr << "dnp-native: " << failure.what() << "\n";
        return failure.code;
    } catch (const std::exception& error) {
        std::cerr << "dnp-native: " << error.what() << "\n";
        return 1;
    }
}
