#include "job.hpp"

#include <algorithm>
#include <cmath>

#include "tokenizer.hpp"

namespace dnp::core {

namespace {

// The settings of a request by name, each with what it is when nobody says; null stands for the bundle's default.
const OrderedJson& request_defaults() {
    static const OrderedJson defaults{
        {"prompt", nullptr},     {"negative", nullptr},     {"dnp", true},
        {"compare", false},      {"seed", 0},               {"images", 1},
        {"windows", 1},          {"height", nullptr},       {"width", nullptr},
        {"sampler", nullptr},    {"steps", nullptr},        {"guidance", nullptr},
        {"eta", 0.0},            {"spacing", nullptr},      {"embedded_guidance", 1.0},
        {"methods", OrderedJson::object()},
        {"dns_seed", nullptr},   {"dns_sampler", nullptr},  {"dns_steps", nullptr},
        {"dns_guidance", nullptr}, {"dns_eta", 0.0},        {"dns_spacing", nullptr},
        {"beams", 1},            {"prefix", ""},            {"min_length", 0},
        {"max_length", nullptr}};
    return defaults;
}

OrderedJson with_defaults(const Json& settings, const OrderedJson& defaults) {
    if (!settings.is_object()) throw settings_error("the settings must be a JSON object, not ", shown(settings));
    Names known;
    for (const auto& [name, value] : defaults.items()) known.push_back(name);
    for (const auto& [name, value] : settings.items())
        if (!defaults.contains(name)) throw settings_error("unknown setting '", name, "'; ", nearest(name, known));
    OrderedJson full = defaults;
    for (const auto& [name, value] : settings.items()) full[name] = value;
    return full;
}

std::int64_t integer(const OrderedJson& full, const char* name, std::int64_t low, std::int64_t high) {
    Json value = full[name];
    if (!is_integer(value, low, high)) throw settings_error(name, " must be an integer from ", low, " to ", high, ", not ", shown(value));
    return value.get<std::int64_t>();
}

bool flag(const OrderedJson& full, const char* name) {
    if (!full[name].is_boolean()) throw settings_error(name, " must be true or false, not ", shown(full[name]));
    return full[name].get<bool>();
}

std::string text(const OrderedJson& full, const char* name, const char* called) {
    if (!full[name].is_string()) throw settings_error("the ", called, " must be text, not ", shown(full[name]));
    auto found = full[name].get<std::string>();
    check_text(found, called);
    return found;
}

std::string words(const OrderedJson& full, const char* name, const char* called, const char* remedy) {
    std::string found = text(full, name, called);
    if (is_blank(found)) throw settings_error("the ", called, " is empty; ", remedy);
    return found;
}

// One number a step; a single one is for all.
Doubles numbers(const OrderedJson& full, const char* name, std::int64_t steps) {
    Json value = full[name];
    for (const Json& number : value.is_array() ? value : Json::array({value}))
        if (!is_guidance(number)) throw settings_error(name, " must be a finite number (or one a step), not ", shown(number));
    return value.is_array() ? value.get<Doubles>() : Doubles(static_cast<std::size_t>(steps), value.get<double>());
}

double eta(const OrderedJson& full, const char* name) {
    Json value = full[name];
    if (!is_number(value) || value.get<double>() < 0 || value.get<double>() > 1)
        throw settings_error("eta is ", shown(value), "; give a number from 0 (no fresh noise) to 1");
    return value.get<double>();
}

// A choice that a table checks itself; null is none.
std::string choice(const OrderedJson& full, const char* name, const char* called) {
    if (full[name].is_null()) return {};
    if (!full[name].is_string() || full[name].get_ref<const std::string&>().empty()) throw settings_error(called, " ", shown(full[name]), " is unknown");
    return full[name].get<std::string>();
}

std::int64_t check_steps(const Json& value, const Schedule& schedule) {
    if (!is_integer(value, 1, schedule.train_timesteps))
        throw settings_error("steps is ", shown(value), "; give a whole number from 1 to ", schedule.train_timesteps, ", such as 20");
    return value.get<std::int64_t>();
}

std::int64_t side(const OrderedJson& full, const char* name, std::int64_t most, const Bundle& bundle) {
    std::int64_t grain = bundle.latents.multiple * bundle.latents.vae_scale_factor;
    std::int64_t size = integer(full, name, grain, most * bundle.latents.vae_scale_factor);
    if (size % grain)
        throw settings_error(name, " ", size, " does not fit the latents; use a multiple of ", grain, ", such as ",
                             std::max(grain, (size + grain / 2) / grain * grain));
    return size;
}

std::map<std::string, double> methods(const OrderedJson& full, const Bundle& bundle) {
    const OrderedJson& given = full["methods"];
    if (!given.is_object() || !std::all_of(given.begin(), given.end(), [](const OrderedJson& value) { return is_guidance(value); }))
        throw settings_error("methods must be numbers by name, such as {\"rescale\": 0.7}, not ", shown(given));
    auto found = given.get<std::map<std::string, double>>();
    if (!found.empty() && !bundle.guidance.methods)
        throw settings_error("this bundle's graph has no guidance methods; export the model again with --guidance-methods");
    if (found.count("perp_neg") && bundle.guidance.roles < 3)
        throw settings_error("perp_neg needs a third branch, and this bundle's graph has two; export the model again with --guidance-methods");
    if (found.count("perp_neg") && !flag(full, "dnp"))
        throw settings_error("perp_neg weighs a negative prompt, but DNP is switched off; drop one of the two");
    return found;
}

CaptionSettings search(const OrderedJson& full, const Bundle& bundle) {
    const auto& spec = bundle.caption;
    CaptionSettings found;
    auto whole = [&](const char* name, std::int64_t low, std::int64_t high) {
        Json value = full[name];
        if (!is_integer(value, low, high)) throw settings_error(name, " must be a whole number from ", low, " to ", high, ", not ", shown(value));
        return value.get<std::int64_t>();
    };
    found.beams = whole("beams", 1, std::min(max_beams, std::max<std::int64_t>(1, (spec.vocab - 1) / 2)));
    found.max_length = whole("max_length", 2, spec.length);
    found.min_length = whole("min_length", 0, found.max_length);
    found.prefix = text(full, "prefix", "caption prefix");
    return found;
}

}  // namespace

Job resolve(const Json& settings, const Bundle& bundle, const Schedule& schedule) {
    OrderedJson full = with_defaults(settings, request_defaults());
    if (!settings.contains("prompt")) throw settings_error("the settings name no 'prompt'; add one");
    auto fill = [&](const char* name, const OrderedJson& value) {
        if (full[name].is_null()) full[name] = value;
    };
    std::int64_t scale = bundle.latents.vae_scale_factor;
    fill("height", bundle.latents.height * scale), fill("width", bundle.latents.width * scale);
    fill("sampler", bundle.final.sampler), fill("steps", bundle.final.steps), fill("guidance", bundle.final.guidance);
    fill("dns_seed", full["seed"]);
    fill("dns_sampler", bundle.dns.sampler), fill("dns_steps", bundle.dns.steps), fill("dns_guidance", bundle.dns.guidance);
    fill("max_length", bundle.caption.max_length);

    Job job;
    // Beside a negative prompt it may be empty: ∅, for n* alone.
    job.prompt = full["negative"].is_null() ? words(full, "prompt", "prompt", "say what the image should show") : text(full, "prompt", "prompt");
    bool dnp = flag(full, "dnp");
    job.compare = flag(full, "compare"), job.runs_dns = dnp && full["negative"].is_null();
    if (!full["negative"].is_null()) {
        job.negative = words(full, "negative", "negative prompt", "say what the image should not show, or switch DNP off (\"dnp\": false)");
        if (!dnp) throw settings_error("a negative prompt was given, but DNP is switched off; drop one of the two");
    }
    std::int64_t last_seed = std::numeric_limits<std::int64_t>::max() - max_images + 1;
    job.images = integer(full, "images", 1, max_images), job.windows = integer(full, "windows", 1, max_windows);
    job.seed = integer(full, "seed", 0, last_seed), job.dns_seed = integer(full, "dns_seed", 0, last_seed);
    job.height = side(full, "height", bundle.latents.max_height, bundle), job.width = side(full, "width", bundle.latents.max_width, bundle);
    Json embedded = full["embedded_guidance"];
    if (!is_guidance(embedded)) throw settings_error("embedded_guidance must be a finite number, not ", shown(embedded));
    if (embedded != 1 && !bundle.guidance.embedded)
        throw settings_error("embedded_guidance is for distilled models whose network takes it; use guidance");

    Schedule sized = schedule.sized(job.height / scale, job.width / scale);
    auto table = [&](const std::string& prefix, double sign, const std::map<std::string, double>& methods) {
        auto name = [&](const char* setting) { return prefix + setting; };
        SamplerSettings asked{choice(full, name("sampler").c_str(), "sampler"), check_steps(full[name("steps")], sized), {}};
        asked.guidance = numbers(full, name("guidance").c_str(), asked.steps);
        for (double& w : asked.guidance) w *= sign;
        asked.eta = eta(full, name("eta").c_str()), asked.spacing = choice(full, name("spacing").c_str(), "spacing");
        asked.embedded = embedded.get<double>(), asked.methods = methods;
        return sampler_table(sized, asked);
    };
    job.final = table("", 1, methods(full, bundle));
    try {  // also where DNS does not run: what is stored with a picture is always valid
        job.dns = table("dns_", -1, {});
    } catch (const Error& error) {
        throw settings_error("DNS pass: ", error.what());
    }
    if (job.runs_dns) job.caption = search(full, bundle);
    job.request = std::move(full);
    return job;
}

CaptionSettings caption_settings(const Json& settings, const Bundle& bundle) {
    OrderedJson full = with_defaults(settings, {{"beams", 1}, {"prefix", ""}, {"min_length", 0}, {"max_length", nullptr}});
    if (full["max_length"].is_null()) full["max_length"] = bundle.caption.max_length;
    return search(full, bundle);
}

void check_defaults(const Bundle& bundle, const Schedule& schedule) {
    Schedule sized = schedule.sized(bundle.latents.height, bundle.latents.width);
    for (auto [defaults, sign] : {std::pair{&bundle.final, 1.0}, {&bundle.dns, -1.0}}) {
        check_steps(defaults->steps, sized);
        SamplerSettings asked{defaults->sampler, defaults->steps, Doubles(static_cast<std::size_t>(defaults->steps), sign * defaults->guidance)};
        sampler_table(sized, asked);
    }
}

}  // namespace dnp::core
