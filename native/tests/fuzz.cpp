// A bounded loop of damaged manifests, tokenizers and settings: each is read, or refused by an Error; nothing else.
// dnp-fuzz BUNDLE COUNT [SEED]
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "job.hpp"
#include "tokenizer.hpp"

using namespace dnp::core;

namespace {

std::mt19937_64 generator;

std::size_t below(std::size_t count) { return generator() % count; }

// Bytes changed, parts taken away, doubled and moved, numbers and words put in the place of others.
std::string damaged(std::string text) {
    static const char* const words[] = {"null", "-1", "0", "1e308", "-1e400", "18446744073709551615", "true", "[]", "{}", "\"\"", "\"\\u0000\"", "\"\\ud800\"", "[[[[[["};
    for (std::size_t times = 1 + below(4); times-- > 0 && !text.empty();) {
        std::size_t at = below(text.size()), length = std::min(text.size() - at, 1 + below(40));
        switch (below(5)) {
            case 0: text[at] = static_cast<char>(generator()); break;
            case 1: text.erase(at, length); break;
            case 2: text.insert(below(text.size()), text.substr(at, length)); break;
            case 3: text.replace(at, length, words[below(std::size(words))]); break;
            default: {  // a whole value
                std::size_t colon = text.find(": ", at), end = text.find_first_of(",\n}", colon);
                if (colon != std::string::npos && end != std::string::npos) text.replace(colon + 2, end - colon - 2, words[below(std::size(words))]);
            }
        }
    }
    return text;
}

template <class Work>
void survives(const std::string& input, Work work) {
    try {
        work();
    } catch (const Error&) {
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s escaped, of:\n%s\n", error.what(), input.c_str());
        std::exit(1);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 3) return 2;
    generator.seed(count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 1);
    Bundle bundle = open_bundle(arguments[1]);
    Schedule schedule = read_schedule(bundle.schedule);
    std::string manifest = read_file(bundle.path / "bundle.json", 1 << 24), tokenizers[2];
    tokenizers[0] = read_file(bundle.path / bundle.text.tokenizers[0].file, 1 << 24);
    tokenizers[1] = read_file(bundle.path / bundle.caption.tokenizer, 1 << 24);
    auto file = std::filesystem::temp_directory_path() / ("dnp-fuzz-" + std::to_string(std::random_device()()) + ".json");
    const std::string settings = R"({"prompt": "a cat", "negative": null, "dnp": true, "compare": false, "seed": 7, "images": 2,
 "height": 64, "width": 64, "sampler": "dpmpp_2m", "steps": 9, "guidance": [1, 2, 3, 4, 5, 6, 7, 8, 9], "eta": 0.0, "spacing": "leading", "methods": {},
 "dns_steps": 3, "dns_guidance": 1.5, "beams": 3, "prefix": "a", "min_length": 2, "max_length": 20})";
    for (long left = std::atol(arguments[2]); left-- > 0;) {
        std::string text = damaged(manifest);
        survives(text, [&] {
            Manifest read = parse_manifest(parse_json(text, "manifest", Code::bundle), "manifest");
            Bundle other;
            static_cast<Manifest&>(other) = read;
            check_defaults(other, read_schedule(read.schedule));
        });
        text = damaged(settings);
        survives(text, [&] { resolve(parse_json(text, "settings", Code::settings), bundle, schedule); });
        text = damaged(tokenizers[left % 2]);
        std::ofstream(file, std::ios::binary) << text;
        survives(text, [&] {
            Tokenizer tokenizer(file);
            tokenizer.decode(tokenizer.encode(damaged("A caf\xc3\xa9 <|endoftext|>, \xe7\x94\xbb\xe5\x83\x8f's [SEP]  x")));
        });
    }
    std::filesystem::remove(file);
}
