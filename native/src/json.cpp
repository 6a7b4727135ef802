#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "unicode.hpp"

namespace dnp::core {

namespace {

constexpr int deepest = 64;

std::size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<std::size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), std::size_t{0});
    for (std::size_t i = 0; i < a.size(); ++i) {
        std::size_t diagonal = row[0]++;
        for (std::size_t j = 0; j < b.size(); ++j) {
            std::size_t replaced = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
        }
    }
    return row.back();
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where, Code code) {
    auto bounded = [&](int depth, Json::parse_event_t, Json&) {
        if (depth > deepest) throw Error(code, where + ": nested too deeply");
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), bounded);
    } catch (const Json::exception& error) {
        // What it quotes of the text may be no UTF-8.
        throw Error(code, cat(where, ": not valid JSON (", encode_utf8(decode_utf8(error.what())), ")"));
    }
}

std::string shown(const Json& value) {
    if (value.is_object()) return cat("an object of ", value.size());
    if (value.is_array()) return cat("a list of ", value.size());
    std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (text.size() <= 60) return text;
    std::size_t end = 57;
    while (end > 0 && (text[end] & 0xC0) == 0x80) --end;  // not within a character
    return text.substr(0, end) + "...";
}

std::string joined(const Names& names) {
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

std::string nearest(const std::string& word, const Names& known) {
    std::string best;
    std::size_t least = word.size() > 100 ? 0 : word.size() / 2 + 1;
    for (const auto& name : known) {
        if (word.size() > 100) break;
        if (std::size_t distance = edit_distance(word, name); distance < least) least = distance, best = name;
    }
    return best.empty() ? "known: " + joined(known) : "did you mean '" + best + "'?";
}

void check_choice(const std::string& name, const Json& value, const Names& known) {
    if (value.is_string() && std::find(known.begin(), known.end(), value.get<std::string>()) != known.end()) return;
    std::string hint = value.is_string() ? nearest(value.get<std::string>(), known) : "known: " + joined(known);
    throw settings_error(name, " ", shown(value), " is unknown; ", hint);
}

bool is_integer(const Json& value, std::int64_t low, std::int64_t high) {
    if (value.is_number_unsigned()) {
        auto number = value.get<std::uint64_t>();
        return high >= 0 && number <= static_cast<std::uint64_t>(high) && (low <= 0 || number >= static_cast<std::uint64_t>(low));
    }
    return value.is_number_integer() && low <= value.get<std::int64_t>() && value.get<std::int64_t>() <= high;
}

bool is_number(const Json& value) { return value.is_number() && std::isfinite(value.get<double>()); }

bool same(const Json& a, const Json& b) {
    auto plain = [](const Json& value) { return value.is_boolean() ? Json(value.get<bool>() ? 1 : 0) : value; };
    return plain(a) == plain(b);
}

bool truthy(const Json& value) {
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_number()) return value.get<double>() != 0;
    if (value.is_string()) return !value.get_ref<const std::string&>().empty();
    return !value.empty();
}

}  // namespace dnp::core
