#include "pipeline.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "processor.hpp"
#include "version.hpp"

namespace dnp::core {

namespace {

constexpr int most_threads = 1024, most_devices = 65535;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Engine engine_of(const Json& options) {
    if (!options.is_object()) throw settings_error("the options must be a JSON object, not ", shown(options));
    Engine engine;
    for (const auto& [name, value] : options.items()) {
        if (name == "backend") {
            if (value == "tensorrt-rtx")
                throw backend_error("libdnp does not run the plans of TensorRT for RTX: its headers are not public; use the backend 'cuda', or 'tensorrt' on a card that has it");
            check_choice(name, value, {"cpu", "cuda", "tensorrt"});
            engine.backend = value.get<std::string>();
        } else if (name == "device") {
            if (!is_integer(value, 0, most_devices)) throw settings_error("device must be the number of a GPU, not ", shown(value));
            engine.device = value.get<int>();
        } else if (name == "onnxruntime") {
            if (!value.is_string()) throw settings_error("onnxruntime must be the path of a library, not ", shown(value));
            engine.library = value.get<std::string>();
        } else if (name == "threads") {
            if (!is_integer(value, 1, most_threads)) throw settings_error("threads must be an integer from 1 to ", most_threads, ", not ", shown(value));
            engine.threads = value.get<int>();
        } else if (name == "plans") {
            if (!value.is_string()) throw settings_error("plans must be the path of a folder, not ", shown(value));
            engine.plans = value.get<std::string>();
        } else {
            throw settings_error("unknown option '", name, "'; ", nearest(name, {"backend", "device", "onnxruntime", "plans", "threads"}));
        }
    }
    if (engine.device && engine.backend == "cpu") throw settings_error("device is for a backend on a GPU, and 'cpu' runs on the processor; leave it out");
    if (!engine.threads) engine.threads = core_count();
    return engine;
}

// The bundle's schedule. Throws bundle_error when its own defaults cannot be honoured with it.
Schedule schedule_of(const Bundle& bundle) {
    try {
        Schedule schedule = read_schedule(bundle.schedule);
        check_defaults(bundle, schedule);
        return schedule;
    } catch (const Error& error) {
        throw bundle_error(bundle.path.string(), ": its own settings cannot be honoured: ", error.what());
    }
}

}  // namespace

// The pipeline's one turn to work, for as long as this lives.
class Pipeline::Turn {
public:
    explicit Turn(Pipeline& pipeline) : pipeline_(pipeline), lock_(pipeline.busy_, std::defer_lock) {
        // A thread that holds a mutex must not try it again, and a callback's thread does.
        if (pipeline.worker_ == std::this_thread::get_id() || !lock_.try_lock())
            throw Error(Code::general, "this pipeline is busy with another request; wait for it, or open one per thread");
        pipeline.stop_.reset();
        if (pipeline.ended_) throw Error(Code::cancelled, "this pipeline is being closed");  // or it ends within a step, by `end`
        pipeline.worker_ = std::this_thread::get_id();
    }
    ~Turn() { pipeline_.worker_ = std::thread::id(); }

private:
    Pipeline& pipeline_;
    std::unique_lock<std::mutex> lock_;
};

// What one job does, part by part.
class Pipeline::Run {
public:
    Run(Pipeline& pipeline, const Job& job, const Progress& progress) : p_(pipeline), job_(job), progress_(progress), started_(now()) {
        add("open", p_.opening_);
        started_ -= p_.opening_;
        *p_.engine_.inside = 0;
        timed("open", [&] { p_.denoiser(), p_.conditioner(), p_.decode(); });
        if (job.runs_dns) timed("open", [&] { p_.captioner(); });
        p_.opening_ = 0;
        at_once_ = p_.decode().at_most("batch", p_.denoiser().at_most(std::min(batch, job.images)));
        if (job.runs_dns) at_once_ = p_.captioner().at_most(at_once_, job.caption);
        check(at_once_);
        if (job.images % at_once_) check(job.images % at_once_);
    }

    // The DNS images and n* of each, into `result`.
    void find_negatives(Result& result) {
        std::vector<std::string> prompts(count(), job_.prompt), empty(count());
        result.dns = sample("dns", job_.dns, prompts, empty, job_.dns_seed);
        for (std::int64_t start = 0; start < job_.images; start += at_once_) {
            Pixels part{std::min(at_once_, job_.images - start), job_.height, job_.width, {}};
            part.values.assign(result.dns.image(start), result.dns.image(start + part.count));
            auto report = [&](std::int64_t length) { tell({"caption", length, job_.caption.max_length, part.count, [&] { return part; }}); };
            std::vector<std::string> captions;
            timed("caption", [&] { captions = p_.captioner().captions(part, job_.caption, p_.stop_, report); });
            result.negatives.insert(result.negatives.end(), captions.begin(), captions.end());
        }
        for (std::size_t i = 0; i < result.negatives.size(); ++i)
            if (is_blank(result.negatives[i]))
                throw Error(Code::general, cat("the captioner has no words for the DNS image of seed ", job_.dns_seed + static_cast<std::int64_t>(i),
                                               ", and an empty n* would be plain guidance; raise min_length, take another seed, or write n* yourself "
                                               "(negative)"));
    }

    // Every (prompt, negative, seed), in batches.
    Pixels sample(const char* phase, const SamplerTable& table, const std::vector<std::string>& prompts, const std::vector<std::string>& negatives,
                  std::int64_t seed) {
        Pixels images{0, job_.height, job_.width, {}};
        std::int64_t batches = (job_.images + at_once_ - 1) / at_once_;
        for (std::int64_t number = 0; number < batches; ++number) {
            std::int64_t start = number * at_once_, part = std::min(at_once_, job_.images - start);
            timed(phase, [&] { join(table, prompts, negatives, seed, start, part); });
            for (std::int64_t call = 1; call <= table.calls(); ++call) {
                timed(phase, [&] { p_.denoiser().step(p_.stop_); });
                tell({phase, number * table.calls() + call, batches * table.calls(), part, [&] { return p_.decoded(p_.denoiser().clean_latents()); }});
            }
            timed("decode", [&] { append(phase, seed + start, images); });
        }
        return images;
    }

    std::map<std::string, double> seconds() {
        seconds_["total"] = now() - started_;
        return seconds_;
    }

private:
    std::size_t count() const { return static_cast<std::size_t>(job_.images); }

    // Throws settings_error when plans do not take what the job needs for so many images.
    void check(std::int64_t images) {
        std::int64_t scale = p_.bundle_.latents.vae_scale_factor, height = job_.height / scale, width = job_.width / scale;
        p_.conditioner().check(job_.windows);
        p_.decode().check({{"places", images}, {"batch", images}, {"height", height}, {"width", width}});
        p_.denoiser().check(job_.final, images, height, width, job_.windows * p_.bundle_.text.length);
        if (!job_.runs_dns) return;
        p_.denoiser().check(job_.dns, images, height, width, job_.windows * p_.bundle_.text.length);
        p_.captioner().check(images, job_.height, job_.width, job_.caption);
    }

    // A sample into each place, with its negative prompt and its prompt; with Perp-Neg ∅ besides.
    void join(const SamplerTable& table, const std::vector<std::string>& prompts, const std::vector<std::string>& negatives, std::int64_t seed,
              std::int64_t start, std::int64_t part) {
        auto slice = [&](const std::vector<std::string>& texts) { return std::vector<std::string>(texts.begin() + start, texts.begin() + start + part); };
        std::vector<std::int64_t> seeds;
        for (std::int64_t i = 0; i < part; ++i) seeds.push_back(seed + start + i);
        std::int64_t scale = p_.bundle_.latents.vae_scale_factor;
        p_.denoiser().open(table, seeds, job_.height / scale, job_.width / scale, job_.windows * p_.bundle_.text.length);
        std::vector<std::vector<std::string>> of_roles{slice(negatives), slice(prompts)};
        if (table.perp_neg()) of_roles = {std::vector<std::string>(static_cast<std::size_t>(part)), slice(prompts), slice(negatives)};
        for (std::size_t role = 0; role < of_roles.size(); ++role)
            p_.conditioner().write(p_.denoiser(), static_cast<std::int64_t>(role), of_roles[role], job_.height, job_.width, job_.windows, p_.stop_);
    }

    void append(const char* phase, std::int64_t seed, Pixels& images) {
        Buffer& latents = p_.denoiser().latents();
        if (!std::all_of(latents.as<float>(), latents.as<float>() + latents.count(), [](float value) { return std::isfinite(value); }))
            throw Error(Code::general, cat("the latents of the ", phase, " pass are no longer finite numbers; bring the guidance nearer to 0, or use a "
                                           "bundle of higher precision"));
        Pixels part = p_.decoded(latents);
        for (std::int64_t i = 0; i < part.count; ++i)
            if (auto [least, most] = std::minmax_element(part.image(i), part.image(i + 1)); *least == *most)
                throw Error(Code::general, cat("the ", phase, " image of seed ", seed + i, " is one flat colour, as when a decoder overflows in fp16; use a "
                                               "bundle of higher precision, or export it with --check-ranges"));
        images.count += part.count;
        images.values.insert(images.values.end(), part.values.begin(), part.values.end());
    }

    void tell(const Step& step) {
        double before = now();
        bool goes_on = !progress_ || progress_(step);
        outside_ += now() - before;
        if (p_.stop_.requested()) throw Error(Code::cancelled, cat("cancelled in ", step.phase, " step ", step.index, " of ", step.total));
        if (!goes_on) throw Error(Code::cancelled, cat("stopped by the progress callback in ", step.phase, " step ", step.index, " of ", step.total));
    }

    void add(const char* phase, double seconds) { seconds_[phase] += seconds; }

    // Counts the time of `work` for a phase, but for what callbacks took of it.
    template <class Work>
    void timed(const char* phase, Work work) {
        double before = now(), elsewhere = outside_;
        work();
        add(phase, now() - before - (outside_ - elsewhere));
    }

    Pipeline& p_;
    const Job& job_;
    const Progress& progress_;
    std::int64_t at_once_ = batch;  // images
    double started_, outside_ = 0;
    std::map<std::string, double> seconds_;
};

Pipeline::Pipeline(const std::string& folder, const Json& options) {
    double started = now();
    engine_ = engine_of(options);
    bundle_ = open_bundle(folder);
    schedule_ = schedule_of(bundle_);
    start(engine_);
    stop_.create();
    conditioner();  // opened now, so that what cannot run says so here
    opening_ = now() - started;
}

Pipeline::~Pipeline() = default;

void Pipeline::warm_up(bool captioner) {
    Turn turn(*this);
    double started = now();
    denoiser(), conditioner(), decode();
    if (captioner) this->captioner();
    opening_ += now() - started;
}

Result Pipeline::generate(const Json& settings, const Progress& progress) {
    Turn turn(*this);
    Job job = resolved(settings);
    Run run(*this, job, progress);
    Result result;
    auto count = static_cast<std::size_t>(job.images);
    std::vector<std::string> prompts(count, job.prompt), empty(count);
    result.negatives.assign(job.runs_dns ? 0 : count, job.negative);
    if (job.runs_dns) run.find_negatives(result);
    if (job.compare) result.plain = run.sample("plain", job.final, prompts, empty, job.seed);
    result.final = run.sample("final", job.final, prompts, result.negatives, job.seed);
    result.request = job.request, result.seconds = run.seconds(), result.inside = *engine_.inside, result.made_with = made_with(), result.warnings = warnings();
    return result;
}

Result Pipeline::find_negatives(const Json& settings, const Progress& progress) {
    Turn turn(*this);
    Job job = resolved(settings);
    if (!job.runs_dns) throw settings_error("DNS finds n*; it takes no negative prompt of your own and cannot be switched off");
    Run run(*this, job, progress);
    Result result;
    run.find_negatives(result);
    result.request = job.request, result.seconds = run.seconds(), result.inside = *engine_.inside, result.made_with = made_with(), result.warnings = warnings();
    return result;
}

std::string Pipeline::caption(const Pixels& image, const Json& settings) {
    Turn turn(*this);
    CaptionSettings how = caption_settings(settings, bundle_);
    return captioner().captions(image, how, stop_, [this](std::int64_t) {
        if (stop_.requested()) throw Error(Code::cancelled, "cancelled while captioning");
    })[0];
}

void Pipeline::end() {
    if (worker_ == std::this_thread::get_id()) throw Error(Code::general, "a pipeline cannot be closed in its own callback; cancel it there");
    ended_ = true;
    stop_.request();
    std::lock_guard wait(busy_);
}

Job Pipeline::resolved(const Json& settings) {
    Job job = resolve(settings, bundle_, schedule_);
    if (job.runs_dns) captioner().check(job.caption);
    return job;
}

Pixels Pipeline::decoded(Buffer& latents) {
    const Shape& shape = latents.shape();  // [places, C, h, w]
    decode().reshape({{"places", shape[0]}, {"batch", shape[0]}, {"height", shape[2]}, {"width", shape[3]}});
    decode().input("latents").copy(latents);
    Ids all(static_cast<std::size_t>(shape[0]));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
    decode().input("decoded").fill(all);
    decode().run(stop_);
    Buffer& image = decode().output("image");
    return {shape[0], image.shape()[1], image.shape()[2], {image.as<std::uint8_t>(), image.as<std::uint8_t>() + image.count()}};
}

Conditioner& Pipeline::conditioner() {
    if (!conditioner_) conditioner_ = std::make_unique<Conditioner>(bundle_, engine_);
    return *conditioner_;
}

Denoiser& Pipeline::denoiser() {
    if (!denoiser_) denoiser_ = std::make_unique<Denoiser>(bundle_, engine_);
    return *denoiser_;
}

Session& Pipeline::decode() {
    if (!decode_) decode_ = std::make_unique<Session>(bundle_, "decode_latents", engine_);
    return *decode_;
}

Captioner& Pipeline::captioner() {
    if (!captioner_) captioner_ = std::make_unique<Captioner>(bundle_, engine_);
    return *captioner_;
}

OrderedJson Pipeline::made_with() const {
    return {{"bundle", bundle_.fingerprint}, {"backend", engine_.backend}, {"precision", nullptr}, {"runs_on", conditioner_->runs_on()}};
}

Names Pipeline::warnings() const {
    Names told;
    for (const auto& [topic, message] : *engine_.warnings) told.push_back(message);
    return told;
}

OrderedJson Pipeline::info() const {
    OrderedJson told = made_with();
    auto pass = [](const PassDefaults& defaults) {
        return OrderedJson{{"sampler", defaults.sampler}, {"steps", defaults.steps}, {"guidance", defaults.guidance}};
    };
    const auto& latents = bundle_.latents;
    std::int64_t scale = latents.vae_scale_factor;
    told["precision"] = bundle_.precision;
    told["name"] = bundle_.name, told["family"] = bundle_.family;
    told["defaults"] = {{"final", pass(bundle_.final)}, {"dns", pass(bundle_.dns)}};
    told["height"] = latents.height * scale, told["width"] = latents.width * scale, told["multiple"] = latents.multiple * scale;
    told["max_height"] = latents.max_height * scale, told["max_width"] = latents.max_width * scale;
    told["samplers"] = sampler_names();
    return told;
}

}  // namespace dnp::core
