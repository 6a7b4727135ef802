#include "denoiser.hpp"

#include <algorithm>
#include <cstring>

#include "noise.hpp"

namespace dnp::core {

Denoiser::Denoiser(const Bundle& bundle, const Engine& engine) : session_(bundle, "denoise", engine), roles_(bundle.guidance.roles) {
    session_.feed_back("state", "next_state");
    session_.feed_back("index", "next_index");
}

// With a row for each sample: how many there are is known when it takes a step.
Sizes Denoiser::sizes_of(const SamplerTable& table, std::int64_t samples, std::int64_t height, std::int64_t width, std::int64_t tokens) const {
    std::int64_t steps = session_.fit("steps", static_cast<std::int64_t>(table.rows.size()));
    std::int64_t noise_steps = session_.fit("noise_steps", std::max<std::int64_t>(1, table.noise_steps));
    return {{"places", samples}, {"rows", samples}, {"steps", steps}, {"noise_steps", noise_steps}, {"height", height}, {"width", width}, {"tokens", tokens}};
}

void Denoiser::check(const SamplerTable& table, std::int64_t samples, std::int64_t height, std::int64_t width, std::int64_t tokens) const {
    session_.check(sizes_of(table, samples, height, width, tokens));
}

void Denoiser::open(const SamplerTable& table, const std::vector<std::int64_t>& seeds, std::int64_t height, std::int64_t width, std::int64_t tokens) {
    auto places = static_cast<std::int64_t>(seeds.size());
    sizes_ = sizes_of(table, places, height, width, tokens);
    session_.reshape(sizes_);
    Buffer &state = session_.input("state"), &noise = session_.input("noise"), &rows = session_.input("table"), &index = session_.input("index");
    for (Buffer* buffer : {&state, &noise, &rows, &index}) buffer->clear();
    std::size_t latent = state.part(2);  // values of [C, h, w]
    for (std::int64_t place = 0; place < places; ++place) {
        // In torch's order: the start, and one more for each call that draws, as one generator per image does.
        TorchNoise generator(seeds[static_cast<std::size_t>(place)]);
        auto start = state.as<float>({place});
        generator.randn(start, latent);
        for (std::size_t i = 0; i < latent; ++i) start[i] *= static_cast<float>(table.init_noise_sigma);
        for (std::int64_t draw = 0; draw < table.noise_steps; ++draw) generator.randn(noise.as<float>({place, draw}), latent);
        std::memcpy(rows.as<float>({place}), table.rows.data(), table.rows.size() * sizeof(Columns));
    }
    table_ = &table, done_ = 0, rows_.clear();
}

void Denoiser::step(Stop& stop) {
    set_rows(table_->roles[done_]);
    session_.run(stop);
    ++done_;
}

// Tells the session whose rows it computes: each place those that its table has a use for.
void Denoiser::set_rows(const std::vector<int>& roles) {
    if (roles == rows_) return;
    std::int64_t places = sizes_["places"];
    Ids row_place, row_role, place_rows(static_cast<std::size_t>(places * roles_));
    for (std::int64_t place = 0; place < places; ++place) {
        auto first = static_cast<std::int64_t>(row_place.size()), last = first + static_cast<std::int64_t>(roles.size()) - 1;
        for (std::int64_t role = 0; role < roles_; ++role) place_rows[static_cast<std::size_t>(place * roles_ + role)] = last;  // unread, of the place itself
        for (int role : roles) {
            place_rows[static_cast<std::size_t>(place * roles_ + role)] = static_cast<std::int64_t>(row_place.size());
            row_place.push_back(place), row_role.push_back(role);
        }
    }
    sizes_["rows"] = static_cast<std::int64_t>(row_place.size());
    session_.reshape(sizes_);
    session_.input("row_place").fill(row_place);
    session_.input("row_role").fill(row_role);
    session_.input("place_rows").fill(place_rows);
    rows_ = roles;
}

Conditioner::Conditioner(const Bundle& bundle, const Engine& engine) : bundle_(bundle), session_(bundle, "encode_text", engine) {
    for (const auto& spec : bundle.text.tokenizers) tokenizers_.emplace_back(bundle, spec);
}

void Conditioner::write(Denoiser& denoiser, std::int64_t role, const std::vector<std::string>& texts, std::int64_t height, std::int64_t width,
                        std::int64_t windows, Stop& stop) {
    std::vector<std::string> different;
    std::vector<std::int64_t> which;  // of them each text is
    for (const auto& text : texts) {
        auto found = std::find(different.begin(), different.end(), text);
        which.push_back(found - different.begin());
        if (found == different.end()) different.push_back(text);
    }
    session_.reshape({{"batch", static_cast<std::int64_t>(different.size())}, {"tokens", windows * bundle_.text.length}});
    auto names = bundle_.text_inputs();
    for (std::size_t i = 0; i < names.size(); ++i) {
        Ids ids;
        for (const auto& text : different) {
            Ids of_text = tokenizers_[i].encode(text, windows);
            ids.insert(ids.end(), of_text.begin(), of_text.end());
        }
        session_.input(names[i]).fill(ids);
    }
    session_.run(stop);
    for (const auto& [name, entry] : bundle_.conditioning) {
        Buffer& bank = denoiser.bank(name);
        std::size_t values = bank.part(2);
        for (std::size_t place = 0; place < texts.size(); ++place) {
            auto target = bank.as<float>({static_cast<std::int64_t>(place), role});
            if (entry.of_size) {
                auto h = static_cast<float>(height), w = static_cast<float>(width);
                const float size[] = {h, w, 0, 0, h, w};
                std::copy_n(size, std::min<std::size_t>(values, 6), target);
            } else if (texts[place].empty() && bundle_.text.empty_is_zeros) {
                std::fill_n(target, values, 0.0f);
            } else {
                std::copy_n(session_.output(name).as<float>({which[place]}), values, target);
            }
        }
    }
}

}  // namespace dnp::core
