// Requests on the graphs of a bundle: DNS, caption, regenerate.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "captioner.hpp"
#include "denoiser.hpp"

namespace dnp::core {

struct Step {
    const char* phase;
    std::int64_t index, total, images;
    std::function<Pixels()> preview;  // costs one run of the decoder
};

// Hears every step; false stops the work there.
using Progress = std::function<bool(const Step&)>;

struct Result {
    Pixels final, dns, plain;
    std::vector<std::string> negatives;
    OrderedJson request;
    std::map<std::string, double> seconds;  // by phase
    double inside = 0;                      // seconds of them in the library's runs
    OrderedJson made_with;                  // what ran
    Names warnings;                         // since the pipeline was opened
};

// One request at a time: a call that would have to wait throws. `cancel` may be called by any thread at any time.
class Pipeline {
public:
    Pipeline(const std::string& folder, const Json& options);
    ~Pipeline();

    void warm_up(bool captioner);
    Result generate(const Json& settings, const Progress& progress);
    Result find_negatives(const Json& settings, const Progress& progress);
    std::string caption(const Pixels& image, const Json& settings);
    void cancel() { stop_.request(); }
    void end();  // cancels what runs, waits for it, and lets nothing begin; throws when called by what runs

    OrderedJson info() const;
    OrderedJson made_with() const;

private:
    class Turn;
    class Run;

    Denoiser& denoiser();
    Conditioner& conditioner();
    Session& decode();
    Captioner& captioner();
    Job resolved(const Json& settings);
    Pixels decoded(Buffer& latents);
    Names warnings() const;

    Bundle bundle_;
    Schedule schedule_;
    Engine engine_;
    Stop stop_;
    std::unique_ptr<Conditioner> conditioner_;
    std::unique_ptr<Denoiser> denoiser_;
    std::unique_ptr<Session> decode_;
    std::unique_ptr<Captioner> captioner_;
    std::mutex busy_;
    std::atomic<std::thread::id> worker_{};
    std::atomic<bool> ended_{false};
    double opening_ = 0;  // seconds spent on opening that no request has told of
};

}  // namespace dnp::core
