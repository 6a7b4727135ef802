// Answers questions about single parts of the library, one JSON object a line on each side, so that a test in Python
// can hold them against Python's own. Floats travel as the eight hexadecimal digits of their bits.
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>

#include "captioner.hpp"
#include "job.hpp"
#include "noise.hpp"
#include "plans.hpp"
#include "tokenizer.hpp"

using namespace dnp::core;

namespace {

std::string bits(const float* values, std::size_t count) {
    std::string text(count * 8, ' ');
    for (std::size_t i = 0; i < count; ++i) {
        std::uint32_t word;
        std::memcpy(&word, values + i, 4);
        for (int digit = 0; digit < 8; ++digit) text[i * 8 + static_cast<std::size_t>(digit)] = "0123456789abcdef"[word >> (28 - 4 * digit) & 15];
    }
    return text;
}

const Tokenizer& tokenizer(const std::string& file) {
    static std::map<std::string, std::unique_ptr<Tokenizer>> open;
    auto& found = open[file];
    if (!found) found = std::make_unique<Tokenizer>(file);
    return *found;
}

Json noise(const Json& ask) {  // {"seed", "counts"}: one draw after the other
    TorchNoise generator(ask["seed"].get<std::int64_t>());
    Json draws = Json::array();
    for (const Json& count : ask["counts"]) {
        std::vector<float> values(count.get<std::size_t>());
        generator.randn(values.data(), values.size());
        draws.push_back(bits(values.data(), values.size()));
    }
    return draws;
}

Json table(const Json& ask) {  // {"schedule", "size", "sampler", "steps", "guidance", ...}
    SamplerSettings asked{ask["sampler"].get<std::string>(), ask["steps"].get<std::int64_t>(), ask["guidance"].get<Doubles>()};
    asked.eta = ask.value("eta", 0.0), asked.spacing = ask.value("spacing", std::string()), asked.embedded = ask.value("embedded", 1.0);
    asked.methods = ask.value("methods", std::map<std::string, double>());
    SamplerTable found = sampler_table(read_schedule(ask["schedule"]).sized(ask["size"][0].get<std::int64_t>(), ask["size"][1].get<std::int64_t>()), asked);
    return {{"rows", bits(found.rows[0].data(), found.rows.size() * column::count)},
            {"init_noise_sigma", found.init_noise_sigma},
            {"roles", found.roles},
            {"noise_steps", found.noise_steps}};
}

Json encode(const Json& ask) {  // {"file", "texts"}
    Json ids = Json::array();
    for (const Json& text : ask["texts"]) ids.push_back(tokenizer(ask["file"].get<std::string>()).encode(text.get<std::string>()));
    return ids;
}

Json decode(const Json& ask) {  // {"file", "ids"}
    Json texts = Json::array();
    for (const Json& ids : ask["ids"]) texts.push_back(tokenizer(ask["file"].get<std::string>()).decode(ids.get<Ids>()));
    return texts;
}

Json resize(const Json& ask) {  // {"source", "target"}
    auto weights = resize_weights(ask["source"].get<std::int64_t>(), ask["target"].get<std::int64_t>());
    return bits(weights.data(), weights.size());
}

Json bundle(const Json& ask) { return open_bundle(ask["folder"].get<std::string>()).fingerprint; }

Json resolved(const Json& ask) {  // {"folder", "settings"}: what a request is with all that it left out
    static std::map<std::string, Bundle> bundles;
    auto folder = ask["folder"].get<std::string>();
    if (!bundles.count(folder)) bundles[folder] = open_bundle(folder);
    const Bundle& bundle = bundles[folder];
    return resolve(ask["settings"], bundle, read_schedule(bundle.schedule)).request;
}

Json plan(const Json& ask) {  // {"folder", "plans", "graph", "version"}: the plan of ONNX Runtime's that is used, or why none is
    Bundle bundle = open_bundle(ask["folder"].get<std::string>());
    auto [found, reason] = PlanStore(ask["plans"].get<std::string>()).find(cpu_plan(bundle, ask["graph"].get<std::string>(), ask["version"].get<std::string>()));
    return found ? Json(found->path.string()) : Json{{"reason", reason}};
}

// An answer to a question: {"value"}, or {"error", "code"}.
Json answer(const Json& ask) {
    static const std::map<std::string, Json (*)(const Json&)> answers{{"noise", noise},   {"table", table},   {"encode", encode},  {"decode", decode},
                                                                     {"resize", resize}, {"bundle", bundle}, {"resolve", resolved},
                                                                     {"plan", plan}};
    try {
        return {{"value", answers.at(ask["ask"].get<std::string>())(ask)}};
    } catch (const Error& error) {
        return {{"error", error.what()}, {"code", static_cast<int>(error.code)}};
    }
}

Floats of_bits(const std::string& text) {
    Floats values(text.size() / 8);
    for (std::size_t i = 0; i < values.size(); ++i) {
        auto word = static_cast<std::uint32_t>(std::stoul(text.substr(i * 8, 8), nullptr, 16));
        std::memcpy(&values[i], &word, 4);
    }
    return values;
}

// Equal but for the last bits of a table: they are another's on another processor.
bool agree(const Json& found, const Json& expected) {
    if (!found.is_object() || !found.contains("rows")) return found == expected;
    Floats a = of_bits(found["rows"].get<std::string>()), b = of_bits(expected["rows"].get<std::string>());
    bool close = a.size() == b.size();
    for (std::size_t i = 0; close && i < a.size(); ++i) close = std::abs(a[i] - b[i]) <= 2e-7f + 2e-6f * std::abs(b[i]);
    return close && found["roles"] == expected["roles"] && found["noise_steps"] == expected["noise_steps"];
}

// Golden questions with Python's answers: how many are answered in another way. Files are named from the file's folder.
int check(const std::string& file) {
    int wrong = 0;
    for (Json question : Json::parse(std::ifstream(file))) {
        if (question.contains("file")) question["file"] = (std::filesystem::path(file).parent_path() / question["file"].get<std::string>()).string();
        Json found = answer(question);
        if (found.contains("value") && agree(found["value"], question["value"])) continue;
        std::cerr << "another answer to " << question.dump().substr(0, 300) << "\n";
        ++wrong;
    }
    return wrong;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 2) return check(arguments[1]) != 0;
    for (std::string line; std::getline(std::cin, line);) std::cout << answer(Json::parse(line)).dump() << std::endl;
}
